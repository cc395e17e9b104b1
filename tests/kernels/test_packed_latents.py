"""Latents and index keys as bytes: how many, how exact, and where each part lies."""

import pytest
import torch

from vllm.v1.attention.ops.packed_latents import (
    pack_index_keys,
    pack_latents,
    unpack_index_keys,
    unpack_latents,
)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3000.0])
def test_a_latent_is_584_bytes_and_comes_back(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 5, 512, generator=generator) * scale
    latents[0, 0, :64] = 0
    packed = pack_latents(latents)
    assert packed.shape == (3, 5, 584) and packed.dtype is torch.uint8
    back = unpack_latents(packed, torch.float32)
    # e4m3 has 3 bits behind the point; an exponent of the scale is whole, so one bit may be lost
    # at the bottom only.
    error = (back - latents).abs()
    most = latents[..., :448].unflatten(-1, (7, 64)).abs().amax(-1).repeat_interleave(64, -1)
    assert (error[..., :448] <= latents[..., :448].abs() / 16 + most / 448 / 512 * 2).all()
    assert torch.equal(back[..., 448:], latents[..., 448:].bfloat16().float())


def test_parts_of_a_packed_latent() -> None:
    latent = torch.zeros(512)
    latent[64:128] = 448.0
    latent[448] = 1.0
    packed = pack_latents(latent)
    assert packed[64:128].view(torch.float8_e4m3fn).float().eq(448).all()
    assert packed[448:450].view(torch.bfloat16).item() == 1.0
    assert packed[577] == 127, "the second group's scale is 2^0"
    assert packed[583] == 0


def test_index_keys_have_a_scale_each() -> None:
    keys = torch.randn(7, 128) * torch.logspace(-3, 3, 7).unsqueeze(1)
    packed = pack_index_keys(keys)
    assert packed.shape == (7, 132)
    back = unpack_index_keys(packed, torch.float32)
    most = keys.abs().amax(-1, keepdim=True)
    assert ((back - keys).abs() <= keys.abs() / 16 + most / 448 / 512).all()
    assert torch.equal(
        unpack_index_keys(pack_index_keys(torch.zeros(2, 16)), torch.float32).sum(),
        torch.tensor(0.0),
    )
