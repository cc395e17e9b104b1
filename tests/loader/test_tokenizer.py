"""Tokenizers equal transformers' and need no torch; unknown GGUF pre-tokenizers are refused."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.loader.gguf_writer import write_gguf
from tests.models.checkpoints import make_hf_model
from vllm.errors import ConfigError, UnsupportedError
from vllm.transformers_utils.gguf_file import read_gguf
from vllm.transformers_utils.gguf_tokenizer import tokenizer_from_gguf
from vllm.transformers_utils.tokenizer import get_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock.",
    "  leading\t\ttabs\r\n\r\n  and   spaces  ",
    "def f(x):\n    return x ** 2  # ünïcödé\n",
    "日本語とEnglish、العربية, עברית, ไทย 👩‍👩‍👧‍👦 🇩🇪",
    "e\u0301 vs \u00e9 \ufb01 \u200d \x00 \x7f",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "3.14159 1e-10 0xFF 1,000,000 ½ ²",
]
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 日本?"},
]


@pytest.fixture(scope="module")
def made_directory(smollm2_gguf, tmp_path_factory):
    """tokenizer.json and tokenizer_config.json from the GGUF's metadata, written by hand."""
    meta = read_gguf(smollm2_gguf).metadata
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    backend.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 8192,
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|im_end|>",
                "add_bos_token": False,
                "clean_up_tokenization_spaces": False,
                "chat_template": meta["tokenizer.chat_template"],
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def theirs(made_directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made_directory)


@pytest.mark.parametrize("source", ["gguf", "directory"])
def test_equal_to_transformers(source, smollm2_gguf, made_directory, theirs):
    ours = get_tokenizer(smollm2_gguf if source == "gguf" else made_directory)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.get_vocab() == theirs.get_vocab()
    assert len(ours) == len(theirs)
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.model_max_length == 8192


@pytest.mark.parametrize("source", ["gguf", "directory"])
@pytest.mark.parametrize("prompted", [True, False])
def test_the_chat_template_gives_the_same_prompt(
    source, prompted, smollm2_gguf, made_directory, theirs
):
    ours = get_tokenizer(smollm2_gguf if source == "gguf" else made_directory)
    options = {"tokenize": False, "add_generation_prompt": prompted}
    prompt = ours.apply_chat_template(CHAT, **options)
    assert prompt == theirs.apply_chat_template(CHAT, **options)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>assistant\n") == prompted


def test_no_torch_is_imported(smollm2_gguf, made_directory):
    code = (
        "import sys; from vllm.transformers_utils.tokenizer import get_tokenizer\n"
        f"for source in ({str(smollm2_gguf)!r}, {str(made_directory)!r}):\n"
        "    tokenizer = get_tokenizer(source)\n"
        "    tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def tiny_backend(split):
    """A trained byte-level BPE whose pre-tokenizer is ``split`` and then bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<user>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "the other day there were 12 of them 1234 " * 3], trainer)
    return backend


def gguf_of(backend, pre, tmp_path, **metadata):
    state = json.loads(backend.to_str())["model"]
    vocab = sorted(state["vocab"], key=state["vocab"].get)
    kinds = [3 if token in ("<s>", "</s>") else 4 if token == "<user>" else 1 for token in vocab]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    return write_gguf(
        tmp_path / "m.gguf",
        make_hf_model("llama"),
        metadata={
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": vocab,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": vocab.index("<s>"),
            "tokenizer.ggml.eos_token_id": vocab.index("</s>"),
            **metadata,
        },
    )


def test_llama_bpe_groups_digits_by_three_and_starts_with_bos(tmp_path):
    path = gguf_of(tiny_backend(pre_tokenizers.ByteLevel(False)), "llama-bpe", tmp_path)
    tokenizer = tokenizer_from_gguf(read_gguf(path))
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12345 b\n\nc")
    assert [word for word, _ in words] == ["a", "Ġ", "123", "45", "Ġb", "ĊĊ", "c"]
    ids = tokenizer.encode("hi")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.encode("hi", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_qwen2_takes_digits_one_by_one_and_composes_characters(tmp_path):
    path = gguf_of(tiny_backend(pre_tokenizers.ByteLevel(False)), "qwen2", tmp_path)
    tokenizer = tokenizer_from_gguf(read_gguf(path))
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 123")
    assert [word for word, _ in words] == ["a", "Ġ", "1", "2", "3"]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_gpt2_equals_the_backend_it_came_from(tmp_path):
    backend = tiny_backend(pre_tokenizers.ByteLevel(False))
    path = gguf_of(backend, "gpt-2", tmp_path)
    tokenizer = tokenizer_from_gguf(read_gguf(path))
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids


def test_user_defined_tokens_are_whole_but_not_special(tmp_path):
    path = gguf_of(tiny_backend(pre_tokenizers.ByteLevel(False)), "gpt-2", tmp_path)
    tokenizer = tokenizer_from_gguf(read_gguf(path))
    ids = tokenizer.encode("a<user>b</s>")
    assert "<user>" in tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<user>b"


def test_bos_and_eos_as_the_file_says(tmp_path):
    path = gguf_of(
        tiny_backend(pre_tokenizers.ByteLevel(False)),
        "llama-bpe",
        tmp_path,
        **{"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True},
    )
    tokenizer = tokenizer_from_gguf(read_gguf(path))
    ids = tokenizer.encode("hi")
    assert ids[0] != tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("model", "pre"), [("gpt2", "tekken"), ("llama", "default"), ("gpt2", "no-such")]
)
def test_an_unknown_tokenizer_is_refused_by_name(model, pre, tmp_path):
    path = gguf_of(
        tiny_backend(pre_tokenizers.ByteLevel(False)),
        pre,
        tmp_path,
        **{"tokenizer.ggml.model": model},
    )
    with pytest.raises(
        UnsupportedError, match=f"'{model}' with pre-tokenizer '{pre}'.*--tokenizer"
    ):
        tokenizer_from_gguf(read_gguf(path))


def test_an_unknown_mode_is_refused_by_name(made_directory):
    with pytest.raises(UnsupportedError, match="--tokenizer-mode 'mistral' is not supported"):
        get_tokenizer(made_directory, mode="mistral")


def test_a_directory_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds no tokenizer.json"):
        get_tokenizer(tmp_path)


def test_a_damaged_tokenizer_names_the_option(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"--tokenizer .* cannot be read"):
        get_tokenizer(tmp_path)
