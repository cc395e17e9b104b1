"""What makes words about KV blocks believable that pass through a client's hands.

A prefill engine seals the parameters that it answers with: its engine's secret over what they say
and over the prompt that the KV was computed of. Whoever decodes has that secret from the handshake,
and the prompt from its own request: blocks of others, or KV of another prompt, cannot be asked for.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np

__all__ = ["engine_secret", "prompt_digest", "public_session", "seal"]


def public_session(instance_id: str) -> str:
    """The name of one run of an engine, for peers and clients; ``instance_id`` stays inside."""
    return hashlib.sha256(f"session {instance_id}".encode()).hexdigest()[:32]


def engine_secret(instance_id: str) -> bytes:
    """Known to all processes of one run of an engine, and to those it tells by handshake."""
    return hashlib.sha256(f"secret {instance_id}".encode()).digest()


def prompt_digest(token_ids: Sequence[int]) -> bytes:
    """SHA-256 of the tokens that KV was computed of: both sides must mean the same ones."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i8").tobytes()).digest()


def seal(secret: bytes, *what: object) -> str:
    """HMAC-SHA256 in hexadecimal over anything that msgpack can hold."""
    made = _begun(secret).copy()
    made.update(msgspec.msgpack.encode(what))
    return made.hexdigest()


@lru_cache(maxsize=64)
def _begun(secret: bytes) -> hmac.HMAC:
    """Made once: setting it up takes longer than all the rest."""
    return hmac.new(secret, digestmod=hashlib.sha256)
