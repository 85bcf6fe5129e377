"""Small random checkpoints that do not say that they decode by blocks, as a trainer saves fine-tunes: transformers' own
classes and fields, and a tokenizer."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import byte_pair

PLAIN = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"vocab_size": 264}),  # transformers adds its <|endoftext|>
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}


def write_plain(folder, name, seed=0):
    config, model, fields = PLAIN[name]
    torch.manual_seed(seed)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    settings = {**sizes, **heads, "eos_token_id": 257, "initializer_range": 0.3, **fields}
    model(config(**settings)).save_pretrained(folder)
    byte_pair.byte_tokenizer().save_pretrained(folder)
    return folder
