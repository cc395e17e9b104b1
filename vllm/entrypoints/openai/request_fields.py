"""Request fields that other servers know and this one does not have yet.

Owns the refusal of a field by name: nothing that a client asks for is ignored. A value that asks
for nothing (the default, or what switches the feature off) passes. When a feature arrives, its
line here goes and a field in ``protocol.py`` comes.
"""

import difflib
from collections.abc import Collection, Set
from typing import Any

from vllm.errors import UnsupportedError, VLLMValidationError

__all__ = ["drop_neutral_fields"]

_STRUCTURED = 'use structured_outputs, such as {{"structured_outputs": {{"{}": ...}}}}'

# Field -> values that ask for nothing, besides null.
_NOT_YET_COMMON: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "watermarking": (False,),
    "logprob_token_ids": ([],),
    "session_id": (),
    "routed_experts_prompt_start": (),
    "return_token_offsets": (False,),
    "mm_payload": (),
    "return_mm_kwargs": (False,),
    "ec_transfer_params": (),
    "repetition_detection": (),
    "thinking_token_budget": (),
}
_NOT_YET_COMPLETION: dict[str, tuple[Any, ...]] = {
    **_NOT_YET_COMMON,
    "suffix": ("",),
    "prompt_embeds": ([],),
}
_NOT_YET_CHAT: dict[str, tuple[Any, ...]] = {
    **_NOT_YET_COMMON,
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
_NOT_YET_TOKENIZE: dict[str, tuple[Any, ...]] = {
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
_NOT_YET_RESPONSES: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "previous_response_id": (),
    "max_tool_calls": (),
    "prompt": (),
    "top_logprobs": (0,),
    "stream_options": ({},),
    "session_id": (),
    "watermarking": (False,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "mm_payload": (),
    "return_mm_kwargs": (False,),
    "ec_transfer_params": (),
    "enable_response_messages": (False,),
    "previous_input_messages": (),
}
_NOT_YET_MESSAGES: dict[str, tuple[Any, ...]] = {
    "mm_payload": (),
    "return_mm_kwargs": (False,),
    "watermarking": (False,),
    "ec_transfer_params": (),
    "service_tier": ("auto", "standard_only"),
}
NOT_YET: dict[str, dict[str, tuple[Any, ...]]] = {
    "messages": _NOT_YET_MESSAGES,
    "responses": _NOT_YET_RESPONSES,
    "completion": _NOT_YET_COMPLETION,
    "chat": _NOT_YET_CHAT,
    "tokenize": _NOT_YET_TOKENIZE,
    "detokenize": {},
}

# Fields of older vLLM and of OpenAI's own service: (values that ask for nothing, what to do).
_ELSEWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "guided_json": ((), _STRUCTURED.format("json")),
    "guided_regex": ((), _STRUCTURED.format("regex")),
    "guided_choice": ((), _STRUCTURED.format("choice")),
    "guided_grammar": ((), _STRUCTURED.format("grammar")),
    "structural_tag": ((), _STRUCTURED.format("structural_tag")),
    "guided_decoding_backend": ((), "choose the backend with --structured-outputs-config"),
    "guided_whitespace_pattern": ((), _STRUCTURED.format("whitespace_pattern")),
    "best_of": ((1,), "use n"),
    "logits_processors": (([],), "name processors with --logits-processors"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "audio": ((), "only text is generated"),
    "modalities": ((["text"],), "only text is generated"),
    "prediction": ((), "leave it out"),
    "service_tier": (("auto", "default"), "leave it out"),
    "store": ((False,), "answers are not stored"),
    "web_search_options": ((), "leave it out"),
    "verbosity": (("medium",), "leave it out"),
}

# Fields of OpenAI's service that its clients send unasked and that no answer depends on: labels of
# stored answers, a name for the end user, hints for a cache that finds common beginnings anyway.
_WITHOUT_EFFECT = frozenset(
    ("metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
_GENERATING = ("completion", "chat", "responses")


def _same(value: Any, neutral: Any) -> bool:
    # True == 1 in Python, but not in JSON.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def drop_neutral_fields(body: dict[str, Any], kind: str, known: Set[str]) -> dict[str, Any]:
    """``body`` with only the fields of ``known``.

    Args:
        kind: a key of ``NOT_YET``.
        known: names of the fields that the request model has.

    Raises:
        UnsupportedError: a field that vLLM or OpenAI has is set to something that asks for it.
        VLLMValidationError: nobody knows the field.
    """
    if body.keys() <= known:
        return body
    kept = {}
    for name, value in body.items():
        if name in known:
            kept[name] = value
            continue
        if name in _WITHOUT_EFFECT and kind in _GENERATING:
            continue
        neutral, advice = NOT_YET[kind].get(name), "leave it out"
        owner = "vLLM has this field; this server does not yet"
        if neutral is None and kind in _GENERATING and name in _ELSEWHERE:
            neutral, advice = _ELSEWHERE[name]
            owner = "this server does not have this field"
        if neutral is None:
            raise _unknown(name, {*known, *NOT_YET[kind]})
        if value is not None and not any(_same(value, item) for item in neutral):
            raise UnsupportedError(f"{name}: {owner}; {advice}", parameter=name)
    return kept


def _unknown(name: str, known: Collection[str]) -> VLLMValidationError:
    # The search for what was meant takes long for long names.
    name = name[:80]
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return VLLMValidationError(f"unknown field {name!r}{hint}", parameter=name)
