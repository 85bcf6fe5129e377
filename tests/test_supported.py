"""Configurations that cannot be honoured are refused at load, from a folder and in memory; the others decode right."""

from __future__ import annotations

import pytest
import torch

import simsd
from simsd import SimsdError
from simsd.models.families.sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM
from small_checkpoints import BASE, MASK_ID, MOE, edit_json, write_checkpoint
from stand_ins import random_sdar

LONG = {"factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": LONG | {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "llama3": LONG | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
BY_LENGTH = {
    "longrope": LONG | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}


def rope(**parameters) -> dict:
    return {"rope_parameters": {"rope_theta": 1e6} | parameters}


DENSE = {
    "longrope": ({"rope_parameters": BY_LENGTH["longrope"]}, "rope type 'longrope' is not supported, since"),
    "dynamic": ({"rope_parameters": BY_LENGTH["dynamic"]}, "rope type 'dynamic' is not supported, since"),
    "rope_unknown": (rope(rope_type="foo"), "rope type 'foo' is not supported: default, linear, yarn, llama3 are"),
    "rope_mrope": (rope(rope_type="mrope", mrope_section=[2, 3, 3]), "rope type 'mrope' is not supported"),
    "rope_by_layer": (
        {"rope_parameters": {"full_attention": ROPES["default"]}},
        "rope type None is not supported",
    ),
    "rope_text": (rope(rope_type="linear", factor="2"), "factor of the rope parameters must be .* number, got '2'"),
    "rope_no_factor": (rope(rope_type="linear"), "'factor'"),
    "rope_factor_0": (rope(rope_type="linear", factor=0), "not finite .*rotary_emb.inv_freq"),
    "rope_theta_0": (rope(rope_type="default", rope_theta=0), "not finite .*rotary_emb.inv_freq"),
    "rope_partial": (rope(rope_type="linear", factor=2.0, partial_rotary_factor=0.5), "got partial_rotary_factor=0.5"),
    "window": (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
        "every layer must have full_attention, got 'sliding_attention' in 1 of them",
    ),
    "layer_types": (
        {"layer_types": ["linear_attention", "full_attention"]},
        "every layer must have full_attention, got 'linear_attention' in 1 of them",
    ),
    "layer_types_short": ({"layer_types": ["full_attention"]}, "layer_types names 1 layers of 2"),
    "key_value_heads": ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads evenly"),
    "no_heads": ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
    "head_dim": ({"head_dim": 15}, "head_dim must be even for RoPE, got 15"),
    "activation": ({"hidden_act": "foo"}, "hidden_act 'foo' is not one that transformers knows"),
    "padding": ({"pad_token_id": 96}, "cannot build its configuration .*Padding_idx must be within num_embeddings"),
    "epsilon": ({"rms_norm_eps": "1e-6"}, "config.* is not valid: .*'rms_norm_eps'.* got str"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantized .* quantization_config"),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, "quantized .* compression_config"),
}  # fmt: skip
MIXTURES = {
    "experts_per_token": ({"num_experts_per_tok": 7}, "num_experts_per_tok must be from 1 to num_experts 6, got 7"),
    "no_experts_per_token": ({"num_experts_per_tok": 0}, "num_experts_per_tok must be from 1 to num_experts 6, got 0"),
    "window": (
        {"use_sliding_window": True, "sliding_window": 8},
        "every layer must have full_attention, got 'sliding_attention' in 2 of them",
    ),
    "sparse_step": ({"decoder_sparse_step": 0}, "cannot build its configuration .*ZeroDivisionError"),
    "key_value_heads": ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads evenly"),
}
CASES = [(name, False) for name in DENSE] + [(name, True) for name in MIXTURES]


@pytest.mark.parametrize(("case", "moe"), CASES, ids=[f"{'moe' if moe else 'dense'}-{name}" for name, moe in CASES])
def test_a_configuration_that_cannot_be_honoured_is_refused_when_loading(tmp_path, case, moe):
    changes, message = (MIXTURES if moe else DENSE)[case]
    write_checkpoint(tmp_path, moe, extra={"mask_token_id": MASK_ID})
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(SimsdError, match=message) as error:
        simsd.load(tmp_path)
    assert "\n" not in str(error.value)


IN_MEMORY = {
    "longrope": (False, {"rope_parameters": BY_LENGTH["longrope"]}),
    "dynamic": (False, {"rope_parameters": BY_LENGTH["dynamic"]}),
    "window": (False, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "key_value_heads": (False, {"num_key_value_heads": 3}),
    "experts_per_token": (True, {"num_experts_per_tok": 7}),
}


@pytest.mark.parametrize("case", IN_MEMORY)
def test_the_same_is_refused_for_a_model_in_memory(case):
    moe, changes = IN_MEMORY[case]
    settings = {name: value for name, value in (BASE | (MOE if moe else {}) | changes).items() if name != "rope_theta"}
    config = (SDARMoeConfig if moe else SDARConfig)(**settings, mask_token_id=MASK_ID)
    model = (SDARMoeForCausalLM if moe else SDARForCausalLM)(config).eval()
    message = (MIXTURES if moe else DENSE)[case][1]
    with pytest.raises(SimsdError, match=f"^SDAR.*{message}"):
        simsd.load(model)
    with pytest.raises(SimsdError, match=message):
        model.generate(torch.tensor([[5, 6]]), custom_generate=simsd.hf_generate, max_new_tokens=4)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("settings", [{"verify": "none"}, {"drafter": "self"}, {"verify": "temporal"}], ids=str)
def test_a_text_does_not_depend_on_a_longer_one_beside_it(kind, settings):
    model = random_sdar(2, rope_parameters=ROPES[kind], max_position_embeddings=128)
    draft = random_sdar(2, rope_parameters=ROPES[kind], max_position_embeddings=128)
    config = simsd.GenerationConfig(max_new_tokens=24, end_token_ids=(), **settings)
    short, long = [5, 6, 7], [1 + i % 50 for i in range(70)]  # on both sides of original_max_position_embeddings
    alone = [simsd.generate(model, [prompt], draft, config)[0].tokens for prompt in (short, long)]
    assert [result.tokens for result in simsd.generate(model, [short, long], draft, config)] == alone


def test_rope_scaling_of_older_configurations_is_read_as_rope_parameters_are(tmp_path):
    """And means something: without it the text is another."""
    texts = []
    old = {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}}
    for i, changes in enumerate((old, rope(rope_type="linear", factor=4.0), {})):
        write_checkpoint(tmp_path / str(i), extra={"mask_token_id": MASK_ID} | changes)
        config = simsd.GenerationConfig(max_new_tokens=16, end_token_ids=())
        texts.append(simsd.generate(simsd.load(tmp_path / str(i)), [[5, 6, 7]], config=config)[0].tokens)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dropout": 0.1},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None},
        {"sliding_window": 8, "use_sliding_window": False},
        {"quantization_config": None},
    ],
    ids=["dropout", "window_of_no_layer", "window_not_used", "not_quantized"],
)
def test_what_changes_nothing_is_not_refused(tmp_path, changes):
    config = simsd.GenerationConfig(max_new_tokens=16, end_token_ids=())
    write_checkpoint(tmp_path, extra={"mask_token_id": MASK_ID})
    plain = simsd.generate(simsd.load(tmp_path), [[5, 6, 7]], config=config)[0].tokens
    edit_json(tmp_path / "config.json", **changes)
    assert simsd.generate(simsd.load(tmp_path), [[5, 6, 7]], config=config)[0].tokens == plain
