"""What a quantised cache costs SmolLM2, and that it costs what the format's own formula does.

The measure: perplexity over some English, and in how many percent of the positions the first choice
is that of the model with a plain cache. The judge: transformers in float32, with K and V of every
layer brought to the format and back by its formula. Two right runs round some numbers differently,
and thirty layers later their errors are different draws: beyond 0.3 points, a difference counts
once it is more than two standard deviations of the paired positions. ``-s`` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from vllm import LLM, SamplingParams
from vllm.model_executor.layers import fused_decoder_layer
from vllm.v1.attention.backends.cpu_attn import CPUAttentionImpl
from vllm.v1.attention.backends.torch_ref import TorchRefImpl
from vllm.v1.attention.ops.kv_formats import FORMATS, KVFormat, kv_format
from vllm.v1.attention.ops.turboquant import TURBOQUANT_FORMATS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NAMES = [name for name in (*FORMATS, *TURBOQUANT_FORMATS) if name != "fp8"]
POINTS = 0.3
LENGTH, COUNT = 256, 4
TEXT = Path(__file__).resolve().parents[2] / "docs" / "kv_cache.md"


@dataclass(frozen=True)
class Run:
    """Of each token of the texts but the first ones.

    Attributes:
        log_probs: of the token that stands there, float64.
        agrees: the first choice is the plain model's.
    """

    log_probs: torch.Tensor
    agrees: torch.Tensor

    @property
    def perplexity(self) -> float:
        return float((-self.log_probs.mean()).exp())

    @property
    def agreement(self) -> float:
        """In percent."""
        return 100 * float(self.agrees.double().mean())

    def is_near(self, other: Run) -> bool:
        count = len(self.agrees)
        # Of the mean of paired differences.
        spread = (self.log_probs - other.log_probs).std() / count**0.5
        parted = 100 * (self.agrees != other.agrees).sum().double().sqrt() / count
        return (
            abs(self.perplexity - other.perplexity) <= POINTS + 2 * spread * other.perplexity
            and abs(self.agreement - other.agreement) <= POINTS + 2 * parted
        )

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.3f}, agreement {self.agreement:.2f} %"


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    from vllm.transformers_utils.config import resolve_model
    from vllm.transformers_utils.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(resolve_model("smollm2").model_path)
    ids = tokenizer.encode(TEXT.read_text())
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(COUNT)]


Choices = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities of the texts' tokens after the first, and the first choices instead."""


@pytest.fixture(scope="module")
def simulate(gguf_file: Path, texts: list[list[int]]) -> Callable[[KVFormat | None], Choices]:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()

    def run(fmt: KVFormat | None) -> Choices:
        plain = modeling_llama.eager_attention_forward

        def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if fmt is not None:
                both = fmt.dequantise_kv(fmt.quantise_kv(key, value))
                key, value = both.chunk(2, dim=-1)
            return plain(module, query, key, value, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(modeling_llama, "eager_attention_forward", attend)
            rows = model(torch.tensor(texts)).logits[:, :-1].log_softmax(-1)
        own = torch.tensor(texts)[:, 1:, None]
        return rows.gather(-1, own).flatten(), rows.argmax(-1).flatten()

    return run


@pytest.fixture(scope="module")
def plain_choices(simulate: Callable[[KVFormat | None], Choices]) -> torch.Tensor:
    return simulate(None)[1]


def score(found: Choices, plain_choices: torch.Tensor) -> Run:
    log_probs, choices = found
    return Run(log_probs=log_probs.double(), agrees=choices == plain_choices)


def by_engine(name: str, texts: list[list[int]]) -> Choices:
    with LLM(
        "smollm2", dtype="float32", max_model_len=512, kv_cache_memory_bytes=256 << 20,
        kv_cache_dtype=name, enable_prefix_caching=False,
    ) as llm:  # fmt: skip
        params = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": t} for t in texts], params, use_tqdm=False)
    log_probs, choices = [], []
    for output, text in zip(outputs, texts, strict=True):
        assert output.prompt_logprobs is not None
        for row, token in zip(output.prompt_logprobs[1:], text[1:], strict=True):
            assert row is not None
            log_probs.append(row[token].logprob)
            choices.append(max(row, key=lambda t: row[t].logprob))
    return torch.tensor(log_probs), torch.tensor(choices)


@pytest.fixture
def in_process() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield patch


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_costs_what_its_formula_does(
    name: str,
    texts: list[list[int]],
    simulate: Callable[[KVFormat | None], Choices],
    plain_choices: torch.Tensor,
    in_process: pytest.MonkeyPatch,
) -> None:
    ours = score(by_engine(name, texts), plain_choices)
    theirs = score(simulate(kv_format(name)), plain_choices)
    print(f"\n{name}: engine {ours}; simulation {theirs}")
    assert ours.is_near(theirs)

    # The gate is worth something: values that are stored a quarter too large do not pass.
    def spoil(impl: type) -> None:
        for method in ("do_kv_cache_update", "do_rope_and_kv_cache_update"):
            store = getattr(impl, method)

            def wrong(self: Any, layer: Any, *args: Any, _store: Any = store, **more: Any) -> None:
                at = 1 if _store.__name__ == "do_kv_cache_update" else 2
                spoilt = [arg * 1.25 if i == at else arg for i, arg in enumerate(args)]
                _store(self, layer, *spoilt, **more)

            in_process.setattr(impl, method, wrong)

    spoil(CPUAttentionImpl)
    spoil(TorchRefImpl)
    in_process.setattr(fused_decoder_layer, "_run", lambda *args: None)
    spoilt = score(by_engine(name, texts), plain_choices)
    print(f"{name} with a wrong scale: {spoilt}")
    assert not spoilt.is_near(theirs)
