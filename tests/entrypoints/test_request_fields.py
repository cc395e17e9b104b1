"""Every request field that vLLM has is implemented or refused by name."""

import pytest

from vllm.entrypoints.openai.http import validate
from vllm.entrypoints.openai.messages_request import MessagesRequest
from vllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
)
from vllm.entrypoints.openai.responses_request import ResponsesRequest
from vllm.entrypoints.openai.serving_completion import split_prompts
from vllm.errors import UnsupportedError, VLLMValidationError

MESSAGES = [{"role": "user", "content": "Hi"}]
# Facts: the fields that vLLM 0.32 names in its schema.
COMPLETION = """
    model prompt echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
    stream stream_options suffix temperature top_p user use_beam_search top_k min_p
    repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output
    ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens
    truncation_side allowed_token_ids prompt_logprobs logprob_token_ids bad_words prompt_embeds
    add_special_tokens response_format structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
    mm_payload return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection thinking_token_budget stream_interval
"""
CHAT = """
    messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens
    max_completion_tokens n presence_penalty response_format seed stop stream stream_options
    temperature top_p tools tool_choice reasoning_effort thinking_token_budget include_reasoning
    parallel_tool_calls user use_beam_search top_k min_p repetition_penalty watermarking
    length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
    skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
    prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo add_generation_prompt
    continue_final_message add_special_tokens documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets
    return_prompt_text mm_payload return_mm_kwargs cache_salt kv_transfer_params
    ec_transfer_params vllm_xargs repetition_detection stream_interval
"""
TOKENIZE_COMPLETION = "model prompt add_special_tokens return_token_strs"
TOKENIZE_CHAT = """
    model messages add_generation_prompt return_token_strs continue_final_message
    add_special_tokens chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs tools
"""
DETOKENIZE = "model tokens"
ANTHROPIC = """
    model messages max_tokens metadata output_config thinking stop_sequences stream system
    temperature tool_choice tools top_k top_p mm_payload return_mm_kwargs cache_salt watermarking
    kv_transfer_params ec_transfer_params vllm_xargs chat_template_kwargs
"""
RESPONSES = """
    background include input instructions max_output_tokens max_tool_calls metadata model logit_bias
    parallel_tool_calls previous_response_id prompt reasoning include_reasoning service_tier store
    stream temperature text tool_choice tools top_logprobs top_p top_k min_p truncation user
    skip_special_tokens include_stop_str_in_output presence_penalty frequency_penalty watermarking
    request_id session_id media_io_kwargs mm_processor_kwargs priority mm_payload return_mm_kwargs
    cache_salt enable_response_messages previous_input_messages structured_outputs
    repetition_penalty seed stop stop_token_ids ignore_eos vllm_xargs kv_transfer_params
    ec_transfer_params chat_template_kwargs
"""
KINDS = [
    (CompletionRequest, "completion", COMPLETION, {"prompt": "Hi"}),
    (ChatCompletionRequest, "chat", CHAT, {"messages": MESSAGES}),
    (TokenizeCompletionRequest, "tokenize", TOKENIZE_COMPLETION, {"prompt": "Hi"}),
    (TokenizeChatRequest, "tokenize", TOKENIZE_CHAT, {"messages": MESSAGES}),
    (DetokenizeRequest, "detokenize", DETOKENIZE, {"tokens": [1]}),
    (MessagesRequest, "messages", ANTHROPIC, {"messages": MESSAGES, "max_tokens": 1}),
    (ResponsesRequest, "responses", RESPONSES, {"input": "Hi", "tool_choice": None}),
]
FIELDS = [
    (model, kind, field, base)
    for model, kind, fields, base in KINDS
    for field in fields.split()
    if field not in base
]


@pytest.mark.parametrize(
    ("model", "kind", "field", "base"), FIELDS, ids=[f"{f[1]}-{f[2]}" for f in FIELDS]
)
def test_no_field_of_vllm_is_unknown(model, kind, field, base):
    """A value that fits no field is refused for its type, or the field is refused by name."""
    with pytest.raises(VLLMValidationError) as refusal:
        validate(model, kind, {**base, field: object()})
    assert refusal.value.parameter == field
    assert field in str(refusal.value)
    assert "unknown field" not in str(refusal.value)


def test_null_asks_for_nothing():
    for model, kind, fields, base in KINDS:
        nothing = dict.fromkeys((f for f in fields.split() if f not in base), None)
        known = model.model_fields
        nothing = {
            name: value
            for name, value in nothing.items()
            if name not in known or known[name].default is None
        }
        validate(model, kind, {**base, **nothing})


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("guided_choice", ["a"], '{"structured_outputs": {"choice": ...}}'),
        ("best_of", 3, "use n"),
        ("length_penalty", 2, "vLLM has this field"),
        ("use_beam_search", 1, "vLLM has this field"),
    ],
)
def test_a_refusal_says_what_would_work(field, value, advice):
    with pytest.raises(UnsupportedError) as refusal:
        validate(CompletionRequest, "completion", {"prompt": "Hi", field: value})
    assert advice in str(refusal.value)


def test_a_misspelt_field_gets_a_suggestion():
    with pytest.raises(VLLMValidationError, match=r"'max_token'; did you mean max_tokens\?"):
        validate(CompletionRequest, "completion", {"prompt": "Hi", "max_token": 4})
    with pytest.raises(VLLMValidationError, match=r"^unknown field 'zzz'$"):
        validate(CompletionRequest, "completion", {"prompt": "Hi", "zzz": 4})


def test_the_models_defaults_fill_what_is_left_open():
    request = validate(CompletionRequest, "completion", {"prompt": "Hi", "top_p": 0.5})
    params = request.sampling_params(
        max_tokens=4, defaults={"temperature": 0.3, "top_p": 0.9, "max_tokens": 7}, constraint=None
    )
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.5, 4)


def test_a_json_schema_format_becomes_a_constraint():
    schema = {"type": "object"}
    body = {
        "prompt": "Hi",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x"}},
    }
    with pytest.raises(VLLMValidationError, match=r"schema must be a JSON object"):
        validate(CompletionRequest, "completion", body).constraint()
    body["response_format"]["json_schema"]["schema"] = schema
    assert validate(CompletionRequest, "completion", body).constraint().json == schema
    body["response_format"] = {"type": "text"}
    assert validate(CompletionRequest, "completion", body).constraint() is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", ["a", *[1] * 100_000], "prompt: must be a string, a list of strings"),
        ("prompt", [[1], *["a"] * 100_000], "prompt: must be a string, a list of strings"),
        ("prompt", ["a"] * 65_537, "prompt holds 65537 prompts, and a request takes at most"),
        ("stop", [1] * 100_000, "stop: must be a string or a list of strings, not [1, 1"),
        ("stop_token_ids", ["a"] * 100_000, "stop_token_ids[0]: must be a valid integer"),
        ("f" * 9_999_999, 1, "unknown field 'ffff"),
        ("bad_words", [None] * 100_000, "bad_words[0]: must be a valid string, not None"),
        ("logit_bias", dict.fromkeys(map(str, range(99_999)), "a"), "logit_bias: must be an obj"),
    ],
)
def test_one_error_of_many_is_told(field: str, value: object, words: str):
    """A refusal costs what its message needs: a million wrong items once held all others up."""
    with pytest.raises(VLLMValidationError) as refusal:
        request = validate(CompletionRequest, "completion", {"prompt": "Hi", field: value})
        split_prompts(request.prompt)
    assert str(refusal.value).startswith(words)
    assert len(str(refusal.value)) < 200
    cause = refusal.value.__context__
    assert cause is None or cause.error_count() == 1


@pytest.mark.parametrize(
    "field", ["metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"]
)
def test_what_no_answer_depends_on_passes(field):
    validate(ChatCompletionRequest, "chat", {"messages": MESSAGES, field: {"any": "thing"}})
    validate(CompletionRequest, "completion", {"prompt": "Hi", field: "thing"})


def test_storing_is_refused():
    with pytest.raises(UnsupportedError, match=r"store: .*answers are not stored"):
        validate(ChatCompletionRequest, "chat", {"messages": MESSAGES, "store": True})
