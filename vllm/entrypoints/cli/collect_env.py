"""``vllm collect-env``: versions, CPU, GPU and the kernels' instruction set, for a bug report."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

import vllm.envs as envs
from vllm.errors import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.system import cpu_flags, format_bytes

__all__ = ["make_parser", "run"]

_PACKAGES = (
    "vllm",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "triton",
    "flashinfer-python",
    "flash-attn-4",
    "xgrammar",
    "fastapi",
    "uvicorn",
    "pyzmq",
    "msgspec",
    "nixl",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-non-cuda",
    "ray",
)
_INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)


def make_parser() -> FlexibleArgumentParser:
    """The parser of ``vllm collect-env``, which has no options."""
    return FlexibleArgumentParser(
        prog="vllm collect-env",
        usage="vllm collect-env",
        description="Print what this installation runs on.",
    )


def _system() -> Iterator[tuple[str, str]]:
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "System", platform.platform()
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        yield "C++ compiler", "none found"
    else:
        yield "C++ compiler", _output_of(compiler, "--version").partition("\n")[0]


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _packages() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        points = [f"{point.name} ({point.value})" for point in entry_points(group=group)]
        yield f"plug-ins {group}", ", ".join(points) or "none"


def _device() -> Iterator[tuple[str, str]]:
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform

    yield "CPU", f"{CpuPlatform.get_device_name()}, {os.cpu_count()} cores"
    yield "CPU instruction sets", " ".join(s for s in _INSTRUCTION_SETS if s in cpu_flags()) or "-"
    yield (
        "Memory",
        (
            f"{format_bytes(CpuPlatform.get_device_total_memory())}, "
            f"{format_bytes(CpuPlatform.get_device_available_memory())} available"
        ),
    )
    smi = shutil.which("nvidia-smi")
    gpus = _output_of(smi, "-L").splitlines() if smi else []
    yield "GPUs", "; ".join(gpus) or "none found"
    for name, value in current_platform.describe().items():
        yield f"Platform: {name}", str(value)


def _kernels() -> Iterator[tuple[str, str]]:
    import torch

    from vllm import _custom_ops as ops

    yield "Extension vllm._C", "built" if ops.has_extension() else "not built: PyTorch kernels"
    yield "Kernels' instruction set", ops.isa()
    yield "torch threads", str(torch.get_num_threads())
    yield "torch CUDA", torch.version.cuda or "not built for CUDA"


def _environment() -> Iterator[tuple[str, str]]:
    for name, value in sorted(os.environ.items()):
        if name.startswith(("VLLM_", "OMP_", "CUDA_", "GOMP_", "HF_HUB_")):
            yield name, "(set)" if "KEY" in name or "TOKEN" in name else value
    try:
        envs.validate_environ(fail_on_unknown=True)
    except VLLMValidationError as error:
        for line in str(error).splitlines():
            yield "refused", line


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    sections = (
        ("System", _system),
        ("Packages", _packages),
        ("Device", _device),
        ("Kernels", _kernels),
        ("Environment", _environment),
    )
    for title, facts in sections:
        sys.stdout.write(f"== {title} ==\n")
        for name, value in facts():
            sys.stdout.write(f"{name:<26} {value}\n")
        sys.stdout.write("\n")
    return 0
