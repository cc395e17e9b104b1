"""The ``vllm`` command itself: subcommands, start-up cost, reports."""

import os
import subprocess
import sys

import pytest

from vllm import __version__
from vllm.entrypoints.cli import serve
from vllm.errors import ConfigError

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "numpy", "pydantic", "httpx", "zmq")


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["serve", "--help"],
        ["serve", "--help=all"],
        ["serve", "--help=max-model-len"],
        ["chat", "--help"],
        ["complete", "--help"],
        ["kv-plan", "--help"],
        ["collect-env", "--help"],
        ["bench", "--help"],
        ["bench", "serve", "--help"],
        ["bench", "throughput", "--help"],
        ["bench", "latency", "--help=all"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(argv):
    code = (
        "import sys\nfrom vllm.entrypoints.cli.main import main\n"
        f"try: status = main({argv!r})\nexcept SystemExit as exit_: status = exit_.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(); print(status, heavy)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    assert result.stdout.splitlines()[-1] == "0 []"
    assert "usage: vllm" in result.stdout or "--max-model-len" in result.stdout


def test_version(vllm_command):
    assert vllm_command("--version").out == f"{__version__}\n"
    assert vllm_command("-v").out == f"{__version__}\n"


@pytest.mark.parametrize("argv", [["--version"], ["serve", "--help=all"]], ids=" ".join)
def test_a_reader_that_leaves_early_is_no_error(argv):
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", *argv],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    os.close(write_end)
    assert (result.returncode, result.stderr) == (1, "")


def test_without_a_command_usage_is_shown(vllm_command):
    answer = vllm_command()
    assert answer.status == 2
    for command in ("serve", "chat", "complete", "bench", "collect-env"):
        assert command in answer.out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["sreve"], "vllm: error: unknown command 'sreve'; did you mean serve?\n"),
        (["launch"], "vllm: error: launch: vLLM has this; this engine does not yet\n"),
        (["bench", "sweep"], "vllm bench: error: sweep: vLLM has this; this engine does not yet\n"),
        (["bench", "srve"], "vllm bench: error: unknown command 'srve'; did you mean serve?\n"),
        (["chat", "--nope"], "vllm chat: error: unknown option --nope; see --help\n"),
        (
            ["bench", "latency", "--enable-lora"],
            "vllm bench latency: error: --enable-lora: vLLM has this; this engine does not yet "
            "(accepted: --no-enable-lora)\n",
        ),
    ],
)
def test_what_does_not_exist(vllm_command, argv, line):
    answer = vllm_command(*argv)
    assert (answer.status, answer.err) == (2, line)


def test_collect_env(vllm_command, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("VLLM_WHATEVER", "1")
    answer = vllm_command("collect-env")
    assert answer.status == 0
    for fact in ("Python", "torch", "C++ compiler", "instruction set", "vllm._C", "Memory"):
        assert fact in answer.out
    assert "secret" not in answer.out
    assert "VLLM_WHATEVER: unknown environment variable" in answer.out


class TestServe:
    def parsed(self, *argv: str):
        args = serve.make_parser().parse_args(argv)
        serve._name_model(args)
        return args

    def test_the_positional_model_is_the_option(self):
        assert self.parsed("m").model == "m"
        assert self.parsed("--model", "m").model == "m"
        assert self.parsed("m", "--model", "m").model == "m"
        assert self.parsed("--port", "1", "m").model == "m"
        assert self.parsed().model == "Qwen/Qwen3-0.6B"

    def test_two_models_are_one_too_many(self):
        with pytest.raises(ConfigError, match="MODEL 'a' and --model 'b' differ"):
            self.parsed("a", "--model", "b")

    def test_a_model_that_is_not_there(self, vllm_command):
        answer = vllm_command("serve", "/nowhere/at/all", "--port", "0")
        assert answer.status == 2
        assert answer.err.splitlines()[-1].startswith(
            "vllm serve: error: --model '/nowhere/at/all' is no directory"
        )
