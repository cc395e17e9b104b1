"""A fast tokenizer out of GGUF metadata: vocabulary, merges, special tokens, chat template.

GGUF names the pre-tokenizer (``tokenizer.ggml.pre``) instead of describing it; the splits below
are those of the models' own ``tokenizer.json``. A name that isn't known is refused: a near miss
would tokenise wrongly in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from vllm.errors import UnsupportedError
from vllm.transformers_utils.gguf_file import GGUFFile

__all__ = ["tokenizer_from_gguf"]

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits_then_bytes() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _bytes() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _bytes,
    "llama-bpe": lambda: _split_then_bytes(_LLAMA3_SPLIT),
    "qwen2": lambda: _split_then_bytes(_QWEN2_SPLIT),
    "smollm": _digits_then_bytes,
}
_WHOLE_WORDS_FIRST = frozenset({"llama-bpe"})
"""Whose BPE takes a word that is in the vocabulary without merging."""
_NORMALIZED = frozenset({"qwen2"})
"""Whose text is brought to NFC first."""
_BOS_BY_DEFAULT = frozenset({"llama-bpe"})


def tokenizer_from_gguf(gguf: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer that ``gguf`` describes.

    Raises:
        UnsupportedError: it isn't byte-level BPE, or its pre-tokenizer is unknown.
    """
    meta = gguf.metadata
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{gguf.path}: the tokenizer {model!r} with pre-tokenizer {pre!r} cannot be built from "
            "GGUF metadata (gpt2 with "
            f"{', '.join(sorted(_PRE_TOKENIZERS))} can); name a directory that holds its "
            "tokenizer.json with --tokenizer",
            parameter="tokenizer",
        )
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    backend = _build(meta, tokens, pre)
    special = {
        f"{role}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in _ROLES.items()
        if f"tokenizer.ggml.{key}_token_id" in meta
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=gguf.get("context_length"),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.name_or_path = str(gguf.path)
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
    return tokenizer


def _build(meta: dict[str, Any], tokens: list[str], pre: str) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    )
    if pre in _NORMALIZED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    kinds = meta.get("tokenizer.ggml.token_type", [])
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=False) if kind > 2]
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in added if kind == _CONTROL]
    )
    backend.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, kind in added
            if kind == _USER_DEFINED
        ]
    )
    _add_template(backend, meta, tokens, pre)
    return backend


def _add_template(backend: Tokenizer, meta: dict[str, Any], tokens: list[str], pre: str) -> None:
    """Make ``add_special_tokens=True`` put BOS before and EOS after, where the file says so."""
    used = []
    for role, default in (("bos", pre in _BOS_BY_DEFAULT), ("eos", False)):
        index = meta.get(f"tokenizer.ggml.{role}_token_id")
        wanted = meta.get(f"tokenizer.ggml.add_{role}_token", default)
        used.append((tokens[index], index) if wanted and index is not None else None)
    if not any(used):
        return
    before, after = ([f"{item[0]}"] if item else [] for item in used)
    single = [*before, "$A", *after]
    pair = [*single, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=single, pair=pair, special_tokens=[item for item in used if item]
            ),
        ]
    )
