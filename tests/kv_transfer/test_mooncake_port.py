"""The Mooncake port: two engines in one process, real bytes, and what must be refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.kv_transfer import mooncake
from tests.kv_transfer.mooncake import REQUIRED, own_network, require_mooncake
from vllm.distributed.kv_transfer.transport import mooncake as transport
from vllm.distributed.kv_transfer.transport.mooncake import MooncakePort, joined_runs
from vllm.distributed.kv_transfer.transport.port import PeerLostError, PortError
from vllm.errors import ConfigError

SIZE = 4 << 20


@pytest.fixture(scope="module")
def network():
    require_mooncake()
    with pytest.MonkeyPatch.context() as patch, own_network():
        patch.setenv("GLOG_minloglevel", "3")
        yield


class End:
    def __init__(self, **options):
        self.memory = np.zeros(SIZE, dtype=np.uint8)
        self.port = MooncakePort("127.0.0.1", "tcp", **options)
        self.port.register([(self.memory.ctypes.data, SIZE)], "cpu")

    def rows(self, length, start=0):
        count = (SIZE - start) // length
        return np.array([[self.memory.ctypes.data + start, length, length, count]], dtype=np.int64)


@pytest.fixture(scope="module")
def ends(network):
    made = End(), End()
    yield made
    for end in made:
        end.port.close()


def finish(port, transfer):
    while not port.poll(transfer):
        pass


def lists(ours, theirs, length):
    peer = ours.port.connect(theirs.port.metadata())
    return ours.port.prepare(None, ours.rows(length)), ours.port.prepare(peer, theirs.rows(length))


@pytest.mark.parametrize("length", [512, 65536])
def test_what_is_written_is_there_and_nothing_else(ends, length):
    """More runs than Mooncake takes at a time, none of them neighbours."""
    ours, theirs = ends
    rng = np.random.default_rng(3)
    ours.memory[:] = rng.integers(0, 256, SIZE, dtype=np.uint8)
    theirs.memory[:] = 7
    local, remote = lists(ours, theirs, length)
    count = SIZE // length // 2
    out_of, into = rng.permutation(2 * count)[:count], rng.permutation(2 * count)[:count]
    finish(ours.port, ours.port.write(local, out_of, remote, into))
    expected = np.full((2 * count, length), 7, dtype=np.uint8)
    expected[into] = ours.memory.reshape(-1, length)[out_of]
    assert np.array_equal(theirs.memory.reshape(-1, length), expected)


def test_several_copies_share_the_places(network):
    ours, theirs = End(max_in_flight=3), End()
    ours.memory[:] = np.arange(SIZE, dtype=np.uint64).astype(np.uint8)
    local, remote = lists(ours, theirs, 4096)
    every_second = np.arange(0, SIZE // 4096, 2)
    copies = [
        ours.port.write(local, part, remote, part) for part in np.array_split(every_second, 5)
    ]
    while copies:
        copies = [copy for copy in copies if not ours.port.poll(copy)]
    got = theirs.memory.reshape(-1, 4096)
    assert np.array_equal(got[every_second], ours.memory.reshape(-1, 4096)[every_second])
    assert not got[1::2].any()
    for end in (ours, theirs):
        end.port.close()


def test_memory_that_is_nobodys_is_not_touched(ends):
    ours, theirs = ends
    with pytest.raises(PortError, match="is not registered"):
        ours.port.prepare(None, ours.rows(4096) + np.array([[SIZE, 0, 0, 0]]))
    local, _ = lists(ours, theirs, 4096)
    peer = ours.port.connect(theirs.port.metadata())
    outside = ours.port.prepare(peer, theirs.rows(4096) + np.array([[SIZE, 0, 0, 0]]))
    transfer = ours.port.write(local, np.array([0]), outside, np.array([0]))
    with pytest.raises(PortError, match="has failed"):
        finish(ours.port, transfer)
    for bad in ([-1], [SIZE // 4096], []):
        with pytest.raises(PortError, match="descriptor"):
            ours.port.write(local, np.array(bad, dtype=np.int64), outside, np.array([0]))
    with pytest.raises(PortError, match="differ in number or length"):
        ours.port.write(local, np.array([0, 1]), outside, np.array([0]))
    with pytest.raises(PortError, match="only writes"):
        ours.port.read(local, np.array([0]), outside, np.array([0]))


def test_peers_that_are_none_are_refused(ends):
    ours, _ = ends
    for metadata in (
        b"",
        b"\xc1",
        b"\x81\xa4peer\xa1x",
        b"\x80\x04pickle",
        b"\x81\xa4peer\xa1\xff",
    ):
        with pytest.raises(PortError):
            ours.port.connect(metadata)
    with pytest.raises(PeerLostError, match=r"no Mooncake engine at 127\.0\.0\.1:1"):
        ours.port.connect(b"\x81\xa4peer\xab127.0.0.1:1")


def test_an_engine_that_has_closed_fails_the_copy(network):
    ours, theirs = End(), End()
    local, remote = lists(ours, theirs, 4096)
    finish(ours.port, ours.port.write(local, np.array([3]), remote, np.array([3])))
    theirs.port.close()
    transfer = ours.port.write(local, np.array([3]), remote, np.array([3]))
    with pytest.raises(PortError, match="has failed"):
        finish(ours.port, transfer)
    ours.port.close()


def test_neighbours_on_both_sides_are_one_run():
    own = np.array([0, 10, 20, 40, 50])
    theirs = np.array([100, 110, 200, 300, 310])
    lengths = np.array([10, 10, 10, 10, 10])
    assert joined_runs(own, theirs, lengths) == [(0, 100, 20), (20, 200, 10), (40, 300, 20)]
    assert joined_runs(own, theirs, lengths, longest=15) == [
        (0, 100, 15),
        (15, 115, 5),
        (20, 200, 10),
        (40, 300, 15),
        (55, 315, 5),
    ]


# Where Mooncake cannot be used


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(ConfigError, match="pip install"):
        MooncakePort("127.0.0.1", "tcp")

    def import_module(name):
        raise ImportError("libibverbs.so.1: cannot open shared object file")

    monkeypatch.setattr(transport, "import_module", import_module)
    with pytest.raises(ConfigError, match=r"libibverbs\.so\.1.*apt-get install libibverbs1"):
        MooncakePort("127.0.0.1", "tcp")


def test_without_mooncake_tests_are_skipped_and_the_gate_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="libibverbs1"):
        require_mooncake()
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match=r"REQUIRE_MOONCAKE=1.*libibverbs1"):
        require_mooncake()


def test_so_they_are_without_the_right_to_make_a_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.engine", sys)
    monkeypatch.setattr(mooncake.os, "geteuid", lambda: 1000)
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs root"):
        require_mooncake()


def test_the_gate_installs_what_mooncake_needs_and_insists_on_it():
    script = (mooncake.ROOT / ".ci" / "run").read_text()
    assert f"export {REQUIRED}=1" in script
    assert script.index("apt-get install") < script.index("make test")
    assert "libibverbs1" in script
    assert "mooncake-cpu" in (mooncake.ROOT / "Makefile").read_text()
