"""Builds ``vllm/_C`` from ``csrc/`` when a C++ compiler is there; see pyproject.toml for the rest.

The kernels are compiled once per instruction set and chosen when they run, so a build works on
every processor of its architecture. Neither torch nor an OpenMP runtime is linked: the module
takes addresses, and brings its own threads. Where it cannot be built the package is installed
without it and runs on PyTorch's kernels.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = Path("csrc/cpu")
SHARED = ("decoder_layer", "dispatch", "module", "moves", "pool", "scratch", "sha256")
PER_ISA = ("attention", "elementwise", "gemm", "linear_attention", "moe", "state", "streams")
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]


def isa_flags() -> dict[str, list[str]]:
    """Namespace of each copy of the kernels -> its compiler flags."""
    flags: dict[str, list[str]] = {"generic": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
    return flags


class BuildKernels(build_ext):
    """Compiles each source by itself, several at a time, skipping what is up to date."""

    def run(self) -> None:
        try:
            super().run()
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"vllm: the CPU kernels could not be built ({error}); "
                "going on with PyTorch's. Set CXX to a C++20 compiler to build them.",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        """An editable install takes the module only if it was built."""
        if Path(self.get_ext_fullpath("vllm._C")).is_file() or any(
            Path(self.build_lib).glob("vllm/_C*.so")
        ):
            super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX", "c++")
        objects_dir = Path(self.build_temp) / "cpu"
        objects_dir.mkdir(parents=True, exist_ok=True)
        include = [f"-I{path}" for path in self.compiler.include_dirs]
        headers = max(path.stat().st_mtime for path in (ROOT / CPU).glob("*.h"))
        jobs: list[tuple[Path, Path, list[str]]] = [
            (CPU / f"{name}.cpp", objects_dir / f"{name}.o", include) for name in SHARED
        ]
        for isa, flags in isa_flags().items():
            jobs += [
                (
                    CPU / f"{name}.cpp",
                    objects_dir / f"{name}.{isa}.o",
                    [*flags, f"-DVLLM_ISA={isa}"],
                )
                for name in PER_ISA
            ]

        def compile_one(job: tuple[Path, Path, list[str]]) -> None:
            source, target, flags = job
            newest = max((ROOT / source).stat().st_mtime, headers, Path(__file__).stat().st_mtime)
            if target.is_file() and target.stat().st_mtime > newest and not self.force:
                return
            # GCC 12 takes the "undefined" vectors of its own intrinsics for mistakes.
            quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
            command = [compiler, *FLAGS, *quiet, *flags, "-c", str(source), "-o", str(target)]
            subprocess.run(command, cwd=ROOT, check=True)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(compile_one, jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        # Linked beside the old one and renamed: a running server keeps the file that it has open.
        fresh = target.with_suffix(".new")
        objects = [str(path) for _, path, _ in jobs]
        link = [compiler, "-shared", "-pthread", *undefined, *objects, "-o", str(fresh)]
        subprocess.run(link, cwd=ROOT, check=True)
        fresh.replace(target)


setup(
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    ext_modules=[Extension("vllm._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildKernels},
)
