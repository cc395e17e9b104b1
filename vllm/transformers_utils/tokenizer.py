"""Tokenizers: from a directory's ``tokenizer.json``, or out of GGUF metadata.

The file says everything about a fast tokenizer, so no class of a model is looked up; that keeps
torch out of the process (``AutoTokenizer`` imports it) and the file's own pre-tokenizer in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError, UnsupportedError
from vllm.transformers_utils.gguf_file import read_gguf
from vllm.transformers_utils.model_path import resolve_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["TOKENIZER_MODES", "get_tokenizer"]

TOKENIZER_MODES = ("auto", "hf")
"""Both the same: a fast tokenizer."""

_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def get_tokenizer(
    path: str | Path,
    mode: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    download_dir: str | None = None,
) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory, a ``.gguf`` file, a short name or a hub id.

    Its chat template, if there is one, is in ``chat_template``.

    Raises:
        ConfigError: naming --tokenizer: nothing there, or it can't be read.
        UnsupportedError: a ``mode`` that this engine lacks, or a GGUF tokenizer that isn't known.
    """
    if mode not in TOKENIZER_MODES:
        raise UnsupportedError(
            f"--tokenizer-mode {mode!r} is not supported; use one of: {', '.join(TOKENIZER_MODES)}",
            parameter="tokenizer_mode",
            value=mode,
        )
    found = resolve_model_path(
        str(path),
        revision=revision,
        download_dir=download_dir,
        weights=False,
        option="--tokenizer",
    )
    if found.suffix == ".gguf":
        from vllm.transformers_utils.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(read_gguf(found))
    return _from_directory(found, trust_remote_code)


def _from_directory(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    options: dict[str, Any] = {"local_files_only": True}
    loader: Any
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        loader = PreTrainedTokenizerFast
    elif any((folder / name).is_file() for name in _SLOW_FILES):
        # Has to be converted, which only the model's own class can; this imports torch.
        from transformers import AutoTokenizer

        loader = AutoTokenizer
        options["trust_remote_code"] = trust_remote_code
    else:
        raise ConfigError(
            f"--tokenizer {folder} holds no tokenizer.json; name a directory that does, or pass "
            "--skip-tokenizer-init",
            parameter="tokenizer",
            value=str(folder),
        )
    try:
        return loader.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"--tokenizer {folder} cannot be read: {error}", parameter="tokenizer"
        ) from error
