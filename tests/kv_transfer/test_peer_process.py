"""Numbers in another process's memory: read as they are, and never another process's."""

import ctypes
import os
import subprocess
import sys

import msgspec
import pytest

from vllm.distributed.kv_transfer.transport.peer_process import (
    PeerProcess,
    ProcessIdentity,
    own_identity,
)
from vllm.distributed.kv_transfer.transport.port import PeerLostError, PortError

CHILD = """
import ctypes, sys, msgspec
from vllm.distributed.kv_transfer.transport.peer_process import own_identity
word = ctypes.c_int64(-7)
encoded = msgspec.json.encode((ctypes.addressof(word), own_identity())).decode()
print(encoded, flush=True)
for line in sys.stdin:
    word.value = int(line)
    print("done", flush=True)
"""


@pytest.fixture
def child():
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address, identity = msgspec.json.decode(
            process.stdout.readline(), type=tuple[int, ProcessIdentity]
        )
        yield process, address, identity
    finally:
        process.kill()
        process.communicate()


def test_a_number_is_read_as_it_is_now(child):
    process, address, identity = child
    reader = PeerProcess(identity)
    assert reader.read_word(address) == -7
    process.stdin.write("123456789012\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"
    assert reader.read_word(address) == 123456789012


def test_a_process_that_has_ended_is_lost(child):
    process, address, identity = child
    reader = PeerProcess(identity)
    process.kill()
    process.wait()
    with pytest.raises(PeerLostError, match="gone"):
        reader.read_word(address)


def test_another_process_of_that_number_is_not_taken_for_it(child):
    _, _, identity = child
    other = ProcessIdentity(os.getpid(), *msgspec.structs.astuple(own_identity())[1:3], bytes(16))
    with pytest.raises(PeerLostError):
        PeerProcess(other)
    with pytest.raises(PortError, match="cannot be read"):
        PeerProcess(msgspec.structs.replace(identity, namespace="pid:[1]"))


def test_memory_that_is_not_there_is_an_error_and_not_a_death():
    reader = PeerProcess(own_identity())
    word = ctypes.c_int64(5)
    assert reader.read_word(ctypes.addressof(word)) == 5
    with pytest.raises(PortError) as caught:
        reader.read_word(8)
    assert not isinstance(caught.value, PeerLostError)


@pytest.mark.parametrize(
    "wrong", [(0, "", 0, bytes(16)), (1, "", 1 << 63, bytes(16)), (1, "", 0, b"short")]
)
def test_an_identity_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(wrong), type=ProcessIdentity)
