"""A hybrid hits exactly where a state was kept: neither later nor earlier, for any schedule."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import full, mamba, sliding
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

BLOCK = 8
HASHER = get_request_block_hasher(BLOCK, "sha256")


def make_manager(mode, window):
    specs = [full(block_size=BLOCK), mamba(block_size=BLOCK, mamba_cache_mode=mode)]
    if window:
        specs.append(sliding(window=window, block_size=BLOCK))
    groups = [KVCacheGroupSpec([f"l.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheManager(KVCacheConfig(2000, [], groups), 4096, hash_block_size=BLOCK)


def request_of(name, tokens):
    request = Request(name, tokens, SamplingParams(max_tokens=1))
    request.set_block_hasher(HASHER)
    return request


def run(manager, request, chunks):
    """Compute the request in steps of these sizes; returns where steps ended."""
    blocks, found = manager.get_computed_blocks(request)
    at, ends = found, []
    for chunk in chunks:
        count = min(chunk, request.num_tokens - at)
        if count == 0:
            break
        first = at == found
        assert manager.allocate_slots(
            request, count, found if first else 0, blocks if first else None
        )
        at += count
        request.num_computed_tokens = at
        manager.publish_blocks()
        ends.append(at)
    manager.check_integrity()
    return found, ends


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["align", "all"]),
    window=st.sampled_from([0, 0, 20]),
    texts=st.lists(
        st.tuples(
            st.integers(1, 120),
            st.integers(1, 120),
            st.lists(st.sampled_from([3, 8, 16, 24, 40]), min_size=1, max_size=8),
        ),
        min_size=2,
        max_size=4,
    ),
)
def test_hits_are_the_boundaries_at_which_states_were_kept(mode, window, texts):
    manager = make_manager(mode, window)
    kept: dict[tuple[int, ...], bool] = {}
    for number, (common, own, chunks) in enumerate(texts):
        tokens = list(range(common)) + [1000 * (number + 1) + i for i in range(own)]
        request = request_of(f"r{number}", tokens)
        boundaries = [n for n in range(BLOCK, len(tokens), BLOCK) if tuple(tokens[:n]) in kept]
        found, ends = run(manager, request, chunks)
        assert found == max(boundaries, default=0)
        reached = ends[-1] if ends else found
        every = range(found + BLOCK - found % BLOCK, reached + 1, BLOCK)
        for end in ends if mode == "align" else every:
            if end % BLOCK == 0:
                kept[tuple(tokens[:end])] = True
        manager.free(request)
        manager.check_integrity()
