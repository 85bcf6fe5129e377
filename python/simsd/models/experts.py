"""The MLP of a mixture-of-experts layer, in calls whose number and shapes do not depend on what the router chose.

Tokens are sorted by expert on the device; then every product serves all experts at once. No row notices another, on any
device and in any dtype: products go by `thin_linear` and `grouped_linear`, what else there is computes row by row. On
the CPU nothing of an expert that no token was sent to is read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE, Glm4MoeTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, Qwen3MoeTopKRouter

from simsd.models.attention import unchecked
from simsd.models.quantized import operands, stored
from simsd_kernels import combine_experts, grouped_linear, silu_mul, sort_by_expert, thin_linear


def mixture_of_experts(block: Qwen3MoeSparseMoeBlock | Glm4MoeMoE, x: Tensor) -> Tensor:
    """What the block's routed experts make of x [M, H], to rounding, in the dtype of the block's weights, which may be
    quantized with row scales, and with the activation silu; no gradients.

    A row's experts and their weights are those that the block's router finds where its logits are the same (of Qwen3's
    bit for bit); they come from `thin_linear` here. The experts' outputs are rounded and added up as transformers does
    in its grouped product ("grouped_mm"): in the router's order, in float32.
    """

    def op(function):
        return unchecked(function, x.device, x.dtype)

    weights, chosen = (route_in_groups if hasattr(block.gate, "topk_group") else route)(block.gate, x)
    experts = block.experts
    offsets, rows, places = op(sort_by_expert)(chosen, experts.num_experts)
    gate_up, *gate_up_scales = operands(*stored(experts.gate_up_proj))
    down, *down_scales = operands(*stored(experts.down_proj))
    hidden = op(grouped_linear)(x.index_select(0, rows), gate_up, offsets, *gate_up_scales)  # [M * C, 2 * I]
    out = op(grouped_linear)(op(silu_mul)(hidden), down, offsets, *down_scales)  # [M * C, H]
    return op(combine_experts)(out, weights, places)


def route(router: Qwen3MoeTopKRouter, x: Tensor) -> tuple[Tensor, Tensor]:
    """The experts of each row of x [M, H], the likeliest first: (weights [M, C] in the dtype of x, int64 [M, C]).

    Everything behind the logits is what the router does; torch's softmax, top-k and sum go row by row. Between equal
    experts torch's top-k decides.
    """
    logits = unchecked(thin_linear, x.device, x.dtype)(x, router.weight)  # [M, E]
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, chosen = probs.topk(router.top_k, dim=-1)
    if not router.norm_topk_prob:
        return weights.to(x.dtype), chosen
    rounded = torch.empty_like(weights, dtype=x.dtype)  # divides and rounds in one launch
    return torch.div(weights, weights.sum(dim=-1, keepdim=True), out=rounded), chosen


def route_in_groups(router: Glm4MoeTopkRouter, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a router that scores by sigmoid and chooses among the best groups of experts. It computes in float32;
    its sigmoid is made of torch's exp, whose bits do not depend on the other elements."""
    logits = unchecked(thin_linear, x.device, torch.float32)(x.float(), router.weight.float())  # [M, E]
    scores = 1 / (1 + torch.exp(-logits))
    ranked = (scores + router.e_score_correction_bias).view(len(x), router.num_group, -1)  # [M, G, E / G]
    best = ranked.topk(2, dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
    outside = torch.ones(ranked.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, best, False)
    chosen = ranked.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1).topk(router.top_k, dim=-1).indices
    weights = scores.gather(1, chosen)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * router.routed_scaling_factor).to(x.dtype), chosen
