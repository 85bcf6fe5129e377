"""SDAR and TraDo (dense and mixture-of-experts): Qwen3's modules."""

from __future__ import annotations

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from simsd.models.block_causal import BlockCausalForward
from simsd.models.configuration import BlockDiffusionConfig
from simsd.models.families.registration import register
from simsd.models.generation import CustomGeneration


class SDARConfig(BlockDiffusionConfig, Qwen3Config):
    model_type = "sdar"
    attribute_map = Qwen3Config.attribute_map | {"block_size": "block_length"}

    block_length: int | None = None
    mask_token_id: int | None = None
    shift: bool = False


class SDARMoeConfig(BlockDiffusionConfig, Qwen3MoeConfig):
    model_type = "sdar_moe"
    attribute_map = Qwen3MoeConfig.attribute_map | {"block_size": "block_length"}

    block_length: int | None = None
    mask_token_id: int | None = None
    shift: bool = False


class SDARForCausalLM(CustomGeneration, BlockCausalForward, Qwen3ForCausalLM):
    config_class = SDARConfig


class SDARMoeForCausalLM(CustomGeneration, BlockCausalForward, Qwen3MoeForCausalLM):
    config_class = SDARMoeConfig


register(SDARForCausalLM)
register(SDARMoeForCausalLM)
