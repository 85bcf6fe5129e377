"""LLaDA2.0 (mini, flash): the modules of GLM-4 MoE, which have another layout of the same weights.

Queries, keys and values are one matrix in its checkpoints, and its names are others. `save_pretrained` writes
transformers' names, under a model_type of their own.
"""

from __future__ import annotations

import re

from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from simsd.errors import SimsdError
from simsd.models.block_causal import BlockCausalForward
from simsd.models.configuration import BlockDiffusionConfig
from simsd.models.families.registration import register
from simsd.models.generation import CustomGeneration

# Published field -> GLM-4 MoE's, where they differ.
_FIELDS = {
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "use_qkv_bias": "attention_bias",
}
_NAMES = (
    (re.compile(r"\bword_embeddings\b"), "embed_tokens"),
    (re.compile(r"\battention\.dense\b"), "self_attn.o_proj"),
    (re.compile(r"\battention\.query_layernorm\b"), "self_attn.q_norm"),
    (re.compile(r"\battention\.key_layernorm\b"), "self_attn.k_norm"),
    (re.compile(r"\bgate\.expert_bias\b"), "gate.e_score_correction_bias"),
)
_QKV = re.compile(r"(.*)\.attention\.query_key_value\.(weight|bias)")


class LLaDA2Config(BlockDiffusionConfig, Glm4MoeConfig):
    model_type = "simsd_llada2"

    block_length: int | None = None
    mask_token_id: int | None = None
    shift: bool = False


class LLaDA2ForCausalLM(CustomGeneration, BlockCausalForward, Glm4MoeForCausalLM):
    config_class = LLaDA2Config


register(LLaDA2ForCausalLM)


def read_config(fields: dict) -> dict:
    """From published fields to GLM-4 MoE's; those in its words stay.

    Raises:
        SimsdError: the layers that a field asks for have no counterpart there.
    """
    if fields.get("num_experts", 1) is None or fields.get("num_shared_experts", 1) in (None, 0):
        raise SimsdError("LLaDA2 needs num_experts and num_shared_experts of at least 1")
    for name, expected in (("use_bias", False), ("norm_head", False), ("score_function", "sigmoid")):
        if fields.get(name) not in (None, expected):
            raise SimsdError(f"{name} must be {expected!r}, got {fields[name]!r}")
    if fields.get("use_sliding_window"):
        raise SimsdError("every layer must have full attention, got use_sliding_window=True")
    read = {_FIELDS.get(name, name): value for name, value in fields.items() if name not in _UNUSED}
    published = "num_experts" in fields
    if published:
        # Its own defaults, where GLM-4 MoE has others.
        read = {"use_qk_norm": True, "first_k_dense_replace": 0, "partial_rotary_factor": 0.5} | read
        # One expert's weight is its score, several are made to add up to 1.
        read["norm_topk_prob"] = fields.get("num_experts_per_tok", 2) > 1
        read["num_nextn_predict_layers"] = 0
    return read


# Of training, of windows that are off, and what `read_config` has looked at.
_UNUSED = {"use_bias", "norm_head", "score_function", "use_sliding_window", "sliding_window", "max_window_layers"}
_UNUSED |= {"embedding_dropout", "output_dropout", "router_dtype", "moe_router_enable_expert_bias"}


def read_tensor(name: str, config: LLaDA2Config) -> list[tuple[str, int]]:
    """Our tensors in a published one, from its first row on, with their rows (0: all)."""
    if found := _QKV.fullmatch(name):
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        parts = zip("qkv", heads, strict=True)
        return [(f"{found[1]}.self_attn.{part}_proj.{found[2]}", count * config.head_dim) for part, count in parts]
    for pattern, ours in _NAMES:
        name = pattern.sub(ours, name)
    return [(name, 0)]
