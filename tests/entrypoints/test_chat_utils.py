"""Messages, their parts, and templates, with the model's own tokenizer."""

import pytest

from vllm.entrypoints.chat_utils import (
    load_chat_template,
    parse_chat_messages,
    render_chat,
    resolve_chat_template,
)
from vllm.errors import ConfigError, UnsupportedError, VLLMValidationError
from vllm.transformers_utils.config import resolve_model
from vllm.transformers_utils.tokenizer import get_tokenizer

STRING_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
PARTS_TEMPLATE = (
    "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
)
ASSIGNED_TEMPLATE = (
    "{% for m in messages %}{% set body = m['content'] | list %}"
    "{% for part in body %}({{ part['text'] }}){% endfor %}{% endfor %}"
)
DEEP = "[" * 9999 + "]" * 9999


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer(resolve_model("smollm2").model_path)


def render(tokenizer, template: str | None, messages: list, **kwargs) -> str:
    resolved = resolve_chat_template(tokenizer, template)
    parsed = parse_chat_messages(messages, resolved.content_format)
    return render_chat(tokenizer, resolved, parsed, **kwargs)


def user(content: object) -> dict:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("template", "content_format"),
    [
        (STRING_TEMPLATE, "string"),
        (PARTS_TEMPLATE, "openai"),
        (ASSIGNED_TEMPLATE, "openai"),
        ("{% generation %}{{ messages }}{% endgeneration %}", "string"),
    ],
)
def test_the_template_tells_how_content_must_look(tokenizer, template, content_format):
    assert resolve_chat_template(tokenizer, template).content_format == content_format


def test_parts_become_one_string_or_stay_parts(tokenizer):
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    assert render(tokenizer, STRING_TEMPLATE, [user(parts)]) == "a\nb\nc"
    assert render(tokenizer, PARTS_TEMPLATE, [user(parts)]) == "[a][b][c]"
    assert render(tokenizer, PARTS_TEMPLATE, [user("alone")]) == "[alone]"


def test_the_models_own_template(tokenizer):
    text = render(tokenizer, None, [{"role": "system", "content": "Be brief."}, user("Hi")])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_final_message_is_left_open(tokenizer):
    messages = [user("Hi"), {"role": "assistant", "content": "Hello, I am "}]
    text = render(
        tokenizer, None, messages, add_generation_prompt=False, continue_final_message=True
    )
    assert text.endswith("<|im_start|>assistant\nHello, I am ")


def test_arguments_of_calls_reach_the_template_as_objects(tokenizer):
    template = "{% for m in messages %}{{ m.tool_calls[0].function.arguments.city }}{% endfor %}"
    call = {"id": "1", "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "annotations": []}
    assert render(tokenizer, template, [message]) == "Oslo"
    call["function"]["arguments"] = {"city": "Rome"}
    assert render(tokenizer, template, [message]) == "Rome"


def test_reasoning_is_known_under_both_names(tokenizer):
    template = "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}"
    for name in ("reasoning", "reasoning_content"):
        message = {"role": "assistant", "content": "x", name: "because"}
        assert render(tokenizer, template, [message]) == "because"


def test_tools_documents_and_variables_reach_the_template(tokenizer):
    template = "{{ tools[0].function.name }} {{ documents[0].text }} {{ mood }}"
    text = render(
        tokenizer,
        template,
        [user("x")],
        tools=[{"type": "function", "function": {"name": "f"}}],
        documents=[{"text": "doc"}],
        variables={"mood": "calm"},
    )
    assert text == "f doc calm"


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], UnsupportedError, "'image_url'"),
        ([{"type": "input_audio", "input_audio": {}}], UnsupportedError, "'input_audio'"),
        ([{"type": "text"}], VLLMValidationError, "text must be a string"),
        ([{"text": "x"}], VLLMValidationError, "type is missing"),
        ([{"type": "text", "text": "x", "bold": 1}], VLLMValidationError, "'bold'"),
        ([3], VLLMValidationError, "messages[0].content[0]"),
        (3, VLLMValidationError, "string or a list"),
        (None, VLLMValidationError, "content is missing"),
    ],
)
def test_a_wrong_part_is_named(content, kind, words):
    with pytest.raises(kind) as refusal:
        parse_chat_messages([user(content)], "string")
    assert words in str(refusal.value)
    assert "messages[0]" in str(refusal.value)
    assert refusal.value.parameter == "messages"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user\n", "content": "x"},
        {"role": "", "content": "x"},
        {"content": "x"},
        {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
        {"role": "assistant", "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "tool_calls": [{"type": "web", "function": {"name": "f"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]},
        {"role": "user", "content": "x", "name": 5},
        "x",
    ],
)
def test_a_wrong_message_is_refused(message):
    with pytest.raises(VLLMValidationError, match=r"messages\[0\]"):
        parse_chat_messages([message], "string")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ messages[9].x }}", "{{ 1 / 0 }}", "{{ messages + 1 }}"],
)
def test_a_template_that_fails_says_so(tokenizer, template):
    with pytest.raises(VLLMValidationError, match=r"^the chat template failed"):
        render(tokenizer, template, [user("x")])


def test_a_template_cannot_reach_out(tokenizer):
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(VLLMValidationError, match="chat template failed"):
        render(tokenizer, template, [user("x")])


def test_variables_cannot_replace_what_is_not_theirs(tokenizer):
    for name in ("messages", "tokenize", "chat_template"):
        with pytest.raises(VLLMValidationError, match=name):
            render(tokenizer, STRING_TEMPLATE, [user("x")], variables={name: 1})


def test_templates_come_from_files_or_as_they_are(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(STRING_TEMPLATE)
    assert load_chat_template(str(path)) == STRING_TEMPLATE
    assert load_chat_template(STRING_TEMPLATE) == STRING_TEMPLATE
    assert load_chat_template(None) is None
    with pytest.raises(ConfigError, match="--chat-template"):
        load_chat_template("no-such-file.jinja")
    with pytest.raises(ConfigError, match=r"--chat-template: line 2"):
        load_chat_template("ok\n{% for %}")
    path.write_bytes(b"{{ \xff }}")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        load_chat_template(str(path))


@pytest.mark.parametrize("template", ["{{ " + DEEP + " }}", "{% if 1 %}" * 9999])
def test_a_template_that_is_nested_too_deeply_is_refused(tokenizer, template):
    with pytest.raises(ConfigError, match="--chat-template: its expressions are nested too"):
        load_chat_template(template)
    with pytest.raises(VLLMValidationError, match="chat_template: its expressions are nested"):
        render(tokenizer, template, [user("x")])
