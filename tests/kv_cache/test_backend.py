"""What outside code asks a backend: shapes and orders, derived from spec and layout."""

import weakref

import pytest
import torch

from vllm.errors import ConfigError
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionType,
    MultipleOf,
    kv_cache_storage,
)
from vllm.v1.kv_cache import published
from vllm.v1.kv_cache_interface import KVQuantMode
from vllm.v1.kv_cache_layout import KVCacheLayout


class Plain(AttentionBackend):
    @staticmethod
    def get_name():
        return "PLAIN"


class Latent(Plain):
    @classmethod
    def is_mla(cls):
        return True


class Flex(Plain):
    @classmethod
    def supported_kv_cache_layouts(cls):
        return (KVCacheLayout.LBNHC,)


class Choosy(Plain):
    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [32, 64]

    @classmethod
    def get_supported_head_sizes(cls):
        return [64, 128]


@pytest.fixture(autouse=True)
def no_layout_is_published(monkeypatch):
    monkeypatch.setattr(published, "_published", weakref.WeakKeyDictionary())


class Owner:
    """Whoever takes a layout up."""


@pytest.mark.parametrize(
    ("cache_dtype", "shape"),
    [
        ("auto", (10, 8, 16, 256)),
        ("fp8", (10, 8, 16, 256)),
        ("int8_per_token_head", (10, 8, 16, 264)),
        ("int4_per_token_head", (10, 8, 16, 136)),
        ("nvfp4", (10, 16, 16, 72)),
    ],
)
def test_shape(cache_dtype, shape):
    assert Plain.get_kv_cache_shape(10, 16, 8, 128, cache_dtype) == shape


@pytest.mark.parametrize(
    ("cache_dtype", "content"), [("auto", 576), ("fp8_ds_mla", 656), ("nvfp4_ds_mla", 352)]
)
def test_latent_shape_has_no_head_axis(cache_dtype, content):
    assert Latent.get_kv_cache_shape(10, 64, 1, 576, cache_dtype) == (10, 64, content)


@pytest.mark.parametrize(
    ("layout", "order", "layered"),
    [
        ("HND", (0, 1, 2, 3), (1, 2, 0, 3, 4)),
        ("NHD", (0, 2, 1, 3), (1, 0, 3, 2, 4)),
        ("BLHNC", (0, 1, 2, 3), (1, 0, 2, 3, 4)),
        ("BHLNC", (0, 1, 2, 3), (1, 2, 0, 3, 4)),
        ("LHBNC", (1, 0, 2, 3), (0, 2, 1, 3, 4)),
    ],
)
def test_stride_order_follows_the_resolved_layout(layout, order, layered):
    owner = Owner()
    published.publish_layout(layout, "engine", owner)
    assert Plain.get_kv_cache_stride_order() == order
    assert Plain.get_kv_cache_stride_order(include_num_layers_dimension=True) == layered
    assert len(order) == len(Plain.get_kv_cache_shape(1, 16, 1, 64))


def test_before_it_is_resolved_a_backend_answers_with_its_first_layout():
    assert Plain.get_kv_cache_stride_order() == (0, 1, 2, 3)
    assert Flex.get_kv_cache_stride_order() == (0, 2, 1, 3)
    assert Flex.get_kv_cache_stride_order(True) == (1, 0, 3, 2, 4)


def test_latent_orders():
    assert Latent.get_kv_cache_stride_order() == (0, 1, 2)
    assert Latent.get_kv_cache_stride_order(True) == (1, 0, 2, 3)


def test_a_second_different_layout_of_one_engine_is_refused():
    core, worker = Owner(), Owner()
    assert published.publish_layout("HND", "engine", core) is KVCacheLayout.LBHNC
    published.publish_layout(KVCacheLayout.LBHNC, "engine", worker)
    for owner in (core, worker, Owner()):
        with pytest.raises(ConfigError, match="BLHNC contradicts LBHNC"):
            published.publish_layout("BLHNC", "engine", owner)
    # Even where the engine has no name, one worker cannot serve two.
    with pytest.raises(ConfigError, match="BLHNC contradicts LBHNC"):
        published.publish_layout("BLHNC", "", worker)


def test_engines_beside_each_other_have_their_own_layouts():
    first, second = Owner(), Owner()
    published.publish_layout("LBHNC", "one", first)
    published.publish_layout("BHLNC", "two", second)
    with pytest.raises(ConfigError, match="BHLNC, LBHNC: read the layout from KVCacheConfig"):
        Plain.get_kv_cache_stride_order()
    del second
    assert published.published_layout() is KVCacheLayout.LBHNC
    del first
    assert published.published_layout() is None


def test_the_block_is_dim_0():
    assert Plain.get_kv_cache_block_dim(16, 8, 128) == 0
    assert Plain.get_kv_cache_shape(1234567, 16, 8, 128)[0] == 1234567


def test_block_sizes():
    assert [Choosy.supports_block_size(size) for size in (None, 16, 32, 48, 96)] == [1, 0, 1, 0, 1]
    assert Choosy.get_preferred_block_size(16) == 32
    assert Choosy.get_preferred_block_size(128) == 128
    assert Plain.get_preferred_block_size(7) == 7
    assert not MultipleOf(16).accepts(0)


def test_reasons_for_declining():
    reasons = Choosy.validate_configuration(
        head_size=80,
        dtype=torch.float32,
        kv_cache_dtype="fp8",
        block_size=16,
        use_mla=True,
        has_sink=True,
        attn_type=AttentionType.ENCODER,
    )
    assert len(reasons) == 7
    assert Choosy.validate_configuration(head_size=64, dtype=torch.bfloat16, block_size=32) == []
    assert Latent.validate_configuration(head_size=64, dtype=torch.bfloat16) == ["only for MLA"]


def test_cache_dtypes():
    assert kv_cache_storage("auto", torch.bfloat16) == ("bfloat16", KVQuantMode.NONE)
    assert kv_cache_storage("float32", torch.bfloat16) == ("float32", KVQuantMode.NONE)
    assert kv_cache_storage("fp8", torch.bfloat16) == ("uint8", KVQuantMode.FP8_PER_TENSOR)
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype 'int3'.*auto"):
        kv_cache_storage("int3", torch.bfloat16)
