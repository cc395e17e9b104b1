"""What an executor and its workers tell each other, as bytes.

Steps are msgpack, typed on arrival. What has no fixed form (a connector's metadata, arguments and
answers of calls by name) is pickled: the bytes never leave memory that only the engine and the
workers that it started can reach.
"""

from __future__ import annotations

import copy
import enum
import pickle
from typing import Any

import msgspec
import numpy as np

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.engine.failures import EngineFailure
from vllm.v1.outputs import ModelRunnerOutput

__all__ = [
    "Kind",
    "decode_answer",
    "decode_call",
    "decode_grammar",
    "decode_result",
    "decode_step",
    "encode_answer",
    "encode_call",
    "encode_grammar",
    "encode_result",
    "encode_step",
]


class Kind(enum.IntEnum):
    """Of a message; each EXECUTE without a SAMPLE to come, and each SAMPLE, has one RESULT."""

    CALL = 0
    """To all: call a method by name, or a function; every worker gives an ANSWER."""
    EXECUTE = 1
    """To all: run a step's forward pass, and sample unless a grammar has a say."""
    SAMPLE = 2
    """To all: finish the step that EXECUTE left open."""
    FLUSH = 3
    """To all: the last step's result is waited for; no other step follows at once."""
    STOP = 4
    """To all: end."""
    ANSWER = 5
    RESULT = 6


_PICKLED = 1
_ARRAY = 2


def _extension(value: Any) -> msgspec.msgpack.Ext:
    """What msgpack has no form for."""
    if isinstance(value, np.ndarray):
        head = pickle.dumps((value.dtype.str, value.shape), protocol=5)
        return msgspec.msgpack.Ext(_ARRAY, len(head).to_bytes(2, "big") + head + value.tobytes())
    return _pickled(value)


def _pickled(value: Any) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(_PICKLED, pickle.dumps(value, protocol=5))


def _from_extension(code: int, data: memoryview) -> Any:
    if code == _PICKLED:
        return pickle.loads(data)
    end = 2 + int.from_bytes(data[:2], "big")
    dtype, shape = pickle.loads(data[2:end])
    return np.frombuffer(data, dtype, offset=end).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_extension)
_decode_step = msgspec.msgpack.Decoder(SchedulerOutput, ext_hook=_from_extension).decode
_decode_grammar = msgspec.msgpack.Decoder(GrammarOutput | None, ext_hook=_from_extension).decode
_decode_result = msgspec.msgpack.Decoder(ModelRunnerOutput, ext_hook=_from_extension).decode


def encode_step(output: SchedulerOutput) -> bytes:
    if output.kv_connector_metadata is not None:
        output = copy.copy(output)
        output.kv_connector_metadata = _pickled(output.kv_connector_metadata)
    return _encoder.encode(output)


def decode_step(data: bytes) -> SchedulerOutput:
    return _decode_step(data)


def encode_grammar(output: GrammarOutput | None) -> bytes:
    return _encoder.encode(output)


def decode_grammar(data: bytes) -> GrammarOutput | None:
    return _decode_grammar(data)


def encode_result(output: ModelRunnerOutput) -> bytes:
    """``req_id_to_index`` is left out; it follows from ``req_ids``."""
    output = copy.copy(output)
    output.req_id_to_index = {}
    if output.kv_connector_output is not None:
        connector_output = copy.copy(output.kv_connector_output)
        for name in ("kv_connector_stats", "kv_cache_events", "kv_connector_worker_meta"):
            value = getattr(connector_output, name)
            if value is not None:
                setattr(connector_output, name, _pickled(value))
        output.kv_connector_output = connector_output
    return _encoder.encode(output)


def decode_result(data: bytes) -> ModelRunnerOutput:
    output = _decode_result(data)
    output.req_id_to_index = {req_id: i for i, req_id in enumerate(output.req_ids)}
    return output


def encode_call(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Raises PicklingError, TypeError or AttributeError for what cannot be pickled."""
    return pickle.dumps((method, args, kwargs), protocol=5)


def decode_call(data: bytes) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return pickle.loads(data)


def encode_answer(value: Any, failure: EngineFailure | None = None) -> bytes:
    return pickle.dumps((value, failure), protocol=5)


def decode_answer(data: bytes) -> tuple[Any, EngineFailure | None]:
    return pickle.loads(data)
