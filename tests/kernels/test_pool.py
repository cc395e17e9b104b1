"""The extension's threads: many callers, forks, and no OpenMP runtime of its own."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vllm import _custom_ops as ops

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")


def run_python(source: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_callers_in_several_threads_get_their_own_results(seed: int) -> None:
    packed = ops.pack_weight(torch.randn(256, 128))
    inputs = [torch.randn(rows, 128) for rows in (1, 3, 20, 64) * 8]
    expected = [ops.linear(x, packed) for x in inputs]
    ops.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as threads:
            for _ in range(20):
                results = list(threads.map(lambda x: ops.linear(x, packed), inputs))
                assert all(map(torch.equal, results, expected))
    finally:
        ops.set_num_threads(2)


def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    run_python(
        """
        import os, torch
        from vllm import _custom_ops as ops
        ops.set_num_threads(2)
        packed, x = ops.pack_weight(torch.randn(512, 64)), torch.randn(9, 64)
        expected = ops.linear(x, packed)
        child = os.fork()
        if child == 0:
            same = all(torch.equal(ops.linear(x, packed), expected) for _ in range(50))
            os._exit(0 if same else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        assert torch.equal(ops.linear(x, packed), expected)
        """
    )


def test_the_process_has_one_openmp_runtime_and_it_is_torchs() -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    maps = run_python(
        """
        import torch
        from vllm import _custom_ops as ops
        ops.set_num_threads(2)
        ops.linear(torch.randn(64, 64), ops.pack_weight(torch.randn(64, 64)))
        torch.randn(1000, 1000) @ torch.randn(1000, 1000)
        print(open("/proc/self/maps").read())
        """
    )
    libraries = {line.split()[-1] for line in maps.splitlines() if line.endswith((".so", ".so.1"))}
    runtimes = {p for p in libraries if any(name in p for name in ("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) <= 1, runtimes


def test_the_extension_alone_needs_no_torch() -> None:
    out = run_python(
        """
        import sys
        from vllm import _C
        _C.set_threads(2)
        print("torch" in sys.modules, _C.isa() in _C.isas(), _C.get_threads())
        """
    )
    assert out.split() == ["False", "True", "2"]


def test_wrong_arguments_are_refused_not_followed() -> None:
    from vllm import _C

    with pytest.raises(TypeError, match="12 arguments expected, 1 given"):
        _C.gemm(1)
    with pytest.raises(TypeError):
        _C.silu_mul("x", 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="no kernels called sse9"):
        ops.set_isa("sse9")
