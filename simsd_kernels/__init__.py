"""Attention, sampling and verification ops for block-diffusion language models: `torch.ops.simsd.*`.

Importing the package defines every op; no device is queried and no kernel is compiled at import.
"""

from simsd_kernels.add_rms_norm.api import add_rms_norm
from simsd_kernels.advance_slots.api import advance_slots
from simsd_kernels.attention_plan.api import attention_plan
from simsd_kernels.banned import banned_mask
from simsd_kernels.block_verify.api import block_verify
from simsd_kernels.combine_experts.api import combine_experts
from simsd_kernels.grouped_linear.api import grouped_linear
from simsd_kernels.masked_attention.api import masked_attention
from simsd_kernels.masked_attention_backward.api import AttentionGradients, masked_attention_backward
from simsd_kernels.plan_block.api import Plan, plan_block
from simsd_kernels.propose_block.api import propose_block
from simsd_kernels.qk_norm_rope_store.api import qk_norm_rope_store
from simsd_kernels.reveal.api import reveal
from simsd_kernels.sample_logits.api import sample_logits
from simsd_kernels.silu_mul.api import silu_mul
from simsd_kernels.sort_by_expert.api import SortedByExpert, sort_by_expert
from simsd_kernels.store_kv.api import store_kv
from simsd_kernels.thin_linear.api import thin_linear
from simsd_kernels.verify_graph.api import Walk, verify_graph
from simsd_kernels.visibility import INF, Visibility

__version__ = "0.1.0"

__all__ = [
    "INF",
    "AttentionGradients",
    "Plan",
    "SortedByExpert",
    "Visibility",
    "Walk",
    "add_rms_norm",
    "advance_slots",
    "attention_plan",
    "banned_mask",
    "block_verify",
    "combine_experts",
    "grouped_linear",
    "masked_attention",
    "masked_attention_backward",
    "plan_block",
    "propose_block",
    "qk_norm_rope_store",
    "reveal",
    "sample_logits",
    "silu_mul",
    "sort_by_expert",
    "store_kv",
    "thin_linear",
    "verify_graph",
]
