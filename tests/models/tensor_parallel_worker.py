"""One rank of a tensor-parallel run, as a process: saves the logits of each checkpoint.

Usage: python -m tests.models.tensor_parallel_worker [--dummy] RANK SIZE RENDEZVOUS OUTPUT
CHECKPOINT...; with --dummy weights are random, and checkpoints need only their config.json.
"""

import sys

import torch

from tests.models.harness import TOKENS, PagedModel, make_config
from vllm import _custom_ops as ops
from vllm.distributed.communication_op import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
    tensor_model_parallel_gather,
)
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers.attention import Attention


def check_collectives(rank: int, size: int) -> None:
    assert get_tensor_model_parallel_rank() == rank
    assert get_tensor_model_parallel_world_size() == size
    mine = torch.full((2, 1), float(rank))
    everyone = torch.arange(float(size)).repeat(2, 1)
    assert torch.equal(tensor_model_parallel_all_gather(mine), everyone)
    assert torch.equal(tensor_model_parallel_all_gather(mine, dim=0)[::2, 0], everyone[0])
    total = tensor_model_parallel_all_reduce(mine.clone())
    assert torch.equal(total, torch.full((2, 1), float(sum(range(size)))))
    gathered = tensor_model_parallel_gather(mine)
    assert torch.equal(gathered, everyone) if rank == 0 else gathered is None
    assert torch.equal(get_tp_group().broadcast(mine.clone(), src=1), torch.ones(2, 1))
    get_tp_group().barrier()


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--dummy"]
    load_format = "auto" if len(arguments) == len(sys.argv) - 1 else "dummy"
    rank, size, rendezvous, output, *checkpoints = arguments
    rank, size = int(rank), int(size)
    torch.set_num_threads(1)
    ops.set_num_threads(1)
    init_distributed_environment(size, rank, f"file://{rendezvous}")
    initialize_model_parallel(size)
    check_collectives(rank, size)
    logits, heads = [], []
    for checkpoint in checkpoints:
        paged = PagedModel(
            make_config(checkpoint, tensor_parallel_size=size, load_format=load_format)
        )
        logits.append(paged.logits(TOKENS, chunk=40))
        heads.append(
            [layer.num_kv_heads for layer in paged.layers.values() if isinstance(layer, Attention)]
        )
    torch.save({"logits": logits, "kv_heads": heads}, f"{output}.{rank}")
    destroy_model_parallel()
    destroy_distributed_environment()


if __name__ == "__main__":
    main()
