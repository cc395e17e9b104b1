"""Backends over libraries: what they hand over, what they decline, and where ours goes on.

The libraries are stand-ins with the real ones' signatures and checks (``library_stand_ins``);
nothing here shows that a library's kernel works.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.kernels import library_stand_ins
from tests.kernels.library_step import Step
from tests.kernels.test_triton_mla import V2, Call
from vllm.errors import ConfigError
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends import flash_attn, flashinfer, libraries, rocm_aiter
from vllm.v1.attention.backends.mla import flash_attn_mla, flashinfer_mla
from vllm.v1.attention.backends.registry import AttentionBackendEnum

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="stand-ins compute on the CPU, beside the interpreter"
)

PAGE = 16
MIXED = ((40, 20), (9, 1), (1, 1), (33, 2), (17, 17))
DECODES = ((40, 1), (9, 1), (33, 1))
FRESH = ((20, 20), (33, 33), (5, 5))


@pytest.fixture(autouse=True)
def _libraries(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[None]:
    library_stand_ins.install(monkeypatch)
    monkeypatch.setattr(flashinfer, "_WORKSPACE_BYTES", 16)
    yield
    libraries.library.cache_clear()


FEATURES = [
    ({}, {}),
    ({"sliding_window": 9}, {"sliding_window": 9}),
    ({"logits_soft_cap": 5.0}, {"logits_soft_cap": 5.0}),
]
IDS = ["plain", "window", "soft cap"]
LIBRARIES = [
    flash_attn.FlashAttentionBackend,
    flashinfer.FlashInferBackend,
    rocm_aiter.AiterFlashAttentionBackend,
    rocm_aiter.AiterUnifiedAttentionBackend,
]


@pytest.mark.parametrize("backend", LIBRARIES, ids=lambda backend: backend.get_name())
@pytest.mark.parametrize(
    ("lengths", "order"),
    [(MIXED, "LBHNC"), (DECODES, "LBNHC"), (FRESH, "BHLNC"), (MIXED, "BLHNC")],
    ids=["mixed", "decode", "fresh", "mixed, block outermost"],
)
def test_a_step_over_any_layout(backend, lengths, order) -> None:
    assert Step(backend, lengths, order).error() < 3e-3


@pytest.mark.parametrize("backend", LIBRARIES, ids=lambda backend: backend.get_name())
@pytest.mark.parametrize(("options", "features"), FEATURES[1:], ids=IDS[1:])
def test_windows_and_soft_caps(backend, options, features) -> None:
    assert Step(backend, MIXED, options=options).error(**features) < 3e-3


def on_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flash_attn, flashinfer, flash_attn_mla):
        monkeypatch.setattr(module, "capability", lambda: (10, 0))


class TestFlashAttention:
    backend = flash_attn.FlashAttentionBackend

    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []
        interface = libraries.library("flash_attn.cute.interface")

        def record(*arguments: Any, **options: Any) -> Any:
            seen.append(options)
            return library_stand_ins._flash_attn_fwd(*arguments, **options)

        monkeypatch.setattr(interface, "_flash_attn_fwd", record)
        return seen

    def test_decodes_are_ours_where_the_library_cannot_split_them(self, monkeypatch) -> None:
        calls = self.calls(monkeypatch)
        assert Step(self.backend, DECODES).error() < 3e-3
        assert not calls
        assert Step(self.backend, MIXED).error() < 3e-3
        (call,) = calls
        assert call["seqused_q"].tolist() == [20, 0, 0, 2, 17] and call["num_splits"] == 1

    def test_and_the_librarys_where_it_can(self, monkeypatch) -> None:
        on_blackwell(monkeypatch)
        calls = self.calls(monkeypatch)
        assert Step(self.backend, DECODES).error() < 3e-3
        assert Step(self.backend, MIXED).error() < 3e-3
        assert [(call["seqused_q"], call["num_splits"]) for call in calls] == [(None, 0)] * 2

    def test_sinks_reach_both(self) -> None:
        sinks = torch.randn(4)
        step = Step(self.backend, MIXED, options={"sinks": sinks})
        assert step.error(sinks=sinks) < 3e-3

    def test_encoders_see_everything(self) -> None:
        assert Step(self.backend, FRESH, causal=False).error() < 3e-3

    def test_values_of_another_width(self) -> None:
        backend = flash_attn.FlashAttentionDiffKVBackend
        assert Step(backend, MIXED, "BLHNC", widths=(48, 32)).error() < 3e-3
        assert Step(backend, DECODES, widths=(24, 40)).error() < 3e-3

    def test_what_they_decline(self, monkeypatch) -> None:
        wanted = {"head_size": 128, "dtype": torch.bfloat16, "block_size": 64}
        monkeypatch.setattr(flash_attn, "why_missing", lambda module: [])
        assert "capability 9.0" in self.backend.validate_configuration(**wanted)[0]
        monkeypatch.setattr(flash_attn, "capability", lambda: (9, 0))
        check = self.backend.validate_configuration
        assert check(**wanted) == []
        assert check(**wanted, has_alibi=True) == ["ALiBi not supported"]
        assert check(**wanted, has_sink=True) == []
        assert "fp8 not supported" in check(**wanted, kv_cache_dtype="fp8")[0]
        assert "head size 264" in check(**wanted | {"head_size": 264})[0]
        assert "block size 40" in check(**wanted | {"block_size": 40})[0]
        assert "values of 64" in check(**wanted, head_size_v=64)[0]
        different = flash_attn.FlashAttentionDiffKVBackend.validate_configuration
        assert different(**wanted | {"head_size": 192}, head_size_v=128) == []
        monkeypatch.setattr(flash_attn, "capability", lambda: (10, 0))
        assert "head size 192" in check(**wanted | {"head_size": 192})[0]
        assert different(**wanted | {"head_size": 192}, head_size_v=128) == []
        assert "values of 64" in different(**wanted | {"head_size": 192}, head_size_v=64)[0]


class TestFlashInfer:
    backend = flashinfer.FlashInferBackend

    @pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e5m2"])
    @pytest.mark.parametrize("lengths", [DECODES, MIXED], ids=["decode", "mixed"])
    def test_caches_of_single_bytes(self, cache_dtype: str, lengths) -> None:
        assert Step(self.backend, lengths, cache_dtype=cache_dtype).error() < 3e-3

    @pytest.mark.parametrize("lengths", [DECODES, MIXED[::2]], ids=["decode", "mixed"])
    def test_a_shared_prefix_is_read_by_a_level_of_its_own(self, lengths, monkeypatch) -> None:
        monkeypatch.setattr(flashinfer, "prefix_worth_sharing", lambda prefix, *_: prefix)
        lengths = tuple((n + 2 * PAGE, new) for n, new in lengths)
        step = Step(self.backend, lengths, shared_pages=2)
        assert step.error() < 3e-3
        ((part,),) = step.metadata.planned.values()
        assert part.is_cascade

    def test_layers_of_one_kind_share_a_plan(self) -> None:
        step = Step(self.backend, MIXED)
        step.run()
        planned = dict(step.metadata.planned)
        out = torch.empty_like(step.query)
        step.impl.forward(step.layer, step.query, None, None, step.cache, step.metadata, out)
        assert step.metadata.planned == planned and len(planned) == 1

    @pytest.mark.parametrize("kv_heads", [1, 2])
    @pytest.mark.parametrize("lengths", [DECODES, MIXED], ids=["decode", "mixed"])
    @pytest.mark.parametrize("order", ["LBNHC", "BHLNC"])
    def test_axes_of_length_one_are_made_canonical(
        self, monkeypatch, lengths, order, kv_heads
    ) -> None:
        on_blackwell(monkeypatch)
        sinks = torch.randn(2 * kv_heads)
        step = Step(self.backend, lengths, order, kv_heads, options={"sinks": sinks})
        assert step.error(sinks=sinks) < 3e-3

    def test_what_it_declines(self, monkeypatch) -> None:
        wanted = {"head_size": 128, "dtype": torch.bfloat16, "block_size": 64}
        check = self.backend.validate_configuration
        monkeypatch.setattr(flashinfer, "why_missing", lambda module: [])
        assert "capability 8.0" in check(**wanted)[0]
        monkeypatch.setattr(flashinfer, "capability", lambda: (9, 0))
        assert check(**wanted, kv_cache_dtype="fp8_e4m3") == []
        assert check(**wanted, has_sink=True) == ["attention sinks not supported"]
        assert check(**wanted, has_alibi=True) == ["ALiBi not supported"]
        assert "int8_per_token_head" in check(**wanted, kv_cache_dtype="int8_per_token_head")[0]
        assert "head size 80" in check(**wanted | {"head_size": 80})[0]
        assert "dtype" in check(**wanted, kv_cache_dtype="float16")[0]
        monkeypatch.setattr(flashinfer, "capability", lambda: (10, 0))
        assert check(**wanted, has_sink=True) == []


class LatentCall(Call):
    def __init__(self, backend: type[AttentionBackend], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.impl = backend.get_impl_cls()(self.heads, self.cache.shape[2], self.scale, 1)
        page = self.cache.shape[1]
        for request, (length, new) in enumerate(self.lengths):
            if length % page and length % page > new:
                self.cache[self.table[request, length // page], length % page :] = 0


@pytest.mark.parametrize(
    "backend",
    [flashinfer_mla.FlashInferMLABackend, flash_attn_mla.FlashAttentionMLABackend],
    ids=lambda backend: backend.get_name(),
)
@pytest.mark.parametrize(
    "lengths",
    [((40, 1), (9, 1), (64, 1)), ((70, 60), (33, 1), (20, 3)), ((67, 3), (130, 4))],
    ids=["decode", "mixed", "a few tokens that begin a block"],
)
def test_latents_of_deepseek(backend, lengths, monkeypatch) -> None:
    flashinfer_mla._wrapper.cache_clear()
    monkeypatch.setattr(flashinfer_mla, "_WORKSPACE_BYTES", 16)
    call = LatentCall(backend, lengths, V2, heads=2, page=64, pad=64, dtype=torch.float16)
    assert call.error() < 3e-3
    flashinfer_mla._wrapper.cache_clear()


def test_latents_of_other_widths_are_declined(monkeypatch) -> None:
    for module, backend in (
        (flashinfer_mla, flashinfer_mla.FlashInferMLABackend),
        (flash_attn_mla, flash_attn_mla.FlashAttentionMLABackend),
    ):
        monkeypatch.setattr(module, "why_missing", lambda module: [])
        monkeypatch.setattr(module, "capability", lambda: (10, 0))
        wanted = {"head_size": 576, "dtype": torch.bfloat16, "use_mla": True, "block_size": 64}
        assert backend.validate_configuration(**wanted) == []
        (reason,) = backend.validate_configuration(**wanted | {"head_size": 320})
        assert reason == "head size 320 not supported"
    monkeypatch.setattr(flash_attn_mla, "capability", lambda: (9, 0))
    (reason,) = flash_attn_mla.FlashAttentionMLABackend.validate_configuration(**wanted)
    assert "capability 10 or 11" in reason


def test_alibi_reaches_aiter() -> None:
    slopes = torch.rand(4)
    for backend in LIBRARIES[2:]:
        for lengths in (FRESH, MIXED):
            step = Step(backend, lengths, options={"alibi_slopes": slopes})
            assert step.error(alibi_slopes=slopes) < 3e-3


def test_a_library_that_is_not_there_is_named_with_its_package(monkeypatch) -> None:
    monkeypatch.undo()
    libraries.library.cache_clear()
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    for name in ("FLASH_ATTN", "FLASHINFER", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN"):
        backend = AttentionBackendEnum[name].get_class()
        reasons = backend.validate_configuration(head_size=64, dtype=torch.float16)
        assert any("is not installed (pip install" in reason for reason in reasons)
    with pytest.raises(ConfigError, match="pip install flash-attn-4"):
        libraries.library("flash_attn.cute.interface")
    with pytest.raises(ConfigError, match="pip install flashinfer-python"):
        libraries.library("flashinfer")


def test_every_name_leads_to_its_backend() -> None:
    for member in AttentionBackendEnum:
        assert member.get_class().get_name() == member.name
