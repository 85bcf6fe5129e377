"""What a configuration may hold: everything else is refused before the weights are read, not in the first forward."""

from __future__ import annotations

import math

from transformers import Glm4MoeConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from simsd.errors import SimsdError
from simsd.models.configuration import head_size

# Their frequencies follow from the configuration alone. Those of the others in transformers, "dynamic" and "longrope",
# change with the highest position of a forward, so that a text would depend on those decoded beside it.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def check_config(source: str, config: PreTrainedConfig) -> None:
    """Raises SimsdError, one line that begins with `source`, for a configuration that our models cannot honour."""
    for name in ("quantization_config", "compression_config"):
        fields = getattr(config, name, None)
        method = fields.get("quant_method", "a method without a name") if isinstance(fields, dict) else fields
        if method and method != "torchao":
            raise SimsdError(
                f"{source}: weights quantized by {method} are not supported (its configuration has {name}): load the"
                " model that they were made of, with quantize="
            )
    for name in _SIZES:
        value = getattr(config, name, 1)
        if value is not None and value < 1:
            raise SimsdError(f"{source}: {name} must be at least 1, got {value}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise SimsdError(f"{source}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    if head_size(config) % 2:
        raise SimsdError(f"{source}: head_dim must be even for RoPE, got {head_size(config)}")
    if config.hidden_act not in ACT2FN:
        raise SimsdError(f"{source}: hidden_act {config.hidden_act!r} is not one that transformers knows")
    _check_sub_blocks(source, config)
    _check_windows(source, config)
    _check_rope(source, config.rope_parameters or {}, turns_parts=isinstance(config, Glm4MoeConfig))
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts and not 1 <= config.num_experts_per_tok <= experts:
        raise SimsdError(
            f"{source}: num_experts_per_tok must be from 1 to num_experts {experts}, got {config.num_experts_per_tok}"
        )
    if experts and hasattr(config, "n_group"):
        _check_groups(source, experts, config)


def _check_sub_blocks(source: str, config: PreTrainedConfig) -> None:
    length, alone = config.sub_block_length, config.first_token_alone
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise SimsdError(f"{source}: sub_block_length must be an integer of at least 1, got {length!r}")
    if not isinstance(alone, bool):
        raise SimsdError(f"{source}: first_token_alone must be true or false, got {alone!r}")


def _check_groups(source: str, experts: int, config: PreTrainedConfig) -> None:
    """Of a router that chooses among the experts of the best groups."""
    groups, best, chosen = config.n_group, config.topk_group, config.num_experts_per_tok
    if groups < 1 or experts % groups or experts < 2 * groups:
        raise SimsdError(f"{source}: {experts} experts cannot be in {groups} groups evenly, with two or more in each")
    if not 1 <= best <= groups:
        raise SimsdError(f"{source}: topk_group must be from 1 to n_group {groups}, got {best}")
    if chosen > (most := best * experts // groups):
        raise SimsdError(f"{source}: num_experts_per_tok {chosen} exceeds the {most} experts of topk_group {best}")


def _check_windows(source: str, config: PreTrainedConfig) -> None:
    types = getattr(config, "layer_types", None)
    if types is None:  # Qwen3-MoE: one window for all layers; Llama, GLM-4 MoE: none
        window = getattr(config, "sliding_window", None)
        types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    if len(types) != config.num_hidden_layers:
        raise SimsdError(f"{source}: layer_types names {len(types)} layers of {config.num_hidden_layers}")
    if other := [kind for kind in types if kind != "full_attention"]:
        raise SimsdError(f"{source}: every layer must have full_attention, got {other[0]!r} in {len(other)} of them")


def _check_rope(source: str, parameters: dict, turns_parts: bool) -> None:
    kind = parameters.get("rope_type")
    if kind in ("dynamic", "longrope"):
        raise SimsdError(
            f"{source}: rope type {kind!r} is not supported, since its frequencies change with the longest text of a"
            f" batch: {', '.join(ROPE_TYPES)} are"
        )
    if kind not in ROPE_TYPES:
        raise SimsdError(f"{source}: rope type {kind!r} is not supported: {', '.join(ROPE_TYPES)} are")
    for name, value in parameters.items():
        if name in ("rope_type", "type") or value is None:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise SimsdError(f"{source}: {name} of the rope parameters must be a finite number, got {value!r}")
    if not turns_parts and parameters.get("partial_rotary_factor") not in (None, 1):
        raise SimsdError(
            f"{source}: RoPE turns whole heads, got partial_rotary_factor={parameters['partial_rotary_factor']}"
        )
