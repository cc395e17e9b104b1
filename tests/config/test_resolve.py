"""Open options, resolved: pure arithmetic, with limits named in the errors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.engine import resolve
from vllm.errors import CapacityError, ConfigError, UnsupportedError

ALL = ("bfloat16", "float16", "float32")
FAST = frozenset({"avx512_bf16"})


@pytest.mark.parametrize(
    ("requested", "checkpoint", "flags", "dtype"),
    [
        ("auto", "bfloat16", frozenset(), "bfloat16"),
        ("auto", "float16", FAST, "float16"),
        ("auto", "float32", FAST, "bfloat16"),
        ("auto", "float32", frozenset({"amx_bf16"}), "bfloat16"),
        ("auto", "float32", frozenset({"avx2"}), "float32"),
        ("auto", None, FAST, "bfloat16"),
        ("auto", None, frozenset(), "float32"),
        ("half", "bfloat16", FAST, "float16"),
        ("float", "bfloat16", FAST, "float32"),
        ("float32", "bfloat16", FAST, "float32"),
    ],
)
def test_dtype_on_the_cpu(requested, checkpoint, flags, dtype):
    assert (
        resolve.resolve_dtype(
            requested, checkpoint, device_type="cpu", supported=ALL, cpu_flags=flags
        )
        == dtype
    )


def test_dtype_of_a_device_without_bfloat16():
    supported = ("float16", "float32")
    auto = resolve.resolve_dtype("auto", "bfloat16", device_type="cuda", supported=supported)
    assert auto == "float16"
    assert resolve.resolve_dtype("auto", "float32", device_type="cuda", supported=supported) == auto
    with pytest.raises(ConfigError, match="--dtype must be one of float16, float32"):
        resolve.resolve_dtype("bfloat16", None, device_type="cuda", supported=supported)


def test_max_model_len():
    assert resolve.resolve_max_model_len(None, 8192) == 8192
    assert resolve.resolve_max_model_len(None, None) == 2048
    assert resolve.resolve_max_model_len(100, 8192) == 100
    assert resolve.resolve_max_model_len(100_000, None) == 100_000
    with pytest.raises(ConfigError, match=r"--max-model-len 8193 .* limit of 8192 tokens"):
        resolve.resolve_max_model_len(8193, 8192)


def test_max_model_len_auto_is_what_fits():
    assert resolve.resolve_max_model_len(resolve.AUTO, 8192, fitting_tokens=1024) == 1024
    assert resolve.resolve_max_model_len(resolve.AUTO, 8192, fitting_tokens=10**6) == 8192
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes"):
        resolve.resolve_max_model_len(resolve.AUTO, 8192)


def test_max_num_batched_tokens():
    def tokens(requested, max_model_len=8192, max_num_seqs=256, chunked_prefill=True):
        return resolve.resolve_max_num_batched_tokens(
            requested,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            chunked_prefill=chunked_prefill,
        )

    assert tokens(None) == 2048
    assert tokens(None, max_num_seqs=4000) == 4000
    assert tokens(None, chunked_prefill=False) == 8192
    assert tokens(512) == 512
    # As many as all requests can have.
    assert tokens(10**23, max_model_len=512, max_num_seqs=4) == 2048
    with pytest.raises(ConfigError, match="--max-num-seqs"):
        tokens(100)
    with pytest.raises(ConfigError, match="--no-enable-chunked-prefill"):
        tokens(4096, chunked_prefill=False)


@given(
    st.none() | st.integers(1, 2**20),
    st.integers(1, 2**17),
    st.integers(1, 4096),
    st.booleans(),
)
def test_a_step_always_holds_its_requests(requested, max_model_len, max_num_seqs, chunked):
    try:
        budget = resolve.resolve_max_num_batched_tokens(
            requested,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            chunked_prefill=chunked,
        )
    except ConfigError:
        assert requested is not None
        return
    assert budget >= max_num_seqs
    assert chunked or budget >= max_model_len


class TestPool:
    GIB = 2**30

    def test_the_option_then_the_variable_then_the_default(self):
        assert resolve.kv_pool_bytes(5, 2.0, 4.0, 16 * self.GIB) == 5
        assert resolve.kv_pool_bytes(None, 2.5, 4.0, 16 * self.GIB) == int(2.5 * self.GIB)
        assert resolve.kv_pool_bytes(None, 0.0, 4.0, 16 * self.GIB) == 4 * self.GIB

    def test_the_default_leaves_half_of_a_small_machine(self):
        assert resolve.kv_pool_bytes(None, None, 4.0, 2 * self.GIB) == self.GIB

    @pytest.mark.parametrize(
        ("requested", "space", "name"),
        [(3 * 2**30, 1.0, "--kv-cache-memory-bytes"), (None, 3.0, "VLLM_CPU_KVCACHE_SPACE=3")],
    )
    def test_more_than_there_is(self, requested, space, name):
        with pytest.raises(CapacityError, match=f"{name} .*3.00 GiB.*2.00 GiB"):
            resolve.kv_pool_bytes(requested, space, 4.0, 2 * self.GIB)


class TestGenerationDefaults:
    MODEL = {"temperature": 0.2, "eos_token_id": 2}

    def test_sources(self, tmp_path):
        file = tmp_path / "generation_config.json"
        file.write_text(json.dumps({"top_p": 0.5}))
        assert resolve.generation_defaults("auto", self.MODEL, {}) == self.MODEL
        assert resolve.generation_defaults("vllm", self.MODEL, {}) == {}
        assert resolve.generation_defaults(str(tmp_path), self.MODEL, {}) == {"top_p": 0.5}
        assert resolve.generation_defaults("vllm", self.MODEL, {"top_k": 3}) == {"top_k": 3}
        merged = resolve.generation_defaults("auto", self.MODEL, {"temperature": 1.0})
        assert merged == {"temperature": 1.0, "eos_token_id": 2}

    @pytest.mark.parametrize("text", [None, "{", "[]"])
    def test_a_bad_source(self, tmp_path, text):
        if text is not None:
            (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ConfigError, match="--generation-config"):
            resolve.generation_defaults(str(tmp_path), {}, {})

    def test_an_unknown_key(self):
        with pytest.raises(ConfigError, match="no key 'temprature'; did you mean temperature"):
            resolve.generation_defaults("auto", {}, {"temprature": 1})

    def test_a_default_that_no_request_could_have_is_refused(self):
        with pytest.raises(ConfigError, match=r"^--override-generation-config: temperature must"):
            resolve.generation_defaults("auto", {}, {"temperature": -1})
        with pytest.raises(ConfigError, match=r"^generation_config\.json: top_p must.*vllm leaves"):
            resolve.generation_defaults("auto", {"top_p": "much"}, {})
        with pytest.raises(ConfigError, match="max_tokens"):
            resolve.generation_defaults("auto", {}, {"max_new_tokens": 0})
        assert resolve.generation_defaults("vllm", {"top_p": "much"}, {}) == {}

    @pytest.mark.parametrize("ends", ["</s>", [[1]], [1, None], 2.5, True, {}])
    def test_ends_of_a_text_that_are_no_tokens_are_refused(self, ends):
        with pytest.raises(ConfigError, match=r"^generation_config\.json: eos_token_id must be"):
            resolve.generation_defaults("auto", {"eos_token_id": ends}, {})
        fine = {"eos_token_id": [1, 2]}
        assert resolve.generation_defaults("auto", fine, {}) == fine


def test_quantised_checkpoints_are_refused():
    class Config:
        quantization_config = {"quant_method": "awq"}

    with pytest.raises(UnsupportedError, match=r"--model m: its weights are quantised \(awq\)"):
        resolve.refuse_quantized("m", Config())
    resolve.refuse_quantized("m", object())
