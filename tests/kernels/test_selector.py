"""Backends decline with reasons; the first that can is taken."""

import pytest
import torch

from vllm.errors import ConfigError
from vllm.platforms import platform_class
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import (
    AttentionBackendEnum,
    register_backend,
    resolve_backend,
)
from vllm.v1.attention.selector import get_attn_backend


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "current_platform", platform_class("cpu")())


def test_the_kernels_are_taken_where_they_can() -> None:
    assert get_attn_backend(64, torch.bfloat16, "auto", 16).get_name() == "CPU_ATTN"
    assert get_attn_backend(256, torch.float32, None, None, has_sink=True).get_name() == "CPU_ATTN"


@pytest.mark.parametrize(
    ("head_size", "dtype", "block_size"),
    [(72 + 4, torch.bfloat16, 16), (264, torch.float16, 16), (64, torch.float32, 24)],
)
def test_the_reference_serves_what_the_kernels_do_not(
    head_size: int, dtype: torch.dtype, block_size: int
) -> None:
    assert get_attn_backend(head_size, dtype, "auto", block_size).get_name() == "TORCH_REF"


def test_where_none_can_every_reason_is_given() -> None:
    with pytest.raises(ConfigError) as caught:
        get_attn_backend(63, torch.int8, "fp8_ds_mla", 8)
    message = str(caught.value)
    assert "CPU_ATTN: head size 63 not supported, dtype torch.int8 not supported" in message
    assert "TORCH_REF: dtype torch.int8 not supported, kv cache dtype fp8_ds_mla" in message


def test_a_named_backend_is_the_only_candidate() -> None:
    chosen = get_attn_backend(64, torch.bfloat16, "auto", 16, backend="torch_ref")
    assert chosen.get_name() == "TORCH_REF"
    with pytest.raises(ConfigError, match="CPU_ATTN: head size 63") as caught:
        get_attn_backend(63, torch.bfloat16, "auto", 16, backend="CPU_ATTN")
    assert "TORCH_REF" not in str(caught.value)


def test_an_unknown_name_is_met_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"one of CPU_ATTN, .*did you mean CPU_ATTN"):
        get_attn_backend(64, torch.bfloat16, "auto", 16, backend="CPU_ATN")


def test_encoder_layers_are_declined() -> None:
    with pytest.raises(ConfigError, match="attention type encoder not supported"):
        get_attn_backend(64, torch.bfloat16, "auto", 16, attn_type="encoder")


def test_latents_have_backends_of_their_own() -> None:
    def chosen(width: int, **options: object) -> str:
        return get_attn_backend(width, torch.float32, "auto", 16, **options).get_name()

    assert chosen(576, use_mla=True) == "CPU_MLA"
    assert chosen(584, use_mla=True) == chosen(45, use_mla=True) == "TORCH_REF_MLA"
    with pytest.raises(ConfigError, match=r"CPU_ATTN: head size 576 .*, MLA not supported"):
        chosen(576, use_mla=True, backend="CPU_ATTN")
    with pytest.raises(ConfigError, match="CPU_MLA: only for MLA"):
        chosen(64, backend="CPU_MLA")


def test_every_registered_path_leads_to_a_backend_of_that_name() -> None:
    for member in AttentionBackendEnum:
        if member.name.startswith(("CPU", "TORCH")):
            assert member.get_class().get_name() == member.name


def test_a_backend_can_be_added_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import registry

    monkeypatch.setattr(registry, "_overrides", {})
    path = AttentionBackendEnum.TORCH_REF.value
    register_backend("mine", path)
    assert AttentionBackendEnum.from_name("MINE") == path
    register_backend("CPU_ATTN", path)
    assert AttentionBackendEnum.CPU_ATTN.get_path() == path
    assert get_attn_backend(64, torch.bfloat16, "auto", 16) is resolve_backend(path)


def test_a_platform_may_insist_on_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    class Insists(platform_class("cpu")):  # type: ignore[misc]
        @classmethod
        def get_attn_backend_cls(cls, *args: object) -> str:
            return AttentionBackendEnum.TORCH_REF.value

    monkeypatch.setattr(selector, "current_platform", Insists())
    assert get_attn_backend(64, torch.bfloat16, "auto", 16).get_name() == "TORCH_REF"


class TestWhatWasMeasured:
    @pytest.fixture
    def order(self, monkeypatch: pytest.MonkeyPatch):
        """Candidates on a GPU of a capability; all can serve, or those named can't."""

        def chosen(major: int, *declining: str) -> str:
            class Candidate:
                def __init__(self, name: str) -> None:
                    self.get_name = lambda: name

                def validate_configuration(self, **_: object) -> list[str]:
                    return ["it is not installed"] if self.get_name() in declining else []

            monkeypatch.setattr(selector, "current_platform", platform_class("cuda")())
            monkeypatch.setattr(selector, "capability", lambda: (major, 0))
            monkeypatch.setattr(selector, "resolve_backend", Candidate)
            monkeypatch.setattr(AttentionBackendEnum, "from_name", staticmethod(str))
            return get_attn_backend(128, torch.bfloat16, "auto", 64).get_name()

        return chosen

    def test_comes_first_on_its_architecture(self, order) -> None:
        assert order(9) == selector.MEASURED[9].backend
        assert order(8) == "TRITON_ATTN"

    def test_and_gives_way_where_it_declines(self, order) -> None:
        assert order(9, selector.MEASURED[9].backend) == "TRITON_ATTN"

    def test_names_backends_that_there_are(self) -> None:
        for measured in selector.MEASURED.values():
            assert measured.backend in AttentionBackendEnum.__members__
