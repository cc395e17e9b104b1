"""``EngineArgs``: the options of ``options.py``, checked, and what becomes of them.

``create_engine_config`` turns them into a checked ``VllmConfig``. Importing this loads neither
torch nor transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import vllm.envs as envs
from vllm.engine import resolve
from vllm.engine.not_yet import GONE, NOT_YET
from vllm.engine.options import EngineOptions
from vllm.errors import ConfigError, UnsupportedError
from vllm.utils.flags import Flag, Kind, arg, dash, flags_of, nearest

if TYPE_CHECKING:
    from vllm.config import (
        CacheConfig,
        KVTransferConfig,
        SchedulerConfig,
        StructuredOutputsConfig,
        VllmConfig,
    )
    from vllm.config.model import ModelConfig
    from vllm.transformers_utils.config import ResolvedModel
    from vllm.utils.argparse_utils import FlexibleArgumentParser

__all__ = ["AsyncEngineArgs", "EngineArgs"]

_Args = TypeVar("_Args")
_Config = TypeVar("_Config")


def _refuses_by_name(cls: type[_Args]) -> type[_Args]:
    """Let the class be made with any keyword of vLLM's: what it lacks is refused by name.

    A keyword that is not there yet may be given with a value that asks for nothing.
    """
    make = cls.__init__

    @functools.wraps(make)
    def init(self: _Args, **kwargs: Any) -> None:
        known = flags_of(type(self))
        for name in [name for name in kwargs if name not in known]:
            value = kwargs.pop(name)
            entry = NOT_YET.get(name)
            if entry is None:
                advice = GONE.get(name.replace("_", "-"))
                if advice is not None:
                    text = f"{name}: vLLM no longer has this; {advice}"
                    raise ConfigError(text, parameter=name, value=value)
                guess = nearest(name, [*known, *NOT_YET])
                hint = f"; did you mean {guess}?" if guess else ""
                raise ConfigError(f"unknown argument {name}{hint}", parameter=name, value=value)
            if not entry.is_off(value):
                raise entry.refusal(name)
        make(self, **kwargs)

    cls.__init__ = init  # type: ignore[method-assign, assignment]
    return cls


@_refuses_by_name
@dataclass(kw_only=True)
class EngineArgs(EngineOptions):
    """Engine options as the user gave them; names and defaults are vLLM's.

    Raises:
        UnsupportedError: an argument that vLLM has and this engine does not yet.
        ConfigError: an unknown argument, or a value that cannot work.
    """

    def __post_init__(self) -> None:
        if isinstance(self.served_model_name, str):
            self.served_model_name = [self.served_model_name]
        self.hf_overrides = {} if self.hf_overrides is None else self.hf_overrides
        # Callers of the class may give vLLM's config objects.
        for name in ("kv_transfer_config", "kv_events_config"):
            given = getattr(self, name)
            if dataclasses.is_dataclass(given) and not isinstance(given, type):
                setattr(self, name, dataclasses.asdict(given))
        for name, flag in self.flags().items():
            setattr(self, name, flag.check(getattr(self, name)))
        if self.served_model_name is not None and not all(self.served_model_name):
            raise ConfigError(
                "--served-model-name must not be empty; leave it out for the name of --model",
                parameter="served_model_name",
            )

    @classmethod
    def flags(cls) -> Mapping[str, Flag]:
        """The options of this class, by field name."""
        return flags_of(cls)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> Self:
        """From the keyword arguments of ``LLM``.

        Raises:
            UnsupportedError: an argument that vLLM has and this engine does not yet.
            ConfigError: an unknown argument, or a value that cannot work.
        """
        return cls(**kwargs)

    @classmethod
    def add_cli_args(cls, parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
        """Give ``parser`` these options, and those that are to be refused by name."""
        for flag in cls.flags().values():
            parser.add_flag(flag)
        parser.refuse(NOT_YET.values())
        parser.refuse_gone(GONE)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """From parsed options; others in ``args`` are not looked at."""
        names = cls.flags()
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})

    def create_engine_config(self, usage_context: object = None) -> VllmConfig:
        """Resolve the model and every open option, and check them against each other.

        Args:
            usage_context: accepted for vLLM's callers; defaults do not depend on it.

        Raises:
            ConfigError, UnsupportedError: naming the option and what would work.
            CapacityError: more memory asked for than there is.
        """
        from vllm.config import (
            AttentionConfig,
            DeviceConfig,
            KVEventsConfig,
            KVTransferConfig,
            LoadConfig,
            ObservabilityConfig,
            ParallelConfig,
            VllmConfig,
        )
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins

        envs.validate_environ()
        load_general_plugins()
        transfer = _from_json("kv_transfer_config", self._kv_transfer(), KVTransferConfig)
        _check_connector(transfer)
        model_config = self._create_model_config()
        resolve.check_tensor_parallel(self.tensor_parallel_size, model_config.hf_text_config)
        cache_config = self._create_cache_config(model_config)
        model_config = self._fit_max_model_len(model_config, cache_config.kv_cache_memory_bytes)
        config = VllmConfig(
            model_config=model_config,
            cache_config=cache_config,
            scheduler_config=self._create_scheduler_config(model_config.max_model_len),
            parallel_config=ParallelConfig(
                tensor_parallel_size=self.tensor_parallel_size,
                distributed_executor_backend=resolve.resolve_executor_backend(
                    self.distributed_executor_backend, self.tensor_parallel_size
                ),
                worker_cls=self.worker_cls,
            ),
            load_config=LoadConfig(
                load_format=self.load_format,
                download_dir=self.download_dir,
                use_tqdm_on_load=self.use_tqdm_on_load,
            ),
            device_config=DeviceConfig(device_type=current_platform.device_type),
            attention_config=AttentionConfig(backend=self._attention_backend()),
            structured_outputs_config=self._structured_outputs(),
            observability_config=ObservabilityConfig(disable_log_stats=self.disable_log_stats),
            kv_transfer_config=transfer,
            kv_events_config=_from_json("kv_events_config", self.kv_events_config, KVEventsConfig),
            additional_config=dict(self.additional_config),
            instance_id=uuid.uuid4().hex,
        )
        if self.enable_sleep_mode and not current_platform.has_sleep_mode:
            raise UnsupportedError(
                "--enable-sleep-mode: vLLM has this; this engine does not yet on this device",
                parameter="enable_sleep_mode",
            )
        current_platform.check_config(config)
        return config

    def _create_scheduler_config(self, max_model_len: int) -> SchedulerConfig:
        from vllm.config import SchedulerConfig
        from vllm.platforms import current_platform

        max_num_seqs = self.max_num_seqs or resolve.DEFAULT_MAX_NUM_SEQS
        if self.max_num_seqs is None and self.max_num_batched_tokens is not None:
            max_num_seqs = min(max_num_seqs, self.max_num_batched_tokens)
        chunked_prefill = self.enable_chunked_prefill is not False
        return SchedulerConfig(
            max_num_batched_tokens=resolve.resolve_max_num_batched_tokens(
                self.max_num_batched_tokens,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                chunked_prefill=chunked_prefill,
                default=current_platform.default_max_num_batched_tokens,
            ),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_queued_reqs=self.max_num_queued_reqs,
            enable_chunked_prefill=chunked_prefill,
            policy=self.scheduling_policy,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            stream_interval=self.stream_interval,
            async_scheduling=resolve.resolve_async_scheduling(
                self.async_scheduling,
                runs_beside_host=current_platform.runs_beside_host,
                obstacles=self._need_tokens_at_once(),
            ),
            scheduler_cls=self.scheduler_cls,
            disable_hybrid_kv_cache_manager=self.disable_hybrid_kv_cache_manager,
            watermark=self.watermark,
        )

    def _need_tokens_at_once(self) -> list[str]:
        """Options in use that need a step's tokens before the next step is scheduled."""
        return [
            dash(name)
            for name in (
                "scheduler_cls",
                "logits_processors",
                "kv_transfer_config",
                "kv_offloading_size",
            )
            if getattr(self, name, None)
        ]

    def _kv_transfer(self) -> dict[str, Any] | None:
        """``kv_transfer_config``, or what ``kv_offloading_size`` stands for."""
        if not self.kv_offloading_size:
            return self.kv_transfer_config
        if self.kv_transfer_config:
            raise ConfigError(
                "--kv-offloading-size and --kv-transfer-config exclude each other: name "
                "MultiConnector in --kv-transfer-config, and OffloadingConnector among its "
                "connectors",
                parameter="kv_offloading_size",
                value=self.kv_offloading_size,
            )
        return {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": int(self.kv_offloading_size * 2**30)},
        }

    def _create_model_config(self) -> ModelConfig:
        from vllm.config import ModelConfig
        from vllm.platforms import current_platform
        from vllm.transformers_utils.config import derive_max_model_len, resolve_model
        from vllm.utils.system import cpu_flags

        resolved = resolve_model(
            self.model,
            revision=self.revision,
            download_dir=self.download_dir,
            trust_remote_code=self.trust_remote_code,
            hf_overrides=self.hf_overrides,
            weights=self.load_format != "dummy",
        )
        self._check_formats(resolved)
        hf_config = resolved.hf_config
        text_config = hf_config.get_text_config()
        checkpoint = getattr(text_config, "dtype", None) or getattr(hf_config, "dtype", None)
        limit = derive_max_model_len(text_config)
        window = getattr(text_config, "sliding_window", None)
        if self.disable_sliding_window and window:
            limit = window if limit is None else min(limit, window)
        requested = None if self.max_model_len == resolve.AUTO else self.max_model_len
        return ModelConfig(
            model=self.model,
            model_path=str(resolved.model_path),
            tokenizer=self._tokenizer(resolved),
            tokenizer_mode=self.tokenizer_mode,
            tokenizer_revision=self.tokenizer_revision,
            trust_remote_code=self.trust_remote_code,
            hf_config=hf_config,
            hf_text_config=text_config,
            architecture=resolved.architecture,
            dtype_name=resolve.resolve_dtype(
                self.dtype,
                str(checkpoint).removeprefix("torch.") if checkpoint else None,
                device_type=current_platform.device_type,
                supported=current_platform.supported_dtype_names,
                cpu_flags=cpu_flags(),
            ),
            max_model_len=resolve.resolve_max_model_len(requested, limit),
            seed=self.seed,
            revision=self.revision,
            quantization=self.quantization,
            enforce_eager=self.enforce_eager,
            enable_sleep_mode=self.enable_sleep_mode,
            max_logprobs=self.max_logprobs,
            logprobs_mode=self.logprobs_mode,
            served_model_name=tuple(self.served_model_name or (self.model,)),
            skip_tokenizer_init=self.skip_tokenizer_init,
            disable_sliding_window=self.disable_sliding_window,
            generation_config=resolve.generation_defaults(
                self.generation_config,
                resolved.generation_config,
                self.override_generation_config,
            ),
            logits_processors=tuple(self.logits_processors or ()),
            runner_type="generate" if self.runner == "auto" else self.runner,
        )

    def _check_formats(self, resolved: ResolvedModel) -> None:
        if self.quantization == "gguf" and not resolved.is_gguf:
            raise ConfigError(
                f"--quantization gguf needs a .gguf file, and --model {self.model} is none",
                parameter="quantization",
                value=self.quantization,
            )
        resolve.refuse_quantized(self.model, resolved.hf_config)

    def _tokenizer(self, resolved: ResolvedModel) -> str:
        if self.tokenizer is None or self.tokenizer == self.model:
            return str(resolved.tokenizer)
        from vllm.transformers_utils.model_path import resolve_model_path

        return str(
            resolve_model_path(
                self.tokenizer,
                revision=self.tokenizer_revision,
                download_dir=self.download_dir,
                weights=False,
                option="--tokenizer",
            )
        )

    def _create_cache_config(self, model_config: ModelConfig) -> CacheConfig:
        from vllm.config import CacheConfig
        from vllm.platforms import current_platform
        from vllm.transformers_utils.hf_config import uniform_sliding_window

        pool = self.kv_cache_memory_bytes
        if current_platform.is_cpu():
            if self.gpu_memory_utilization != type(self).flags()["gpu_memory_utilization"].default:
                raise ConfigError(
                    "--gpu-memory-utilization is a share of a GPU's memory, and this engine runs "
                    "on the CPU: set --kv-cache-memory-bytes instead",
                    parameter="gpu_memory_utilization",
                    value=self.gpu_memory_utilization,
                )
            pool = resolve.kv_pool_bytes(
                pool,
                envs.VLLM_CPU_KVCACHE_SPACE,
                envs.DEFAULT_CPU_KVCACHE_SPACE,
                current_platform.get_device_available_memory() // self.tensor_parallel_size,
            )
        window = uniform_sliding_window(model_config.hf_text_config)
        return CacheConfig(
            block_size=self.block_size or current_platform.default_block_size,
            user_specified_block_size=self.block_size is not None,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_memory_bytes=pool,
            cache_dtype=self.kv_cache_dtype,
            kv_offloading_size=self.kv_offloading_size or None,
            kv_offloading_backend=self.kv_offloading_backend,
            kv_cache_dtype_skip_layers=tuple(map(str, self.kv_cache_dtype_skip_layers or ())),
            calculate_kv_scales=self.calculate_kv_scales,
            num_gpu_blocks_override=self.num_gpu_blocks_override,
            enable_prefix_caching=self.enable_prefix_caching is not False,
            prefix_caching_hash_algo=self.prefix_caching_hash_algo,
            kv_cache_layout=envs.VLLM_KV_CACHE_LAYOUT,
            mamba_block_size=self.mamba_block_size,
            mamba_cache_dtype=self.mamba_cache_dtype,
            mamba_ssm_cache_dtype=self.mamba_ssm_cache_dtype,
            mamba_cache_mode=self.mamba_cache_mode
            or ("align" if self.enable_prefix_caching else "none"),
            sliding_window=None if self.disable_sliding_window else window,
        )

    def _fit_max_model_len(self, model_config: ModelConfig, pool: int | None) -> ModelConfig:
        """``--max-model-len auto``: as long as the cache can hold, in whole blocks."""
        if self.max_model_len != resolve.AUTO:
            return model_config
        from vllm.platforms import current_platform

        block = self.block_size or current_platform.default_block_size
        per_token = resolve.kv_bytes_per_token(
            num_layers=model_config.get_num_layers(),
            num_kv_heads=max(1, model_config.get_total_num_kv_heads() // self.tensor_parallel_size),
            head_size=model_config.get_head_size(),
            cache_dtype=self.kv_cache_dtype,
            model_dtype=model_config.dtype_name,
        )
        # One block stays with the pool: it is the null block.
        tokens = None if pool is None else max(1, pool // (per_token * block) - 1) * block
        length = resolve.resolve_max_model_len(
            resolve.AUTO, model_config.max_model_len, fitting_tokens=tokens
        )
        return dataclasses.replace(model_config, max_model_len=length)

    def _attention_backend(self) -> str | None:
        _only_keys("attention_config", self.attention_config, ("backend",))
        other = self.attention_config.get("backend")
        if other and self.attention_backend and other != self.attention_backend:
            raise ConfigError(
                f"--attention-backend {self.attention_backend} and --attention-config.backend "
                f"{other} differ; give one of them",
                parameter="attention_backend",
                value=self.attention_backend,
            )
        return self.attention_backend or other

    def _structured_outputs(self) -> StructuredOutputsConfig:
        from vllm.config import StructuredOutputsConfig

        given = self.structured_outputs_config
        known = ("backend", "disable_any_whitespace")
        _only_keys("structured_outputs_config", given, known)
        backend = given.get("backend", "auto")
        if backend not in ("auto", "xgrammar"):
            raise UnsupportedError(
                f"--structured-outputs-config.backend {backend}: vLLM has this; this engine does "
                "not yet (accepted: auto, xgrammar)",
                parameter="structured_outputs_config",
                value=backend,
            )
        return StructuredOutputsConfig(
            backend="xgrammar",
            disable_any_whitespace=bool(given.get("disable_any_whitespace", False)),
        )


def _from_json(name: str, given: dict[str, Any] | None, config: type[_Config]) -> _Config | None:
    """The config that a JSON option describes; None where it is empty."""
    if not given:
        return None
    import msgspec

    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    _only_keys(name, given, tuple(field.name for field in fields))
    try:
        return msgspec.convert(given, config)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{dash(name)}: {error}", parameter=name, value=given) from None


def _check_connector(transfer: KVTransferConfig | None) -> None:
    """Refuse a connector that nobody knows before a model is loaded for it."""
    if transfer is None or not transfer.kv_connector or transfer.kv_connector_module_path:
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    KVConnectorFactory.check_name(transfer.kv_connector)


def _only_keys(name: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{dash(name)} has no key {key!r}; known: {', '.join(known)}",
                parameter=name,
                value=key,
            )


@_refuses_by_name
@dataclass(kw_only=True)
class AsyncEngineArgs(EngineArgs):
    """``EngineArgs`` of a server."""

    enable_log_requests: bool = arg(
        False,
        "top level",
        Kind.SWITCH,
        "Log every request as it arrives.",
    )
