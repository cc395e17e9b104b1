"""Mixture-of-experts layers: who computes a token (routing), and with which weights (layer)."""

from vllm.model_executor.layers.fused_moe.layer import FusedMoE
from vllm.model_executor.layers.fused_moe.routing import Routing, select_experts

__all__ = ["FusedMoE", "Routing", "select_experts"]
