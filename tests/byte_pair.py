"""Checkpoint folders of small random SDAR models with a byte-level tokenizer: every byte is a token of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from simsd.models.families.sdar import SDARConfig, SDARForCausalLM

MASK, END = "<|MASK|>", "<|end|>"
VOCABULARY = 258


def write_model(folder: Path, seed: int = 0, *, sharpness: float = 4.0, tokenizer: bool = True, **changes) -> Path:
    """A random two-layer model in `folder`; `changes` go to its configuration."""
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
        "block_length": 4,
        "eos_token_id": 257,
        "mask_token_id": 256,
        "initializer_range": 0.3,
    } | changes
    torch.manual_seed(seed)
    model = SDARForCausalLM(SDARConfig(**settings)).eval()
    with torch.no_grad():
        model.lm_head.weight *= sharpness
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Without a chat template: a prompt is its bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (MASK, END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, mask_token=MASK)
