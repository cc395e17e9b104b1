"""Every option of vLLM's ``serve`` is either accepted or refused by name; none is ignored."""

import inspect
import re
from pathlib import Path

import pytest

import vllm
from tests.cli.vllm_surface import DEFAULTS, FLAGS_BY_GROUP, SHORT_FORMS
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.engine.not_yet import NOT_YET
from vllm.entrypoints.cli.serve import ServeArgs, make_parser
from vllm.entrypoints.openai.cli_args import FrontendArgs
from vllm.errors import UnsupportedError
from vllm.utils.flags import Kind, flags_of

FLAGS = [(group, name) for group, names in FLAGS_BY_GROUP.items() for name in names.split()]
PACKAGE = Path(vllm.__file__).parent


def field(name: str) -> str:
    return name.replace("-", "_")


def accepted_options() -> set[str]:
    return {flag.option.removeprefix("--") for flag in make_parser().flags.values()} | {"help"}


def test_the_surface_is_complete():
    assert len(FLAGS) == 317


@pytest.mark.parametrize(("group", "name"), FLAGS, ids=[name for _, name in FLAGS])
def test_flag_is_accepted_or_refused_by_name(group, name, vllm_command):
    if name in accepted_options():
        answer = vllm_command("serve", f"--help={name}")
        assert answer.status == 0
        assert f"--{name}" in answer.out or name == "help"
        return
    entry = NOT_YET[field(name)]
    assert entry.group == group
    value = ["something"] if entry.takes_value else []
    spelling = f"--{name}"
    if not entry.takes_value and spelling in entry.off:
        spelling = f"--no-{name}"
    if spelling in entry.off:
        return
    answer = vllm_command("serve", "model", spelling, *value)
    assert answer.status == 2
    assert f"{spelling}: vLLM has this; this engine does not yet" in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize("entry", NOT_YET.values(), ids=lambda entry: entry.name)
def test_a_value_that_asks_for_nothing_passes(entry):
    for off in entry.off:
        tokens = [entry.option, off] if entry.takes_value else [off]
        args = make_parser().parse_args(["model", *tokens])
        assert not hasattr(args, entry.name)


def test_what_is_refused_is_vllms():
    known = {field(name) for _, name in FLAGS}
    assert set(NOT_YET) <= known
    ours = set(make_parser().flags)
    # What vLLM had before this release and its users still write.
    assert ours - known <= {"structured_outputs_config", "calculate_kv_scales"}
    assert not ours & set(NOT_YET)


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_is_vllms(name):
    flag = make_parser().flags.get(field(name))
    if flag is None:
        entry = NOT_YET[field(name)]
        default = DEFAULTS[name]
        assert entry.is_off(default) or not entry.takes_value
    elif name in SHORT_FORMS:
        assert (flag.default, flag.short) == (DEFAULTS[name], SHORT_FORMS[name])
    else:
        assert flag.default == DEFAULTS[name]


@pytest.mark.parametrize("name", SHORT_FORMS)
def test_short_form_is_known(name):
    flag = make_parser().flags.get(field(name))
    assert (flag or NOT_YET[field(name)]).short == SHORT_FORMS[name]


def test_every_engine_option_is_read():
    source = inspect.getsource(EngineArgs)
    unread = [name for name in EngineArgs.flags() if f"self.{name}" not in source]
    assert unread == []


def test_every_server_option_is_read():
    """An option in the table that no code looks at would be ignored."""
    code = "\n".join(path.read_text() for path in (PACKAGE / "entrypoints").rglob("*.py"))
    unread = [name for name in flags_of(FrontendArgs) if not re.search(rf"\b\w+\.{name}\b", code)]
    assert unread == []


def test_every_configuration_field_is_read():
    """A field of the configuration that no other module looks at would be an ignored option."""
    from vllm.config import CacheConfig, LoadConfig, ModelConfig, SchedulerConfig

    # What the resolution of the model itself needs, and what has one value only.
    resolved = {"download_dir", "revision", "quantization", "runner", "enforce_eager"}
    skipped = {PACKAGE / "engine" / "arg_utils.py"}
    code = "\n".join(
        path.read_text()
        for path in PACKAGE.rglob("*.py")
        if path not in skipped and path.parent != PACKAGE / "config"
    )
    unread = [
        f"{config.__name__}.{name}"
        for config in (CacheConfig, LoadConfig, ModelConfig, SchedulerConfig)
        for name in config.__dataclass_fields__
        if name in EngineArgs.flags().keys() - resolved and not re.search(rf"\.{name}\b", code)
    ]
    assert unread == []


def test_engine_args_take_the_same_names():
    args = AsyncEngineArgs(model="m", tensor_parallel_size=1, enable_lora=False, max_loras=None)
    assert args.model == "m"
    with pytest.raises(UnsupportedError, match="data_parallel_size: vLLM has this"):
        AsyncEngineArgs(model="m", data_parallel_size=2)


def test_llm_takes_the_same_names():
    with pytest.raises(UnsupportedError, match="enable_lora: vLLM has this"):
        EngineArgs.from_kwargs(model="m", enable_lora=True)
    args = EngineArgs.from_kwargs(model="m", enable_lora=False, pipeline_parallel_size=1)
    assert args.model == "m"
    with pytest.raises(UnsupportedError, match="pipeline_parallel_size"):
        EngineArgs.from_kwargs(model="m", pipeline_parallel_size=2)
    with pytest.raises(ValueError, match="unknown argument max_modl_len; did you mean max_model_l"):
        EngineArgs.from_kwargs(model="m", max_modl_len=3)


@pytest.mark.parametrize(
    "flag",
    [
        *flags_of(ServeArgs).values(),
        *flags_of(FrontendArgs).values(),
        *AsyncEngineArgs.flags().values(),
    ],
    ids=lambda flag: flag.name,
)
def test_default_passes_its_own_check(flag):
    assert flag.check(flag.default) == flag.default


def test_every_switch_has_its_twin():
    parser = make_parser()
    for flag in parser.flags.values():
        if flag.kind is Kind.SWITCH:
            on = parser.parse_args(["m", flag.option])
            off = parser.parse_args(["m", f"--no-{flag.option.removeprefix('--')}"])
            assert getattr(on, flag.name) is True
            assert getattr(off, flag.name) is False
