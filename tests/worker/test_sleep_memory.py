"""Weights that are moved into one region: same values, same sharing, nothing left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from tests.worker.driver import make_config, make_hf_model
from vllm import _extension
from vllm.forward_context import ForwardContext, set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.gpu.sleep import move_weights, weights_size


class Parts(nn.Module):
    """One of each kind of tensor that a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(7, 5)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.randn(9, 4).t())
        self.plain = torch.randn(3, dtype=torch.float64)
        joined = torch.randn(6, 10)
        self.upper = nn.Parameter(joined[:2], requires_grad=False)
        self.lower = nn.Parameter(joined[2:, 1::2], requires_grad=False)
        self.nothing = torch.empty(0)
        self.bytes = torch.arange(5, dtype=torch.uint8)

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {name: self.__dict__[name] for name in ("plain", "nothing", "bytes")}
        return dict(self.named_parameters()) | dict(self.named_buffers()) | own


def test_every_kind_of_tensor_keeps_values_strides_and_sharing() -> None:
    model = Parts()
    before = {name: (t.detach().clone(), t.stride()) for name, t in model.tensors().items()}
    size = weights_size(model, "cpu")
    region = torch.full((size,), 77, dtype=torch.int8)
    ends: list[int] = []
    move_weights(model, region, ends.append)
    assert ends == sorted(ends) and ends[-1] == size
    inside = range(region.data_ptr(), region.data_ptr() + size)
    for name, tensor in model.tensors().items():
        values, stride = before[name]
        assert torch.equal(tensor, values) and tensor.stride() == stride, name
        assert tensor.data_ptr() in inside or not tensor.numel(), name
    assert model.second.weight is model.first.weight
    step = model.lower.data_ptr() - model.upper.data_ptr()
    assert step == (2 * 10 + 1) * 4
    # What the region holds is what the model shows.
    region.zero_()
    assert not any(tensor.any() for tensor in model.tensors().values())


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_computes_the_same_from_the_region(tmp_path, monkeypatch, tied: bool) -> None:
    # As on a GPU: weights are not packed for the CPU's kernels, which know their addresses.
    monkeypatch.setattr(_extension, "kernels", None)
    make_hf_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = get_model(make_config(tmp_path))
    ids, positions = torch.arange(20) * 7 % 160, torch.arange(20)

    def run() -> torch.Tensor:
        context = ForwardContext(None, model.static_forward_context)
        with torch.inference_mode(), set_forward_context(context):
            return model.compute_logits(model(ids, positions))

    expected = run()
    old = {parameter.data_ptr() for parameter in model.parameters()}
    region = torch.zeros(weights_size(model, "cpu"), dtype=torch.int8)
    move_weights(model, region)
    gc.collect()
    assert torch.equal(run(), expected)
    assert not [
        tensor.shape
        for tensor in gc.get_objects()
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.data_ptr() in old
    ]
    region.zero_()
    assert not torch.equal(run(), expected)
