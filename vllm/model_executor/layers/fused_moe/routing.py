"""Which experts compute a token, and with what weight. Knows no expert.

Scores of each expert or of all, plain or limited to groups of experts (DeepSeek V2
arXiv:2405.04434, V3 arXiv:2412.19437). T tokens, E experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm.errors import ConfigError

__all__ = ["Routing", "select_experts"]

_SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
_TINY = 1e-20
"""Keeps the sum of sigmoid scores that all vanish from dividing by zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a router's logits become experts and weights.

    Raises:
        ConfigError: more experts a token than there are, or groups that don't divide them.
    """

    num_experts: int
    top_k: int
    renormalize: bool = True
    """The weights of a token sum to one."""
    scoring_func: str = "softmax"
    """"softmax" over all experts; "sigmoid" or "sqrtsoftplus", the root of softplus, of each."""
    num_expert_group: int = 1
    topk_group: int = 1
    """Of ``num_expert_group`` groups of neighbouring experts, so many may be chosen from."""
    routed_scaling_factor: float = 1.0
    """Factor of the weights, after all else."""

    def __post_init__(self) -> None:
        if self.scoring_func not in _SCORES:
            raise ConfigError(
                f"config.json: experts are scored by {', '.join(_SCORES)}, not "
                f"{self.scoring_func!r}"
            )
        if not isinstance(self.top_k, int) or not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"config.json: num_experts_per_tok {self.top_k} must be between 1 and the number "
                f"of experts, {self.num_experts}"
            )
        groups = self.num_expert_group
        if groups < 1 or self.num_experts % groups or not 1 <= self.topk_group <= groups:
            raise ConfigError(
                f"config.json: {self.num_experts} experts in {groups} groups, of which "
                f"{self.topk_group} are used: the groups must divide the experts"
            )
        if self.num_experts // groups * self.topk_group < self.top_k:
            raise ConfigError(
                f"config.json: {self.topk_group} of {groups} groups of experts hold fewer than "
                f"num_experts_per_tok {self.top_k}"
            )


_SCORE_OF: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


def select_experts(
    router_logits: torch.Tensor,
    routing: Routing,
    correction_bias: torch.Tensor | None = None,
    chosen_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token, best first.

    Args:
        router_logits: (T, E), any float dtype; scores are computed in float32.
        correction_bias: (E,) added to the scores for the choice, not for the weights. With it, a
            group is as good as its two best experts together; without, as its best one.
        chosen_ids: (T, k) experts that were chosen already; scores only weigh them.

    Returns:
        Weights (T, k) float32 and expert ids (T, k) int64.
    """
    scores = _SCORE_OF[routing.scoring_func](router_logits.float())
    choice = scores if correction_bias is None else scores + correction_bias.float()
    if routing.topk_group < routing.num_expert_group:
        choice = _within_best_groups(choice, routing, correction_bias is not None)
    ids = choice.topk(routing.top_k, dim=-1).indices if chosen_ids is None else chosen_ids
    weights = scores.gather(-1, ids)
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    if routing.routed_scaling_factor != 1.0:
        weights = weights * routing.routed_scaling_factor
    return weights, ids


def _within_best_groups(choice: torch.Tensor, routing: Routing, sum_of_two: bool) -> torch.Tensor:
    """``choice`` (T, E) with minus infinity outside each token's best groups."""
    groups = choice.unflatten(-1, (routing.num_expert_group, -1))
    if sum_of_two:
        rank = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
    else:
        rank = groups.amax(-1)
    best = rank.topk(routing.topk_group, dim=-1).indices
    allowed = torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, best, True)
    return groups.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
