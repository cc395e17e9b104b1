"""Puts a checkpoint's tensors where they belong in a model, and says clearly what did not fit.

A module is packed as soon as its last shard is there, so that loading needs about one copy of
the weights, not two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from vllm.errors import ConfigError, UnsupportedError
from vllm.model_executor.layers.weight_loading import ShardId, WeightShapeError, load_shard
from vllm.model_executor.models.cache_scales import CacheScales

__all__ = [
    "CheckpointNames",
    "language_model_weights",
    "load_checkpoint",
    "maybe_prefix",
    "process_module",
]

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
        self.all_shards: dict[str, frozenset[ShardId]] = {}
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
                self.all_shards[full] = frozenset(getattr(param, "shard_ids", (None,)))
                self.shards[full] = set(self.all_shards[full])
                self.module_of[full] = module
                self.names_left.setdefault(module, set()).add(full)

    def failed(self, name: str, shard_id: ShardId) -> None:
        """The shard came, but does not fit: it is not missing, and the parameter stays unfilled."""
        if shard_id is None:
            self.shards[name].clear()
        else:
            self.shards[name].discard(shard_id)

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


# What may be rounded to the model's own type; numbers of others mean nothing without scales.
_WEIGHT_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointNames:
    """How a checkpoint's names become those of parameters here, and back for messages."""

    fused: Mapping[str, tuple[str, ShardId]] = field(default_factory=dict)
    """Part of a name -> (part of the parameter's name, shard)."""
    experts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """A projection of one expert, ``<experts>.<number>.<projection>.weight`` -> (prefix of the
    parameter in ``<experts>``, shard's name)."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Part of a name -> what it is called here."""

    def find(self, name: str, known: set[str]) -> tuple[str | None, ShardId]:
        """The parameter that ``name`` fills, and which shard of it; (None, None) for none."""
        if name in known:
            return name, None
        parts = [self.renamed.get(part, part) for part in name.split(".")]
        name = ".".join(parts)
        if name in known:
            return name, None
        for index, part in enumerate(parts):
            if part in self.fused:
                target, shard_id = self.fused[part]
                full = ".".join((*parts[:index], target, *parts[index + 1 :]))
                if full in known:
                    return full, shard_id
        if len(parts) > 3 and parts[-3].isdecimal() and parts[-2] in self.experts:
            prefix, shard = self.experts[parts[-2]]
            full = ".".join((*parts[:-3], f"{prefix}_{parts[-1]}"))
            if full in known:
                return full, (int(parts[-3]), shard)
        return None, None

    def in_checkpoint(self, name: str, shard_id: ShardId) -> str:
        """What a checkpoint calls a shard of the parameter ``name``."""
        parts = name.split(".")
        if isinstance(shard_id, tuple):
            expert, shard = shard_id
            prefix, _, kind = parts[-1].rpartition("_")
            for projection, target in self.experts.items():
                if target == (prefix, shard):
                    parts = [*parts[:-1], str(expert), projection, kind]
                    break
            else:
                shard_id = None
        part_of = {target: part for part, target in self.fused.items()}
        called = {here: there for there, here in self.renamed.items()}
        parts = [part_of.get((part, shard_id), part) for part in parts]
        return ".".join(called.get(part, part) for part in parts)


def load_checkpoint(
    model: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    fused: Mapping[str, tuple[str, ShardId]] | None = None,
    experts: Mapping[str, tuple[str, str]] | None = None,
    renamed: Mapping[str, str] | None = None,
    ignored: Iterable[str] = (),
) -> set[str]:
    """Fill every parameter of ``model``.

    Args:
        weights: checkpoint names and tensors, in any order.
        fused: part of a checkpoint name -> (part of the parameter's name, shard), for instance
            ``{"q_proj": ("qkv_proj", "q")}``. A name that is a parameter already wins.
        experts: for instance ``{"gate_proj": ("w13", "gate")}``; see ``CheckpointNames``.
        renamed: part of a checkpoint name -> its name here, ``{"block_sparse_moe": "mlp"}``.
        ignored: names in the checkpoint that this model does without.

    Returns:
        The names of the parameters filled.

    Raises:
        ConfigError: one line that lists the weights that are missing, unexpected or of a wrong
            shape.
    """
    names = CheckpointNames(fused=fused or {}, experts=experts or {}, renamed=renamed or {})
    outstanding = _Outstanding(model)
    known = set(outstanding.params)
    skip = set(ignored)
    unexpected: list[str] = []
    misshaped: list[str] = []
    touched: set[str] = set()
    used: set[str] = set()
    cache_scales = CacheScales(model)
    for name, tensor in weights:
        if cache_scales.take(name, tensor):
            continue
        used.update(name.split("."))
        target, shard_id = names.find(name, known)
        if target is None:
            if name not in skip and not name.endswith(_DERIVED_BUFFERS):
                unexpected.append(name)
            continue
        touched.add(target)
        param = outstanding.params.get(target)
        if param is None:
            unexpected.append(f"{name} (a second time)")
            continue
        if shard_id is not None and shard_id not in outstanding.all_shards[target]:
            unexpected.append(name)
            continue
        if param.is_floating_point() and tensor.dtype not in _WEIGHT_TYPES:
            stored = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"{name} is stored as {stored}: quantised weights are not supported yet; float32, "
                "float16 and bfloat16 are",
                parameter="quantization",
            )
        try:
            load_shard(param, tensor, shard_id)
        except WeightShapeError as error:
            misshaped.append(f"{name} {error}")
            outstanding.failed(target, shard_id)
            continue
        outstanding.arrived(target, shard_id)
    # Where a checkpoint has our name of a part, what misses is told by that name, too.
    theirs = {there: here for there, here in names.renamed.items() if here not in used}
    names = replace(names, renamed=theirs)
    missing = {
        names.in_checkpoint(name, shard_id): None
        for name, left in outstanding.shards.items()
        for shard_id in sorted(left, key=_shard_order)
    }
    if missing or unexpected or misshaped:
        raise ConfigError(_problems(list(missing), unexpected, misshaped), parameter="model")
    return touched


def _shard_order(shard_id: ShardId) -> tuple[int, str]:
    return shard_id if isinstance(shard_id, tuple) else (0, str(shard_id))


def language_model_weights(
    weights: Iterable[tuple[str, torch.Tensor]], left_out: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The language model's tensors of a multimodal checkpoint, by the names of a text model's.

    Their names hold ``language_model`` in one of the orders in use: ``language_model.model.norm``
    or ``model.language_model.norm``.

    Args:
        left_out: parts of names that only the other modalities have.
    """
    others = set(left_out)
    for name, tensor in weights:
        parts = name.split(".")
        if not others.isdisjoint(parts):
            continue
        yield ".".join(part for part in parts if part != "language_model"), tensor


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
