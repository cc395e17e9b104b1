"""Which steps are captured: sizes that graphs are made for, and the one that a step runs."""

from __future__ import annotations

import pytest

from vllm.v1.worker.gpu.cuda_graphs import decode_graph_sizes, prompt_graph_sizes
from vllm.v1.worker.gpu.input_preparation import graph_size

LLAMA_8B, QWEN_600M = 8.03e9 / 32, 0.6e9 / 28


@pytest.mark.parametrize(
    ("max_num_tokens", "weights", "largest", "count"),
    [(8192, LLAMA_8B, 512, 8), (8192, QWEN_600M, 2048, 12), (100, QWEN_600M, 64, 3)],
)
def test_prompts_are_captured_up_to_where_launches_hide(
    max_num_tokens, weights, largest, count
) -> None:
    sizes = prompt_graph_sizes(max_num_tokens, weights)
    assert sizes == sorted(set(sizes), reverse=True)
    assert (sizes[0], len(sizes)) == (largest, count)


def test_large_layers_and_short_steps_have_no_graph() -> None:
    assert prompt_graph_sizes(8192, 2e10) == []
    assert prompt_graph_sizes(15, QWEN_600M) == []


@pytest.mark.parametrize("largest", [1, 3, 4, 8, 13, 256])
def test_every_batch_of_decodes_finds_its_graph(largest) -> None:
    sizes = decode_graph_sizes(largest)
    assert sizes[0] == largest
    for requests in range(1, largest + 1):
        size = graph_size(requests, largest)
        assert size in sizes
        assert size == min(s for s in sizes if s >= requests)
    assert graph_size(largest + 1, largest) == 0
