"""The GGUF header reader agrees with the gguf package's, and refuses damaged files."""

import struct

import pytest
from gguf import GGUFReader

from tests.loader.gguf_writer import write_gguf
from tests.models.checkpoints import make_hf_model
from vllm.errors import ConfigError
from vllm.transformers_utils.gguf_file import read_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    metadata = {
        "a.bool": True,
        "a.int": 7,
        "a.float": 0.25,
        "a.text": "naïve\n",
        "a.strings": ["one", "", "drei ü"],
        "a.ints": [1, 2, 3],
    }
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "m.gguf", make_hf_model("llama"), metadata=metadata
    )


def test_metadata_and_tensors_are_the_packages(path):
    ours, theirs = read_gguf(path), GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents(), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.type_id == tensor.tensor_type
        assert mine.offset == tensor.data_offset


def test_the_default_models_vocabulary(smollm2_gguf):
    metadata = read_gguf(smollm2_gguf).metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == 49152
    assert metadata["tokenizer.ggml.tokens"][1] == "<|im_start|>"


def test_a_rewritten_file_is_read_again(path, tmp_path):
    copy = tmp_path / "m.gguf"
    copy.write_bytes(path.read_bytes())
    first = read_gguf(copy)
    assert read_gguf(copy) is first
    copy.write_bytes(path.read_bytes() + b"more")
    assert read_gguf(copy) is not first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file: it has 0 bytes"),
        (b"PK\3\4" + bytes(40), "does not start with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1; versions 2 and 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 5), "damaged or incomplete"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60) + bytes(8), "damaged or incomplete"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99), "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "damaged or incomplete"),
    ],
)
def test_a_damaged_file_is_one_line(content, message, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_gguf(path)
    assert "\n" not in str(raised.value)


def test_a_header_cut_anywhere_is_refused(path, tmp_path):
    whole = path.read_bytes()
    header = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    cut = tmp_path / "cut.gguf"
    for end in range(0, header - 64, 97):
        cut.write_bytes(whole[:end])
        with pytest.raises(ConfigError):
            read_gguf(cut)


def test_a_missing_file():
    with pytest.raises(ConfigError, match=r"cannot read GGUF file /absent.gguf"):
        read_gguf("/absent.gguf")
