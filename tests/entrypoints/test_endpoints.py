"""The endpoints beside generation."""

import re
from pathlib import Path

import openai
import pytest

import vllm
from tests.entrypoints.server import MODEL, Server


def test_models_are_listed(client: openai.OpenAI):
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert card.owned_by == "vllm"
    assert card.max_model_len == 1024
    assert client.models.retrieve(MODEL).id == MODEL


def test_an_unknown_model_is_404(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match=r"does not exist.*smollm2"):
        client.models.retrieve("gpt-4")


def test_tokens_go_there_and_back(server: Server):
    text = "Grüße, 世界! 🙂"
    answer = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 1024
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_chats_are_tokenised_as_they_are_prompted(server: Server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    with_prompt = server.post("/tokenize", body).json()["tokens"]
    without = server.post("/tokenize", {**body, "add_generation_prompt": False}).json()["tokens"]
    assert with_prompt[: len(without)] == without
    assert len(with_prompt) > len(without)
    usage = server.post("/v1/chat/completions", {**body, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == len(with_prompt)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")]
)
def test_health_has_no_body(server: Server, method: str, path: str):
    response = server.get(path) if method == "GET" else server.post(path)
    assert response.status_code == 200
    assert response.content == b""


def test_version_and_load(server: Server):
    assert server.get("/version").json() == {"version": vllm.__version__}
    assert server.get("/load").json() == {"server_load": 0}


def test_tokenizer_info_shows_the_template(server: Server):
    assert "<|im_start|>" in server.get("/tokenizer_info").json()["chat_template"]


def test_metrics_count_what_happens(server: Server):
    tokens = server.metric("vllm:generation_tokens_total")
    requests = server.metric("http_requests_total")
    server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 5, "ignore_eos": True})
    assert server.metric("vllm:generation_tokens_total") == tokens + 5
    assert server.metric("http_requests_total") == requests + 1
    text = server.get("/metrics").text
    names = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    assert {
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "http_request_duration_seconds",
        "http_request_duration_highr_seconds",
        "http_request_size_bytes",
        "http_response_size_bytes",
        "process_resident_memory_bytes",
    } <= names
    assert 'handler="/v1/completions"' in text
    assert "/metrics" not in text


def test_the_schema_names_every_endpoint_and_body(server: Server):
    schema = server.get("/openapi.json").json()
    assert {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ping",
        "/version",
        "/load",
        "/metrics",
    } <= set(schema["paths"])
    fields = schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "tools", "structured_outputs", "cache_salt"} <= set(fields)


def test_every_endpoint_on_the_page_for_vllms_users_exists(server: Server):
    page = (Path(__file__).parents[2] / "docs" / "from_vllm.md").read_text()
    table = page.partition("## Endpoints")[2].partition("## ")[0]
    open_rows = [row for row in table.splitlines() if "DEV_MODE" not in row]
    named = re.findall(r"`(GET|POST) (/\S*?)`", "\n".join(open_rows))
    assert len(named) > 10
    paths = server.get("/openapi.json").json()["paths"]
    assert [(m, path) for m, path in named if m.lower() not in paths.get(path, {})] == []


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"prompt": "Hi", "max_tokens": 1}, "text_completion"),
        ({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}, "chat.completion"),
    ],
)
def test_invocations_take_either_kind(server: Server, body: dict, kind: str):
    assert server.post("/invocations", body).json()["object"] == kind
    refused = server.post("/invocations", {"max_tokens": 1})
    assert refused.status_code == 400
    assert "messages (chat) or prompt (completion)" in refused.json()["error"]["message"]


def test_request_ids_come_back(server: Server):
    body = {"prompt": "Hi", "max_tokens": 1}
    given = server.post("/v1/completions", body, headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    assert given.json()["id"] == "cmpl-mine-1"
    made = server.post("/v1/completions", body)
    assert made.json()["id"] == f"cmpl-{made.headers['x-request-id']}"
    named = server.post("/v1/completions", {**body, "request_id": "r"}, headers={})
    assert named.status_code == 200


def test_other_origins_may_ask(server: Server):
    response = server.get("/v1/models", headers={"Origin": "http://elsewhere"})
    assert response.headers["access-control-allow-origin"] == "*"
