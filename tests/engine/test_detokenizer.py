"""Text that comes piece by piece is the text of the whole, and stop strings cut it exactly."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.conftest import VOCAB_SIZE, make_tokenizer
from vllm.sampling_params import SamplingParams
from vllm.transformers_utils.tokenizer import get_tokenizer
from vllm.v1.engine.detokenizer import (
    IncrementalDetokenizer,
    TextStream,
    find_stop,
    token_decoder,
)

TEXTS = [
    "plain words, and a line\nbreak",
    "emoji 😀 family 👩‍👩‍👧 flag 🇩🇪 done",
    "日本語 mixed with Größe",
    "ends within a character 😀",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return get_tokenizer("smollm2")


def byte_fallback_tokenizer() -> Any:
    """A sentencepiece-like tokenizer: leading space as U+2581, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", "▁Hello", "▁world", "ing", "▁go"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def stream_text(decode: Any, ids: list[int], context: list[int] | None = None) -> str:
    stream = TextStream(decode, context or [])
    return "".join(map(stream.push, ids)) + stream.flush()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_pieces_add_up_to_the_whole_text(
    byte_level: Any, smollm2: Any, text: str, cut: int
) -> None:
    for tokenizer in (byte_level, smollm2):
        decode = token_decoder(tokenizer, skip_special_tokens=True)
        ids = tokenizer.backend_tokenizer.encode(text).ids
        ids = ids[: len(ids) - cut]
        assert stream_text(decode, ids) == decode(ids)


def test_random_bytes_add_up_to_the_whole_text(byte_level: Any) -> None:
    decode = token_decoder(byte_level, skip_special_tokens=True)
    rng = random.Random(0)
    for _ in range(20):
        ids = [rng.randrange(2, VOCAB_SIZE) for _ in range(40)]
        # U+FFFD is held back with what follows it, so only the count of them may differ.
        assert stream_text(decode, ids).replace("�", "") == decode(ids).replace("�", "")


def test_a_character_is_not_shown_before_its_last_byte(byte_level: Any) -> None:
    stream = TextStream(token_decoder(byte_level, skip_special_tokens=True))
    ids = byte_level.backend_tokenizer.encode("🎉").ids
    assert len(ids) > 1
    assert [stream.push(token_id) for token_id in ids] == [*[""] * (len(ids) - 1), "🎉"]


def test_sentencepiece_spaces_and_bytes(byte_level: Any) -> None:
    backend = byte_fallback_tokenizer()

    def decode(ids: Any) -> str:
        return backend.decode(list(ids), skip_special_tokens=True)

    vocab = backend.get_vocab()
    hello, world, ing = vocab["▁Hello"], vocab["▁world"], vocab["ing"]
    emoji = [vocab[f"<0x{byte:02X}>"] for byte in "😀".encode()]
    assert stream_text(decode, [hello, world, ing, *emoji, world]) == "Hello worlding😀 world"
    assert stream_text(decode, [world], context=[hello]) == " world"


def test_a_prompt_that_ends_within_a_character_is_completed(byte_level: Any) -> None:
    ids = byte_level.backend_tokenizer.encode("a 🎉").ids
    decode = token_decoder(byte_level, skip_special_tokens=True)
    assert stream_text(decode, ids[-1:], context=ids[:-1]) == "🎉"


def test_endless_broken_bytes_stay_bounded(byte_level: Any) -> None:
    stream = TextStream(token_decoder(byte_level, skip_special_tokens=True))
    continuation = byte_level.backend_tokenizer.encode("🎉").ids[-1]
    for _ in range(200):
        stream.push(continuation)
    assert len(stream._pending) < 32


@pytest.mark.parametrize(
    ("text", "new", "stop", "expected"),
    [
        ("hello STOP", 2, ["STOP"], ("STOP", 6)),
        ("hello STOP x", 2, ["STOP"], None),
        ("abcd", 4, ["cd", "b"], ("b", 1)),
        ("abcd", 4, ["b", "bc"], ("bc", 1)),
        ("abc", 3, ["x"], None),
    ],
)
def test_find_stop(text: str, new: int, stop: list[str], expected: tuple[str, int] | None) -> None:
    assert find_stop(text, new, stop) == expected


def run(tokenizer: Any, text: str, **params: Any) -> tuple[IncrementalDetokenizer, Any, list[str]]:
    """Feed the tokens of ``text`` one by one; returns the deltas shown too."""
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(**params), [])
    shown: list[str] = []
    ids = tokenizer.backend_tokenizer.encode(text).ids
    for i, token_id in enumerate(ids):
        last = i == len(ids) - 1
        stopped = detokenizer.update([token_id], finished=last, by_stop_token=False)
        shown.append(detokenizer.take_text(finished=last or stopped is not None, delta=True))
        if stopped is not None:
            return detokenizer, stopped, shown
    return detokenizer, None, shown


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_over_several_tokens(byte_level: Any, include: bool) -> None:
    detokenizer, stopped, shown = run(
        byte_level,
        "one two XYZZY three",
        stop=["o XYZ", "never"],
        include_stop_str_in_output=include,
    )
    assert stopped == "o XYZ"
    assert detokenizer.output_text == ("one two XYZ" if include else "one tw")
    assert "".join(shown) == detokenizer.output_text


def test_only_what_may_begin_a_stop_string_is_held_back(byte_level: Any) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, SamplingParams(stop=["STOP", "TX"]), [])
    text = "abSTabSTO."
    shown = []
    for token_id in byte_level.backend_tokenizer.encode(text).ids:
        detokenizer.update([token_id], finished=False, by_stop_token=False)
        shown.append(detokenizer.take_text(finished=False, delta=False))
    assert shown == ["a", "ab", "ab", "ab", "abSTa", "abSTab", "abSTab", "abSTab", "abSTab", text]


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_held_back_is_the_longest_beginning_of_a_stop_string(text: str, stop: list[str]) -> None:
    detokenizer = IncrementalDetokenizer(None, SamplingParams(stop=stop), [])
    detokenizer._text = text
    held = max(
        (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0
    )
    assert detokenizer.take_text(finished=False, delta=False) == text[: len(text) - held]


def test_stop_strings_wait_for_min_tokens(byte_level: Any) -> None:
    text = "aXbXc"
    ids = byte_level.backend_tokenizer.encode(text).ids
    assert len(ids) == len(text)
    detokenizer, stopped, _ = run(byte_level, text, stop=["X"], min_tokens=3)
    assert stopped == "X"
    assert detokenizer.output_text == "aXb"


def test_text_of_a_stop_token_is_left_out_unless_included(byte_level: Any) -> None:
    ids = byte_level.backend_tokenizer.encode("ab").ids
    for include, text in ((False, "a"), (True, "ab")):
        detokenizer = IncrementalDetokenizer(
            byte_level, SamplingParams(include_stop_str_in_output=include), []
        )
        detokenizer.update(ids, finished=True, by_stop_token=True)
        assert detokenizer.take_text(finished=True, delta=False) == text
        assert detokenizer.take_token_ids(delta=False) == ids


def test_without_detokenize_ids_only(byte_level: Any) -> None:
    for tokenizer, params in ((byte_level, {"detokenize": False}), (None, {})):
        detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(**params), [])
        detokenizer.update([5, 6], finished=False, by_stop_token=False)
        assert detokenizer.take_text(finished=True, delta=False) == ""
        assert detokenizer.take_token_ids(delta=True) == [5, 6]
        assert detokenizer.take_token_ids(delta=True) == []


def test_special_tokens_are_shown_on_request(byte_level: Any) -> None:
    ids = [*byte_level.backend_tokenizer.encode("a").ids, byte_level.eos_token_id]
    for skip, text in ((True, "a"), (False, "a</s>")):
        detokenizer = IncrementalDetokenizer(
            byte_level, SamplingParams(skip_special_tokens=skip), []
        )
        detokenizer.update(ids, finished=True, by_stop_token=False)
        assert detokenizer.output_text == text
