"""The command line beyond argparse: spellings, dotted JSON, config files, help, refusals."""

import json
import re

import pytest

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.not_yet import GONE, NOT_YET
from vllm.entrypoints.cli.serve import make_parser
from vllm.errors import ConfigError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.flags import Flag, Kind, NotYet


def parse(*argv: str):
    return make_parser().parse_args(["model", *argv])


def fails(capsys: pytest.CaptureFixture[str], *argv: str, lines: int = 1) -> str:
    """The lines that refuse ``argv``."""
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("vllm serve: error: ")
    assert printed.err.count("\n") == lines
    return printed.err


@pytest.mark.parametrize(
    "argv",
    [
        ["--max-num-seqs", "7"],
        ["--max_num_seqs", "7"],
        ["--max-num-seqs=7"],
        ["--max_num_seqs=7"],
        ["--max-num-seqs", "9", "--max_num_seqs=7"],
    ],
)
def test_underscores_dashes_and_equals_are_the_same(argv):
    assert parse(*argv).max_num_seqs == 7


def test_underscores_of_values_are_kept():
    args = parse("--served_model_name=my_model", "--scheduler-cls", "a_b.C_d")
    assert (args.served_model_name, args.scheduler_cls) == (["my_model"], "a_b.C_d")


def test_dotted_keys_make_one_document():
    args = parse(
        "--hf-overrides.rope_scaling.factor",
        "2.5",
        "--hf_overrides.rope_scaling.type=yarn",
        "--hf-overrides.layers+",
        "3",
        "--hf-overrides.layers+",
        "[4, 5]",
        "--hf-overrides.names+=a,b",
        "--hf-overrides.flag",
        "true",
        "--additional-config.x_y",
        "text",
    )
    assert args.hf_overrides == {
        "rope_scaling": {"factor": 2.5, "type": "yarn"},
        "layers": [3, [4, 5]],
        "names": ["a", "b"],
        "flag": True,
    }
    assert args.additional_config == {"x_y": "text"}


def test_dotted_keys_add_to_a_document_given_before():
    args = parse("--hf-overrides", '{"a": {"b": 1}, "c": 2}', "--hf-overrides.a.d", "4")
    assert args.hf_overrides == {"a": {"b": 1, "d": 4}, "c": 2}


def test_a_later_document_replaces_an_earlier_one():
    assert parse("--hf-overrides.a", "1", "--hf-overrides", '{"c": 2}').hf_overrides == {"c": 2}


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--hf-overrides", "{"], "--hf-overrides takes a JSON object, not '{'"),
        (["--hf-overrides", "[1]"], "--hf-overrides takes a JSON object"),
        (["--hf-overrides.a..b", "1"], "a key is empty"),
        (["--hf-overrides.a", "1", "--hf-overrides.a.b", "1"], "'a' has a value already"),
        (["--hf-overrides.a", "1", "--hf-overrides.a+", "1"], "'a' is not a list"),
        (["--hf-overrides.a"], "takes a value"),
        (["--dtype.a", "1"], "--dtype takes no JSON object"),
        (["--port", "80000"], "--port must be between 0 and 65535, not 80000"),
        (["--port", "http"], "--port takes a whole number, not 'http'"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be between 1 and 65536, not 0"),
        (["--max-num-seqs"], "--max-num-seqs"),
        (["--gpu-memory-utilization", "nan"], "must be between 0.01 and 1.0, not nan"),
        (["--gpu-memory-utilization", "1.5"], "must be between 0.01 and 1.0, not 1.5"),
        (["--max-model-len", "8q"], "such as 8192, 8k, 8K"),
        (["--max-model-len", "0"], "must be at least 1, or auto"),
        (["--max-model-len", "-2"], "must be at least 1, or auto"),
        (["--dtype", "int4"], "--dtype must be one of auto, half"),
        (["--kv-cache-dtype", "fp8_inc"], "--kv-cache-dtype fp8_inc: vLLM has this"),
        (
            ["--distributed-executor-backend", "external_launcher"],
            "backend external_launcher: vLLM has this",
        ),
        (["--allowed-origins", "x"], "--allowed-origins takes a JSON list"),
        (["--max-modle-len", "3"], "unknown option --max-modle-len; did you mean --max-model-len?"),
        (["--zzz"], "unknown option --zzz; see --help"),
        (["other"], "unexpected argument 'other'"),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size: vLLM has this"),
        (["-pp", "2"], "-pp: vLLM has this"),
        (["-pp=2"], "-pp: vLLM has this"),
        (["-O3"], "-O: vLLM has this"),
        (["-cc.level", "3"], "-cc: vLLM has this"),
        (["--speculative-config.model", "x"], "--speculative-config: vLLM has this"),
        (["--enable-lora"], "--enable-lora: vLLM has this"),
        (["--enable_lora"], "--enable-lora: vLLM has this"),
    ],
)
def test_bad_option_is_one_line_that_names_it(argv, part, capsys):
    assert part in fails(capsys, *argv)


def test_all_options_that_are_refused_are_named_at_once(capsys):
    error = fails(
        capsys,
        *("--enable-lora", "--lora-modules", "a=b", "c=d", "--swap-space", "4", "--zzz", "5"),
        *("--enforce-eager", "--max-modle-len=3", "--no-enable-prefix-caching"),
        lines=5,
    )
    assert [line.split(": ")[2] for line in error.splitlines()] == [
        "--enable-lora",
        "--lora-modules",
        "--swap-space",
        "unknown option --zzz; see --help",
        "unknown option --max-modle-len; did you mean --max-model-len?",
    ]


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        (["--task", "generate"], "--task: vLLM no longer has this; use --runner"),
        (["--disable-log-requests"], "--enable-log-requests; leave it out"),
        (["--disable_log_requests"], "--enable-log-requests; leave it out"),
        (["--no-enable-reasoning"], "--reasoning-parser alone switches it on"),
        (["--swap-space=4"], "not swapped out; leave it out"),
        (["--rope-scaling", "{}"], "use --hf-overrides"),
    ],
)
def test_an_option_of_older_releases_says_what_to_use(argv, advice, capsys):
    assert advice in fails(capsys, *argv)


def test_advice_names_options_that_exist():
    options = set(make_parser()._option_string_actions)
    for advice in GONE.values():
        if "not here yet" in advice or "does not have yet" in advice:
            continue
        for option in re.findall(r"--[a-z][a-z-]+", advice):
            known = option in options or option.removeprefix("--").replace("-", "_") in NOT_YET
            assert known, advice


@pytest.mark.parametrize(
    "argv",
    [
        ["--limit-mm-per-prompt", '{"image": 0, "video": {"count": 0}}'],
        ["--limit-mm-per-prompt.image", "0", "--limit-mm-per-prompt.video=0"],
        ["--language-model-only", "--skip-mm-profiling"],
    ],
)
def test_to_be_served_without_images_is_what_happens_anyway(argv):
    assert parse(*argv).model_tag == "model"


def test_images_are_refused(capsys):
    for argv in (["--limit-mm-per-prompt", '{"image": 1}'], ["--limit-mm-per-prompt.image", "2"]):
        assert "--limit-mm-per-prompt: vLLM has this" in fails(capsys, *argv)


def test_short_options_that_ask_for_nothing_pass():
    args = parse("-tp", "1", "-pp=1", "-O2", "-cc", "{}", "--no-enable-lora", "-n", "1")
    assert args.model_tag == "model"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("8192", 8192),
        ("8k", 8000),
        ("8K", 8192),
        ("1M", 2**20),
        ("1m", 10**6),
        ("25.6k", 25600),
        ("auto", -1),
        ("-1", -1),
        ("AUTO", -1),
    ],
)
def test_max_model_len_in_words(text, tokens):
    assert parse("--max-model-len", text).max_model_len == tokens


@pytest.mark.parametrize(
    ("text", "size"), [("4G", 4 * 2**30), ("4g", 4 * 10**9), ("4GiB", 4 * 2**30), ("512Mi", 2**29)]
)
def test_memory_in_words(text, size):
    assert parse("--kv-cache-memory-bytes", text).kv_cache_memory_bytes == size


def test_lists_and_repeated_options():
    args = parse(
        "--served-model-name",
        "a",
        "b",
        "--middleware",
        "x.A",
        "--middleware",
        "y.B",
        "--allowed-origins",
        '["https://a"]',
    )
    assert args.served_model_name == ["a", "b"]
    assert args.middleware == ["x.A", "y.B"]
    assert args.allowed_origins == ["https://a"]


def test_defaults_are_not_shared_between_runs():
    parse().middleware.append("x")
    assert parse().middleware == []


class TestConfigFile:
    def write(self, tmp_path, text: str) -> str:
        path = tmp_path / "options.yaml"
        path.write_text(text)
        return str(path)

    def test_options_come_from_the_file(self, tmp_path):
        file = self.write(
            tmp_path,
            "port: 1234\nmax_model_len: 4k\nenable-prefix-caching: false\n"
            "served-model-name: [a, b]\nhf-overrides: {x: {y: 1}}\ndtype: bfloat16\nhost:\n",
        )
        args = parse("--config", file)
        assert (args.port, args.max_model_len, args.enable_prefix_caching) == (1234, 4000, False)
        assert (args.served_model_name, args.hf_overrides) == (["a", "b"], {"x": {"y": 1}})
        assert (args.dtype, args.host, args.model_tag) == ("bfloat16", None, "model")

    def test_the_command_line_wins(self, tmp_path):
        file = self.write(tmp_path, "port: 1234\nenable-prefix-caching: false\n")
        args = parse("--port", "99", f"--config={file}", "--enable-prefix-caching")
        assert (args.port, args.enable_prefix_caching) == (99, True)

    def test_a_list_in_the_file_leaves_the_model_alone(self, tmp_path):
        file = self.write(tmp_path, "served-model-name: [a, b]\n")
        args = make_parser().parse_args(["--config", file, "model"])
        assert (args.model_tag, args.served_model_name) == ("model", ["a", "b"])

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("prot: 1", "unknown option --prot; did you mean --port?"),
            ("port: x", "--port takes a whole number"),
            ("enable-lora: true", "--enable-lora: vLLM has this"),
            ("- port", "expected 'option: value' lines"),
            ("a: [", "--config"),
            ("config: other.yaml", "config is not allowed in here"),
        ],
    )
    def test_bad_file_is_one_line(self, tmp_path, capsys, text, part):
        assert part in fails(capsys, "--config", self.write(tmp_path, text))

    def test_missing_file(self, capsys):
        assert "No such file" in fails(capsys, "--config", "/nowhere.yaml")


class TestHelp:
    def help(self, capsys, *argv: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            parse(*argv)
        assert exit_.value.code == 0
        return capsys.readouterr().out

    @pytest.mark.parametrize("option", ["--help", "-h"])
    def test_bare_help_names_groups_only(self, capsys, option):
        text = self.help(capsys, option)
        for group in ("Frontend", "ModelConfig", "LoRAConfig", "CacheConfig", "VllmConfig"):
            assert group in text
        assert "--max-model-len" not in text

    def test_one_group(self, capsys):
        text = self.help(capsys, "--help=schedulerconfig")
        assert "--max-num-seqs" in text
        assert "--disable-chunked-mm-input" in text.partition("not yet")[2]
        assert "--max-model-len" not in text

    @pytest.mark.parametrize("topic", ["max-model-len", "max_model_len", "--max-model-len"])
    def test_one_flag(self, capsys, topic):
        text = self.help(capsys, f"--help={topic}")
        assert "--max-model-len" in text
        assert "--max-num-seqs" not in text

    def test_all_flags_that_contain_a_word(self, capsys):
        text = self.help(capsys, "--help=prefix")
        assert "--enable-prefix-caching" in text
        assert "--prefix-caching-hash-algo" in text
        assert "--port" not in text

    def test_all(self, capsys):
        text = self.help(capsys, "--help=all")
        assert all(flag.option in text for flag in make_parser().flags.values())

    def test_a_flag_that_is_not_there_yet(self, capsys):
        assert "--lora-modules: vLLM has this" in self.help(capsys, "--help=lora-modules")

    def test_unknown_topic(self, capsys):
        assert "did you mean --help=max-model-len?" in fails(capsys, "--help=mx-modl-ln")

    def test_percent_signs_survive(self, capsys):
        parser = FlexibleArgumentParser(prog="p")
        parser.add_flag(Flag(name="x", kind=Kind.INT, default=1, group="g", help="50% of it"))
        with pytest.raises(SystemExit):
            parser.parse_args(["--help"])
        assert "50% of it" in capsys.readouterr().out


def test_plain_argparse_options_work_too():
    parser = FlexibleArgumentParser(prog="example")
    parser.add_argument("--my-option", type=int, default=1)
    parser.add_argument("rest", nargs="*")
    args = parser.parse_args(["--my_option", "5", "--", "a", "--b"])
    assert (args.my_option, args.rest) == (5, ["a", "--b"])


def test_an_option_added_wins_over_its_refusal():
    parser = FlexibleArgumentParser(prog="example")
    parser.add_flag(Flag(name="profile", kind=Kind.SWITCH, default=False, group="g", help="h"))
    parser.refuse([NotYet(name="profile", group="g", takes_value=False)])
    assert parser.parse_args(["--profile"]).profile is True


def test_document_of_a_json_option_round_trips():
    value = {"a": [1, {"b": "ü"}], "c": None}
    assert parse("--additional-config", json.dumps(value)).additional_config == value


def test_flag_check_refuses_other_types():
    flag = Flag(name="n", kind=Kind.INT, default=1, group="g", help="h", minimum=0)
    for bad in ("3", 3.0, True, None, [3]):
        with pytest.raises(ConfigError, match="--n takes a whole number"):
            flag.check(bad)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--allowed-headers", "[1]"], "--allowed-headers takes a JSON list, each of them text"),
        (["--allowed-origins", '["a", null]'], "not None"),
        (["--served-model-name", "a\udce9"], "--served-model-name takes text in UTF-8"),
        (["--response-role", "\udcff"], "--response-role takes text in UTF-8"),
        (["--api-key", "good", "bad\udcff"], r"not 'bad\udcff'"),
    ],
)
def test_text_that_could_never_be_sent_is_refused(argv, part, capsys):
    assert part in fails(capsys, *argv)


def test_lists_given_from_python_hold_text():
    for name in ("served_model_name", "logits_processors", "kv_cache_dtype_skip_layers"):
        with pytest.raises(ConfigError, match="each of them text, not 3"):
            AsyncEngineArgs(**{name: ["a", 3]})
    with pytest.raises(ConfigError, match="--model takes text in UTF-8 without NUL"):
        AsyncEngineArgs(model="a\0b")
