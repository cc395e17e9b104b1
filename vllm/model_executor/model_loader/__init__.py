"""From a resolved configuration to a model that can run.

``get_model`` builds the model on its device, fills it by ``--load-format`` and packs its weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator
from typing import Any

import torch

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import collect_layers
from vllm.model_executor.model_loader.base_loader import (
    BaseModelLoader,
    get_model_loader,
    register_model_loader,
)
from vllm.model_executor.models.weights import process_module

__all__ = ["BaseModelLoader", "get_model", "get_model_loader", "register_model_loader"]

logger = init_logger(__name__)


def get_model(vllm_config: VllmConfig) -> Any:
    """The model on its device, in evaluation mode, weights loaded and packed.

    ``model.static_forward_context`` maps the name of each layer that owns a cache to the layer.

    Raises:
        ConfigError: naming --model or --load-format, and what is wrong with the weights.
    """
    model_config = vllm_config.model_config
    loader = get_model_loader(vllm_config.load_config, model_config.model_path)
    started = time.perf_counter()
    with (
        set_current_vllm_config(vllm_config),
        collect_layers() as layers,
        _one_thread_per_operator(),
        torch.no_grad(),
    ):
        model = loader.load_model(vllm_config, model_config)
        for module in model.modules():
            process_module(module)
    model.eval().requires_grad_(False)
    model.static_forward_context = layers
    _return_free_memory()
    logger.info("Loading weights took %.2f s", time.perf_counter() - started)
    return model


@contextlib.contextmanager
def _one_thread_per_operator() -> Iterator[None]:
    """Loading is thousands of small operators, where threads that meet after each cost more than
    they give: on two busy cores 7.7 s of CPU time against 0.9 s. Loaders use threads of their own.
    """
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def _return_free_memory() -> None:
    """Give what loading has freed back to the system; glibc would keep it for later."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
