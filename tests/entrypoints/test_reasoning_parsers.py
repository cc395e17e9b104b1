"""Reasoning parsers on answers as models write them: whole, and in every cut of a stream."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterator

import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from xgrammar.testing import _is_grammar_accept_string as accepts

from tests.entrypoints.server import SMALL, TINY, Server
from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.tool_choice import AnswerReader
from vllm.entrypoints.openai.tool_parsers import ToolParserManager
from vllm.errors import ConfigError
from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.sampling_params import StructuredOutputsParams

REQUEST = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "hi"}]})
ASKS = "<|im_start|>assistant\n"
CALL = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>"

# parser, end of the prompt, answer, expected reasoning, expected content
CASES = [
    ("qwen3", ASKS, "<think>\nOne, two.\n</think>\n\nThree.", "One, two.", "Three."),
    ("qwen3", ASKS, "  <think>a < b</think>c", "a < b", "c"),
    ("qwen3", ASKS, "No thought.\n", None, "No thought.\n"),
    ("qwen3", ASKS, "  <thin", None, "  <thin"),
    ("qwen3", ASKS, "", None, ""),
    ("qwen3", ASKS, "<think>cut o", "cut o", None),
    ("qwen3", ASKS, "<think>cut off </thi", "cut off </thi", None),
    ("qwen3", ASKS, "<think></think>none", None, "none"),
    ("qwen3", ASKS, "<think>a\n\nb</think>\n  code\n", "a\n\nb", "  code\n"),
    ("qwen3", ASKS + "<think>\n", "begun\n</think>\n\nend", "begun", "end"),
    ("qwen3", ASKS + "<think>\n\n</think>\n\n", "<b>plain</b>", None, "<b>plain</b>"),
    ("deepseek_v3", ASKS + "</think>", "plain", None, "plain"),
    ("deepseek_r1", ASKS, "always thinks</think>\nend", "always thinks", "end"),
    ("deepseek_r1", ASKS, "<think>\nsays so\n</think>end", "says so", "end"),
    ("deepseek_r1", ASKS, "never ends", "never ends", None),
    ("mistral", "[/INST]", "[THINK]so[/THINK]it is", "so", "it is"),
    (
        "openai_gptoss",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>Hm < 3<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes",
        "Hm < 3",
        "Yes",
    ),
    (
        "openai_gptoss",
        "<|start|>assistant",
        "<|channel|>final<|message|>Yes<|return|>",
        None,
        "Yes",
    ),
    ("openai_gptoss", "<|start|>assistant", "<|channel|>analysis<|message|>Hm", "Hm", None),
    ("openai_gptoss", "<|start|>assistant", '{"a": 1}', None, '{"a": 1}'),
    ("openai_gptoss", "<|start|>assistant", "<|channel|>ana", None, ""),
    (
        "openai_gptoss",
        "<|start|>assistant",
        f'<|channel|>analysis<|message|>Hm<|end|><|start|>assistant{CALL}{{"a": 1}}<|call|>',
        "Hm",
        '<|channel|>commentary to=functions.add<|message|>{"a": 1}<|call|>',
    ),
]


def parser_of(name: str, prompt: str) -> ReasoningParser:
    parser = ReasoningParserManager.get_reasoning_parser(name)(None)
    parser.begin(prompt)
    return parser


def streamed(reader: AnswerReader, pieces: list[str]) -> tuple[str, str, list[list[str]]]:
    """Reasoning, content and [name, arguments] of calls that a stream of ``pieces`` sends."""
    deltas = [reader.push(piece, [0]) for piece in pieces] + [reader.finish()]
    reasoning, content = "", ""
    calls: list[list[str]] = []
    for delta in filter(None, deltas):
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for call in delta.tool_calls:
            if call.function.name:
                calls.append([call.function.name, ""])
            calls[-1][1] += call.function.arguments or ""
    return reasoning, content, calls


@pytest.mark.parametrize(("name", "prompt", "answer", "reasoning", "content"), CASES)
def test_a_whole_answer_is_split(name, prompt, answer, reasoning, content):
    parser = parser_of(name, prompt)
    assert parser.extract_reasoning(answer, REQUEST) == (reasoning, content)


@pytest.mark.parametrize(("name", "prompt", "answer", "reasoning", "content"), CASES)
def test_a_stream_is_split_the_same(name, prompt, answer, reasoning, content):
    for size in (1, 2, 3, 7):
        pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
        reader = AnswerReader(REQUEST, None, parser_of(name, prompt))
        assert not reader.is_plain
        assert streamed(reader, pieces) == (reasoning or "", content or "", [])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_text_in_any_cut_is_split_as_a_whole(data):
    name = data.draw(st.sampled_from(["qwen3", "deepseek_r1", "openai_gptoss"]))
    parts = ["<think>", "</think>", "<|channel|>", "analysis", "final", "<|message|>", "<|end|>"]
    parts += [" ", "\n", "a", "<", "<|", "</", "to=functions.x"]
    answer = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=12)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=6)) | {0, len(answer)})
    pieces = [answer[a:b] for a, b in itertools.pairwise(cuts)]
    reasoning, content = parser_of(name, ASKS).extract_reasoning(answer, REQUEST)
    reader = AnswerReader(REQUEST, None, parser_of(name, ASKS))
    assert streamed(reader, pieces) == (reasoning or "", content or "", [])


def test_calls_behind_reasoning_are_read():
    tool = {"type": "function", "function": {"name": "add"}}
    request = REQUEST.model_copy(
        update={"tools": ChatCompletionRequest(messages=[], tools=[tool]).tools}
    )
    request.tool_choice = "auto"
    for reasoning, tools, answer in (
        ("qwen3", "hermes", '<think>Hm</think>\n<tool_call>{"name": "add", "arguments": {"a": 1}}'
         "</tool_call>"),
        ("openai_gptoss", "openai", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
         f'{CALL}{{"a": 1}}'),
    ):  # fmt: skip

        def make(reasoning=reasoning, tools=tools) -> AnswerReader:
            parser = ToolParserManager.get_tool_parser(tools)(None)
            return AnswerReader(request, parser, parser_of(reasoning, ASKS))

        thought, content, calls = make().read(answer)
        assert (thought, content or None) == ("Hm", None)
        assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
            ("add", {"a": 1})
        ]
        reader = make()
        assert streamed(reader, list(answer)) == ("Hm", "", [["add", '{"a": 1}']])
        assert reader.ends_with_calls


def test_reasoning_is_left_out_where_asked():
    request = REQUEST.model_copy(update={"include_reasoning": False})
    answer = "<think>Hm</think>Yes"
    assert AnswerReader(request, None, parser_of("qwen3", ASKS)).read(answer) == (None, "Yes", [])
    reader = AnswerReader(request, None, parser_of("qwen3", ASKS))
    assert streamed(reader, list(answer)) == ("", "Yes", [])


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ({"json": {"type": "integer"}}, "12", "x"),
        ({"json_object": True}, "{}", "1"),
        ({"regex": "[ab]+"}, "abba", "c"),
        ({"choice": ["yes", "no"]}, "no", "maybe"),
        ({"grammar": 'root ::= "x" "y"'}, "xy", "x"),
    ],
)
def test_a_constraint_holds_behind_the_reasoning(constraint, good, bad):
    given = StructuredOutputsParams(**constraint)
    for name, prompt, begin in (
        ("qwen3", ASKS, "<think>"),
        ("qwen3", ASKS + "<think>\n", ""),
        ("deepseek_r1", ASKS, ""),
    ):
        after = parser_of(name, prompt).constraint_after(given)
        grammar = xgrammar.Grammar.from_structural_tag(json.loads(after.structural_tag))
        assert accepts(grammar, f"{begin}Let me {{ think.</think>{good}")
        assert not accepts(grammar, f"{begin}Let me think.</think>{bad}")
        assert not accepts(grammar, good)
    ended = parser_of("qwen3", ASKS + "<think>\n\n</think>\n\n")
    assert ended.constraint_after(given) is given


def test_a_constraint_that_cannot_follow_is_kept_as_it_is():
    tag = StructuredOutputsParams(structural_tag='{"type": "structural_tag"}')
    assert parser_of("qwen3", ASKS).constraint_after(tag) is tag
    assert parser_of("deepseek_r1", ASKS).constraint_after(tag) is None
    assert parser_of("openai_gptoss", ASKS).constraint_after(tag) is tag


def test_gptoss_needs_no_option():
    assert ReasoningParserManager.default_for("gpt_oss") == "openai_gptoss"
    assert ReasoningParserManager.default_for("llama") == ""
    request = REQUEST.model_copy()
    parser_of("openai_gptoss", ASKS).adjust_request(request)
    assert request.skip_special_tokens is False


PLUGIN = textwrap.dedent(
    """
    from vllm.reasoning import ReasoningParser, ReasoningParserManager

    @ReasoningParserManager.register_module("shout")
    class Shout(ReasoningParser):
        def is_reasoning_end(self, input_ids):
            return True

        def extract_reasoning(self, model_output, request):
            return "loud", model_output.upper()

        def extract_reasoning_streaming(self, previous_text, current_text, delta_text,
                                        previous_token_ids, current_token_ids, delta_token_ids):
            return None
    """
)


def test_a_plugin_file_registers_its_parser(tmp_path):
    path = tmp_path / "loud_plugin.py"
    path.write_text(PLUGIN)
    ReasoningParserManager.import_reasoning_parser(str(path))
    reader = AnswerReader(REQUEST, None, parser_of("shout", ASKS))
    assert reader.read("hi") == ("loud", "HI", [])


def test_a_broken_plugin_and_an_unknown_name_are_refused_by_option(tmp_path):
    path = tmp_path / "broken_reasoning.py"
    path.write_text("import no_such_module_at_all")
    with pytest.raises(ConfigError, match=r"--reasoning-parser-plugin: .*no_such_module_at_all"):
        ReasoningParserManager.import_reasoning_parser(str(path))
    with pytest.raises(ConfigError, match=r"--reasoning-parser: no parser named 'nope'; .*qwen3"):
        ReasoningParserManager.check("nope")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("thinker") / "log"
    with Server(log, *TINY, *SMALL, "--reasoning-parser", "qwen3") as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_tells_reasoning_from_content(thinker: Server, stream: bool):
    """The grammar makes this small model think as a larger one would."""
    written = {"type": "const_string", "value": "<think>\nHm.\n</think>\n\nYes."}
    answer = thinker.client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Really?"}],
        max_tokens=60,
        stream=stream,
        extra_body={
            "structured_outputs": {
                "structural_tag": json.dumps({"type": "structural_tag", "format": written})
            }
        },
    )
    if stream:
        deltas = [chunk.choices[0].delta for chunk in answer]
        reasoning = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
        content = "".join(delta.content or "" for delta in deltas)
    else:
        message = answer.choices[0].message
        reasoning, content = message.reasoning, message.content
    assert (reasoning, content) == ("Hm.", "Yes.")
