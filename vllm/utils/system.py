"""The machine's CPU as the kernel describes it, and sizes in words for people."""

from __future__ import annotations

import functools
from pathlib import Path

__all__ = ["cpu_flags", "format_bytes"]


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets as /proc/cpuinfo names them; empty where that does not exist."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def format_bytes(size: float) -> str:
    """``size`` in GiB or MiB, for people."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB"
