"""Workers as Ray actors, here on a cluster of two nodes of this host."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import ENGINE_ARGS
from vllm import LLM, SamplingParams
from vllm.errors import CapacityError, WorkerError
from vllm.v1.executor.ray_executor import RayDistributedExecutor

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=2)
PROMPTS = ["The quick brown", "def main", [7, 8, 9] * 20]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, with a CPU each: two workers cannot share one."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, logging_level="warning")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def start(model: Path, **kwargs: Any) -> LLM:
    return LLM(str(model), **{**ENGINE_ARGS, **kwargs}, distributed_executor_backend="ray")


def node_of(worker: Any) -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def nap(worker: Any, seconds: float) -> int:
    time.sleep(seconds)
    return worker.rank


def test_two_nodes_give_the_tokens_of_one_process_until_an_actor_is_killed(
    tiny_model: Path, llm: LLM, cluster: Any
):
    import ray

    two = start(tiny_model, tensor_parallel_size=2)
    executor = two.llm_engine.client._core.executor
    assert isinstance(executor, RayDistributedExecutor)
    nodes = executor.collective_rpc(node_of)
    assert len(set(nodes)) == 2
    expected = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    got = two.generate(PROMPTS, GREEDY, use_tqdm=False)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        for mine, other in zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            assert {t: e.logprob for t, e in mine.items()} == pytest.approx(
                {t: e.logprob for t, e in other.items()}, abs=1e-4
            )
    assert two.collective_rpc("check_health") == [None, None]
    with pytest.raises(TimeoutError, match=r"nap: no answer within 0\.05 s from 2 of 2 workers"):
        executor.collective_rpc(nap, (2.0,), timeout=0.05)
    assert executor.collective_rpc(nap, (0.0,), timeout=60) == [0, 1]

    heard: list[Exception] = []
    executor.register_failure_callback(heard.append)
    ray.kill(executor._workers[1])
    deadline = time.monotonic() + 20
    while not heard and time.monotonic() < deadline:
        time.sleep(0.1)
    assert isinstance(heard[0], WorkerError)
    with pytest.raises(WorkerError, match="a Ray worker has failed"):
        two.generate(PROMPTS, GREEDY, use_tqdm=False)
    two.shutdown()


def test_a_cluster_without_room_is_one_line(tiny_model: Path, cluster: Any):
    with pytest.raises(CapacityError, match="4 workers need 4 CPU of the Ray cluster, which has 2"):
        start(tiny_model, tensor_parallel_size=4)
