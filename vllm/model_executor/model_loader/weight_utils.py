"""Which safetensors files make up a checkpoint, and the tensors in them, memory-mapped.

``default_weight_loader`` is offered under the name by which models outside this package import it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm.errors import ConfigError
from vllm.model_executor.layers.weight_loading import default_weight_loader

__all__ = [
    "default_weight_loader",
    "safetensors_files",
    "safetensors_names",
    "safetensors_weights_iterator",
]

_INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")


def _lies_within(name: object) -> bool:
    if not isinstance(name, str):
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def safetensors_files(folder: Path) -> list[Path]:
    """The files of one checkpoint: those of the index, or every ``.safetensors``.

    Raises:
        ConfigError: there are none, or the index names one that isn't there.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()), key=str)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--model {folder}: {_INDEX} is damaged ({error})", parameter="model"
            ) from None
        outside = [name for name in names if not _lies_within(name)]
        if outside:
            raise ConfigError(
                f"--model {folder}: {_INDEX} names what is no file of this directory: "
                f"{', '.join(map(repr, outside))}",
                parameter="model",
            )
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ConfigError(
                f"--model {folder}: {_INDEX} names files that are not there: {', '.join(absent)}",
                parameter="model",
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if single in files:
        # A directory may hold other tensors too (adapters, an original's consolidated.*).
        return [single]
    if not files:
        others = sorted({p.suffix for pattern in _OTHER_FORMATS for p in folder.glob(pattern)})
        found = f" (there are {', '.join(others)} files, which --model cannot load)"
        raise ConfigError(
            f"--model {folder} holds no .safetensors weights{found if others else ''}; "
            "use --load-format dummy for random ones",
            parameter="model",
            value=str(folder),
        )
    return files


def safetensors_names(file: Path) -> list[str]:
    """Names of the tensors in ``file``.

    Raises:
        ConfigError: it is damaged or cut off.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"--model: {file} is damaged or incomplete ({error}); download it again",
            parameter="model",
        ) from None


def safetensors_weights_iterator(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the mapped files; a page is read when a tensor is copied."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name, tensors.get_tensor(name)
