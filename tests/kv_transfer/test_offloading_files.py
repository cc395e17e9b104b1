"""Offloading's second tier: from host memory to files by NIXL, and back, on a tiny model."""

from __future__ import annotations

import hashlib
import importlib.util
import resource
import signal

import pytest

from tests.kv_transfer.conftest import cached, greedy, prompt_of
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_files import (
    TRAILER_BYTES,
    FileIndex,
    FileReport,
)
from vllm.errors import CapacityError, ConfigError

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="needs nixl: pip install 'vllm[nixl]'",
)
PROMPTS = [prompt_of(70, 1), prompt_of(33, 2), prompt_of(100, 3), prompt_of(17, 4)]
FILLER = [prompt_of(100, seed) for seed in range(9, 13)]


def offloading(folder, blocks=8, bytes_to_use=64 << 20, **more):
    extra = {"num_cpu_blocks": blocks, "file_path": str(folder), "file_bytes_to_use": bytes_to_use}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra | more,
    }


def files_in(folder):
    return sorted(folder.glob("*/rank*/*/*.kv"))


def each(llm, prompts, count=8):
    """One after the other: the 8 blocks of host memory are enough for what a step stores."""
    return [greedy(llm, [prompt], count)[0] for prompt in prompts]


def evict(llm):
    """Everything before it leaves the cache of 17 blocks and the host memory of 8."""
    each(llm, FILLER, count=1)


def metric(llm, name):
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:kv_offload_{name}")


@pytest.fixture
def make_offloading(make_llm, tmp_path):
    def make(**kwargs):
        config = kwargs.pop("config", None) or offloading(tmp_path)
        return make_llm(kv_transfer_config=config, num_gpu_blocks_override=18, **kwargs)

    return make


@pytest.mark.parametrize("layout", ["BHLNC", "LBHNC"])
def test_blocks_come_back_from_files(make_llm, make_offloading, tmp_path, monkeypatch, layout):
    plain = greedy(make_llm(), PROMPTS)
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    llm = make_offloading()
    assert each(llm, PROMPTS) == plain
    evict(llm)
    assert files_in(tmp_path)
    for prompt, expected, tokens in zip(PROMPTS, plain, (64, 32, 96, 16), strict=True):
        evict(llm)
        assert cached(llm, prompt) == tokens
        assert each(llm, [prompt]) == [expected]
    llm.llm_engine.client.call_utility("check_integrity")


def test_another_engine_finds_the_files(make_llm, make_offloading, tmp_path):
    """After a restart, or beside this one; an engine whose blocks mean something else does not."""
    plain = greedy(make_llm(), PROMPTS)
    first = make_offloading()
    each(first, PROMPTS)
    evict(first)
    second = make_offloading()
    assert cached(second, PROMPTS[2]) == 96
    assert each(second, PROMPTS) == plain
    assert cached(make_offloading(block_size=32), PROMPTS[0]) == 0
    assert cached(make_offloading(dtype="bfloat16"), PROMPTS[0]) == 0


def test_what_was_read_is_what_counts(make_llm, make_offloading, tmp_path):
    """Otherwise the tests above would pass without any file: bytes with a right checksum."""
    plain = greedy(make_llm(), PROMPTS[:1])
    llm = make_offloading()
    each(llm, PROMPTS[:1])
    evict(llm)
    for file in files_in(tmp_path):
        content = bytearray(file.read_bytes())
        body = content[:-TRAILER_BYTES]
        body[3::4] = bytes(byte ^ 0x80 for byte in body[3::4])
        digest = hashlib.sha256(bytes.fromhex(file.stem) + body).digest()
        file.write_bytes(body + content[-TRAILER_BYTES:-32] + digest)
    assert each(llm, PROMPTS[:1]) != plain


SPOILT = {
    "missing": lambda file: file.unlink(),
    "short": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "empty": lambda file: file.write_bytes(b""),
    "one bit": lambda file: file.write_bytes(
        bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]
    ),
    "another block": lambda file: file.write_bytes(
        next(o for o in sorted(file.parents[1].glob("*/*.kv")) if o != file).read_bytes()
    ),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_bad_file_is_computed_again(make_llm, make_offloading, tmp_path, how):
    """Only from that block on, and whatever the failure policy is: nothing was promised."""
    plain = greedy(make_llm(), PROMPTS)
    llm = make_offloading()
    each(llm, PROMPTS)
    evict(llm)
    for file in files_in(tmp_path):
        SPOILT[how](file)
    assert cached(llm, PROMPTS[2]) == 0
    assert each(llm, PROMPTS) == plain
    assert metric(llm, "file_failed_loads") > 0
    evict(llm)
    evict(llm)
    if how != "a folder":
        assert cached(llm, PROMPTS[0]) == 64


def test_a_full_disk_costs_blocks_and_nothing_else(make_llm, make_offloading, tmp_path, caplog):
    plain = greedy(make_llm(), PROMPTS)
    llm = make_offloading()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert each(llm, PROMPTS) == plain
        evict(llm)
        assert not list(tmp_path.glob("*/rank*/*/*"))
        assert cached(llm, PROMPTS[0]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert metric(llm, "file_failed_stores") > 0
    assert caplog.text.count("is the disk full?") == 1
    # There is room again.
    assert each(llm, PROMPTS) == plain
    evict(llm)
    assert cached(llm, PROMPTS[0]) == 64


def test_no_more_bytes_are_used_than_allowed(make_offloading, tmp_path):
    llm = make_offloading(config=offloading(tmp_path, bytes_to_use=100_000))
    each(llm, PROMPTS)
    evict(llm)
    each(llm, [prompt_of(100, seed) for seed in range(20, 26)], count=1)
    evict(llm)
    sizes = [file.stat().st_size for file in files_in(tmp_path)]
    assert sizes and sum(sizes) <= 100_000 < sum(sizes) + 2 * sizes[0]


def test_a_reset_deletes_the_files(make_offloading, tmp_path):
    """Weights may have changed: nothing computed before may be found."""
    llm = make_offloading()
    each(llm, PROMPTS)
    evict(llm)
    assert files_in(tmp_path)
    connector = llm.llm_engine.client._core.scheduler.kv_transfer.connector
    assert connector.reset_cache()
    assert llm.reset_prefix_cache()
    assert cached(llm, PROMPTS[0]) == 0
    assert not files_in(tmp_path)


def test_what_cannot_work_is_refused_at_start(make_offloading, tmp_path):
    alone = offloading(tmp_path)
    del alone["kv_connector_extra_config"]["file_bytes_to_use"]
    with pytest.raises(ConfigError, match="file_path and file_bytes_to_use together"):
        make_offloading(config=alone)
    with pytest.raises(CapacityError, match="raise file_bytes_to_use"):
        make_offloading(config=offloading(tmp_path, bytes_to_use=10))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file_path .* cannot be used"):
        make_offloading(config=offloading(tmp_path / "file"))


def test_files_are_known_by_last_use(tmp_path):
    index = FileIndex(2, tmp_path)
    for name in (b"a", b"b"):
        index.add(name)
    index.use(b"a")
    index.add(b"c")
    assert index.take_unwanted() == [b"b"] and len(index) == 2
    index.drop(b"a")
    index.drop(b"a")
    assert index.take_unwanted() == [b"a"] and b"a" not in index
    index.clear()
    index.add(b"c")
    assert index.take_unwanted() == []


def test_what_failed_on_one_rank_has_failed():
    ours = FileReport(fetched={b"a", b"b"}, not_written={b"w"})
    theirs = FileReport(fetched={b"a"}, not_fetched={b"b"})
    joined = ours.aggregate(theirs)
    assert joined == FileReport(fetched={b"a"}, not_fetched={b"b"}, not_written={b"w"})


@pytest.mark.slow
def test_every_rank_has_files_of_its_own(make_llm, make_offloading, tmp_path):
    plain = greedy(make_llm(), PROMPTS)
    llm = make_offloading(tensor_parallel_size=2)
    assert each(llm, PROMPTS) == plain
    evict(llm)
    assert len(list(tmp_path.glob("*/rank*"))) == 2
    assert cached(llm, PROMPTS[2]) == 96
    assert each(llm, PROMPTS) == plain
    evict(llm)
    for file in tmp_path.glob("*/rank1/*/*.kv"):
        file.unlink()
    assert each(llm, PROMPTS) == plain
