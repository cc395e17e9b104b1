"""Digests of canonical bytes, for the prefix cache's chain of block hashes.

Owns the algorithms' names and their two encodings. Knows nothing of requests or blocks.

====================  ==============================================================
name                  what is digested
====================  ==============================================================
``sha256``            parent digest, then token ids as little-endian uint32, then the
                      extra keys in canonical CBOR where there are any
``sha256_cbor``       canonical CBOR (RFC 8949, 4.2.1) of the array
                      ``[parent digest, [token ids], extra keys or null]``
``xxhash``            as ``sha256``, with XXH3-128 (faster; not collision resistant)
``xxhash_cbor``       as ``sha256_cbor``, with XXH3-128
====================  ==============================================================
"""

import importlib.util
import itertools
import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256 as _sha256
from typing import Any

import numpy as np

from vllm.errors import ConfigError

__all__ = [
    "HASH_ALGORITHMS",
    "HashAlgorithm",
    "canonical_cbor",
    "get_hash_algorithm",
    "pack_token_ids",
    "sha256",
    "xxh3_128",
]

Chain = Callable[[bytes, Sequence[int], int], list[bytes]]

_PACK_CHUNK = 512
_pack_chunk = struct.Struct(f"<{_PACK_CHUNK}I").pack


def sha256(data: bytes) -> bytes:
    """The 32-byte SHA-256 digest of ``data``."""
    return _sha256(data).digest()


def xxh3_128(data: bytes) -> bytes:
    """The 16-byte XXH3-128 digest of ``data``, big endian."""
    import xxhash

    return xxhash.xxh3_128_digest(data)


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32, four bytes each.

    Packing by chunks of 512 costs 9 ns an id; one array of the whole list costs 10 to 20.

    Raises:
        OverflowError, struct.error: an id is negative or needs more than 32 bits.
    """
    num_tokens = len(token_ids)
    if num_tokens < _PACK_CHUNK:
        packed = array("I", token_ids)
        if sys.byteorder == "big":
            packed.byteswap()
        return packed.tobytes()
    whole = num_tokens - num_tokens % _PACK_CHUNK
    chunks = [
        _pack_chunk(*token_ids[start : start + _PACK_CHUNK])
        for start in range(0, whole, _PACK_CHUNK)
    ]
    if whole < num_tokens:
        chunks.append(pack_token_ids(token_ids[whole:]))
    return b"".join(chunks)


def _cbor_head(major: int, value: int) -> bytes:
    major <<= 5
    if value < 24:
        return bytes((major | value,))
    if value < 1 << 8:
        return bytes((major | 24, value))
    if value < 1 << 16:
        return struct.pack(">BH", major | 25, value)
    if value < 1 << 32:
        return struct.pack(">BI", major | 26, value)
    return struct.pack(">BQ", major | 27, value)


def canonical_cbor(value: Any) -> bytes:
    """Canonical CBOR of None, bool, int (64 bits), str, bytes, and lists or tuples of those.

    Raises:
        TypeError: ``value`` holds something else.
    """
    if value is None:
        return b"\xf6"
    if value is True:
        return b"\xf5"
    if value is False:
        return b"\xf4"
    if isinstance(value, int):
        return _cbor_head(0, value) if value >= 0 else _cbor_head(1, -1 - value)
    if isinstance(value, bytes):
        return _cbor_head(2, len(value)) + value
    if isinstance(value, str):
        text = value.encode()
        return _cbor_head(3, len(text)) + text
    if isinstance(value, list | tuple):
        return _cbor_head(4, len(value)) + b"".join(map(canonical_cbor, value))
    raise TypeError(f"cannot hash a {type(value).__name__}")


def _cbor_blocks(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The items of each block's array of token ids, in canonical CBOR.

    Encodes all ids at once: 20 ns each, a tenth of encoding them one by one.
    """
    ids = np.frombuffer(pack_token_ids(token_ids), dtype="<u4")
    # A head byte, then no, one, two or four bytes of the id, big endian.
    sizes = 1 + (ids >= 24) + (ids >= 1 << 8) + 2 * (ids >= 1 << 16)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    out = np.empty(ends[-1] if len(ids) else 0, dtype=np.uint8)
    out[starts] = np.where(sizes == 1, ids, np.select([sizes == 2, sizes == 3], [24, 25], 26))
    for distance in range(1, 5):
        # The byte that is the ``distance``-th from the end of its item.
        has = sizes > distance
        out[ends[has] - distance] = (ids[has] >> (8 * (distance - 1))) & 255
    encoded = out.tobytes()
    bounds = [0, *ends[block_size - 1 :: block_size].tolist()]
    return [encoded[a:b] for a, b in itertools.pairwise(bounds)]


def _sha256_chain(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    packed, step = pack_token_ids(token_ids), 4 * block_size
    hashes: list[bytes] = []
    add, constructor = hashes.append, _sha256
    for start in range(0, len(packed), step):
        parent = constructor(parent + packed[start : start + step]).digest()
        add(parent)
    return hashes


def _native_sha256_chain() -> Chain:
    """The extension's, where it was built and the processor has the instructions."""
    try:
        from vllm import _C
    except ImportError:
        return _sha256_chain
    # A build of an older source lacks it.
    has_sha256 = getattr(_C, "has_sha256", None)
    return _C.sha256_chain if has_sha256 is not None and has_sha256() else _sha256_chain


def _xxh3_128_chain(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    from xxhash import xxh3_128_digest

    packed, step = pack_token_ids(token_ids), 4 * block_size
    hashes: list[bytes] = []
    add = hashes.append
    for start in range(0, len(packed), step):
        parent = xxh3_128_digest(parent + packed[start : start + step])
        add(parent)
    return hashes


@dataclass(frozen=True, slots=True, kw_only=True)
class HashAlgorithm:
    """A digest and the encoding it is taken over; ``digest_size`` is in bytes."""

    name: str
    digest: Callable[[bytes], bytes]
    digest_size: int
    is_cbor: bool
    is_collision_resistant: bool
    chain: Chain
    """(parent, token ids, tokens of a block) to the digest of each block, without CBOR."""

    def hash_block(
        self, parent: bytes, token_ids: Sequence[int], extra_keys: tuple[Any, ...] | None = None
    ) -> bytes:
        """The digest of one block of ``token_ids`` that follows the block hashed ``parent``."""
        if self.is_cbor:
            return self.digest(canonical_cbor((parent, list(token_ids), extra_keys)))
        data = parent + pack_token_ids(token_ids)
        if extra_keys is not None:
            data += canonical_cbor(extra_keys)
        return self.digest(data)

    def hash_blocks(self, parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
        """The digests of consecutive blocks without extra keys.

        ``len(token_ids)`` is a multiple of ``block_size``. SHA-256 of 16 tokens costs 0.2 us where
        the extension does it; elsewhere the tokens are packed once, and a block costs one slice,
        one concatenation and one digest.
        """
        assert len(token_ids) % block_size == 0
        if not self.is_cbor:
            return self.chain(parent, list(token_ids), block_size)
        hashes: list[bytes] = []
        before = b"\x83" + _cbor_head(2, len(parent))
        between, after = _cbor_head(4, block_size), canonical_cbor(None)
        for encoded in _cbor_blocks(token_ids, block_size):
            parent = self.digest(b"".join((before, parent, between, encoded, after)))
            hashes.append(parent)
        return hashes


HASH_ALGORITHMS = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")


def get_hash_algorithm(name: str) -> HashAlgorithm:
    """The algorithm that ``--prefix-caching-hash-algo`` names.

    Raises:
        ConfigError: the name is unknown, or its package is not installed.
    """
    if name not in HASH_ALGORITHMS:
        raise ConfigError(
            f"--prefix-caching-hash-algo must be one of {', '.join(HASH_ALGORITHMS)}, not {name!r}",
            parameter="prefix_caching_hash_algo",
            value=name,
        )
    is_sha = name.startswith("sha256")
    if not is_sha and importlib.util.find_spec("xxhash") is None:
        raise ConfigError(
            f"--prefix-caching-hash-algo={name} needs the package xxhash (pip install xxhash); "
            "sha256 works without it",
            parameter="prefix_caching_hash_algo",
            value=name,
        )
    return HashAlgorithm(
        name=name,
        digest=sha256 if is_sha else xxh3_128,
        digest_size=32 if is_sha else 16,
        is_cbor=name.endswith("_cbor"),
        is_collision_resistant=is_sha,
        chain=_native_sha256_chain() if is_sha else _xxh3_128_chain,
    )
