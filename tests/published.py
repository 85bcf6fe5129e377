"""Checkpoint folders as SDAR publishes them: every key of their JSON files, with sizes, and ids with them, shrunk.

What 4B-Chat and 8B-Chat hold is public in SDAR's repository (training/model/, "older": the config.json before
block_size and mask_token_id were added). 1.7B-Chat and 30B-A3B-Chat are the same keys over their base models', and
the b8 to b64 variants another block_size: inferred.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

# 256 bytes and one merge stand for Qwen's 151643 pieces, so id 151643 is 257 here and the mask token's, 151669, is 283.
VOCABULARY, PIECES, ENDOFTEXT, IM_END, MASK_ID = 320, 257, 257, 259, 283
SIZES = {
    "bos_token_id": ENDOFTEXT,
    "eos_token_id": ENDOFTEXT,
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "mask_token_id": MASK_ID,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
DENSE = {
    "architectures": ["SDARForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "bos_token_id": 151643,
    "debug": False,
    "eos_token_id": 151643,
    "block_size": 4,
    "mask_token_id": 151669,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "micro_forward": False,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_deepep": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OLDER = {name: value for name, value in DENSE.items() if name not in ("block_size", "mask_token_id")}
MOE = DENSE | {
    "architectures": ["SDARMoeForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
        "AutoModel": "modeling_sdar_moe.SDARMoeModel",
        "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
    },
    "decoder_sparse_step": 1,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
CONFIGS = {
    "SDAR-1.7B-Chat": DENSE | {"max_window_layers": 28},
    "SDAR-1.7B-Chat tied": DENSE | {"max_window_layers": 28, "tie_word_embeddings": True},
    "SDAR-4B-Chat": DENSE,
    "SDAR-8B-Chat": DENSE,
    "SDAR-8B-Chat older": OLDER,
    "SDAR-8B-Chat-b8": DENSE | {"block_size": 8},
    "SDAR-8B-Chat-b16": DENSE | {"block_size": 16},
    "SDAR-8B-Chat-b32": OLDER,  # by its name
    "SDAR-8B-Chat-b64": DENSE | {"block_size": 64},
    "SDAR-30B-A3B-Chat": MOE,
    "SDAR-30B-A3B-Chat-b32": MOE | {"block_size": 32},
}
BLOCK_LENGTHS = {name: int(name.split("-b")[1]) if "-b" in name else 4 for name in CONFIGS}
GENERATION = {
    "bos_token_id": ENDOFTEXT,
    "do_sample": True,
    "eos_token_id": [IM_END, ENDOFTEXT],
    "pad_token_id": ENDOFTEXT,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}
_SPECIAL = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end".split()
_SPECIAL += "vision_start vision_end vision_pad image_pad video_pad".split()
_PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
_PLAIN += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|MASK|>"]
ADDED = [(f"<|{word}|>", True) for word in _SPECIAL] + [(token, False) for token in _PLAIN]
_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
# The published template without tools and thinking, which a plain chat does not reach.
TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role != "system") or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
TOKENIZER = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "added_tokens_decoder": {
        str(PIECES + i): {"content": token, **_FLAGS, "special": special} for i, (token, special) in enumerate(ADDED)
    },
    "additional_special_tokens": [token for token, special in ADDED[1:] if special] + ["<|MASK|>"],
    "auto_map": {"AutoTokenizer": ["tokenization_qwen2.Qwen2Tokenizer", None]},
    "bos_token": None,
    "chat_template": TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|endoftext|>",
    "mask_token": "<|MASK|>",
    "errors": "replace",
    "model_max_length": 131072,
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def config(name: str) -> dict:
    """The config.json of a published checkpoint at small sizes."""
    published = copy.deepcopy(CONFIGS[name])
    return published | {key: size for key, size in SIZES.items() if key in published}


def minimal(name: str) -> dict:
    """What of `config(name)` a model cannot be built without, in today's words."""
    published = config(name)
    kept = {"model_type", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "norm_topk_prob", *SIZES}
    fields = {key: value for key, value in published.items() if key in kept}
    return fields | {"block_length": BLOCK_LENGTHS[name], "mask_token_id": MASK_ID}


def write(folder: Path, fields: dict, seed: int = 0):
    """Weights of `fields`' sizes, decided by sizes and seed, in bfloat16 and several files; `fields` as config.json.

    Returns the stock model with these weights in float32.
    """
    is_moe = fields["model_type"] == "sdar_moe"
    sizes = {key: value for key, value in fields.items() if key in (*SIZES, "tie_word_embeddings", "rope_theta")}
    torch.manual_seed(seed)
    sizes |= {"initializer_range": 0.3, "norm_topk_prob": True, "attn_implementation": "eager"}
    source = (Qwen3MoeConfig if is_moe else Qwen3Config)(**sizes)
    model = (Qwen3MoeForCausalLM if is_moe else Qwen3ForCausalLM)(source).eval()
    for parameter in model.parameters():  # not the RoPE frequencies, which are no weights
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder, max_shard_size="20KB")
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    return model


def write_all(folder: Path, name: str) -> Path:
    """A whole published folder: sharded weights, config, generation config and tokenizer files."""
    write(folder, config(name))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=4))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, vocab.json, merges.txt, tokenizer_config.json, added_tokens.json and special_tokens_map.json.

    The last two are published with "<MASK>" for the mask token, which the first ones call "<|MASK|>".
    """
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"th": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in ADDED])
    tokenizer.save(str(folder / "tokenizer.json"))
    older = [token.replace("<|MASK|>", "<MASK>") for token, _ in ADDED]
    special = [token.replace("<|MASK|>", "<MASK>") for token in TOKENIZER["additional_special_tokens"]]
    end = {"content": "<|endoftext|>", **_FLAGS}
    files = {
        "vocab.json": vocabulary,
        "tokenizer_config.json": TOKENIZER,
        "added_tokens.json": {token: PIECES + i for i, token in enumerate(older)},
        "special_tokens_map.json": {"additional_special_tokens": special, "eos_token": end, "pad_token": end},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
