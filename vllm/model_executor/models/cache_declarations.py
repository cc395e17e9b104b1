"""What the layers of each architecture keep, from its ``config.json`` alone.

For plans that are made without building a model (``vllm kv-plan``). Layers of a built model
declare the same through the same functions (``v1/kv_cache/declare.py``); a test builds each model
on the meta device and compares names and specs. Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import vllm.envs as envs
from vllm.errors import ConfigError
from vllm.v1.kv_cache.content import check_counts
from vllm.v1.kv_cache.declare import (
    attention_spec,
    cross_attention_spec,
    kv_heads_of_rank,
    latent_spec,
    state_spec,
)
from vllm.v1.kv_cache.declare_compressed import (
    compressed_latent_spec,
    compressor_spec,
    index_key_spec,
    window_latent_spec,
)
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache.state_shapes import MambaStateShapeCalculator, StateShapes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["declare_kv_caches", "declared_architectures"]

Specs = Iterator[KVCacheSpec]


class _Declaring:
    """The settings and sizes that the declarations of one model share."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.config: Any = vllm_config.model_config.hf_text_config
        self.tp_size = vllm_config.parallel_config.tensor_parallel_size

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that the configuration has and that is not null."""
        for name in names:
            value = getattr(self.config, name, None)
            if value is not None:
                return value
        return default

    def need(self, *names: str) -> Any:
        """As ``get``.

        Raises:
            ConfigError: it has none of them.
        """
        value = self.get(*names)
        if value is None:
            raise ConfigError(f"config.json has no {' or '.join(names)}", parameter="model")
        return value

    @property
    def num_layers(self) -> int:
        return self.need("num_hidden_layers", "decoder_layers", "num_layers")

    @property
    def head_dim(self) -> int:
        width = self.get("head_dim", "attention_head_dim")
        return width or self.need("hidden_size", "d_model") // self.num_heads

    def kinds(self, field: str, *known: Any) -> list[Any] | None:
        """What ``field`` says each layer is, one of ``known``; None where it is absent.

        Raises:
            ConfigError: it names another kind, or too few layers.
        """
        values = self.get(field)
        if values is None:
            return None
        unknown = sorted({str(value) for value in values if value not in known})
        if unknown:
            raise ConfigError(
                f"config.json: {field} names {', '.join(unknown)}; known: "
                f"{', '.join(map(str, known))}",
                parameter="model",
            )
        if len(values) < self.num_layers:
            raise ConfigError(
                f"config.json: {field} names {len(values)} layers, num_hidden_layers "
                f"{self.num_layers}",
                parameter="model",
            )
        return list(values)[: self.num_layers]

    @property
    def num_heads(self) -> int:
        return self.need("num_attention_heads", "decoder_attention_heads", "num_heads")

    def attention(self, name: str, window: int | None = None, chunk: int | None = None) -> Any:
        heads = self.get("num_key_value_heads", default=self.num_heads)
        if self.vllm_config.model_config.disable_sliding_window:
            window = None
        return attention_spec(
            self.vllm_config,
            name,
            num_kv_heads=kv_heads_of_rank(heads, self.tp_size),
            head_size=self.head_dim,
            sliding_window=window,
            attention_chunk_size=chunk,
        )

    def state(self, name: str, shapes: StateShapes) -> KVCacheSpec:
        return state_spec(self.vllm_config, name, shapes, envs.VLLM_SSM_CONV_STATE_LAYOUT)

    def mamba2(self, name: str, intermediate_size: int, num_heads: int, head_dim: int) -> Any:
        shapes = MambaStateShapeCalculator.mamba2(
            tp_size=self.tp_size,
            intermediate_size=intermediate_size,
            n_groups=self.need("n_groups", "mamba_n_groups", "mamba_ngroups"),
            num_heads=num_heads,
            head_dim=head_dim,
            state_size=self.need("ssm_state_size", "state_size", "mamba_d_state"),
            conv_kernel=self.need("conv_kernel", "mamba_d_conv"),
        )
        return self.state(name, shapes)

    def mamba1(self, name: str, intermediate_size: int) -> Any:
        shapes = MambaStateShapeCalculator.mamba1(
            tp_size=self.tp_size,
            intermediate_size=intermediate_size,
            state_size=self.need("state_size", "mamba_d_state"),
            conv_kernel=self.need("conv_kernel", "mamba_d_conv"),
        )
        return self.state(name, shapes)


def _decoder(model: _Declaring) -> Specs:
    """Attention in every layer; full, windowed or chunked as ``layer_types`` says."""
    kinds = model.kinds("layer_types", "full_attention", "sliding_attention", "chunked_attention")
    window, chunk = model.get("sliding_window"), model.get("attention_chunk_size")
    for i in range(model.num_layers):
        kind = kinds[i] if kinds else "sliding_attention" if window else "full_attention"
        yield model.attention(
            f"model.layers.{i}.self_attn.attn",
            window=window if kind == "sliding_attention" else None,
            chunk=chunk if kind == "chunked_attention" else None,
        )


def _latent_decoder(model: _Declaring) -> Specs:
    for i in range(model.num_layers):
        yield latent_spec(
            model.vllm_config,
            f"model.layers.{i}.self_attn.attn",
            kv_lora_rank=model.need("kv_lora_rank"),
            qk_rope_head_dim=model.need("qk_rope_head_dim"),
        )


def _deepseek_v4(model: _Declaring) -> Specs:
    """Window in every layer; where ``compress_ratios`` is not 0, compressed latents and the window
    of uncompressed states that they are made from; at ratio 4 an indexer with both of its own.
    """
    config, width = model.vllm_config, model.head_dim
    ratios = model.need("compress_ratios")
    if len(ratios) < model.num_layers:
        raise ConfigError(
            f"config.json: compress_ratios names {len(ratios)} layers, num_hidden_layers "
            f"{model.num_layers}",
            parameter="model",
        )
    for i, ratio in enumerate(ratios[: model.num_layers]):
        prefix = f"model.layers.{i}.attn"
        yield window_latent_spec(
            config, f"{prefix}.swa_cache", width=width, window=model.need("sliding_window")
        )
        if not ratio:
            continue
        overlaps = ratio == 4
        yield compressed_latent_spec(config, f"{prefix}.mla_cache", width=width, ratio=ratio)
        yield compressor_spec(
            f"{prefix}.compressor.state_cache", width=width, ratio=ratio, overlaps=overlaps
        )
        if overlaps:
            index = model.need("index_head_dim")
            yield index_key_spec(
                config,
                f"{prefix}.indexer.k_cache",
                width=index,
                ratio=ratio,
                latent_width=width,
            )
            yield compressor_spec(
                f"{prefix}.indexer.compressor.state_cache",
                width=index,
                ratio=ratio,
                overlaps=overlaps,
            )


def _mamba1(model: _Declaring) -> Specs:
    for i in range(model.num_layers):
        yield model.mamba1(f"backbone.layers.{i}.mixer", model.need("intermediate_size"))


def _mamba2(model: _Declaring) -> Specs:
    inner = model.need("expand") * model.need("hidden_size")
    for i in range(model.num_layers):
        yield model.mamba2(
            f"backbone.layers.{i}.mixer", inner, model.need("num_heads"), model.need("head_dim")
        )


def _jamba(model: _Declaring) -> Specs:
    period, offset = model.need("attn_layer_period"), model.need("attn_layer_offset")
    check_counts("config.json: ", attn_layer_period=period)
    for i in range(model.num_layers):
        if i % period == offset:
            yield model.attention(f"model.layers.{i}.self_attn.attn", model.get("sliding_window"))
        else:
            inner = model.need("mamba_expand") * model.need("hidden_size")
            yield model.mamba1(f"model.layers.{i}.mamba", inner)


def _mamba2_or_attention(model: _Declaring) -> Specs:
    """Bamba and Granite 4: ``layer_types`` or ``attn_layer_indices`` say which layers attend."""
    attention = ("attention", "full_attention")
    kinds = model.kinds("layer_types", *attention, "mamba", "mamba2", "linear_attention")
    attending = model.get("attn_layer_indices", default=())
    inner = model.need("mamba_expand") * model.need("hidden_size")
    for i in range(model.num_layers):
        if (kinds[i] in attention) if kinds else (i in attending):
            yield model.attention(f"model.layers.{i}.self_attn.attn")
        else:
            heads, width = model.need("mamba_n_heads"), model.need("mamba_d_head")
            if width == "auto":
                width = inner // heads
            yield model.mamba2(f"model.layers.{i}.mamba", inner, heads, width)


def _nemotron_h(model: _Declaring) -> Specs:
    heads, width = model.need("mamba_num_heads"), model.need("mamba_head_dim")
    known = ("linear_attention", "full_attention", "mlp", "moe")
    model.need("layer_types")
    for i, kind in enumerate(model.kinds("layer_types", *known) or ()):
        if kind == "full_attention":
            yield model.attention(f"backbone.layers.{i}.mixer.attn")
        elif kind == "linear_attention":
            yield model.mamba2(f"backbone.layers.{i}.mixer", heads * width, heads, width)


def _zamba2(model: _Declaring) -> Specs:
    """A state in every layer; hybrid layers attend too, over two hidden states side by side."""
    model.need("layer_types")
    kinds = model.kinds("layer_types", "linear_attention", "hybrid") or ()
    inner = model.need("mamba_expand") * model.need("hidden_size")
    heads = model.need("n_mamba_heads")
    for i in range(model.num_layers):
        yield model.mamba2(f"model.layers.{i}.mamba", inner, heads, inner // heads)
        if kinds[i] == "hybrid":
            yield attention_spec(
                model.vllm_config,
                f"model.layers.{i}.self_attn.attn",
                num_kv_heads=kv_heads_of_rank(model.need("num_key_value_heads"), model.tp_size),
                head_size=2 * model.need("hidden_size") // model.num_heads,
            )


def _falcon_h1(model: _Declaring) -> Specs:
    """Attention and state side by side in every layer."""
    expanded = model.get("mamba_expand", default=2) * model.need("hidden_size")
    inner = model.get("mamba_d_ssm", default=expanded)
    for i in range(model.num_layers):
        yield model.attention(f"model.layers.{i}.self_attn.attn")
        heads, width = model.need("mamba_n_heads"), model.need("mamba_d_head")
        yield model.mamba2(f"model.layers.{i}.mamba", inner, heads, width)


def _qwen3_next(model: _Declaring) -> Specs:
    interval = model.get("full_attention_interval", default=4)
    check_counts("config.json: ", full_attention_interval=interval)
    kinds = model.kinds("layer_types", "full_attention", "linear_attention") or [
        "linear_attention" if (i + 1) % interval else "full_attention"
        for i in range(model.num_layers)
    ]
    for i, kind in enumerate(kinds):
        if kind == "full_attention":
            yield model.attention(f"model.layers.{i}.self_attn.attn")
            continue
        shapes = MambaStateShapeCalculator.gdn_attention(
            tp_size=model.tp_size,
            num_k_heads=model.need("linear_num_key_heads"),
            num_v_heads=model.need("linear_num_value_heads"),
            head_k_dim=model.need("linear_key_head_dim"),
            head_v_dim=model.need("linear_value_head_dim"),
            conv_kernel=model.need("linear_conv_kernel_dim"),
        )
        yield model.state(f"model.layers.{i}.linear_attn", shapes)


def _kimi_linear(model: _Declaring) -> Specs:
    for i, kind in enumerate(model.need("layer_types")[: model.num_layers]):
        if kind == "full_attention":
            yield latent_spec(
                model.vllm_config,
                f"model.layers.{i}.self_attn.attn",
                kv_lora_rank=model.need("kv_lora_rank"),
                qk_rope_head_dim=model.need("qk_rope_head_dim"),
            )
            continue
        heads, width = model.need("linear_num_heads"), model.need("linear_head_dim")
        shapes = MambaStateShapeCalculator.kda(
            tp_size=model.tp_size,
            num_heads=heads,
            head_dim=width,
            num_k_heads=heads,
            head_k_dim=width,
            conv_kernel=model.need("linear_conv_kernel_dim"),
        )
        yield model.state(f"model.layers.{i}.self_attn", shapes)


def _lfm2(model: _Declaring) -> Specs:
    attending = model.get("full_attn_idxs", default=())
    kinds = model.kinds("layer_types", "full_attention", "conv") or [
        "full_attention" if i in attending else "conv" for i in range(model.num_layers)
    ]
    for i, kind in enumerate(kinds):
        if kind == "full_attention":
            yield model.attention(f"model.layers.{i}.self_attn.attn")
            continue
        shapes = MambaStateShapeCalculator.short_conv(
            tp_size=model.tp_size,
            intermediate_size=model.get("conv_dim", "hidden_size"),
            conv_kernel=model.need("conv_L_cache"),
        )
        yield model.state(f"model.layers.{i}.short_conv", shapes)


def _minimax(model: _Declaring) -> Specs:
    """Linear attention but for the layers that ``attn_type_list`` (or ``layer_types``) names."""
    kinds = model.kinds("attn_type_list", 0, 1)
    if kinds is None:
        model.need("layer_types")
        named = model.kinds("layer_types", "full_attention", "linear_attention") or ()
        kinds = [int(kind == "full_attention") for kind in named]
    for i, kind in enumerate(kinds):
        if kind == 1:
            yield model.attention(f"model.layers.{i}.self_attn.attn")
            continue
        shapes = MambaStateShapeCalculator.linear_attention(
            tp_size=model.tp_size, num_heads=model.num_heads, head_dim=model.head_dim
        )
        yield model.state(f"model.layers.{i}.self_attn", shapes)


def _encoder_decoder(model: _Declaring) -> Specs:
    """Each decoder layer attends to itself, and to the encoder's output."""
    width = model.get("d_kv", default=model.need("d_model") // model.num_heads)
    heads = kv_heads_of_rank(model.num_heads, model.tp_size)
    layers = model.get("decoder_layers", "num_decoder_layers", default=model.num_layers)
    for i in range(layers):
        prefix = f"model.decoder.layers.{i}"
        yield attention_spec(
            model.vllm_config, f"{prefix}.self_attn.attn", num_kv_heads=heads, head_size=width
        )
        yield cross_attention_spec(
            model.vllm_config, f"{prefix}.encoder_attn.attn", num_kv_heads=heads, head_size=width
        )


_DECLARATIONS: dict[str, Callable[[_Declaring], Specs]] = {
    "BambaForCausalLM": _mamba2_or_attention,
    "BartForConditionalGeneration": _encoder_decoder,
    "DeepseekV2ForCausalLM": _latent_decoder,
    "DeepseekV3ForCausalLM": _latent_decoder,
    "DeepseekV4ForCausalLM": _deepseek_v4,
    "FalconH1ForCausalLM": _falcon_h1,
    "FalconMambaForCausalLM": _mamba1,
    "Gemma2ForCausalLM": _decoder,
    "Gemma3ForCausalLM": _decoder,
    "Gemma3ForConditionalGeneration": _decoder,
    "GptOssForCausalLM": _decoder,
    "GraniteMoeHybridForCausalLM": _mamba2_or_attention,
    "JambaForCausalLM": _jamba,
    "KimiLinearForCausalLM": _kimi_linear,
    "Lfm2ForCausalLM": _lfm2,
    "Lfm2MoeForCausalLM": _lfm2,
    "Llama4ForCausalLM": _decoder,
    "Llama4ForConditionalGeneration": _decoder,
    "LlamaForCausalLM": _decoder,
    "Mamba2ForCausalLM": _mamba2,
    "MambaForCausalLM": _mamba1,
    "MiniMaxForCausalLM": _minimax,
    "MiniMaxText01ForCausalLM": _minimax,
    "MistralForCausalLM": _decoder,
    "MixtralForCausalLM": _decoder,
    "NemotronHForCausalLM": _nemotron_h,
    "Qwen2ForCausalLM": _decoder,
    "Qwen2MoeForCausalLM": _decoder,
    "Qwen3ForCausalLM": _decoder,
    "Qwen3MoeForCausalLM": _decoder,
    "Qwen3NextForCausalLM": _qwen3_next,
    "T5ForConditionalGeneration": _encoder_decoder,
    "Zamba2ForCausalLM": _zamba2,
}


def declared_architectures() -> list[str]:
    """Names that ``declare_kv_caches`` knows."""
    return sorted(_DECLARATIONS)


def declare_kv_caches(vllm_config: VllmConfig) -> dict[str, KVCacheSpec]:
    """Layer name -> what the layer keeps on one rank, in the order of the layers.

    Raises:
        ConfigError: the architecture is unknown, its configuration lacks a field, or
            --tensor-parallel-size does not fit it.
    """
    architecture = vllm_config.model_config.architecture
    if architecture not in _DECLARATIONS:
        near = difflib.get_close_matches(architecture, _DECLARATIONS, n=3, cutoff=0.5)
        raise ConfigError(
            f"what {architecture} keeps per block is not known here; known: "
            f"{', '.join(near or declared_architectures())}",
            parameter="model",
            value=architecture,
        )
    specs = _DECLARATIONS[architecture](_Declaring(vllm_config))
    return {spec.layer_name: spec for spec in specs}
