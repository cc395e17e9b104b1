"""A step is split so that each chunk is a request: positions, blocks and lengths add up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import PagedModel, make_config
from vllm.errors import ConfigError
from vllm.model_executor.layers.attention.chunked_local_attention import _chunked, split_by_chunk
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.torch_ref import TorchRefBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec

BLOCK = 4


def make_step(requests):
    """``requests``: (computed, new tokens) of each."""
    computed = torch.tensor([c for c, _ in requests], dtype=torch.int32)
    new = torch.tensor([n for _, n in requests], dtype=torch.int32)
    starts = torch.zeros(len(requests) + 1, dtype=torch.int32)
    starts[1:] = new.cumsum(0)
    lens = computed + new
    width = -(-int(lens.max()) // BLOCK)
    table = torch.arange(len(requests) * width, dtype=torch.int32).view(len(requests), width)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lens,
        seq_lens_cpu=lens,
        num_computed_tokens_cpu=computed,
        num_reqs=len(requests),
        num_actual_tokens=int(new.sum()),
        max_query_len=int(new.max()),
        max_seq_len=int(lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.arange(int(new.sum())),
    )


def test_what_is_split_anew_in_each_step_is_not_captured():
    assert TritonAttentionBackend.fits_cuda_graphs and TritonAttentionBackend.fits_prompt_graphs
    chunked = _chunked(TritonAttentionBackend)
    assert not chunked.fits_cuda_graphs and not chunked.fits_prompt_graphs


def seen(common):
    """For each token, in order: the (block, offset) of every key that it attends to."""
    keys = []
    starts = common.query_start_loc.tolist()
    for row in range(common.num_reqs):
        length = int(common.seq_lens[row])
        table = common.block_table_tensor[row].tolist()
        for token in range(starts[row + 1] - starts[row]):
            last = length - (starts[row + 1] - starts[row]) + token
            keys.append([(table[p // BLOCK], p % BLOCK) for p in range(last + 1)])
    return keys


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=5),
    blocks=st.integers(1, 4),
)
def test_each_token_sees_its_own_chunk_up_to_itself(requests, blocks):
    chunk = blocks * BLOCK
    common = make_step(requests)
    expected = [
        [key for position, key in enumerate(keys) if position // chunk == (len(keys) - 1) // chunk]
        for keys in seen(common)
    ]
    split = split_by_chunk(common, chunk, BLOCK)
    assert seen(split) == expected
    assert split.num_actual_tokens == common.num_actual_tokens
    assert split.max_seq_len == int(split.seq_lens.max()) <= chunk
    starts = split.query_start_loc
    assert split.max_query_len == int((starts[1:] - starts[:-1]).max())
    assert torch.equal(
        split.num_computed_tokens_cpu, split.seq_lens_cpu - (starts[1:] - starts[:-1])
    )
    assert torch.equal(split.slot_mapping, common.slot_mapping)
    for tensor in (split.seq_lens, split.query_start_loc, split.block_table_tensor):
        assert tensor.dtype == torch.int32
        assert tensor.stride(-1) == 1


def test_a_step_within_the_first_chunk_is_left_as_it_is():
    common = make_step([(0, 8), (5, 1)])
    assert split_by_chunk(common, 8, BLOCK) is common


@pytest.mark.parametrize("spec_cls", [ChunkedLocalAttentionSpec, FullAttentionSpec])
def test_blocks_must_divide_chunks(spec_cls):
    """Also where the layer was promoted to a full one."""
    builder = _chunked(CPUAttentionBackend).get_builder_cls()

    def make(block_size):
        spec = spec_cls(
            block_size=block_size,
            num_kv_heads=1,
            head_size=8,
            dtype="float32",
            attention_chunk_size=48,
        )
        return builder(spec, ["a"], None, torch.device("cpu"))

    assert make(16).chunk_size == 48
    with pytest.raises(
        ConfigError, match="attention_chunk_size 48 is not a multiple of the 32 tok"
    ):
        make(32)


def test_layers_of_one_backend_share_one_class():
    assert _chunked(CPUAttentionBackend) is _chunked(CPUAttentionBackend)
    assert _chunked(CPUAttentionBackend) is not _chunked(TorchRefBackend)
    assert _chunked(CPUAttentionBackend).get_name() == "CPU_ATTN"


def test_the_cache_keeps_a_chunk(tmp_path):
    paged = PagedModel(make_config(save(make_hf_model("llama4_text"), tmp_path)))
    specs = [layer.get_kv_cache_spec(paged.config) for layer in paged.layers.values()]
    assert [type(spec) for spec in specs] == [
        ChunkedLocalAttentionSpec,
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
    ] * 2
    assert specs[0].attention_chunk_size == 32
