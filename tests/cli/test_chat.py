"""``vllm chat`` and ``vllm complete`` against a real HTTP server."""

import io

import pytest


@pytest.fixture
def typed(monkeypatch):
    """What the user types into the command."""

    def give(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return give


def test_quick_chat(vllm_command, peer):
    answer = vllm_command("chat", "--url", f"{peer.url}/v1", "-q", "hello", "--max-tokens", "2")
    assert (answer.status, answer.out) == (0, "tik tik \n")
    assert peer.requests == [
        {
            "model": "words",
            "stream": True,
            "max_tokens": 2,
            "messages": [{"role": "user", "content": "hello"}],
        }
    ]


def test_the_history_goes_along(vllm_command, peer, typed):
    typed("one\n\ntwo\n")
    answer = vllm_command("chat", "--url", f"{peer.url}/v1", "--system-prompt", "Be brief.")
    assert answer.status == 0
    assert answer.out == "tik tik tik \n" * 2
    assert peer.requests[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "tik tik tik "},
        {"role": "user", "content": "two"},
    ]


def test_quick_completion(vllm_command, peer):
    answer = vllm_command(
        "complete", "--url", f"{peer.url}/v1/", "--quick", "Once", "--temperature", "0"
    )
    assert (answer.status, answer.out) == (0, "tik tik tik \n")
    assert (peer.requests[0]["prompt"], peer.requests[0]["temperature"]) == ("Once", 0)


def test_completions_stand_alone(vllm_command, peer, typed):
    typed("one\ntwo")
    assert vllm_command("complete", "--url", f"{peer.url}/v1").out == "tik tik tik \n" * 2
    assert [request["prompt"] for request in peer.requests] == ["one", "two"]


def test_the_key_is_sent(vllm_command, peer, monkeypatch):
    vllm_command("chat", "--url", f"{peer.url}/v1", "-q", "x", "--api-key", "secret")
    monkeypatch.setenv("VLLM_API_KEY", "other")
    vllm_command("chat", "--url", f"{peer.url}/v1", "-q", "x")
    keys = [headers["authorization"] for headers in peer.headers]
    assert keys == ["Bearer secret", "Bearer other"]


def test_an_error_of_the_server_is_one_line(vllm_command, peer):
    peer.fail_every = 1
    answer = vllm_command("chat", "--url", f"{peer.url}/v1", "-q", "x")
    assert answer.status == 1
    assert answer.err.endswith("answered 500: out of words\n")


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_no_server_is_one_line(vllm_command, command):
    answer = vllm_command(command, "--url", "http://127.0.0.1:1/v1", "-q", "x")
    assert answer.status == 1
    assert answer.err.startswith(f"vllm {command}: error: no answer from http://127.0.0.1:1/v1/")
    assert answer.err.count("\n") == 1


def test_a_bad_url_is_one_line(vllm_command):
    answer = vllm_command("chat", "--url", "localhost:8000", "-q", "x")
    assert (answer.status, answer.err.count("\n")) == (2, 1)
    assert "--url must begin with http://" in answer.err
