"""Embedding and head are cut by vocabulary; a vocabulary that doesn't divide is padded."""

import pytest
import torch

from tests.models.test_linear import load, seen_from
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.layers.weight_loading import WeightShapeError

VOCAB, WIDTH = 11, 6


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_the_ranks_sum_to_the_embedding(size):
    table = torch.randn(VOCAB, WIDTH)
    ids = torch.tensor([0, 10, 5, 5, 3, 6])
    total = torch.zeros(len(ids), WIDTH)
    for rank in range(size):
        with seen_from(rank, size):
            layer = VocabParallelEmbedding(VOCAB, WIDTH)
            load(layer, "weight", table)
            layer.process_weights_after_loading()
            total += layer(ids)
    assert torch.equal(total, table[ids])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_columns_of_the_ranks_are_the_logits(size):
    table, bias, hidden = torch.randn(VOCAB, WIDTH), torch.randn(VOCAB), torch.randn(3, WIDTH)
    parts = []
    for rank in range(size):
        with seen_from(rank, size):
            head = ParallelLMHead(VOCAB, WIDTH, bias=True)
        load(head, "weight", table)
        load(head, "bias", bias)
        head.process_weights_after_loading()
        parts.append(head.project(hidden))
    logits = torch.cat(parts, -1)
    torch.testing.assert_close(logits[:, :VOCAB], hidden @ table.T + bias)
    assert torch.equal(logits[:, VOCAB:], torch.zeros(3, logits.shape[1] - VOCAB))


def test_added_rows_are_zero_and_cut_off():
    head = ParallelLMHead(VOCAB + 3, WIDTH, org_num_embeddings=VOCAB)
    table, hidden = torch.randn(VOCAB, WIDTH), torch.randn(3, WIDTH)
    load(head, "weight", table)
    logits = LogitsProcessor(VOCAB + 3, VOCAB)(head, hidden)
    torch.testing.assert_close(logits, hidden @ table.T)


def test_soft_cap_and_scale():
    head = ParallelLMHead(VOCAB, WIDTH)
    table, hidden = torch.randn(VOCAB, WIDTH), torch.randn(3, WIDTH)
    load(head, "weight", table)
    logits = LogitsProcessor(VOCAB, scale=0.5, soft_cap=2.0)(head, hidden)
    torch.testing.assert_close(logits, torch.tanh(hidden @ table.T / 2) * 2 * 0.5)


def test_a_head_is_not_read_from():
    with pytest.raises(RuntimeError, match="output head"):
        ParallelLMHead(VOCAB, WIDTH)(torch.zeros(1, dtype=torch.int64))


def test_another_vocabulary_is_a_wrong_shape():
    with pytest.raises(WeightShapeError, match=r"\[12, 6\], expected \[11, 6\]"):
        load(VocabParallelEmbedding(VOCAB, WIDTH), "weight", torch.zeros(12, WIDTH))
