"""Wrong requests: 4xx in OpenAI's form, one clear line, and the server goes on."""

import json

import httpx
import openai
import pytest

from tests.entrypoints.server import BRIEF, MODEL, PATIENCE, Server
from tests.entrypoints.test_request_fields import CHAT as CHAT_FIELDS
from tests.entrypoints.test_request_fields import COMPLETION, DETOKENIZE, TOKENIZE_COMPLETION

PROMPT = {"prompt": "Hi", "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


def refused(response: httpx.Response, status: int, *words: str) -> dict:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert "\n" not in error["message"]
    assert len(error["message"]) < 600
    for word in words:
        assert word in error["message"]
    return error


@pytest.fixture(autouse=True)
def server_goes_on(server: Server):
    yield
    assert server.post("/v1/completions", PROMPT).status_code == 200


COMPLETION_ERRORS = [
    # wrong types
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"n": "two"}, "n"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"stop": 3}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"Paris": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"stop": [f"s{i}" for i in range(5000)]}, "stop"),
    ({"bad_words": [f"w{i}" for i in range(5000)]}, "bad_words"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    # out of range
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -4}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9}, "min_tokens"),
    ({"logprobs": -2}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [10**7]}, "stop_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [2], "min_tokens": 1}, "allowed_token_ids"),
    ({"allowed_token_ids": [17], "bad_words": ["!"]}, "allowed_token_ids"),
    ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ({"truncate_prompt_tokens": -7}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 99999}, "truncate_prompt_tokens"),
    ({"truncation_side": "left"}, "truncation_side"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"request_id": ""}, "request_id"),
    # prompts that cannot run
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-5]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": "word " * 2000}, "prompt"),
    ({"prompt": [5] * 1024}, "prompt"),
    # combinations
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs",
    ),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    ({"kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params"),
    # what vLLM, or an older one, has
    ({"suffix": "end"}, "suffix"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"watermarking": True}, "watermarking"),
    ({"session_id": "s"}, "session_id"),
    ({"thinking_token_budget": 3}, "thinking_token_budget"),
    ({"ec_transfer_params": {}}, "ec_transfer_params"),
    ({"guided_json": {}}, "guided_json"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"best_of": 2}, "best_of"),
    ({"logits_processors": ["x"]}, "logits_processors"),
    # what nobody has
    ({"temprature": 1}, "temprature"),
    ({"messages": []}, "messages"),
    ({"structured_outputs": {"jsn": {}}}, "structured_outputs"),
]


@pytest.mark.parametrize(("fields", "param"), COMPLETION_ERRORS)
def test_a_wrong_field_is_named(server: Server, fields: dict, param: str):
    error = refused(server.post("/v1/completions", {**PROMPT, **fields}), 400)
    assert error["type"] == "BadRequestError"
    assert error["param"] == param or error["param"] == "prompt_token_ids"
    assert param.removesuffix("_ids") in error["message"]


CHAT_ERRORS = [
    ({"messages": []}, "messages", "empty"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": ["hi"]}, "messages", "dictionary"),
    ({"messages": [{"content": "x"}]}, "messages", "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages", "content is missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages", "messages[0]"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages", "'mood'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
        "'image_url'",
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}],
                }
            ]
        },
        "messages",
        "arguments",
    ),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"logprobs": True, "top_logprobs": 99}, "logprobs", "--max-logprobs"),
    ({"tool_choice": "required"}, "tool_choice", "tools"),
    ({"tool_choice": "always"}, "tool_choice", "required"),
    ({"tools": [{"type": "retrieval"}]}, "tools", "tools[0]"),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
        "tool_choice",
        "'g'",
    ),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": "required",
            "response_format": {"type": "json_object"},
        },
        "tool_choice",
        "response_format",
    ),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "--trust-request-chat-template"),
    (
        {"chat_template_kwargs": {"chat_template": "x"}},
        "chat_template",
        "--trust-request-chat-template",
    ),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize"),
    ({"documents": [{"text": "x"}]}, "documents", "template"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "template"),
    ({"include_reasoning": "maybe"}, "include_reasoning", "boolean"),
    ({"continue_final_message": True}, "continue_final_message", "assistant"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "add_generation_prompt",
    ),
    ({"functions": [{"name": "f"}]}, "functions", "use tools"),
    ({"store": True}, "store", "not stored"),
    ({"max_completion_tokens": 99999}, "max_completion_tokens", "leave"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    ({"prompt": "hi"}, "prompt", "unknown field"),
]


@pytest.mark.parametrize(("fields", "param", "word"), CHAT_ERRORS)
def test_a_wrong_chat_field_is_named(server: Server, fields: dict, param: str, word: str):
    error = refused(server.post("/v1/chat/completions", {**CHAT, **fields}), 400, word)
    assert error["param"] == param


# Each is of a wrong type, or out of range, for nearly every field.
STRANGE = (
    "true",
    "-1",
    "1.5",
    "1e30",
    "9" * 30,
    '"x"',
    '"\\ud800"',
    "[]",
    "[null]",
    '[9e99, "a"]',
    '{"a": {"b": []}}',
    "[" * 300 + "]" * 300,
)


@pytest.mark.parametrize(
    ("path", "base", "fields"),
    [
        ("/v1/completions", PROMPT, COMPLETION),
        ("/v1/chat/completions", CHAT, CHAT_FIELDS),
        ("/tokenize", {"prompt": "Hi"}, f"{TOKENIZE_COMPLETION} messages tools"),
        ("/detokenize", {"tokens": [1]}, DETOKENIZE),
    ],
)
def test_no_value_of_any_field_is_the_servers_error(
    server: Server, path: str, base: dict, fields: str
):
    """Every field once with each of many values: answered, or refused in the usual form."""
    for field in fields.split():
        rest = {name: value for name, value in base.items() if name != field}
        for value in STRANGE:
            body = json.dumps(rest)[:-1] + (", " if rest else "") + f'"{field}": {value}}}'
            headers = {"content-type": "application/json"}
            response = server.post(path, content=body, headers=headers)
            if response.status_code != 200:
                assert response.status_code in (400, 404), (body, response.text)
                refused(response, response.status_code)


def test_deep_values_and_large_numbers_never_reach_the_engine(server: Server):
    deep: object = 1
    for _ in range(300):
        deep = {"a": deep}
    for value in (deep, 10**30):
        error = refused(
            server.post("/v1/completions", {**PROMPT, "vllm_xargs": {"x": value}}),
            400,
            "vllm_xargs",
        )
        assert error["param"] == "vllm_xargs"
    refused(server.post("/v1/completions", {**PROMPT, "priority": 10**30}), 400, "priority")
    refused(
        server.post("/v1/completions", {**PROMPT, "structured_outputs": {"json": deep}}),
        400,
        "structured_outputs is nested",
    )


def test_values_that_ask_for_nothing_pass(server: Server):
    neutral = {
        "suffix": None,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "watermarking": False,
        "session_id": None,
        "guided_json": None,
        "logit_bias": {},
        "stop": [],
        "stream_options": None,
        "bad_words": [],
        "temperature": None,
    }
    assert server.post("/v1/completions", {**PROMPT, **neutral}).status_code == 200
    neutral = {"include_reasoning": True, "store": False, "modalities": ["text"], "tools": None}
    assert server.post("/v1/chat/completions", {**CHAT, **neutral}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000]
)
def test_bad_json_is_400(server: Server, path: str, body: bytes):
    headers = {"content-type": "application/json"}
    refused(server.post(path, content=body, headers=headers), 400, "body")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(server: Server, value: str):
    body = f'{{"prompt": "Hi", "temperature": {value}}}'
    headers = {"content-type": "application/json"}
    refused(server.post("/v1/completions", content=body, headers=headers), 400)


def test_another_content_type_is_415(server: Server):
    body = json.dumps(PROMPT)
    headers = {"content-type": "text/plain"}
    refused(server.post("/v1/completions", content=body, headers=headers), 415, "application/json")


def test_a_body_without_end_is_413(server: Server):
    def chunks():
        for _ in range(70):
            yield b" " * 1024 * 1024

    with httpx.Client(timeout=PATIENCE, limits=BRIEF) as client:
        response = client.post(
            f"{server.url}/v1/completions",
            content=chunks(),
            headers={"content-type": "application/json"},
        )
    refused(response, 413)


def test_an_unknown_model_is_404(server: Server, client: openai.OpenAI):
    for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
        error = refused(server.post(path, {**body, "model": "gpt-4"}), 404, "gpt-4", MODEL)
        assert error["type"] == "NotFoundError"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="Hi")


def test_unknown_paths_say_what_is_known(server: Server):
    refused(server.get("/nowhere"), 404, "/docs")
    refused(server.post("/v1/embeddings", {"input": "x"}), 404, "vLLM has it")
    refused(server.get("/v1/completions"), 405)


def test_a_template_that_fails_is_400(server: Server):
    messages = [{"role": "user", "content": "x"}]
    body = {**CHAT, "messages": messages, "chat_template_kwargs": {"add_generation_prompt": 1}}
    refused(server.post("/v1/chat/completions", body), 400, "add_generation_prompt")


@pytest.mark.parametrize(
    "schema", [{"type": "objekt"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}]
)
def test_a_schema_that_cannot_be_compiled_is_400(server: Server, schema: dict):
    body = {**CHAT, "structured_outputs": {"json": schema}}
    refused(server.post("/v1/chat/completions", body), 400)


def test_errors_of_a_stream_have_their_status(server: Server):
    """The first output is awaited before the status is sent."""
    body = {**PROMPT, "stream": True, "structured_outputs": {"regex": "("}}
    refused(server.post("/v1/completions", body), 400)


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"messages": [], "media_io_kwargs": {"a": 1}}, "media_io"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [1], "skip": 1}, "skip"),
    ],
)
def test_tokenizer_errors(server: Server, path: str, body: dict, word: str):
    refused(server.post(path, body), 400, word)


def test_too_many_headers_are_431(server: Server):
    headers = {f"x-{i}": "1" for i in range(300)}
    assert server.get("/v1/models", headers=headers).status_code in (400, 431)
