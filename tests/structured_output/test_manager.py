"""The manager compiles aside, keeps each request's state, and fails requests one by one."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.structured_output.conftest import VOCAB_SIZE
from vllm.config import ModelConfig, SchedulerConfig, VllmConfig
from vllm.errors import QueueFullError
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output import manager as manager_module
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend


@pytest.fixture(scope="module")
def config(tokenizer):
    from vllm.transformers_utils.config import resolve_model

    resolved = resolve_model("smollm2")
    return VllmConfig(
        model_config=ModelConfig(
            model="smollm2",
            model_path=resolved.model_path,
            tokenizer=resolved.tokenizer,
            hf_config=resolved.hf_config,
            hf_text_config=resolved.hf_text_config,
            architecture=resolved.architecture,
            dtype_name="float32",
            max_model_len=256,
        ),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=256, max_num_seqs=4, max_model_len=256
        ),
    )


@pytest.fixture
def manager(config, tokenizer):
    manager = StructuredOutputManager(config, lambda: tokenizer)
    yield manager
    manager.shutdown()


def make_request(req_id: str, tokenizer, **constraint) -> Request:
    params = SamplingParams(structured_outputs=constraint or None)
    params.eos_token_id = tokenizer.eos_token_id
    return Request(req_id, [1, 2], params)


def wait(request: Request) -> None:
    deadline = time.monotonic() + 120
    while not request.structured_output_request.is_grammar_ready:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def allowed(mask_row: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask_row.view(np.uint8), bitorder="little")).tolist())


def test_requests_without_a_constraint_are_left_alone(manager, tokenizer):
    request = make_request("a", tokenizer)
    manager.grammar_init(request)
    assert request.structured_output_request is None


def test_masks_follow_each_request(manager, tokenizer):
    requests = {
        "a": make_request("a", tokenizer, choice=["ab"]),
        "b": make_request("b", tokenizer, choice=["b"]),
    }
    for request in requests.values():
        manager.grammar_init(request)
    for request in requests.values():
        wait(request)
        assert request.structured_output_request.error is None
    (a,), (b,), stop = tokenizer.encode("a"), tokenizer.encode("b"), tokenizer.eos_token_id
    (ab,) = tokenizer.encode("ab")

    mask = manager.grammar_bitmask(requests, ["b", "a"])
    assert mask.shape == (2, VOCAB_SIZE // 32) and mask.dtype == np.int32
    assert allowed(mask[0]) == {b}
    assert allowed(mask[1]) == {a, ab}
    assert manager.accept_tokens(requests["a"], [a])
    assert manager.accept_tokens(requests["b"], [b])
    mask = manager.grammar_bitmask(requests, ["a", "b"])
    assert allowed(mask[0]) == {b}
    assert allowed(mask[1]) == {stop}
    assert not manager.is_terminated(requests["b"])
    assert manager.accept_tokens(requests["b"], [stop])
    assert manager.is_terminated(requests["b"])
    assert not manager.accept_tokens(requests["a"], [stop])


def test_requests_with_one_constraint_have_states_of_their_own(manager, tokenizer):
    requests = [make_request(str(i), tokenizer, regex="[0-9]{2}") for i in range(2)]
    for request in requests:
        manager.grammar_init(request)
    for request in requests:
        wait(request)
    (digit,) = tokenizer.encode("7")
    assert manager.accept_tokens(requests[0], [digit, digit])
    assert manager.accept_tokens(requests[1], [digit])
    assert not manager.accept_tokens(requests[0], [digit])
    assert manager.accept_tokens(requests[1], [digit])


def test_a_bad_constraint_fails_its_request_only(manager, tokenizer):
    bad = make_request("bad", tokenizer, regex="(")
    good = make_request("good", tokenizer, choice=["b"])
    for request in (bad, good):
        manager.grammar_init(request)
    for request in (bad, good):
        wait(request)
    assert "regex" in bad.structured_output_request.error
    assert bad.structured_output_request.error_type == "VLLMValidationError"
    assert good.structured_output_request.error is None


def test_asking_twice_compiles_once(manager, tokenizer):
    request = make_request("a", tokenizer, choice=["b"])
    manager.grammar_init(request)
    first = request.structured_output_request
    manager.grammar_init(request)
    assert request.structured_output_request is first


def test_nothing_is_made_before_the_first_constraint(config, tokenizer):
    called_in: list[str] = []

    def factory():
        called_in.append(threading.current_thread().name)
        return tokenizer

    manager = StructuredOutputManager(config, factory)
    manager.grammar_init(make_request("a", tokenizer))
    assert called_in == []
    request = make_request("b", tokenizer, choice=["b"])
    manager.grammar_init(request)
    wait(request)
    assert len(called_in) == 1 and called_in[0].startswith("grammar")
    manager.shutdown()


def test_a_tokenizer_that_cannot_be_made_fails_the_request(config, tokenizer):
    def factory():
        raise OSError("no tokenizer here")

    manager = StructuredOutputManager(config, factory)
    request = make_request("a", tokenizer, choice=["b"])
    manager.grammar_init(request)
    wait(request)
    assert "no tokenizer here" in request.structured_output_request.error
    assert request.structured_output_request.error_type == "EngineGenerateError"
    manager.shutdown()


# The matcher keeps every way to read the text so far, and there are ever more of them.
AMBIGUOUS = "(.*)*" * 30 + "b"
# Seconds: for ever compared with what is quick, and that in turn on a busy machine with this.
SOON = 2.0
SLOW_TO_COMPILE = {"type": "string", "maxLength": 10**8}


@pytest.fixture
def patient(monkeypatch):
    """Those beside a hanging grammar may take as long as it did."""
    monkeypatch.setattr(manager_module, "_FOLLOW_SECONDS_WHILE_OTHERS_HANG", SOON)


@pytest.mark.usefixtures("patient")
def test_a_grammar_that_takes_too_long_to_follow_fails_its_request_only(config, tokenizer):
    manager = StructuredOutputManager(config, lambda: tokenizer, follow_seconds=SOON)
    requests = {
        "before": make_request("before", tokenizer, choice=["ab"]),
        "bad": make_request("bad", tokenizer, regex=AMBIGUOUS),
        "after": make_request("after", tokenizer, choice=["b"]),
    }
    for request in requests.values():
        manager.grammar_init(request)
    for request in requests.values():
        wait(request)
    (blanks,) = tokenizer.encode(" " * 16)
    assert not manager.accept_tokens(requests["bad"], [blanks] * 4)
    state = requests["bad"].structured_output_request
    assert f"took longer than {SOON:g} s" in state.error
    assert state.error_type == "VLLMValidationError"
    assert not manager.accept_tokens(requests["bad"], [blanks])
    (b,), (ab,) = tokenizer.encode("b"), tokenizer.encode("ab")
    mask = manager.grammar_bitmask(requests, ["before", "bad", "after"])
    assert ab in allowed(mask[0]) and allowed(mask[2]) == {b}
    assert manager.accept_tokens(requests["after"], [b])
    manager.shutdown()


class HangingGrammar(StructuredOutputGrammar):
    """Its mask takes as long as ``gate`` is shut."""

    gate = threading.Event()

    def accept_tokens(self, tokens):
        return True

    def is_terminated(self):
        return False

    def rollback(self, num_tokens):
        pass


class BackendWithHangingGrammars(XgrammarBackend):
    def compile(self, params, stop_token_ids):
        if params.choice == ["hang"]:
            return HangingGrammar()
        return super().compile(params, stop_token_ids)

    def fill_bitmask(self, grammars, bitmask):
        if isinstance(grammars[0], HangingGrammar):
            HangingGrammar.gate.wait()
            bitmask[:] = 0
        else:
            super().fill_bitmask(grammars, bitmask)


@pytest.mark.usefixtures("patient")
def test_a_mask_that_takes_too_long_leaves_the_others_right(config, tokenizer, monkeypatch):
    monkeypatch.setattr(
        "vllm.v1.structured_output.backend_xgrammar.XgrammarBackend", BackendWithHangingGrammars
    )
    manager = StructuredOutputManager(config, lambda: tokenizer, follow_seconds=SOON)
    requests = {
        name: make_request(name, tokenizer, choice=[text])
        for name, text in {"a": "ab", "hang": "hang", "b": "b"}.items()
    }
    for request in requests.values():
        manager.grammar_init(request)
    for request in requests.values():
        wait(request)
    (b,) = tokenizer.encode("b")
    mask = manager.grammar_bitmask(requests, ["a", "hang", "b"])
    assert (mask[1] == -1).all()
    (hanging,) = [t for t in threading.enumerate() if t.name.endswith("(given up)")]
    HangingGrammar.gate.set()
    hanging.join(120)
    assert not hanging.is_alive()
    # What the thread that was given up has written since went elsewhere.
    assert (mask[1] == -1).all() and allowed(mask[2]) == {b}
    assert not manager.accept_tokens(requests["hang"], [b])
    assert "following the grammar took" in requests["hang"].structured_output_request.error
    assert manager.accept_tokens(requests["b"], [b])
    manager.shutdown()


def test_a_grammar_that_takes_too_long_to_compile_fails_its_request_only(config, tokenizer):
    manager = StructuredOutputManager(config, lambda: tokenizer, compile_seconds=SOON)
    first = make_request("first", tokenizer, choice=["b"])
    manager.grammar_init(first)
    wait(first)
    slow = [make_request(str(i), tokenizer, json=SLOW_TO_COMPILE) for i in range(2)]
    good = make_request("good", tokenizer, choice=["b"])
    for request in (*slow, good):
        manager.grammar_init(request)
    # Nobody asks about the slow ones: their clients may be gone.
    wait(good)
    assert good.structured_output_request.error is None
    for request in slow:
        wait(request)
        assert "compiling the grammar took longer than" in request.structured_output_request.error
    with pytest.raises(QueueFullError, match="try again later"):
        manager.grammar_init(make_request("third", tokenizer, choice=["b"]))
    manager.shutdown()


def test_shutdown_may_be_called_twice(config, tokenizer):
    manager = StructuredOutputManager(config, lambda: tokenizer)
    manager.grammar_init(make_request("a", tokenizer, choice=["b"]))
    manager.shutdown()
    manager.shutdown()


def test_importing_loads_neither_torch_nor_xgrammar():
    code = (
        "import sys, vllm.v1.structured_output; "
        "assert not {'torch', 'xgrammar', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
