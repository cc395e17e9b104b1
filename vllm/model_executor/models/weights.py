"""Puts a checkpoint's tensors where they belong in a model, and says clearly what did not fit.

A module is packed as soon as its last shard is there, so that loading needs about one copy of
the weights, not two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from vllm.errors import ConfigError
from vllm.model_executor.layers.weight_loading import ShardId, WeightShapeError

__all__ = ["load_checkpoint", "maybe_prefix", "process_module"]

_SHOWN = 8
_DERIVED_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def maybe_prefix(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def process_module(module: nn.Module) -> None:
    """Bring a loaded module's weights into the form that its kernels read."""
    process = getattr(module, "process_weights_after_loading", None)
    if process is not None:
        process()


class _Outstanding:
    """Which shards of which parameters have not come yet."""

    def __init__(self, model: nn.Module) -> None:
        self.shards: dict[str, set[ShardId]] = {}
        self.module_of: dict[str, nn.Module] = {}
        self.params: dict[str, nn.Parameter] = {}
        self.names_left: dict[nn.Module, set[str]] = {}
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            for name, param in module.named_parameters(recurse=False):
                full = maybe_prefix(prefix, name)
                self.params[full] = param
                self.shards[full] = set(getattr(param, "shard_ids", (None,)))
                self.module_of[full] = module
                self.names_left.setdefault(module, set()).add(full)

    def arrived(self, name: str, shard_id: ShardId) -> None:
        left = self.shards[name]
        if shard_id is None:
            left.clear()
        else:
            left.discard(shard_id)
        if left:
            return
        module = self.module_of[name]
        names = self.names_left[module]
        names.discard(name)
        if not names:
            process_module(module)
            # The packed form has replaced it: nothing may hold the original any more.
            for loaded in [key for key, owner in self.module_of.items() if owner is module]:
                self.params.pop(loaded, None)


def load_checkpoint(
    model: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    fused: Mapping[str, tuple[str, ShardId]],
    ignored: Iterable[str] = (),
) -> set[str]:
    """Fill every parameter of ``model``.

    Args:
        weights: checkpoint names and tensors, in any order.
        fused: part of a checkpoint name -> (part of the parameter's name, shard), for instance
            ``{"q_proj": ("qkv_proj", "q")}``. A name that is a parameter already wins.
        ignored: names in the checkpoint that this model does without.

    Returns:
        The names of the parameters filled.

    Raises:
        ConfigError: one line that lists the weights that are missing, unexpected or of a wrong
            shape.
    """
    outstanding = _Outstanding(model)
    known = set(outstanding.params)
    skip = set(ignored)
    unexpected: list[str] = []
    misshaped: list[str] = []
    touched: set[str] = set()
    for name, tensor in weights:
        target, shard_id = _find(name, known, fused)
        if target is None:
            if name not in skip and not name.endswith(_DERIVED_BUFFERS):
                unexpected.append(name)
            continue
        touched.add(target)
        param = outstanding.params.get(target)
        if param is None:
            unexpected.append(f"{name} (a second time)")
            continue
        try:
            param.weight_loader(param, tensor, shard_id)  # type: ignore[attr-defined]
        except WeightShapeError as error:
            misshaped.append(f"{name} {error}")
            outstanding.shards[target].discard(shard_id)
            continue
        outstanding.arrived(target, shard_id)
    missing = _missing_names(outstanding.shards, fused)
    if missing or unexpected or misshaped:
        raise ConfigError(_problems(missing, unexpected, misshaped), parameter="model")
    return touched


def _find(
    name: str, known: set[str], fused: Mapping[str, tuple[str, ShardId]]
) -> tuple[str | None, ShardId]:
    if name in known:
        return name, None
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part in fused:
            target, shard_id = fused[part]
            full = ".".join((*parts[:index], target, *parts[index + 1 :]))
            if full in known:
                return full, shard_id
    return None, None


def _missing_names(
    shards: Mapping[str, set[ShardId]], fused: Mapping[str, tuple[str, ShardId]]
) -> list[str]:
    """Missing shards by the names that a checkpoint would give them."""
    part_of = {target: part for part, target in fused.items()}
    missing = []
    for name, left in shards.items():
        for shard_id in sorted(left, key=str):
            parts = name.split(".")
            if shard_id is not None:
                parts = [part_of.get((part, shard_id), part) for part in parts]
            missing.append(".".join(parts))
    return missing


def _problems(missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    told = []
    for what, names in (
        ("missing", missing),
        ("of a wrong shape", misshaped),
        ("unexpected", unexpected),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            told.append(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}")
    return "the weights do not fit config.json: " + "; ".join(told)
