"""Binding: the runner gets raw tensors in layer order, layers what their kernels read."""

from types import SimpleNamespace

import pytest
import torch

from tests.kv_cache.helpers import full, make_config, mamba, placed
from vllm.errors import ConfigError
from vllm.model_executor.layers.attention_layer_base import (
    AttentionLayerBase,
    collect_layers,
    register_layer,
)
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache import allocate_kv_cache, drop_head_dim, state_views
from vllm.v1.kv_cache_interface import MLAAttentionSpec, MultipleOf
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import (
    bind_kv_cache,
    extract_layer_index,
    get_backend_constraints,
    get_kv_cache_specs,
    get_kv_sharing_targets,
    share_kv_caches,
)


class Backend(AttentionBackend):
    @staticmethod
    def get_name():
        return "TEST"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [32, MultipleOf(48)]

    @classmethod
    def supported_kv_cache_layouts(cls):
        return (KVCacheLayout.LBNHC,)


class PaddedBackend(Backend):
    @classmethod
    def customize_spec(cls, spec):
        return full(2, 4, num_head_slots=4, state_content_bytes=16)


class Layer(AttentionLayerBase):
    def __init__(self, spec=None, target=None, backend=Backend):
        self.spec, self.kv_sharing_target_layer_name, self.backend = spec, target, backend

    def get_attn_backend(self):
        return self.backend

    def get_kv_cache_spec(self, vllm_config):
        return self.spec


class StateLayer(Layer):
    def bind_kv_cache(self, kv_cache):
        self.kv_cache = state_views(kv_cache, self.spec.shapes, self.spec.dtypes)


class LatentLayer(Layer):
    def bind_kv_cache(self, kv_cache):
        self.kv_cache = drop_head_dim(kv_cache)


def test_identity_is_kept():
    tensors = {"layers.0.self_attn": torch.zeros(1), "layers.1.self_attn": torch.zeros(1)}
    layers = {name: Layer() for name in tensors}
    runner: list[torch.Tensor] = []
    bind_kv_cache(tensors, layers, runner)
    for name, tensor in tensors.items():
        assert layers[name].kv_cache is tensor
    assert [id(t) for t in runner] == [id(t) for t in tensors.values()]


def test_ascending_layers_and_within_a_layer_the_order_of_the_dict():
    names = ["l.10.attn", "l.2.cross", "l.2.attn", "l.0.attn"]
    tensors = {name: torch.zeros(1) for name in names}
    runner: list[torch.Tensor] = []
    bind_kv_cache(tensors, {name: Layer() for name in names}, runner)
    expected = ["l.0.attn", "l.2.cross", "l.2.attn", "l.10.attn"]
    assert [id(t) for t in runner] == [id(tensors[name]) for name in expected]


def test_hooks_run_in_the_order_of_the_dict():
    called = []
    names = ["l.1", "l.0", "l.2"]
    layers = {
        name: SimpleNamespace(bind_kv_cache=lambda _, name=name: called.append(name))
        for name in names
    }
    bind_kv_cache({name: torch.zeros(1) for name in names}, layers, [])
    assert called == names


def test_a_device_that_cannot_tell_two_caches_apart_says_so(monkeypatch):
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(device_type="tpu"))
    tensors = {"l.0.self": torch.zeros(1), "l.0.cross": torch.zeros(1)}
    with pytest.raises(NotImplementedError, match=r"l\.0\.self, l\.0\.cross"):
        bind_kv_cache(tensors, {name: Layer() for name in tensors}, [])


def test_the_runners_list_must_be_empty():
    with pytest.raises(AssertionError, match="must be empty"):
        bind_kv_cache({}, {}, [torch.zeros(1)])


@pytest.mark.parametrize(
    ("name", "modules", "index"),
    [
        ("model.layers.7.self_attn", 1, 7),
        ("model.layers.7.self_attn.0", 2, 14),
        ("model.layers.7.self_attn.1", 2, 15),
        ("model.layers.7.mlp", 2, 14),
    ],
)
def test_layer_index(name, modules, index):
    assert extract_layer_index(name, modules) == index


@pytest.mark.parametrize(("name", "modules"), [("attn", 1), ("a.1.b.2", 1), ("a.1.b.2.c.3", 2)])
def test_names_without_a_clear_index(name, modules):
    with pytest.raises(ValueError, match="must hold one number"):
        extract_layer_index(name, modules)


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
def test_states_and_latents_are_unpacked_by_their_layers(num_blocks, layout):
    """With any number of blocks: two rows are not a pair of states."""
    latent = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=20, dtype="bfloat16")
    groups = [{"l.0": mamba(), "l.1": mamba()}, {"l.2": latent, "l.3": latent}]
    used = groups[:1] if layout == "LBHNC" else groups
    config = placed(used, KVCacheLayout(layout), num_blocks)
    cache = allocate_kv_cache(config)
    layers = {
        name: (StateLayer if spec is groups[0].get(name) else LatentLayer)(spec)
        for group in groups
        for name, spec in group.items()
    }
    runner: list[torch.Tensor] = []
    bind_kv_cache(cache, layers, runner)
    for name, raw in zip(sorted(cache), runner, strict=True):
        assert raw is cache[name]
        bound = layers[name].kv_cache
        if name in groups[0]:
            assert isinstance(bound, tuple)
            conv, ssm = bound
            assert (conv.shape, ssm.shape) == ((num_blocks, 3, 8), (num_blocks, 2, 4))
            assert bound[0].data_ptr() == raw.data_ptr()
        else:
            assert bound.shape == (num_blocks, 16, 20)
            assert bound.data_ptr() == raw.data_ptr()


def test_dim_0_must_be_the_block():
    cache = allocate_kv_cache(placed([{"l.0": full()}], KVCacheLayout.LBHNC, 3))
    cache["l.0"] = cache["l.0"].transpose(0, 1)
    with pytest.raises(ConfigError, match=r"layer l\.0 has shape \(2, 3.*dim 0 must be the 3"):
        bind_kv_cache(cache, {"l.0": Layer()}, [])


def test_kernel_blocks_at_dim_0_are_accepted():
    config = placed([{"l.0": full(block_size=64)}], KVCacheLayout.LBHNC, 3, (16,))
    layer = Layer()
    bind_kv_cache(allocate_kv_cache(config), {"l.0": layer}, [])
    assert layer.kv_cache.shape[0] == 12


def test_layers_that_share_a_cache():
    cache = allocate_kv_cache(placed([{"l.0": full()}], KVCacheLayout.LBHNC, 3))
    layers = {"l.0": Layer(full()), "l.1": Layer(None, "l.0")}
    targets = get_kv_sharing_targets(layers)
    share_kv_caches(cache, targets, cache.config)
    bind_kv_cache(cache, layers, [])
    assert layers["l.1"].kv_cache is layers["l.0"].kv_cache
    assert cache.config.kv_cache_groups[0].layer_names == ["l.0", "l.1"]
    with pytest.raises(ConfigError, match=r"'l\.9', which does not exist"):
        get_kv_sharing_targets({"l.0": Layer(None, "l.9")})
    chain = {"l.0": Layer(), "l.1": Layer(None, "l.0"), "l.2": Layer(None, "l.1")}
    with pytest.raises(ConfigError, match=r"l\.1, which has none itself"):
        get_kv_sharing_targets(chain)


def test_declarations_are_gathered_with_the_backends_packing():
    layers = {"l.0": Layer(full()), "l.1": Layer(full(), backend=PaddedBackend), "l.2": Layer()}
    specs = get_kv_cache_specs(layers, make_config())
    assert list(specs) == ["l.0", "l.1"]
    assert specs["l.0"] == full()
    assert specs["l.1"].num_heads == 4
    assert specs["l.1"].layer_name == "l.1"
    limits = get_backend_constraints(layers, specs)
    assert limits["l.0"].backend == "TEST"
    assert limits["l.0"].layouts == (KVCacheLayout.LBNHC,)
    assert [limits["l.0"].accepts_block(size) for size in (16, 32, 48, 96)] == [0, 1, 1, 1]


def test_layers_register_while_a_model_is_built():
    with collect_layers() as outer:
        register_layer("a", Layer())
        with collect_layers() as inner:
            register_layer("a", Layer())
        register_layer("b", Layer())
        with pytest.raises(ValueError, match="duplicate layer name 'a'"):
            register_layer("a", Layer())
    register_layer("alone", Layer())
    assert (list(outer), list(inner)) == (["a", "b"], ["a"])
