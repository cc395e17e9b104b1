"""Servers over Mooncake that differ in ranks, block sizes and layouts: NIXL's combinations."""

from __future__ import annotations

import pytest

from tests.kv_transfer.harness import STATEFUL
from tests.kv_transfer.mooncake_servers import (
    TCP,
    Cluster,
    ask_of,
    bootstrap_of,
    compare,
    engine_id_of,
    fetch_of,
    prompts,
    setup,
)
from tests.kv_transfer.test_matrix import COVERING, name_of
from tests.kv_transfer.test_matrix import setup as setup_of


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("combination", COVERING, ids=name_of)
def test_servers_that_differ_write_the_tokens_of_one(mooncake_fleet, tmp_path, combination):
    theirs, ours = (
        setup_of(combination, side, connector="MooncakeConnector", extra=TCP)
        for side in ("their", "our")
    )
    with Cluster(mooncake_fleet, tmp_path, theirs, ours) as cluster:
        compare(cluster, prompts(5))
        assert cluster.d.metric("vllm:kv_failed_transfers_total") == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", STATEFUL)
def test_convolutions_by_rows_with_other_ranks_are_refused(mooncake_fleet, model):
    """The client is told at once, and the decoder's log says which option works."""
    by_rows = (("VLLM_SSM_CONV_STATE_LAYOUT", "SD"),)
    p, d = mooncake_fleet.all_of(
        setup(model, role="kv_producer", tp=1, environment=by_rows),
        setup(model, role="kv_consumer", tp=2, environment=by_rows),
    )
    (prompt,) = prompts(1, 60)
    assert p.complete(prompt, 1, ask_of("r")).status_code == 200
    params = fetch_of("r", bootstrap_of(p), engine_id_of(p))
    response = d.complete(prompt, params=params)
    assert response.status_code == 500 and "could not be loaded" in response.text
    assert "VLLM_SSM_CONV_STATE_LAYOUT=DS" in d.log()
    d.wait_until_empty()
    p.wait_until_empty(40)
