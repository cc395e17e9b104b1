"""Loads, sends and their failures, with a connector that does what the test says."""

import pytest

from tests.core.helpers import FakeModel, full_spec, make_request, make_scheduler, window_spec
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    NullKVConnector,
    SupportsHMA,
    supports_hma,
)
from vllm.v1.engine import FinishReason
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus


class Metadata(KVConnectorMetadata):
    def __init__(self, loads):
        self.loads = loads


class StoreConnector(KVConnectorBase_V1, SupportsHMA):
    """Holds the KV of the first ``tokens`` tokens of every prompt, somewhere."""

    def __init__(self, tokens=0, load_async=False, keep=()):
        self.tokens, self.load_async, self.keep = tokens, load_async, set(keep)
        self.unknown: set[str] = set()
        self.loads: list[tuple[str, int]] = []
        self.finished: dict[str, tuple[list[int], ...]] = {}
        self.model: FakeModel | None = None

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        if request.request_id in self.unknown:
            return None, False
        found = min(self.tokens, request.num_prompt_tokens) - num_computed_tokens
        return max(0, found), self.load_async

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        if num_external_tokens:
            self.loads.append((request.request_id, num_external_tokens))
            if self.model is not None:
                # The bytes arrive as if by the worker half.
                model = self.model
                model.tables[request.request_id] = [list(ids) for ids in blocks.get_block_ids()]
                model.tokens[request.request_id] = request.all_token_ids.copy()
                row = model.tables[request.request_id][0]
                for position in range(min(self.tokens, request.num_prompt_tokens)):
                    key = 0, row[position // 16], position % 16
                    model.content[key] = model._fingerprint(request.request_id, position)

    def build_connector_meta(self, scheduler_output):
        loads, self.loads = self.loads, []
        return Metadata(loads)

    def request_finished_all_groups(self, request, block_ids):
        self.finished[request.request_id] = block_ids
        return request.request_id in self.keep, {"remote": request.request_id}

    def start_load_kv(self, forward_context, **kwargs): ...

    def wait_for_layer_load(self, layer_name): ...

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): ...

    def wait_for_save(self): ...


def setup(connector, *args, **kwargs):
    scheduler = make_scheduler(*args, connector=connector, **kwargs)
    model = FakeModel(scheduler)
    connector.model = model
    return scheduler, model


def test_a_synchronous_load_counts_as_computed():
    connector = StoreConnector(tokens=64)
    scheduler, model = setup(connector)
    scheduler.add_request(make_request("a", 100, max_tokens=2))
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 36}
    assert output.scheduled_new_reqs[0].num_computed_tokens == 64
    assert output.kv_connector_metadata.loads == [("a", 64)]
    outputs = scheduler.update_from_output(output, model.execute(output))
    stats = outputs[0].scheduler_stats
    assert (stats.external_prefix_cache_queries, stats.external_prefix_cache_hits) == (100, 64)
    assert outputs[0].outputs[0].num_cached_tokens == 64
    # What was loaded can be found by others.
    scheduler.add_request(make_request("b", 80, max_tokens=1))
    assert scheduler.schedule().scheduled_new_reqs[0].num_computed_tokens == 64


def test_the_last_token_is_computed_even_if_all_could_be_loaded():
    connector = StoreConnector(tokens=64)
    scheduler, _ = setup(connector)
    scheduler.add_request(make_request("a", 64, max_tokens=1))
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 1}
    assert output.kv_connector_metadata.loads == [("a", 63)]


def test_a_connector_that_does_not_know_yet_holds_up_only_its_request():
    connector = StoreConnector(tokens=0)
    connector.unknown = {"a"}
    scheduler, model = setup(connector, max_num_seqs=1)
    scheduler.add_request(make_request("a", 20, max_tokens=1))
    scheduler.add_request(make_request("b", 20, max_tokens=1))
    assert [out.request_id for out in model.step()] == ["b"]
    connector.unknown.clear()
    assert [out.request_id for out in model.step()] == ["a"]


def test_an_asynchronous_load_waits_without_computing_and_shares_nothing_meanwhile():
    connector = StoreConnector(tokens=64, load_async=True)
    scheduler, model = setup(connector)
    scheduler.add_request(request := make_request("a", 100, max_tokens=2))
    output = scheduler.schedule()
    scheduler.check_integrity()
    assert output.total_num_scheduled_tokens == 0
    assert request.status is RequestStatus.WAITING_FOR_REMOTE_KVS
    assert scheduler.kv_cache_manager.usage > 0 and scheduler.has_unfinished_requests()
    other = make_request("b", 80, max_tokens=1, block_hasher=scheduler.block_hasher)
    assert scheduler.kv_cache_manager.get_computed_blocks(other)[1] == 0
    outputs = scheduler.update_from_output(output, model.execute(output))
    assert outputs[0].scheduler_stats.num_waiting_by_reason == {"capacity": 0, "deferred": 1}
    model.step(KVConnectorOutput(finished_recving={"a"}))
    assert request.status is RequestStatus.WAITING
    assert scheduler.kv_cache_manager.get_computed_blocks(other)[1] == 64
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 36}
    outputs = scheduler.update_from_output(output, model.execute(output))
    assert outputs[0].outputs[0].num_cached_tokens == 64
    assert outputs[0].outputs[0].num_external_tokens == 64
    model.run()


def test_loaded_requests_that_block_each_other_give_way():
    connector = StoreConnector(tokens=1000, load_async=True)
    scheduler, model = setup(connector, 9)
    for i, name in enumerate("abcd"):
        prompt = [1000 * i + j for j in range(32)]
        scheduler.add_request(make_request(name, prompt, max_tokens=30))
    model.step()
    model.step(KVConnectorOutput(finished_recving=set("abcd")))
    # All blocks are held by requests that have one token less than they need blocks for.
    assert scheduler.kv_cache_manager.usage == 1.0
    connector.tokens = 0
    assert {len(tokens) for tokens in model.run().values()} == {30}
    assert scheduler.kv_cache_manager.usage == 0


def test_a_loaded_request_without_room_takes_that_of_the_last_loaded():
    connector = StoreConnector(tokens=64, load_async=True)
    scheduler, model = setup(connector, 9)
    for i, name in enumerate("ab"):
        prompt = [1000 * i + j for j in range(70)]
        scheduler.add_request(make_request(name, prompt, max_tokens=2))
    model.step()
    model.step(KVConnectorOutput(finished_recving=set("ab")))
    assert scheduler.kv_cache_manager.usage == 1.0
    connector.tokens = 0
    assert set(model.run()) == set("ab")


def test_a_whole_prompt_that_arrives_leaves_one_token_to_compute():
    connector = StoreConnector(tokens=1000, load_async=True)
    scheduler, model = setup(connector)
    scheduler.add_request(make_request("a", 64, max_tokens=3))
    model.step()
    model.step(KVConnectorOutput(finished_recving={"a"}))
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 1}


def test_blocks_being_written_survive_an_abort_until_the_load_ends():
    connector = StoreConnector(tokens=64, load_async=True)
    scheduler, model = setup(connector)
    scheduler.add_request(make_request("a", 100))
    model.step()
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    scheduler.check_integrity()
    assert not scheduler.requests and scheduler.kv_cache_manager.usage > 0
    model.step(KVConnectorOutput(finished_recving={"a"}))
    assert scheduler.kv_cache_manager.usage == 0
    # Nobody knows whether they were complete.
    other = make_request("b", 80, block_hasher=scheduler.block_hasher)
    assert scheduler.kv_cache_manager.get_computed_blocks(other)[1] == 0


def test_blocks_being_sent_survive_their_request():
    connector = StoreConnector(keep={"a"})
    scheduler, model = setup(connector)
    scheduler.add_request(make_request("a", 100, max_tokens=1))
    (out,) = model.step()
    assert out.finished and out.kv_transfer_params == {"remote": "a"}
    assert len(connector.finished["a"][0]) == 7
    assert not scheduler.requests and scheduler.kv_cache_manager.usage > 0
    model.step(KVConnectorOutput(finished_sending={"a"}))
    assert scheduler.kv_cache_manager.usage == 0


def test_an_aborted_load_whose_blocks_are_also_sent_is_freed_after_both():
    connector = StoreConnector(tokens=64, load_async=True, keep={"a"})
    scheduler, model = setup(connector)
    scheduler.add_request(make_request("a", 100))
    model.step()
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    model.step(KVConnectorOutput(finished_recving={"a"}))
    assert scheduler.kv_cache_manager.usage > 0
    model.step(KVConnectorOutput(finished_sending={"a"}))
    assert scheduler.kv_cache_manager.usage == 0


@pytest.mark.parametrize("how", ["request", "blocks"])
def test_a_failed_load_ends_the_request_by_default(how):
    connector = StoreConnector(tokens=64, load_async=True)
    scheduler, model = setup(connector, load_failure_policy="fail")
    scheduler.add_request(make_request("a", 100))
    model.step()
    if how == "request":
        (out,) = model.step(KVConnectorOutput(failed_recving={"a"}))
    else:
        bad = connector.model.tables["a"][0][1]
        assert model.step(KVConnectorOutput(invalid_block_ids={bad})) == []
        assert scheduler.kv_cache_manager.usage > 0
        (out,) = model.step(KVConnectorOutput(finished_recving={"a"}))
    assert out.finish_reason is FinishReason.ERROR and out.error_type == "KVTransferError"
    assert "kv_load_failure_policy" in out.error
    assert not scheduler.has_unfinished_requests() and scheduler.kv_cache_manager.usage == 0


@pytest.mark.parametrize("how", ["request", "blocks"])
def test_a_failed_load_is_recomputed_where_asked(how):
    connector = StoreConnector(tokens=64, load_async=True)
    scheduler, model = setup(connector, load_failure_policy="recompute")
    scheduler.add_request(make_request("a", 100, max_tokens=2))
    model.step()
    if how == "request":
        model.step(KVConnectorOutput(failed_recving={"a"}))
    else:
        bad = connector.model.tables["a"][0][1]
        model.step(KVConnectorOutput(invalid_block_ids={bad}))
        model.step(KVConnectorOutput(finished_recving={"a"}))
    # It is not loaded again, and says that nothing was cached.
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 100}
    outputs = scheduler.update_from_output(output, model.execute(output))
    assert outputs[0].outputs[0].num_cached_tokens == 0
    assert outputs[0].outputs[0].num_external_tokens == 0
    model.run()


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_bad_blocks_of_a_synchronous_load_taint_all_who_read_them(policy):
    connector = StoreConnector(tokens=64)
    scheduler, model = setup(connector, load_failure_policy=policy)
    prompt = [100 + i for i in range(100)]
    scheduler.add_request(make_request("a", prompt, max_tokens=3))
    # "b" shares the loaded blocks, "c" what "b" computes after them, "d" nothing.
    scheduler.add_request(make_request("b", prompt[:80] + [7] * 30, max_tokens=3))
    scheduler.add_request(make_request("c", prompt[:80] + [7] * 60, max_tokens=3))
    scheduler.add_request(make_request("d", [900 + i for i in range(90)], max_tokens=3))
    connector.tokens = 64
    output = scheduler.schedule()
    bad = model_row(output, "a")[2]
    result = model.execute(output, KVConnectorOutput(invalid_block_ids={bad}))
    outs = scheduler.update_from_output(output, result)[0].outputs
    scheduler.check_integrity()
    by_id = {out.request_id: out for out in outs}
    assert by_id["d"].new_token_ids and not by_id["d"].finished
    if policy == "fail":
        assert all(by_id[r].finish_reason is FinishReason.ERROR for r in "abc")
        assert all(by_id[r].new_token_ids == [] for r in "abc")
    else:
        assert set(by_id) == {"d"}
        assert all(scheduler.requests[r].status is RequestStatus.PREEMPTED for r in "abc")
    # Two good blocks stay findable, nothing behind them does.
    probe = make_request("probe", prompt, block_hasher=scheduler.block_hasher)
    assert scheduler.kv_cache_manager.get_computed_blocks(probe)[1] == 32
    connector.tokens = 0
    tokens = model.run()
    assert set(tokens) == ({"d"} if policy == "fail" else set("abcd"))
    assert all(len(t) == 3 for r, t in tokens.items() if r != "d")
    assert scheduler.kv_cache_manager.usage == 0


def model_row(output, request_id):
    return next(n for n in output.scheduled_new_reqs if n.req_id == request_id).block_ids[0]


def test_a_bad_block_in_one_group_recomputes_the_request_in_all():
    connector = StoreConnector()
    scheduler, model = setup(
        connector, 60, full_spec(), window_spec(32), load_failure_policy="recompute"
    )
    scheduler.add_request(request := make_request("a", 100, max_tokens=5))
    output = scheduler.schedule()
    bad = output.scheduled_new_reqs[0].block_ids[1][4]
    result = model.execute(output, KVConnectorOutput(invalid_block_ids={bad}))
    scheduler.update_from_output(output, result)
    scheduler.check_integrity()
    assert request.status is RequestStatus.PREEMPTED
    assert len(model.run()["a"]) == 5


def test_what_the_workers_report_reaches_the_connector():
    connector = StoreConnector()
    seen = []
    connector.update_connector_output = seen.append
    scheduler, model = setup(connector)
    scheduler.add_request(make_request("a", 20, max_tokens=1))
    report = KVConnectorOutput(kv_connector_stats={"bytes": 5})
    model.step(report)
    assert seen == [report]


def test_steps_go_on_while_a_connector_pushes():
    connector = StoreConnector()
    scheduler, _ = setup(connector)
    assert not scheduler.has_requests()
    connector.has_pending_push_work = lambda: True
    assert scheduler.has_requests()


def test_a_connector_without_support_for_groups_gets_a_flat_list():
    class Flat(StoreConnector):
        def request_finished(self, request, block_ids):
            self.finished[request.request_id] = block_ids
            return False, None

    # As a class of its own that does not have the marker.
    members = {k: v for k, v in vars(StoreConnector).items() if not k.startswith("__")}
    members |= {"request_finished": Flat.request_finished, "__init__": StoreConnector.__init__}
    del members["request_finished_all_groups"], members["_abc_impl"]
    plain = type("Plain", (KVConnectorBase_V1,), members)
    assert not supports_hma(plain) and supports_hma(StoreConnector)
    connector = plain()
    scheduler, model = setup(connector)
    scheduler.add_request(make_request("a", 20, max_tokens=1))
    model.step()
    assert len(connector.finished["a"]) == 2 and isinstance(connector.finished["a"][0], int)


def test_the_base_class_has_defaults_for_all_but_the_essentials():
    essentials = {
        "start_load_kv",
        "wait_for_layer_load",
        "save_kv_layer",
        "wait_for_save",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
    }
    assert KVConnectorBase_V1.__abstractmethods__ == essentials
    from tests.core.helpers import make_vllm_config

    class Minimal(StoreConnector):
        __init__ = KVConnectorBase_V1.__init__

    connector = Minimal(make_vllm_config(), KVConnectorRole.WORKER, None)
    assert connector.role is KVConnectorRole.WORKER
    assert connector.get_finished({"a"}) == (None, None)
    assert connector.get_transfer_results(set()).failed_recving is None
    assert connector.get_block_ids_with_load_errors() == set()
    connector.bind_connector_metadata(metadata := Metadata([]))
    assert connector.has_connector_metadata()
    assert connector._get_connector_metadata() is metadata
    connector.clear_connector_metadata()
    assert not connector.has_connector_metadata()
    with pytest.raises(ValueError, match="--pipeline-parallel-size 1"):
        connector.set_xfer_handshake_metadata_pp_aware({(1, 0): None})


def test_no_connector_means_nothing_to_load_or_keep():
    connector = NullKVConnector()
    request = make_request("a", 10)
    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    assert connector.request_finished(request, []) == (False, None)
