"""Autoregressive models trained on to block diffusion, with their modules and names: Qwen3, Qwen2, Llama.

What is recorded of such a model in its configuration is enough to load it again, whichever family it came as. Its
model_type is one of ours: dllm registers "a2d-qwen3" and its like with transformers itself.
"""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from simsd.models.block_causal import BlockCausalForward
from simsd.models.configuration import BlockDiffusionConfig
from simsd.models.families.registration import register
from simsd.models.generation import CustomGeneration


class A2DQwen3Config(BlockDiffusionConfig, Qwen3Config):
    model_type = "simsd_qwen3"

    block_length: int | None = None
    mask_token_id: int | None = None
    shift: bool = False


class A2DQwen2Config(BlockDiffusionConfig, Qwen2Config):
    model_type = "simsd_qwen2"

    block_length: int | None = None
    mask_token_id: int | None = None
    shift: bool = False


class A2DLlamaConfig(BlockDiffusionConfig, LlamaConfig):
    model_type = "simsd_llama"

    block_length: int | None = None
    mask_token_id: int | None = None
    shift: bool = False


class A2DQwen3ForCausalLM(CustomGeneration, BlockCausalForward, Qwen3ForCausalLM):
    config_class = A2DQwen3Config


class A2DQwen2ForCausalLM(CustomGeneration, BlockCausalForward, Qwen2ForCausalLM):
    config_class = A2DQwen2Config


class A2DLlamaForCausalLM(CustomGeneration, BlockCausalForward, LlamaForCausalLM):
    config_class = A2DLlamaConfig


register(A2DQwen3ForCausalLM)
register(A2DQwen2ForCausalLM)
register(A2DLlamaForCausalLM)
