"""What a load format has to do: yield a checkpoint's tensors. The registry of formats."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from tqdm.auto import tqdm

from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.distributed.parallel_state import get_world_group
from vllm.errors import ConfigError

__all__ = [
    "BaseModelLoader",
    "get_model_loader",
    "register_model_loader",
    "with_progress",
]


class BaseModelLoader(ABC):
    """Fills a model's parameters from wherever ``--load-format`` says."""

    def __init__(self, load_config: LoadConfig) -> None:
        self.load_config = load_config

    @abstractmethod
    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Fill every parameter of ``model``; what doesn't fit is one ``ConfigError``."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig) -> Any:
        """Build the model and fill it; see ``model_loader.get_model`` for what surrounds it."""
        from vllm.model_executor.models.registry import ModelRegistry

        model_cls, _ = ModelRegistry.resolve_model_cls(model_config.architecture)
        device = torch.device(vllm_config.device_config.device_type)
        with _default_dtype(model_config.dtype), device:
            model = model_cls(vllm_config=vllm_config, prefix="")
        self.load_weights(model, model_config)
        return model


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Holds for construction only: a loader's own arithmetic names its dtypes and devices."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


_LOADER = "vllm.model_executor.model_loader"
_loaders: dict[str, str | type[BaseModelLoader]] = {
    "safetensors": f"{_LOADER}.default_loader:SafetensorsLoader",
    "gguf": f"{_LOADER}.default_loader:GGUFLoader",
    "dummy": f"{_LOADER}.dummy_loader:DummyLoader",
}


def register_model_loader(
    load_format: str,
) -> Callable[[type[BaseModelLoader]], type[BaseModelLoader]]:
    """Class decorator that makes ``--load-format load_format`` use the class.

    Raises:
        ValueError: what is decorated is no ``BaseModelLoader``.
    """

    def register(loader: type[BaseModelLoader]) -> type[BaseModelLoader]:
        if not issubclass(loader, BaseModelLoader):
            raise ValueError(f"{loader.__name__} must derive from BaseModelLoader")
        _loaders[load_format] = loader
        return loader

    return register


def get_model_loader(load_config: LoadConfig, model_path: str) -> BaseModelLoader:
    """The loader of ``--load-format``; "auto" goes by the path.

    Raises:
        ConfigError: no such format, or one that doesn't fit the path.
    """
    is_file = model_path.endswith(".gguf")
    name = load_config.load_format
    if name == "auto":
        name = "gguf" if is_file else "safetensors"
    if name not in _loaders:
        raise ConfigError(
            f"--load-format {name!r} is not known; these are: auto, {', '.join(sorted(_loaders))}",
            parameter="load_format",
            value=name,
        )
    if (name == "gguf" and not is_file) or (name == "safetensors" and is_file):
        raise ConfigError(
            f"--load-format {name} cannot read {model_path}; use --load-format auto",
            parameter="load_format",
            value=name,
        )
    loader = _loaders[name]
    if isinstance(loader, str):
        module, _, attribute = loader.partition(":")
        loader = getattr(import_module(module), attribute)
        assert not isinstance(loader, str)
    return loader(load_config)


def with_progress(
    weights: Iterable[tuple[str, torch.Tensor]], total: int, load_config: LoadConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """``weights`` with a progress bar over tensors, on the first rank."""
    show = load_config.use_tqdm_on_load and get_world_group().is_first_rank
    yield from tqdm(
        weights, total=total, desc="Loading weights", unit="tensor", disable=not show, leave=True
    )
