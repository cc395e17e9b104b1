import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.helpers import make_request
from vllm.errors import ConfigError
from vllm.utils.hashing import (
    HASH_ALGORITHMS,
    _native_sha256_chain,
    _sha256_chain,
    canonical_cbor,
    get_hash_algorithm,
    pack_token_ids,
)
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, group_block_hashes

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=1200)


@given(tokens)
def test_packed_tokens_are_little_endian_words_however_many_there_are(token_ids):
    assert pack_token_ids(token_ids) == struct.pack(f"<{len(token_ids)}I", *token_ids)


@pytest.mark.parametrize("bad", [-1, 2**32])
@pytest.mark.parametrize("length", [3, 600])
def test_packing_refuses_what_is_not_a_token_id(bad, length):
    with pytest.raises((OverflowError, struct.error)):
        pack_token_ids([bad] * length)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        # Examples of RFC 8949, appendix A.
        (0, "00"),
        (23, "17"),
        (24, "1818"),
        (100, "1864"),
        (1000, "1903e8"),
        (1000000, "1a000f4240"),
        (1000000000000, "1b000000e8d4a51000"),
        (-1, "20"),
        (-100, "3863"),
        (None, "f6"),
        (True, "f5"),
        (False, "f4"),
        (b"\x01\x02\x03\x04", "4401020304"),
        ("ü", "62c3bc"),
        ([1, [2, 3], [4, 5]], "8301820203820405"),
        (list(range(1, 26)), "98190102030405060708090a0b0c0d0e0f101112131415161718181819"),
    ],
)
def test_cbor_is_that_of_the_standard(value, encoded):
    assert canonical_cbor(value).hex() == encoded


def test_cbor_refuses_what_has_no_canonical_form_here():
    with pytest.raises(TypeError, match="float"):
        canonical_cbor([1.5])


def test_unknown_algorithm_names_the_option_and_the_choices():
    with pytest.raises(ConfigError, match=r"--prefix-caching-hash-algo.*sha256_cbor.*'md5'"):
        get_hash_algorithm("md5")


def test_sha256_is_over_parent_then_tokens():
    request = make_request("r", list(range(40)))
    hasher = get_request_block_hasher(16, "sha256")
    first, second = hasher(request)
    words = struct.pack("<40I", *range(40))
    assert first == hashlib.sha256(hasher.none_hash + words[:64]).digest()
    assert second == hashlib.sha256(first + words[64:128]).digest()


def test_sha256_cbor_is_over_parent_tokens_and_extra_keys():
    request = make_request("r", list(range(32)), cache_salt="s")
    hasher = get_request_block_hasher(16, "sha256_cbor")
    first, second = hasher(request)
    expected = canonical_cbor([hasher.none_hash, list(range(16)), ["s"]])
    assert first == hashlib.sha256(expected).digest()
    expected = canonical_cbor([first, list(range(16, 32)), None])
    assert second == hashlib.sha256(expected).digest()


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 300), max_size=60), st.integers(1, 9))
def test_cbor_of_many_blocks_is_that_of_each(token_ids, block_size):
    token_ids = token_ids[: len(token_ids) // block_size * block_size]
    algorithm = get_hash_algorithm("sha256_cbor")
    hashes = algorithm.hash_blocks(parent := b"p" * 32, token_ids, block_size)
    for index, found in enumerate(hashes):
        block = token_ids[index * block_size : (index + 1) * block_size]
        assert found == hashlib.sha256(canonical_cbor((parent, block, None))).digest()
        parent = found
    assert len(hashes) == len(token_ids) // block_size


native = pytest.mark.skipif(
    _native_sha256_chain() is _sha256_chain,
    reason="no extension here, or the processor has no instructions for SHA-256",
)


@native
@given(st.lists(st.integers(0, 2**32 - 1), max_size=200), st.integers(1, 70))
def test_the_extension_and_the_library_give_the_same_digests(token_ids, block_size):
    """Block sizes from 1 to 70: the padding of SHA-256 falls on every place of its last chunk."""
    token_ids = token_ids[: len(token_ids) // block_size * block_size]
    parent = hashlib.sha256(b"before").digest()
    found = _native_sha256_chain()(parent, token_ids, block_size)
    assert found == _sha256_chain(parent, token_ids, block_size)


@native
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((b"p" * 32, [-1], 1), OverflowError),
        ((b"p" * 32, [2**32], 1), OverflowError),
        ((b"p" * 32, [2**70], 1), OverflowError),
        ((b"p" * 32, ["1"], 1), TypeError),
        ((b"p" * 31, [1], 1), ValueError),
        ((b"p" * 32, (1,), 1), ValueError),
        ((b"p" * 32, [1], 0), ValueError),
        ((b"p" * 32, [1]), TypeError),
    ],
)
def test_the_extension_refuses_what_is_no_chain(arguments, error):
    with pytest.raises(error):
        _native_sha256_chain()(*arguments)


@pytest.mark.parametrize("name", HASH_ALGORITHMS)
def test_hashing_piece_by_piece_gives_the_same_chain(name):
    hasher = get_request_block_hasher(16, name)
    prompt = list(range(700))
    whole = make_request("whole", prompt, cache_salt="salt", block_hasher=hasher)
    grown = make_request("grown", prompt[:5], cache_salt="salt", block_hasher=hasher)
    for token in prompt[5:]:
        grown.append_output_token_ids(token)
        assert len(grown.block_hashes) == grown.num_tokens // 16
    assert grown.block_hashes == whole.block_hashes


@pytest.mark.parametrize("name", HASH_ALGORITHMS)
def test_hashes_differ_from_the_first_different_token_on(name):
    hasher = get_request_block_hasher(16, name)
    a = make_request("a", list(range(96)), block_hasher=hasher).block_hashes
    other = list(range(96))
    other[40] = 999
    b = make_request("b", other, block_hasher=hasher).block_hashes
    assert a[:2] == b[:2]
    assert not set(a[2:]) & set(b)


@pytest.mark.parametrize("name", HASH_ALGORITHMS)
def test_salt_changes_every_hash(name):
    hasher = get_request_block_hasher(16, name)
    prompt = list(range(64))
    chains = [
        make_request("r", prompt, cache_salt=salt, block_hasher=hasher).block_hashes
        for salt in (None, "a", "b")
    ]
    assert len({block_hash for chain in chains for block_hash in chain}) == 12


def test_engines_agree_on_sha256_and_not_on_xxhash_unless_seeded(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert len({get_request_block_hasher(16, "sha256").none_hash for _ in range(3)}) == 1
    assert len({get_request_block_hasher(16, "xxhash").none_hash for _ in range(3)}) == 3
    unseeded = get_request_block_hasher(16, "sha256").none_hash
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert len({get_request_block_hasher(16, "xxhash").none_hash for _ in range(3)}) == 1
    assert get_request_block_hasher(16, "sha256").none_hash != unseeded


def test_a_large_blocks_hash_is_that_of_its_last_part():
    small = get_request_block_hasher(16, "sha256")
    request = make_request("r", list(range(16 * 7)), block_hasher=small)
    hashes = group_block_hashes(request.block_hashes, 3)
    assert hashes == [request.block_hashes[2], request.block_hashes[5]]
