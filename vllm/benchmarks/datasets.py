"""Prompts for the benchmarks: random tokens, a ShareGPT file, a JSON Lines file.

Knows tokenizers as something with ``encode`` and ``decode``; nothing of servers or engines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from vllm.benchmarks.args import DatasetArgs
from vllm.errors import ConfigError

__all__ = ["Sample", "make_samples", "random_samples"]

_ROUND_TRIPS = 10
# ShareGPT conversations outside these bounds tell nothing: too short, or longer than most models.
_MIN_TOKENS = 4
_MAX_PROMPT_TOKENS = 1024
_MAX_TOTAL_TOKENS = 2048


class Tokenizer(Protocol):
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request to come."""

    prompt: str
    prompt_len: int
    """Tokens of ``prompt`` as the tokenizer counts them, special tokens included."""
    output_len: int


def make_samples(args: DatasetArgs, tokenizer: Tokenizer, seed: int) -> list[Sample]:
    """``args.num_prompts`` samples of the chosen dataset.

    Raises:
        ConfigError: the dataset's file is missing, not what it should be, or has no usable prompt.
    """
    args = _with_common_lengths(args)
    if args.dataset_name == "prefix_repetition":
        return _prefix_repetition(args, tokenizer, seed)
    if args.dataset_name == "random":
        return random_samples(
            tokenizer,
            count=args.num_prompts,
            input_len=args.random_input_len,
            output_len=args.random_output_len,
            range_ratio=args.random_range_ratio,
            prefix_len=args.random_prefix_len,
            seed=seed,
        )
    if args.dataset_path is None:
        raise ConfigError(
            f"--dataset-name {args.dataset_name} needs --dataset-path", parameter="dataset_path"
        )
    read = _read_sharegpt if args.dataset_name == "sharegpt" else _read_custom
    samples = read(args, args.dataset_path, tokenizer)
    if not samples:
        raise ConfigError(
            f"--dataset-path {args.dataset_path} has no usable prompt",
            parameter="dataset_path",
            value=args.dataset_path,
        )
    generator = np.random.default_rng(seed)
    order = np.arange(len(samples)) if args.disable_shuffle else generator.permutation(len(samples))
    return [samples[order[i % len(order)]] for i in range(args.num_prompts)]


def _with_common_lengths(args: DatasetArgs) -> DatasetArgs:
    """``args`` with --input-len and --output-len in the place of each dataset's own."""
    return replace(
        args,
        random_input_len=args.input_len or args.random_input_len,
        random_output_len=args.output_len or args.random_output_len,
        prefix_repetition_suffix_len=args.input_len or args.prefix_repetition_suffix_len,
        prefix_repetition_output_len=args.output_len or args.prefix_repetition_output_len,
        sharegpt_output_len=args.output_len or args.sharegpt_output_len,
        custom_output_len=args.output_len or args.custom_output_len,
    )


def _prefix_repetition(args: DatasetArgs, tokenizer: Tokenizer, seed: int) -> list[Sample]:
    """As many prompts behind each prefix, one more behind the first ones; in random order."""
    generator = np.random.default_rng(seed)
    samples: list[Sample] = []
    for index in range(args.prefix_repetition_num_prefixes):
        count = len(range(index, args.num_prompts, args.prefix_repetition_num_prefixes))
        samples += random_samples(
            tokenizer,
            count=count,
            input_len=args.prefix_repetition_suffix_len,
            output_len=args.prefix_repetition_output_len,
            prefix_len=args.prefix_repetition_prefix_len,
            seed=int(generator.integers(2**63)),
        )
    if args.disable_shuffle:
        return samples
    return [samples[index] for index in generator.permutation(len(samples))]


def random_samples(
    tokenizer: Tokenizer,
    *,
    count: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[Sample]:
    """Prompts of random tokens whose text has the wanted number of tokens when read back."""
    generator = np.random.default_rng(seed)
    usable = _usable_tokens(tokenizer)
    overhead = len(tokenizer.encode(""))
    prefix = generator.choice(usable, prefix_len).tolist()
    samples = []
    for _ in range(count):
        length = _spread(generator, input_len, range_ratio)
        ids = prefix + generator.choice(usable, max(1, length - overhead)).tolist()
        text, tokens = _text_of_length(tokenizer, ids, generator, usable)
        samples.append(
            Sample(
                prompt=text,
                prompt_len=tokens + overhead,
                output_len=_spread(generator, output_len, range_ratio),
            )
        )
    return samples


def _spread(generator: np.random.Generator, length: int, ratio: float) -> int:
    low = max(1, int(np.floor(length * (1 - ratio))))
    return int(generator.integers(low, int(np.ceil(length * (1 + ratio))) + 1))


def _usable_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Token ids that are no special tokens."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return np.array([token for token in range(len(tokenizer)) if token not in special])


def _text_of_length(
    tokenizer: Tokenizer, ids: list[int], generator: np.random.Generator, usable: np.ndarray
) -> tuple[str, int]:
    """Text of as many tokens as ``ids``, and how many it has: seldom a few more or less.

    Decoding and encoding again merges and splits tokens, so the difference is cut or filled up
    until both lengths agree.
    """
    wanted = len(ids)
    for _ in range(_ROUND_TRIPS):
        text = tokenizer.decode(ids)
        again = tokenizer.encode(text, add_special_tokens=False)
        missing = wanted - len(again)
        if missing == 0:
            break
        ids = again[:wanted] + generator.choice(usable, max(0, missing)).tolist()
    return text, len(again)


def _read(path: str, parse: Callable[[str], list[Any]]) -> list[Any]:
    try:
        with open(path, encoding="utf-8") as stream:
            return parse(stream.read())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--dataset-path {path}: {error}", parameter="dataset_path", value=path
        ) from None


def _read_sharegpt(args: DatasetArgs, path: str, tokenizer: Tokenizer) -> list[Sample]:
    """First question and answer of each conversation."""
    samples: list[Sample] = []
    for entry in _read(path, json.loads):
        turns = entry.get("conversations", []) if isinstance(entry, dict) else []
        if len(turns) < 2:
            continue
        prompt = turns[0]["value"]
        prompt_len = len(tokenizer.encode(prompt))
        output_len = args.sharegpt_output_len or len(
            tokenizer.encode(turns[1]["value"], add_special_tokens=False)
        )
        if (
            min(prompt_len, output_len) >= _MIN_TOKENS
            and prompt_len <= _MAX_PROMPT_TOKENS
            and prompt_len + output_len <= _MAX_TOTAL_TOKENS
        ):
            samples.append(Sample(prompt=prompt, prompt_len=prompt_len, output_len=output_len))
    return samples


def _read_custom(args: DatasetArgs, path: str, tokenizer: Tokenizer) -> list[Sample]:
    """Lines ``{"prompt": TEXT, "output_tokens": N}``; the second is optional."""
    lines = _read(path, lambda text: [json.loads(x) for x in text.splitlines() if x.strip()])
    samples: list[Sample] = []
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
            raise ConfigError(
                f"--dataset-path {path}: line {number} has no text under 'prompt'",
                parameter="dataset_path",
                value=path,
            )
        samples.append(
            Sample(
                prompt=line["prompt"],
                prompt_len=len(tokenizer.encode(line["prompt"])),
                output_len=int(line.get("output_tokens") or args.custom_output_len),
            )
        )
    return samples
