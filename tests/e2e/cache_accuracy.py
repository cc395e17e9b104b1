"""What a model says over a quantised cache, by the engine and by a simulation in float32.

The simulation is transformers in float32, with K and V of every layer brought to the format and
back by its formula. Left to themselves two right runs part: float32 rounds sums in the order they
come, a number next to a threshold of the format falls on the other side, and by the time thirty
layers have read it half of what the format costs is another draw of the same error. So the
simulation quantises the very keys and values that the engine was about to store, which it finds to
be its own but for rounding (``Followed.deviation``); all else, it computes itself. Then
log-probabilities are equal position by position, and a few hundred positions tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from vllm import LLM, SamplingParams
from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales
from vllm.v1.worker.kv_scales import kv_scales_of, restore_kv_scales

__all__ = [
    "Followed",
    "Recorder",
    "Run",
    "Simulation",
    "ask",
    "observed_by",
    "scales_of",
    "set_scales",
]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Of each token of the texts but the first ones.

    Attributes:
        log_probs: of the token that stands there, float64.
        choices: the likeliest tokens instead.
    """

    log_probs: torch.Tensor
    choices: torch.Tensor

    @property
    def perplexity(self) -> float:
        return float((-self.log_probs.mean()).exp())

    def agreement(self, plain: Run) -> float:
        """In how many percent of the positions the choice is that of ``plain``."""
        return 100 * float((self.choices == plain.choices).double().mean())

    def describe(self, plain: Run) -> str:
        return f"perplexity {self.perplexity:.3f}, top-1 agreement {self.agreement(plain):.2f} %"


@dataclass
class Recorder:
    """A ``KVScaleFinder`` that changes no scale: keeps what layers are about to store.

    Attributes:
        factor: what values are multiplied by once they are noted: 1, or an error.
        stored: by layer, keys and values of each step, ``(T, K, D)``.
    """

    factor: float = 1.0
    stored: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)

    def observe(self, layer: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        steps = self.stored.setdefault(layer.layer_name, [])
        steps.append((key.detach().clone(), value.detach().clone()))
        if self.factor != 1:
            value *= self.factor

    def of_layer(self, index: int, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``(texts, K, T, D)`` of a layer; ``texts`` (texts, T) were one step."""
        (step,) = self.stored[f"model.layers.{index}.self_attn.attn"]
        key, value = (x.unflatten(0, texts.shape).transpose(1, 2) for x in step)
        return key, value


def _finder_of(worker: Any, finder: Recorder | None) -> None:
    worker.model_runner._scale_finder = finder


@contextmanager
def observed_by(llm: LLM, recorder: Recorder) -> Iterator[None]:
    """Layers of an engine in this process show ``recorder`` what they store."""
    llm.collective_rpc(_finder_of, args=(recorder,))
    yield
    llm.collective_rpc(_finder_of, args=(None,))


def _scales_of_worker(worker: Any) -> dict[str, tuple[float, float]]:
    return kv_scales_of(worker.model_runner.layers)


def scales_of(llm: LLM) -> list[SideScales]:
    """By layer, of an engine in this process."""
    (scales,) = llm.collective_rpc(_scales_of_worker)
    return [
        SideScales(k=scales[name][0], v=scales[name][1])
        for name in sorted(scales, key=lambda name: int(name.split(".")[2]))
    ]


def _set_scales_of_worker(worker: Any, scales: dict[str, tuple[float, float]]) -> None:
    restore_kv_scales(worker.model_runner.layers, scales)


def set_scales(llm: LLM, of_layer: Callable[[int], tuple[float, float]]) -> None:
    """Scales of K and V by the number of a layer, before the engine has served anything."""
    (scales,) = llm.collective_rpc(_scales_of_worker)
    changed = {name: of_layer(int(name.split(".")[2])) for name in scales}
    llm.collective_rpc(_set_scales_of_worker, args=(changed,))


def ask(llm: LLM, texts: torch.Tensor) -> Run:
    """The engine's answer for token ids ``(texts, T)``, all in one step."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
    prompts = [{"prompt_token_ids": text} for text in texts.tolist()]
    log_probs, choices = [], []
    for output in llm.generate(prompts, params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        for row, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True):
            assert row is not None
            log_probs.append(row[token].logprob)
            choices.append(max(row, key=lambda t: row[t].logprob))
    return Run(
        log_probs=torch.tensor(log_probs, dtype=torch.float64), choices=torch.tensor(choices)
    )


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A simulation that took its keys and values from an engine.

    Attributes:
        deviation: of these from its own, the largest of any layer, relative.
    """

    run: Run
    deviation: float


class Simulation:
    """transformers in float32, with its attention in plain steps."""

    def __init__(self, model: LlamaForCausalLM, texts: torch.Tensor) -> None:
        self.texts = texts
        self._model = model
        model.set_attn_implementation("eager")

    def free(
        self,
        fmt: KVFormat | None,
        scales: list[SideScales] | None = None,
        skipped: Collection[int] = (),
    ) -> Run:
        """By its own keys and values; ``fmt`` None, and layers ``skipped``, leave them alone."""

        def store(index: int, key: torch.Tensor, value: torch.Tensor) -> Any:
            if fmt is None or index in skipped:
                return key, value
            return _there_and_back(fmt, scales, index, key, value)

        return self._run(store)

    def following(self, recorder: Recorder, fmt: KVFormat, scales: list[SideScales]) -> Followed:
        """By the keys and values that an engine was about to store."""
        deviation = 0.0

        def store(index: int, key: torch.Tensor, value: torch.Tensor) -> Any:
            nonlocal deviation
            theirs = recorder.of_layer(index, self.texts)
            for own, other in zip((key, value), theirs, strict=True):
                deviation = max(deviation, float((own - other).norm() / own.norm()))
            return _there_and_back(fmt, scales, index, *theirs)

        run = self._run(store)
        return Followed(run=run, deviation=deviation)

    def _run(self, store: Any) -> Run:
        plain = modeling_llama.eager_attention_forward

        def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            key, value = store(module.layer_idx, key, value)
            return plain(module, query, key, value, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(modeling_llama, "eager_attention_forward", attend)
            ids = self.texts.to(self._model.device)
            log_probs, choices = [], []
            hidden = self._model.model(ids).last_hidden_state
            for states, text in zip(hidden[:, :-1], ids[:, 1:], strict=True):
                rows = self._model.lm_head(states).log_softmax(-1)
                log_probs.append(rows.gather(-1, text[:, None]).flatten().double().cpu())
                choices.append(rows.argmax(-1).cpu())
        return Run(log_probs=torch.cat(log_probs), choices=torch.cat(choices))


def _there_and_back(
    fmt: KVFormat,
    scales: list[SideScales] | None,
    index: int,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read of keys and values ``(..., D)`` that are stored."""
    of_layer = None if scales is None else scales[index]
    both = fmt.dequantise_kv(fmt.quantise_kv(key, value, of_layer), of_layer)
    keys, values = both.chunk(2, dim=-1)
    return keys, values
