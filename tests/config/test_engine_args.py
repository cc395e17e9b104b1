"""``EngineArgs`` to ``VllmConfig`` on a real model."""

import json
import pickle
import subprocess
import sys

import pytest

from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.errors import CapacityError, ConfigError, UnsupportedError

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path):
    """Writes a model directory without weights, with these changes to its config.json."""

    def write(**changes) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **changes}))
        return str(tmp_path)

    return write


def config_of(model: str, **kwargs):
    return EngineArgs.from_kwargs(model=model, **kwargs).create_engine_config()


def test_defaults(model):
    path = model()
    config = config_of(path)
    assert config.model_config.max_model_len == 512
    assert config.model_config.dtype_name == "bfloat16"
    assert config.model_config.architecture == "LlamaForCausalLM"
    assert config.model_config.served_model_name == (path,)
    assert config.model_config.tokenizer == path
    assert config.scheduler_config.max_num_seqs == 256
    assert config.scheduler_config.max_num_batched_tokens == 2048
    assert config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_model_len == 512
    assert config.cache_config.enable_prefix_caching
    assert config.cache_config.block_size
    assert not config.cache_config.user_specified_block_size
    assert config.cache_config.kv_cache_memory_bytes
    assert config.parallel_config.world_size == 1


def test_the_options_arrive(model):
    config = config_of(
        model(),
        served_model_name=["a", "b"],
        max_model_len="256",
        block_size=16,
        kv_cache_memory_bytes=2**24,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        scheduling_policy="priority",
        max_num_seqs=8,
        max_num_queued_reqs=64,
        dtype="float32",
        seed=7,
        attention_config={"backend": "TORCH_REF"},
        structured_outputs_config={"backend": "auto", "disable_any_whitespace": True},
        override_generation_config={"temperature": 0.5, "max_new_tokens": 9},
        logits_processors=["m:C"],
        additional_config={"x": 1},
    )
    assert config.model_config.served_model_name == ("a", "b")
    assert config.model_config.max_model_len == 256
    assert config.model_config.dtype_name == "float32"
    assert config.model_config.seed == 7
    assert config.model_config.logits_processors == ("m:C",)
    assert config.model_config.get_diff_sampling_param() == {"temperature": 0.5, "max_tokens": 9}
    assert (config.cache_config.block_size, config.cache_config.user_specified_block_size) == (
        16,
        True,
    )
    assert config.cache_config.kv_cache_memory_bytes == 2**24
    assert not config.cache_config.enable_prefix_caching
    assert config.scheduler_config.policy == "priority"
    assert config.scheduler_config.max_num_queued_reqs == 64
    assert not config.scheduler_config.enable_chunked_prefill
    assert config.attention_config.backend == "TORCH_REF"
    assert config.structured_outputs_config.disable_any_whitespace
    assert config.additional_config == {"x": 1}


def test_one_name_may_be_given_alone(model):
    assert config_of(model(), served_model_name="a").model_config.served_model_name == ("a",)


def test_hf_overrides_change_the_model(model):
    config = config_of(
        model(),
        hf_overrides={"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        max_model_len=2048,
    )
    assert config.model_config.max_model_len == 2048


def test_a_stretched_model_is_as_long_as_it_says(model):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert config_of(model(rope_scaling=yarn)).model_config.max_model_len == 2048


def test_without_sliding_window_the_context_is_the_window(model):
    path = model(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=128)
    assert config_of(path).cache_config.sliding_window == 128
    config = config_of(path, disable_sliding_window=True)
    assert config.model_config.max_model_len == 128
    assert config.cache_config.sliding_window is None
    with pytest.raises(ConfigError, match="limit of 128 tokens"):
        config_of(path, disable_sliding_window=True, max_model_len=129)


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, "none"),
        ({"enable_prefix_caching": True}, "align"),
        ({"enable_prefix_caching": False}, "none"),
        ({"enable_prefix_caching": True, "mamba_cache_mode": "none"}, "none"),
        ({"enable_prefix_caching": True, "mamba_cache_mode": "all"}, "all"),
        ({"mamba_cache_mode": "align"}, "align"),
    ],
)
def test_who_asks_for_prefixes_gets_states_kept(model, given, mode):
    assert config_of(model(), **given).cache_config.mamba_cache_mode == mode


def test_max_model_len_auto_fits_the_cache(model):
    # 2 layers * 2 KV heads * head size 16 * K and V * 2 bytes: 256 bytes a token.
    config = config_of(
        model(), max_model_len="auto", kv_cache_memory_bytes=256 * 16 * 9, block_size=16
    )
    assert config.model_config.max_model_len == 128
    assert config.scheduler_config.max_model_len == 128
    roomy = config_of(model(), max_model_len=-1, kv_cache_memory_bytes=2**24, block_size=16)
    assert roomy.model_config.max_model_len == 512


def test_few_tokens_a_step_mean_few_requests(model):
    config = config_of(model(), max_num_batched_tokens=64)
    assert config.scheduler_config.max_num_seqs == 64


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [
        ({"max_model_len": 513}, "--max-model-len 513 is longer than the model's limit of 512"),
        ({"max_num_batched_tokens": 8, "max_num_seqs": 9}, "--max-num-batched-tokens 8 must be"),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
            "at least --max-model-len",
        ),
        ({"quantization": "gguf"}, "--quantization gguf needs a .gguf file"),
        ({"attention_config": {"flavour": 1}}, "--attention-config has no key 'flavour'"),
        (
            {"attention_config": {"backend": "A"}, "attention_backend": "B"},
            "--attention-backend B and --attention-config.backend A differ",
        ),
        ({"structured_outputs_config": {"x": 1}}, "--structured-outputs-config has no key 'x'"),
        ({"override_generation_config": {"heat": 1}}, "no key 'heat'"),
        ({"generation_config": "/nowhere"}, "--generation-config must be auto, vllm or"),
        ({"tokenizer": "/nowhere"}, "--tokenizer '/nowhere'"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be between 1 and 65536"),
        ({"max_num_seqs": "many"}, "--max-num-seqs takes a whole number"),
        ({"max_num_seqs": True}, "--max-num-seqs takes a whole number"),
        ({"hf_overrides": 3}, "--hf-overrides takes a JSON object"),
        ({"dtype": "int8"}, "--dtype must be one of"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_option(model, kwargs, part):
    with pytest.raises(ConfigError) as error:
        config_of(model(), **kwargs)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [
        ({"kv_cache_dtype": "fp8_inc"}, "--kv-cache-dtype fp8_inc"),
        ({"quantization": "awq"}, "--quantization awq"),
        ({"runner": "pooling"}, "--runner pooling"),
        ({"structured_outputs_config": {"backend": "outlines"}}, "config.backend outlines"),
        ({"speculative_config": {"model": "x"}}, "speculative_config"),
        ({"enable_lora": True}, "enable_lora"),
    ],
)
def test_what_is_not_there_yet_is_refused_by_name(model, kwargs, part):
    with pytest.raises(UnsupportedError, match="vLLM has this; this engine does not yet") as error:
        config_of(model(), **kwargs)
    assert part in str(error.value)


def test_a_quantised_checkpoint_is_refused(model):
    with pytest.raises(UnsupportedError, match="quantised"):
        config_of(model(quantization_config={"quant_method": "fp8"}))


def test_more_memory_than_there_is(model):
    with pytest.raises(CapacityError, match=r"--kv-cache-memory-bytes 1\d+ asks for"):
        config_of(model(), kv_cache_memory_bytes=10**15)


def test_a_share_of_a_gpu_is_refused_on_the_cpu(model):
    with pytest.raises(ConfigError, match="CPU: set --kv-cache-memory-bytes"):
        config_of(model(), gpu_memory_utilization=0.5)
    assert config_of(model(), gpu_memory_utilization=0.92).device_config.device_type == "cpu"


def test_the_variable_sets_the_pool(model, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0.25")
    assert config_of(model()).cache_config.kv_cache_memory_bytes == 2**28
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000000")
    with pytest.raises(CapacityError, match="VLLM_CPU_KVCACHE_SPACE=1e"):
        config_of(model())


def test_variables_that_are_not_here_yet_are_refused_by_the_offline_engine_too(model, monkeypatch):
    monkeypatch.setenv("VLLM_RPC_TIMEOUT", "1")
    with pytest.raises(UnsupportedError, match="VLLM_RPC_TIMEOUT"):
        config_of(model())


def test_the_configuration_crosses_processes(model):
    config = config_of(model())
    assert pickle.loads(pickle.dumps(config)) == config


def test_async_args_add_to_the_engines(model):
    args = AsyncEngineArgs.from_kwargs(model=model(), enable_log_requests=True)
    assert args.enable_log_requests
    assert args.create_engine_config().model_config.max_model_len == 512
    assert set(EngineArgs.flags()) < set(AsyncEngineArgs.flags())


def test_resolving_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from vllm.engine.arg_utils import EngineArgs; "
        "EngineArgs(model='smollm2').create_engine_config(); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    assert result.stdout == "[]\n"


def test_kv_transfer_and_events_come_as_json(model):
    config = config_of(
        model(),
        kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
        kv_events_config={"enable_kv_cache_events": True, "publisher": "zmq"},
    )
    assert config.kv_transfer_config.kv_connector == "ExampleConnector"
    assert config.kv_transfer_config.engine_id
    assert config.kv_events_config.publisher == "zmq"
    assert config_of(model()).kv_transfer_config is None
    given = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    assert config_of(model(), kv_transfer_config=given).kv_transfer_config == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_conector": "X"}, "--kv-transfer-config has no key 'kv_conector'"),
        ({"kv_connector": "X", "kv_role": "boss"}, "kv_role must be one of"),
        ({"kv_connector": "X", "kv_role": "kv_both", "kv_port": "5"}, "kv_port"),
    ],
)
def test_wrong_keys_of_kv_transfer_are_named(model, given, message):
    with pytest.raises(ConfigError, match=message):
        config_of(model(), kv_transfer_config=given)


def test_offloading_by_size_is_the_offloading_connector(model):
    config = config_of(model(), kv_offloading_size=1.5)
    transfer = config.kv_transfer_config
    assert (transfer.kv_connector, transfer.kv_role) == ("OffloadingConnector", "kv_both")
    assert transfer.kv_connector_extra_config == {"cpu_bytes_to_use": 3 * 2**29}
    assert config_of(model(), kv_offloading_size=0.0).kv_transfer_config is None
    with pytest.raises(ConfigError, match="--kv-offloading-size and --kv-transfer-config exclude"):
        config_of(
            model(),
            kv_offloading_size=1.0,
            kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
        )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("SharedStorageConnector", "it is called ExampleConnector now"),
        ("LMCacheConnectorV1", "kv_connector_module_path"),
        ("NixlConector", "did you mean NixlConnector?"),
    ],
)
def test_an_unknown_connector_is_refused_before_a_model_is_loaded(name, advice):
    given = {"kv_connector": name, "kv_role": "kv_both"}
    with pytest.raises(ConfigError, match=f"kv_connector '{name}' is unknown.*") as error:
        config_of("/no/such/model", kv_transfer_config=given)
    assert advice in str(error.value)
