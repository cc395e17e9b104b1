"""Reports of several workers' connectors become one."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput


def output(**report: object) -> ModelRunnerOutput:
    return ModelRunnerOutput(
        ["a"], {"a": 0}, [[1]], kv_connector_output=KVConnectorOutput(**report) if report else None
    )


class Stats:
    def __init__(self, count: int) -> None:
        self.count = count

    def aggregate(self, other: Stats) -> Stats:
        return Stats(self.count + other.count)


def test_a_transfer_has_ended_when_all_workers_have_said_so():
    aggregator = KVOutputAggregator(2)
    first = aggregator.aggregate(
        [
            output(finished_sending={"x", "y"}, finished_recving={"z"}),
            output(finished_sending={"x"}),
        ]
    )
    assert first.sampled_token_ids == [[1]]
    assert first.kv_connector_output.finished_sending == {"x"}
    assert first.kv_connector_output.finished_recving is None
    second = aggregator.aggregate([output(), output(finished_sending={"y"})])
    assert second.kv_connector_output.finished_sending == {"y"}
    third = aggregator.aggregate([output(), output(finished_recving={"z"})])
    assert third.kv_connector_output.finished_recving == {"z"}
    assert aggregator.aggregate([output(), output()]).kv_connector_output is None
    # An id may come again.
    again = aggregator.aggregate([output(finished_sending={"x"}), output()])
    assert again.kv_connector_output is None


def test_a_load_that_failed_anywhere_has_failed_once_all_are_done_with_it():
    aggregator = KVOutputAggregator(2)
    first = aggregator.aggregate([output(failed_recving={"x"}), output(invalid_block_ids={4})])
    assert first.kv_connector_output == KVConnectorOutput(invalid_block_ids={4})
    second = aggregator.aggregate([output(), output(finished_recving={"x"})])
    assert second.kv_connector_output == KVConnectorOutput(failed_recving={"x"})
    both = aggregator.aggregate([output(failed_recving={"x"}), output(failed_recving={"x"})])
    assert both.kv_connector_output == KVConnectorOutput(failed_recving={"x"})


def test_what_else_workers_report_is_put_together():
    aggregator = KVOutputAggregator(3)
    joined = aggregator.aggregate(
        [
            output(kv_connector_stats=Stats(1), kv_cache_events=["a"]),
            output(kv_connector_stats=Stats(2), invalid_block_ids={1}),
            output(kv_cache_events=["b"], invalid_block_ids={2}),
        ],
        output_rank=2,
    ).kv_connector_output
    assert joined.kv_connector_stats.count == 3
    assert joined.kv_cache_events == ["a", "b"]
    assert joined.invalid_block_ids == {1, 2}


def test_counters_are_added_up_and_one_stuck_worker_is_enough():
    aggregator = KVOutputAggregator(2)
    joined = aggregator.aggregate(
        [
            output(kv_connector_stats={"bytes": 3, "loads": 1}),
            output(kv_connector_stats={"bytes": 4}, stuck_recving={"z"}),
        ]
    ).kv_connector_output
    assert joined.kv_connector_stats == {"bytes": 7, "loads": 1}
    assert joined.stuck_recving == {"z"} and not joined.failed_recving
    later = aggregator.aggregate([output(finished_recving={"z"}), output(failed_recving={"z"})])
    assert later.kv_connector_output.failed_recving == {"z"}
