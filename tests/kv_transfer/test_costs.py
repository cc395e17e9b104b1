"""Which way a transfer goes: by what each would take, and by what earlier ones took."""

import pytest

from vllm.distributed.kv_transfer.costs import HOST_COPIES, NVLINK, Experience, route

MIB = 1 << 20


@pytest.mark.parametrize(
    ("descriptors", "mebibytes", "way"),
    [
        # A block of all layers is one run: nothing is gained by gathering it.
        (8, 64, "descriptors"),
        # 32 layers of 1,024 blocks, each a run of its own.
        (32768, 1024, "staging"),
        # As few as they are, they cost less than asking the peer.
        (32, 2, "descriptors"),
    ],
)
def test_the_quickest_way_is_taken_over_nvlink(descriptors, mebibytes, way):
    found = route(NVLINK, descriptors, mebibytes * MIB, NVLINK.slot_bytes)
    assert found.way == way
    assert found.seconds[way] == min(found.seconds.values())


def test_mapped_memory_is_a_way_only_where_it_is_mapped():
    assert "mapped" not in route(NVLINK, 32768, 1024 * MIB, NVLINK.slot_bytes).seconds
    assert route(NVLINK, 32768, 1024 * MIB, NVLINK.slot_bytes, mapped=True).way == "mapped"
    assert "mapped" not in route(HOST_COPIES, 9, MIB, None, mapped=True).seconds


def test_a_unit_larger_than_a_slot_goes_by_descriptors():
    assert set(route(NVLINK, 32768, 1024 * MIB, None).seconds) == {"descriptors"}


def test_a_descriptor_costs_what_it_costs_whatever_its_size():
    """3.9 GB/s in runs of 16 KiB on a link of 385: the figure that all this is about."""
    seconds = NVLINK.by_descriptors(65536, 1024 * MIB)
    assert 3.5e9 < 1024 * MIB / seconds < 4.2e9


def test_a_way_that_was_slow_is_left_and_tried_again_later():
    seen = Experience()

    def choose():
        return route(HOST_COPIES, 65536, 256 * MIB, HOST_COPIES.slot_bytes, seen=seen)

    first = choose()
    assert first.way == "staging"
    for _ in range(4):
        seen.learn("staging", first.seconds["staging"], 5 * first.seconds["staging"])
    assert choose().way == "descriptors"
    turns = 0
    while choose().way == "descriptors" and turns < 500:
        seen.learn("descriptors", 1.0, 1.0)
        turns += 1
    assert 3 < turns < 500


def test_one_absurd_measurement_does_not_rule_a_way_out_for_ever():
    seen = Experience()
    seen.learn("staging", 1e-3, 1e-3)
    seen.learn("staging", 1e-3, 1e6)
    assert 1 < seen.factor("staging") <= 5
    assert seen.factor("descriptors") == 1


def test_the_first_transfer_of_a_way_is_not_held_against_it():
    seen = Experience()
    seen.learn("mapped", 1e-3, 1.0)
    assert seen.factor("mapped") == 1
    seen.learn("mapped", 1e-3, 4e-3)
    assert seen.factor("mapped") == 2
