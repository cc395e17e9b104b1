"""Messages between front end and engine core as bytes: msgpack, typed on arrival."""

import msgspec

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

__all__ = ["UtilityCall", "encode", "decode_ids", "decode_outputs", "decode_request", "decode_call"]


class UtilityCall(msgspec.Struct, array_like=True, gc=False):
    """A call of one of ``EngineCore``'s utilities; answered by ``UtilityOutput``."""

    client_index: int
    call_id: int
    method: str
    args: list


encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(EngineCoreRequest).decode
decode_outputs = msgspec.msgpack.Decoder(EngineCoreOutputs).decode
decode_ids = msgspec.msgpack.Decoder(list[str]).decode
decode_call = msgspec.msgpack.Decoder(UtilityCall).decode
