"""Which device is found, what it tells, and how threads are set up."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import vllm.platforms as platforms
from vllm import _custom_ops as ops
from vllm.errors import ConfigError
from vllm.platforms import PlatformEnum, current_platform, platform_class
from vllm.platforms.cpu import CpuPlatform, parse_core_list, usable_cores


def entry_point(name: str, path: str | None) -> SimpleNamespace:
    return SimpleNamespace(name=name, load=lambda: lambda: path)


def set_plugins(monkeypatch: pytest.MonkeyPatch, **paths: str | None) -> None:
    points = [entry_point(name, path) for name, path in paths.items()]
    monkeypatch.setattr(platforms, "entry_points", lambda group: points)


def test_finding_the_platform_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from vllm.platforms import current_platform as p\n"
        "p.default_block_size, p.worker_cls, p.get_device_total_memory()\n"
        "p.prepare_environment()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_a_plugin_comes_before_the_built_in_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    set_plugins(monkeypatch, absent=None, mine="my.module.MyPlatform")
    assert platforms.resolve_platform_path() == "my.module.MyPlatform"
    monkeypatch.setenv("VLLM_PLUGINS", "absent")
    assert platforms.resolve_platform_path() != "my.module.MyPlatform"


def test_two_plugins_that_claim_the_machine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_plugins(monkeypatch, a="x.A", b="x.B")
    with pytest.raises(ConfigError, match=r"\(a, b\).*VLLM_PLUGINS"):
        platforms.resolve_platform_path()


@pytest.mark.parametrize(
    ("built_for_cuda", "gpus", "expected"),
    [(True, 2, "cuda"), (True, 0, "cpu"), (False, 2, "cpu")],
)
def test_cuda_needs_a_gpu_and_a_torch_for_it(
    monkeypatch: pytest.MonkeyPatch, built_for_cuda: bool, gpus: int, expected: str
) -> None:
    set_plugins(monkeypatch)
    monkeypatch.setattr(platforms, "_torch_is_built_for_cuda", lambda: built_for_cuda)
    monkeypatch.setattr(platforms, "_count_nvidia_gpus", lambda: gpus)
    path = platforms.resolve_platform_path()
    assert path.startswith(f"vllm.platforms.{expected}.")


def test_what_torch_was_built_for_is_read_from_its_files() -> None:
    assert platforms._torch_is_built_for_cuda() == (torch.version.cuda is not None)
    assert platforms._count_nvidia_gpus() == torch.cuda.device_count()


def test_hidden_gpus_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert platforms._count_nvidia_gpus() == 0


def test_an_unknown_device_is_refused() -> None:
    assert platform_class("cpu") is CpuPlatform
    assert platform_class("cuda")._enum is PlatformEnum.CUDA
    with pytest.raises(ConfigError, match="--device must be one of cpu, cuda, not 'tpu'"):
        platform_class("tpu")


def test_the_cpu_tells_its_memory_and_name() -> None:
    total = CpuPlatform.get_device_total_memory()
    assert 0 < CpuPlatform.get_device_available_memory() <= total
    assert CpuPlatform.get_device_name()
    assert CpuPlatform.describe()["kernels"] == ops.isa()
    assert CpuPlatform.get_device_capability() is None
    assert not CpuPlatform.has_device_capability(80)
    assert str(CpuPlatform.set_device(0)) == "cpu"
    assert CpuPlatform.supported_dtypes()[0] is torch.bfloat16


@pytest.mark.parametrize(
    ("text", "cores"), [("0", [0]), ("0-3", [0, 1, 2, 3]), ("4, 0-1", [4, 0, 1])]
)
def test_a_core_list_is_read_in_its_order(text: str, cores: list[int]) -> None:
    assert parse_core_list(text) == cores


@pytest.mark.parametrize("text", ["", "a", "1-", "-2", "1,,2", "0x1"])
def test_a_wrong_core_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="VLLM_CPU_OMP_THREADS_BIND"):
        parse_core_list(text)


@pytest.fixture
def restored_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    affinity = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, affinity)
    ops.set_num_threads(min(2, len(affinity)))


def test_threads_are_the_usable_cores_unless_told(
    restored_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CpuPlatform.init_threads() == usable_cores()
    assert CpuPlatform.init_threads(1, 1000) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert CpuPlatform.init_threads() == 3
    if ops.has_extension():
        from vllm import _C

        assert _C.get_threads() == 3
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("value", ["0", "many", "-1"])
def test_a_wrong_thread_count_is_refused(
    restored_threads: None, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS"):
        CpuPlatform.init_threads()


def test_threads_are_bound_to_the_cores_named(
    restored_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = min(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{core}|{core}")
    assert CpuPlatform.init_threads(1, 2) == 1
    assert os.sched_getaffinity(0) == {core}
    with pytest.raises(ConfigError, match="2 core lists for 3 ranks"):
        CpuPlatform.init_threads(0, 3)


def test_cores_that_are_not_there_are_refused(
    restored_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0,4095")
    with pytest.raises(ConfigError, match=r"names cores \[4095\]"):
        CpuPlatform.init_threads()


def test_torchs_threads_do_not_spin_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    CpuPlatform.prepare_environment()
    assert os.environ["GOMP_SPINCOUNT"] == "7", "the user's choice stands"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    CpuPlatform.prepare_environment()
    assert int(os.environ.pop("GOMP_SPINCOUNT")) < 10_000


def test_the_current_platform_is_one_object() -> None:
    assert current_platform is platforms.current_platform
    with pytest.raises(AttributeError):
        platforms.no_such_thing  # noqa: B018
