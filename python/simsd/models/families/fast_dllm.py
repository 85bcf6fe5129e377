"""Fast-dLLM v2 (1.5B, 7B): Qwen2's modules and names, decoded by sub-blocks.

A block's first token is told by the last row of the block before it, and its loop takes it before any other is drawn.
Its configuration does not name the sub-blocks: 8 is what its `generate` takes by default.
"""

from __future__ import annotations

from transformers import Qwen2Config, Qwen2ForCausalLM

from simsd.models.block_causal import BlockCausalForward
from simsd.models.configuration import BlockDiffusionConfig
from simsd.models.families.registration import register
from simsd.models.generation import CustomGeneration


class FastDLLMConfig(BlockDiffusionConfig, Qwen2Config):
    model_type = "simsd_fast_dllm"

    block_length: int | None = None
    mask_token_id: int | None = None
    shift: bool | None = None  # the family's: a copy that was loaded without says False
    sub_block_length: int | None = 8
    first_token_alone: bool = True


class FastDLLMForCausalLM(CustomGeneration, BlockCausalForward, Qwen2ForCausalLM):
    config_class = FastDLLMConfig


register(FastDLLMForCausalLM)
