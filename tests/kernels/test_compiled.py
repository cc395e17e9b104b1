"""What kernels become on Hopper: nothing spills more than is known, no descriptor is lost."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kernels"

# Bytes; every other kernel spills nothing. Prompts take all registers there are.
SPILLED = {
    "_prefill_kernel": 640,
    "wide_absorbed_kernel": 160,
    "_chunks_kernel": 128,
    "_truncate_kernel": 64,
    "_ssd_kernel": 32,
}


@pytest.fixture(scope="module")
def sass() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_sass", FOLDER / "sass.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def listing(*lines: str) -> str:
    return "\n".join(
        f"        /*{16 * i:04x}*/                   {x} ;" for i, x in enumerate(lines)
    )


# The first product takes the pair UR6, the second the pair UR18: 64 units of 16 bytes further on.
BASE = (
    "UIADD3 UR14, UR36, 0x4000, URZ", "USHF.R.U32.HI UR6, URZ, 0x4, UR14",
    "USGXT.U32 UR6, UR6, 0xe", "UMOV UR7, URZ",
)  # fmt: skip
ADDED = (
    "UIADD3 UR18, UP1, UR18, 0x40, URZ", "UIADD3.X UR19, UR19, -0x7fffffe0, URZ, UP1, !UPT",
    "UMOV UR7, 0x80000020",
    "HGMMA.64x32x16.F32 R104, R24, gdesc[UR4].tnspB, R104",
    "HGMMA.64x32x16.F32 R104, R28, gdesc[UR16].tnspB, R104", "EXIT",
)  # fmt: skip
POSITION = ("R2UR UR19, R4", "UIADD3 UR18, UR16, 0x1, URZ")
START = ("S2UR UR36, SR_CgaCtaId", "S2UR UR16, SR_CTAID.Y", "LDG.E R4, desc[UR40][R2.64]")


def test_descriptors_of_one_base_are_right(sass: ModuleType) -> None:
    copies = ("UMOV UR18, UR6", "UMOV UR19, UR7")
    text = listing(*START, *POSITION, *BASE, *copies, *ADDED)
    assert sass.listed_descriptors(text) == (2, [])


def test_a_lost_copy_is_found(sass: ModuleType) -> None:
    """As ptxas 12.8 assembled prompts over TurboQuant slots with heads of 32."""
    count, wrong = sass.listed_descriptors(listing(*START, *POSITION, *BASE, *ADDED))
    assert (count, len(wrong)) == (2, 1)
    assert "LDG.E" in wrong[0] and "S2UR SR_CTAID.Y" in wrong[0]


def test_swaps_spills_and_loops_are_followed(sass: ModuleType) -> None:
    swapped = (
        # The halves in each other's place, exchanged without a third register.
        "UMOV UR19, UR6", "UMOV UR18, URZ",
        "ULOP3.LUT UR19, UR19, UR18, URZ, 0x3c, !UPT",
        "ULOP3.LUT UR18, UR19, UR18, URZ, 0x3c, !UPT",
        "ULOP3.LUT UR19, UR19, UR18, URZ, 0x3c, !UPT",
        # To the stack and back, around a loop.
        "IMAD.U32 R10, RZ, RZ, UR18", "IMAD.U32 R11, RZ, RZ, UR19", "STL.64 [R1+0x8], R10",
    )  # fmt: skip
    reload = ("LDL.64 R20, [R1+0x8]", "R2UR UR18, R20", "R2UR UR19, R21")
    before = len(START) + len(BASE) + len(swapped)
    loop = (*reload, *ADDED[:-1], f"@P0 BRA 0x{16 * before:x}", "EXIT")
    assert sass.listed_descriptors(listing(*START, *BASE, *swapped, *loop)) == (2, [])
    # Something else in one of the two words.
    other = (*swapped, "STL [R1+0xc], R4")
    count, wrong = sass.listed_descriptors(listing(*START, *BASE, *other, *reload, *ADDED))
    assert (count, len(wrong)) == (2, 1)


def rows(tmp_path: Path, only: str) -> list[dict[str, Any]]:
    output = tmp_path / "rows.json"
    command = [sys.executable, str(FOLDER / "compiled.py"), "--only", only, "--output", str(output)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(output.read_text())["rows"]


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    found = rows(tmp_path, "")
    assert len(found) > 120
    assert sum(row["descriptors"] for row in found) > 2000
    assert not [row for row in found if row["wrong"]]
    over = [row for row in found if row["spilled"] > SPILLED.get(row["kernel"], 0)]
    assert not over
    assert not [row for row in found if row["shared"] > 232448]


@pytest.mark.slow
def test_steps_of_one_token_leave_room_for_others(tmp_path: Path) -> None:
    """Decodes wait for memory: they need several programs on a multiprocessor."""
    found = rows(tmp_path, "^(Qwen3-0.6B|Llama-3.1-8B) (decode, page|store)")
    for row in found:
        assert row["registers"] <= (128 if row["kernel"] == "_decode_kernel" else 64), row
