"""Tool parsers on answers as models write them: whole, and in every cut of a stream."""

import itertools
import json
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.entrypoints.openai.protocol import ChatCompletionRequest, DeltaMessage
from vllm.entrypoints.openai.tool_parsers import ToolParser, ToolParserManager
from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import to_delta
from vllm.entrypoints.openai.tool_parsers.scanners import CallArguments, JSONCallList
from vllm.errors import ConfigError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "tags": {"type": "array"},
                },
            },
        },
    }
    for name in ("get_weather", "add")
]
REQUEST = ChatCompletionRequest.model_validate(
    {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
)
OSLO = ("get_weather", {"city": "Oslo"})
ADD = ("add", {"days": 3, "tags": ["a", "}"]})

# parser, answer, expected content, expected calls
CASES = [
    ("hermes", "Just text.", "Just text.", []),
    ("hermes", "", "", []),
    ("hermes", "  \n", "  \n", []),
    ("hermes", "a < b and <tool_cal", "a < b and <tool_cal", []),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        None,
        [OSLO],
    ),
    (
        "hermes",
        'Let me look.\n<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}'
        '</tool_call>\n<tool_call>{"name": "add", "arguments": {"days": 3, "tags": ["a", "}"]}}'
        "</tool_call>\n",
        "Let me look.\n",
        [OSLO, ADD],
    ),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>',
        None,
        [OSLO],
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', None, [("add", {})]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', None, [("add", {})]),
    ("hermes", "<tool_call>not JSON</tool_call>", "<tool_call>not JSON</tool_call>", []),
    (
        "hermes",
        '<tool_call>{"no": "name"}</tool_call>',
        '<tool_call>{"no": "name"}</tool_call>',
        [],
    ),
    # The close tag never comes: the model ran out of tokens just before it.
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}', None, [("add", {})]),
    (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {}}<tool_call>'
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>',
        None,
        [("add", {}), OSLO],
    ),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Oslo"}}', None, [OSLO]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Oslo"}}; '
        '{"name": "add", "parameters": {"days": 3, "tags": ["a", "}"]}}',
        None,
        [OSLO, ADD],
    ),
    ("llama3_json", 'Text with {"name": "x"}', 'Text with {"name": "x"}', []),
    ("llama3_json", '{"city": "Oslo"} is JSON', '{"city": "Oslo"} is JSON', []),
    ("llama3_json", "<|python", "<|python", []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}}, '
        '{"name": "add", "arguments": {"days": 3, "tags": ["a", "}"]}}]',
        None,
        [OSLO, ADD],
    ),
    (
        "mistral",
        'Sure.[TOOL_CALLS]get_weather{"city": "Oslo"}[TOOL_CALLS]add[ARGS]'
        '{"days": 3, "tags": ["a", "}"]}',
        "Sure.",
        [OSLO, ADD],
    ),
    ("mistral", "No [TOOL tags", "No [TOOL tags", []),
    (
        "pythonic",
        "[get_weather(city='Oslo'), add(days=3, tags=['a', '}'])]",
        None,
        [OSLO, ADD],
    ),
    ("pythonic", "[1, 2, 3] is a list", "[1, 2, 3] is a list", []),
    ("pythonic", "plain", "plain", []),
    ("llama4_pythonic", "<|python_start|>[get_weather(city='Oslo')]<|python_end|>", None, [OSLO]),
    (
        "qwen3_coder",
        "I'll see.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call><function=add><parameter=days>3</parameter>"
        '<parameter=tags>["a", "}"]</parameter></function></tool_call>',
        "I'll see.\n",
        [OSLO, ADD],
    ),
    ("qwen3_coder", "<tool_call>huh</tool_call>", "<tool_call>huh", []),
]


def streamed(parser: ToolParser, pieces: list[str]) -> tuple[str, list[list[str]]]:
    """Content, and [name, arguments] of each call, from a stream cut into ``pieces``."""
    content, calls, text = "", [], ""

    def take(delta: DeltaMessage | None) -> None:
        nonlocal content
        if delta is None:
            return
        content += delta.content or ""
        for call in delta.tool_calls:
            if call.id is not None:
                assert call.index == len(calls)
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""

    for piece in pieces:
        take(parser.extract_tool_calls_streaming(text, text + piece, piece, [], [], [], REQUEST))
        text += piece
    take(parser.finish_streaming())
    return content, calls


@pytest.mark.parametrize(("name", "answer", "content", "calls"), CASES)
def test_a_whole_answer_gives_its_text_and_calls(name, answer, content, calls):
    found = ToolParserManager.get_tool_parser(name)(None).extract_tool_calls(answer, REQUEST)
    assert found.content == content
    assert [(c.function.name, json.loads(c.function.arguments)) for c in found.tool_calls] == calls
    assert found.tools_called == bool(calls)
    assert len({call.id for call in found.tool_calls}) == len(calls)


@settings(max_examples=300, deadline=None)
@given(case=st.sampled_from(CASES), data=st.data())
def test_every_cut_of_a_stream_gives_the_same(case, data):
    name, answer, content, calls = case
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(answer) - 1)), max_size=12)))
    bounds = [0, *[cut for cut in cuts if cut < len(answer)], len(answer)]
    pieces = [answer[a:b] for a, b in itertools.pairwise(bounds)]
    shown, found = streamed(ToolParserManager.get_tool_parser(name)(None), pieces)
    assert shown == (content or "")
    assert [(call, json.loads(arguments)) for call, arguments in found] == calls


def test_arguments_stream_while_they_are_written():
    parser = ToolParserManager.get_tool_parser("hermes")(None)
    pieces = ['<tool_call>{"name": "add", "arguments": {"ci', 'ty": "Os', 'lo"}}</tool_call>']
    deltas = [
        parser.extract_tool_calls_streaming("", "", piece, [], [], [], REQUEST) for piece in pieces
    ]
    arguments = [delta.tool_calls[0].function.arguments for delta in deltas]
    assert arguments == ['{"ci', 'ty": "Os', 'lo"}']
    assert deltas[0].tool_calls[0].function.name == "add"
    assert deltas[1].tool_calls[0].id is None


def test_parallel_calls_can_be_limited_to_one():
    scanner = JSONCallList(limit=1)
    text = '[{"name": "a", "parameters": {}}, {"name": "b", "parameters": {"x": 1}}]'
    delta, num_calls = to_delta(scanner.feed(text), 0, lambda: "id")
    assert num_calls == 1
    assert delta.tool_calls[0].function.name == "a"


def test_broken_arguments_keep_what_was_sent():
    pieces = JSONCallList().feed('[{"name": "a", "parameters": {"x": ')
    assert pieces[-1] == CallArguments('{"x": ')


def test_mistral_ids_have_nine_characters():
    found = ToolParserManager.get_tool_parser("mistral")(None).extract_tool_calls(
        '[TOOL_CALLS]add{"x": 1}', REQUEST
    )
    assert len(found.tool_calls[0].id) == 9
    assert found.tool_calls[0].id.isalnum()


def test_an_unknown_parser_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"--tool-call-parser: no parser named 'hermess'.*hermes"):
        ToolParserManager.get_tool_parser("hermess")


PLUGIN = textwrap.dedent(
    """
    from vllm.entrypoints.openai.protocol import (
        DeltaFunctionCall, DeltaMessage, DeltaToolCall, ExtractedToolCallInformation,
        FunctionCall, ToolCall,
    )
    from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import (
        ToolParser, ToolParserManager,
    )


    @ToolParserManager.register_module(["shout"])
    class ShoutParser(ToolParser):
        def extract_tool_calls(self, model_output, request):
            call = ToolCall(type="function", function=FunctionCall(name="shout", arguments="{}"))
            return ExtractedToolCallInformation(tools_called=True, tool_calls=[call], content=None)

        def extract_tool_calls_streaming(self, previous_text, current_text, delta_text,
                                         previous_token_ids, current_token_ids, delta_token_ids,
                                         request):
            if self.prev_tool_call_arr:
                return None
            self.prev_tool_call_arr.append({"name": "shout", "arguments": {"a": 1}})
            self.streamed_args_for_tool.append("{")
            function = DeltaFunctionCall(name="shout", arguments="{").model_dump(exclude_none=True)
            return DeltaMessage(tool_calls=[DeltaToolCall(index=0, id="x", function=function)])
    """
)


def test_a_plugin_file_registers_its_parser(tmp_path):
    path = tmp_path / "shout_plugin.py"
    path.write_text(PLUGIN)
    ToolParserManager.import_tool_parser(str(path))
    parser = ToolParserManager.get_tool_parser("shout")(None)
    assert parser.extract_tool_calls("hi", REQUEST).tool_calls[0].function.name == "shout"
    # What the plug-in has parsed but not sent by the end is sent then.
    assert streamed(parser, ["h", "i"]) == ("", [["shout", '{"a": 1}']])


def test_a_broken_plugin_is_refused_by_option(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module_at_all")
    with pytest.raises(ConfigError, match=r"--tool-parser-plugin: .*no_such_module_at_all"):
        ToolParserManager.import_tool_parser(str(path))
