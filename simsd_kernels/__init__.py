"""Attention, sampling and verification ops for block-diffusion language models: `torch.ops.simsd.*`.

Importing the package defines every op; no device is queried and no kernel is compiled at import.
"""

from simsd_kernels.block_verify.api import block_verify
from simsd_kernels.block_verify.graph_api import Walk, block_verify_graph
from simsd_kernels.masked_attention.api import masked_attention
from simsd_kernels.plan_block.api import Plan, plan_block
from simsd_kernels.qk_norm_rope_store.api import qk_norm_rope_store
from simsd_kernels.reveal.api import reveal
from simsd_kernels.sample_logits.api import sample_logits
from simsd_kernels.store_kv.api import store_kv
from simsd_kernels.thin_linear.api import thin_linear
from simsd_kernels.visibility import INF, Visibility

__version__ = "0.1.0"

__all__ = [
    "INF",
    "Plan",
    "Visibility",
    "Walk",
    "block_verify",
    "block_verify_graph",
    "masked_attention",
    "plan_block",
    "qk_norm_rope_store",
    "reveal",
    "sample_logits",
    "store_kv",
    "thin_linear",
]
