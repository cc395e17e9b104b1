"""The file tier of offloading: which hashes have a file, and blocks to files and back.

A file is one block of one rank: what its host slot holds, then a trailer with a checksum over
content and hash. What is damaged, short or missing is found out before anybody reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.transport.nixl_files import FileCopy, NixlFiles
from vllm.errors import ConfigError
from vllm.logger import init_logger

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["TRAILER_BYTES", "BlockFiles", "FileIndex", "FileReport", "rank_folder"]

logger = init_logger(__name__)

_MAGIC = b"vLLM KV1"
_TRAILER = struct.Struct("<8sQ32s")
TRAILER_BYTES = _TRAILER.size
_SUFFIX = ".kv"


def rank_folder(
    folder: str, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, rank: int
) -> Path:
    """Where the files of a rank are: engines share them if their blocks mean the same.

    Weights are known by the model's name only: other weights of the same name need another folder.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    load_format = vllm_config.load_config.load_format
    meaning = {
        "model": model.model,
        "weights": [load_format, model.seed if load_format == "dummy" else None],
        "dtype": model.dtype_name,
        "cache dtype": cache.cache_dtype,
        "layout": kv_cache_config.kv_cache_layout,
        "groups": [repr(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups],
        "ranks": vllm_config.parallel_config.world_size,
    }
    text = json.dumps(meaning, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Path(folder).expanduser() / name / f"rank{rank}"


def _path(folder: Path, block_hash: bytes) -> Path:
    name = block_hash.hex()
    return folder / name[:2] / f"{name}{_SUFFIX}"


class FileIndex:
    """Which hashes have a file, least recently used first; at most ``num_files``."""

    def __init__(self, num_files: int, folder: Path) -> None:
        self._num_files = num_files
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._unwanted: list[bytes] = []
        found = []
        for path in folder.glob(f"*/*{_SUFFIX}"):
            try:
                found.append((path.stat().st_mtime, bytes.fromhex(path.stem)))
            except (OSError, ValueError):
                continue
        for _, block_hash in sorted(found):
            self.add(block_hash)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._known

    def use(self, block_hash: bytes) -> None:
        self._known.move_to_end(block_hash)

    def add(self, block_hash: bytes) -> None:
        """There will be a file; the least recently used one may have to go for it."""
        self._known[block_hash] = None
        if len(self._known) > self._num_files:
            self._unwanted.append(self._known.popitem(last=False)[0])

    def drop(self, block_hash: bytes) -> None:
        """The file is not there, or is no good."""
        if self._known.pop(block_hash, 0) is None:
            self._unwanted.append(block_hash)

    def clear(self) -> None:
        self._unwanted += self._known
        self._known.clear()

    def take_unwanted(self) -> list[bytes]:
        """Hashes whose files are to be deleted."""
        unwanted, self._unwanted = self._unwanted, []
        return [block_hash for block_hash in unwanted if block_hash not in self._known]


@dataclass(slots=True)
class FileReport(KVConnectorWorkerMetadata):
    """What became of a step's files; with several ranks, what failed on one has failed."""

    fetched: set[bytes] = field(default_factory=set)
    not_fetched: set[bytes] = field(default_factory=set)
    not_written: set[bytes] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> FileReport:
        assert isinstance(other, FileReport)
        failed = self.not_fetched | other.not_fetched
        return FileReport(
            fetched=(self.fetched | other.fetched) - failed,
            not_fetched=failed,
            not_written=self.not_written | other.not_written,
        )


class BlockFiles:
    """Copies host slots to files and back.

    Args:
        host: int8 (slots, bytes of a slot); the last ``TRAILER_BYTES`` of each are ours.

    Raises:
        ConfigError: the folder cannot be made or written to, or NIXL is not installed.
    """

    def __init__(self, folder: Path, host: torch.Tensor) -> None:
        self._folder = folder
        self._host = host.numpy().view("uint8")
        self._address = host.data_ptr()
        self._pitch = host.stride(0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK | os.X_OK)
        except OSError as error:
            raise _unusable(folder, str(error)) from None
        if not writable:
            raise _unusable(folder, "it may not be written to")
        self._files = NixlFiles(
            f"vllm-files-{os.getpid()}-{id(self):x}", (self._address, host.numel())
        )
        self._warned = False

    def _copies(self, slots: Sequence[int], hashes: Sequence[bytes]) -> list[FileCopy]:
        return [
            FileCopy(
                path=_path(self._folder, block_hash),
                address=self._address + slot * self._pitch,
                size=self._host.shape[1],
            )
            for slot, block_hash in zip(slots, hashes, strict=True)
        ]

    def _trailer(self, slot: int, block_hash: bytes) -> bytes:
        content = self._host[slot, :-TRAILER_BYTES]
        digest = hashlib.sha256(block_hash)
        digest.update(content.data)
        return _TRAILER.pack(_MAGIC, len(content), digest.digest())

    def write(self, slots: Sequence[int], hashes: Sequence[bytes]) -> set[bytes]:
        """Make a file of each slot; returns the hashes whose file could not be made."""
        for slot, block_hash in zip(slots, hashes, strict=True):
            trailer = self._trailer(slot, block_hash)
            self._host[slot, -TRAILER_BYTES:] = memoryview(trailer)
        failed = self._files.write(self._copies(slots, hashes))
        if failed and not self._warned:
            self._warned = True
            logger.warning(
                "OffloadingConnector cannot write %s: is the disk full? Blocks that find no place "
                "are forgotten, and computed again when they are needed; lower file_bytes_to_use "
                "(vllm:kv_offload_file_failed_stores_total counts them)",
                failed[0].path,
            )
        return {bytes.fromhex(copy.path.stem) for copy in failed}

    def read(self, slots: Sequence[int], hashes: Sequence[bytes]) -> set[bytes]:
        """Fill slots from files; returns the hashes whose file is missing or damaged."""
        failed = self._files.read(self._copies(slots, hashes))
        bad = {bytes.fromhex(copy.path.stem) for copy in failed}
        for slot, block_hash in zip(slots, hashes, strict=True):
            stored = self._host[slot, -TRAILER_BYTES:].tobytes()
            if block_hash not in bad and stored != self._trailer(slot, block_hash):
                bad.add(block_hash)
        return bad

    def delete(self, hashes: Iterable[bytes]) -> None:
        """As far as that works: what stays is only room lost."""
        for block_hash in hashes:
            with contextlib.suppress(OSError):
                _path(self._folder, block_hash).unlink()

    def close(self) -> None:
        self._files.close()


def _unusable(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"OffloadingConnector: file_path {folder} cannot be used: {why}",
        parameter="kv_connector_extra_config",
        value=str(folder),
    )
