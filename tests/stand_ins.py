"""Small random-weight models for tests that are about the loop and not about the text."""

from __future__ import annotations

import torch

import simsd
from simsd.models.families.sdar import SDARConfig, SDARForCausalLM

MASK = 61
END = 60
VOCABULARY = 64


def random_sdar(seed: int = 0, *, block_length: int | None = 4, sharpness: float = 4.0, **changes) -> simsd.LoadedModel:
    """A two-layer SDAR of random weights; `sharpness` scales its logits, so that confidences differ."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "block_length": block_length,
        "mask_token_id": MASK,
        "eos_token_id": END,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    } | changes
    torch.manual_seed(seed)
    model = SDARForCausalLM(SDARConfig(**settings)).eval()
    with torch.no_grad():
        model.lm_head.weight *= sharpness
    return simsd.load(model)


def disturbed(model: simsd.LoadedModel, amount: float = 0.02, seed: int = 3) -> simsd.LoadedModel:
    """The model with noise on its weights, in place: a draft that agrees with the original often, but not always."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter += amount * torch.randn_like(parameter)
    return model
