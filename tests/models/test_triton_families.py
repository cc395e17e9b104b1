"""Models with latents and states by Triton's kernels, in the interpreter, against transformers.

What a GPU runs (``tests/gpu/test_families_on_gpu.py``), held to the same tokens where none is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import parity
from tests.models.checkpoints import make_hf_model, save
from tests.models.linear_attention_checkpoints import make_linear_model
from tests.models.state_checkpoints import make_state_model
from vllm import SamplingParams, _linear_attention_ops, _state_ops, _triton_state_ops
from vllm.model_executor.layers.attention.mla_attention import LatentUpProjection
from vllm.platforms.cpu import CpuPlatform

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU runs the kernels themselves"
)

LATENTS = ("deepseek_v2", "deepseek_v3", "kimi_linear")
STATES = ("mamba2", "bamba")
MODELS = [
    "deepseek_v3",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("deepseek_v2", *STATES, "qwen3_next", "lfm2", "kimi_linear", "minimax")
    ),
]
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], list(range(40))]


@pytest.fixture
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, what a GPU would choose."""

    def norm(
        x: torch.Tensor,
        gate: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        num_groups: int = 1,
        norm_before_gate: bool = False,
    ) -> torch.Tensor:
        return _triton_state_ops.gated_rms_norm(x, gate, weight, eps, num_groups, norm_before_gate)

    for name in ("causal_conv1d", "selective_scan", "ssd_scan"):
        monkeypatch.setattr(_state_ops, name, getattr(_triton_state_ops, name))
    monkeypatch.setattr(_state_ops, "gated_rms_norm", norm)
    monkeypatch.setattr(_linear_attention_ops, "_triton_takes", lambda *_: True)
    # Weights are packed for the CPU's products only.
    monkeypatch.setattr(
        LatentUpProjection,
        "process_weights_after_loading",
        lambda self: self._split(self.weight.data),
    )
    monkeypatch.setattr(CpuPlatform, "attention_backend_priority", ("CPU_ATTN", "TRITON_MLA"))
    monkeypatch.setattr(
        parity,
        "GREEDY",
        SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=-1),
    )


def make(model_type: str) -> Any:
    if model_type.startswith("deepseek"):
        return make_hf_model(model_type, max_position_embeddings=512)
    return (make_state_model if model_type in STATES else make_linear_model)(model_type)


@pytest.mark.usefixtures("_by_triton")
@pytest.mark.parametrize("model_type", MODELS)
def test_logits_are_those_of_transformers(model_type: str, tmp_path) -> None:
    hf = make(model_type)
    save(hf, tmp_path)
    with parity.engine(tmp_path, block_size=32) as llm:
        runner = llm.llm_engine.client._core.executor.worker.model_runner
        backends = {layer.get_attn_backend().get_name() for layer in runner.layers.values()}
        assert ("TRITON_MLA" in backends) == (model_type in LATENTS)
        got = parity.generate(llm, PROMPTS)
    for prompt, tokens, logits in zip(got.prompts, got.tokens, got.logits, strict=True):
        with torch.inference_mode():
            whole = hf(torch.tensor([prompt + tokens[:-1]])).logits[0, -len(tokens) :]
        torch.testing.assert_close(logits, whole, atol=parity.TOLERANCE, rtol=parity.TOLERANCE)
        assert whole.argmax(-1).tolist() == tokens
