"""Each family against its published code: small random checkpoints in the published layout, whose logits and texts
tests/published_families holds. Each file there names the code that they come from and its commit.

That code ran in float32 under transformers 4.57.3 (LLaDA2's attention mask cast to float32, too, which it is otherwise
not). Known differences, which these texts avoid: the published loops may generate the mask token; dllm's hides a
generated padding token from later ones, and pads a prompt on the left to whole blocks, where ours decodes the rest of
its last block; Stable-DiffCoder's cuts the last block where the text ends, ours decodes it whole.
"""

from __future__ import annotations

import json
import types
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import simsd
from simsd import SimsdError
from simsd.models.fused import obstacle
from small_checkpoints import edit_json, write_tokenizer

FIXTURES = Path(__file__).parent / "published_families"
MASK = 46
MASKS = (MASK, 5)  # Stable-DiffCoder's is 5, whatever its vocabulary
DIFFCODER = "stable_diffcoder"
NAMES = ("a2d_qwen3", "a2d_qwen2", "a2d_llama", "fast_dllm_v2", DIFFCODER, "llada2")
each = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.usefixtures("one_thread")


def fixture(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def weight(name: str, shape: list[int]) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "norm" in name:
        return 1 + 0.1 * values
    if name == "lm_head.weight":
        values[list(MASKS)] = 0  # never the likeliest
        return values
    return (0.1 if name.endswith("bias") else 0.3) * values


def write(folder: Path, name: str) -> Path:
    """The checkpoint as its publishers would have saved it."""
    data = fixture(name)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data["config"]))
    tensors = {key: weight(key, shape) for key, shape in data["shapes"].items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, name: str, **changes) -> simsd.LoadedModel:
    """Stable-DiffCoder's block length and mask token are the family's; those of the others are too large for them."""
    given = {} if name == DIFFCODER else {"mask_token_id": MASK, "block_length": fixture(name)["block_length"]}
    return simsd.load(folder, **given | changes)


@each
def test_logits_are_those_of_the_published_code(name, tmp_path):
    data, loaded = fixture(name), load(write(tmp_path, name), name)
    with torch.no_grad():
        logits = loaded.model(torch.tensor(data["tokens"])).logits[0]
    expected = torch.tensor(data["logits"])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@each
@pytest.mark.parametrize("verify", ["none", "exact"])
def test_texts_are_those_of_the_published_loop(name, verify, tmp_path):
    write(tmp_path, name)
    texts, end = fixture(name)["texts"], 2 if name == DIFFCODER else 47
    assert len(texts) >= 4 and len({tuple(text["new"]) for text in texts}) >= 3
    for text in texts:
        loaded = load(tmp_path, name, shift=text.get("shift", False))
        most = 24 if text["new"][-1] == end else len(text["new"])
        config = simsd.GenerationConfig(max_new_tokens=most, end_token_ids=(end,), verify=verify, **text["settings"])
        [result] = simsd.generate(loaded, [text["prompt"]], config=config)
        assert result.tokens == text["new"], text


@each
def test_decoding_runs_fused_and_row_by_row(name, tmp_path):
    loaded = load(write(tmp_path, name), name)
    assert obstacle(loaded.model) is None and loaded.deterministic


@each
def test_a_loaded_model_can_be_saved_and_loaded_without_naming_anything(name, tmp_path):
    loaded = load(write(tmp_path / "in", name), name, shift=True)
    loaded.model.save_pretrained(tmp_path / "out")
    again = simsd.load(tmp_path / "out")
    assert (again.block_length, again.mask_token_id, again.shift) == (
        (4, 5, True) if name == DIFFCODER else (8, MASK, True)
    )
    tokens = torch.tensor(fixture(name)["tokens"])
    with torch.no_grad():
        assert torch.equal(again.model(tokens).logits, loaded.model(tokens).logits)


def test_the_familys_mask_token_goes_before_the_tokenizers_and_the_callers_before_both(tmp_path):
    for name, own in ((DIFFCODER, 5), ("a2d_qwen3", 0)):
        folder = write(tmp_path / name, name)
        write_tokenizer(folder)  # its <|MASK|> is 0
        assert simsd.load(folder).mask_token_id == own
        assert simsd.load(folder, mask_token_id=7).mask_token_id == 7
        edit_json(folder / "config.json", mask_token_id=9)
        assert simsd.load(folder).mask_token_id == 9


def test_a_text_goes_in_and_a_text_comes_out(tmp_path):
    folder = write(tmp_path, "llada2")
    write_tokenizer(folder)
    loaded = simsd.load(folder, mask_token_id=0, block_length=8)
    assert loaded.encode_prompt("a b") and loaded.end_token_ids == (1,)
    assert isinstance(simsd.generate(loaded, ["a b"], max_new_tokens=8)[0].text, str)


# Naming a family, and what is refused


def stock_folder(folder: Path, name: str, **fields) -> Path:
    """A fine-tune with a plain model_type, and nothing in its configuration of how it was trained."""
    write(folder, name)
    edit_json(folder / "config.json", architectures=["X"], auto_map=None, **fields)
    return folder


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_a_fine_tune_with_a_plain_model_type_loads_once_its_family_is_named(kind, tmp_path):
    folder = stock_folder(tmp_path, f"a2d_{kind}", model_type=kind)
    with pytest.raises(SimsdError, match=f"model_type '{kind}' is not supported without .* pass family='{kind}'"):
        simsd.load(folder)
    loaded = simsd.load(folder, family=kind, block_length=8, mask_token_id=MASK, shift=True)
    assert (loaded.block_length, loaded.mask_token_id, loaded.shift) == (8, MASK, True)
    expected = load(write(tmp_path / "named", f"a2d_{kind}"), f"a2d_{kind}")
    tokens = torch.tensor(fixture(f"a2d_{kind}")["tokens"])
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, expected.model(tokens).logits)


def test_a_qwen3_module_in_memory_may_name_another_family(tmp_path):
    loaded = load(write(tmp_path, "a2d_qwen3"), "a2d_qwen3")
    again = simsd.load(loaded.model, family="sdar", block_length=4)
    assert type(again.model).__name__ == "SDARForCausalLM" and again.block_length == 4
    assert again.model.lm_head.weight.data_ptr() == loaded.model.lm_head.weight.data_ptr()


def test_llada2s_own_module_in_memory_shares_its_weights(tmp_path):
    """Its names and its joint matrix of queries, keys and values, as its remote code has them."""
    data = fixture("llada2")
    source = torch.nn.Module()
    for key, shape in data["shapes"].items():
        *path, leaf = key.split(".")
        place = source
        for step in path:
            if step not in place._modules:
                place.add_module(step, torch.nn.Module())
            place = place._modules[step]
        if leaf == "expert_bias":
            place.register_buffer(leaf, weight(key, shape))
        else:
            place.register_parameter(leaf, torch.nn.Parameter(weight(key, shape)))
    source.config = types.SimpleNamespace(**data["config"])
    loaded = simsd.load(source, mask_token_id=MASK, block_length=8)
    with torch.no_grad():
        logits = loaded.model(torch.tensor(data["tokens"])).logits[0]
    assert (logits - torch.tensor(data["logits"])).abs().max() <= 1e-5 * logits.abs().max()
    assert loaded.model.lm_head.weight.data_ptr() == source.lm_head.weight.data_ptr()


REFUSED = {
    "Dream": ({"model_type": "Dream", "architectures": ["DreamModel"]}, "Dream is not supported: .* whole sequence"),
    "LLaDA": ({"model_type": "llada", "architectures": ["LLaDAModelLM"]}, "LLaDA is not supported: .* whole sequence"),
    "Qwen3-0.6B-diffusion-mdlm-v0.1": ({"model_type": "a2d-qwen3"}, "MDLM is not supported: .* whole sequence"),
    "LLaDA2.1-mini": ({"model_type": "llada2_moe"}, "LLaDA2.1 is not supported: its token editing"),
    "gemma": ({"model_type": "diffusion_gemma"}, "DiffusionGemma is not supported: its renoising"),
    "Efficient-DLM-8B": ({"model_type": "edlm", "architectures": ["EfficientDLM"]}, "Efficient-DLM is not supported:"),
    "mamba": ({"model_type": "mamba2"}, "model_type 'mamba2' is not supported: sdar, sdar_moe, a2d-qwen3, .* are"),
    "no type": ({"model_type": None}, "model_type None is not supported"),
    "a list": ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decoded_is_refused_by_name_with_the_reason(name, tmp_path):
    fields, message = REFUSED[name]
    folder = write(tmp_path / name, "llada2")
    edit_json(folder / "config.json", **fields)
    with pytest.raises(SimsdError, match=message) as error:
        simsd.load(folder)
    assert "\n" not in str(error.value)


def test_llada2_1_decodes_without_editing_where_its_family_is_named(tmp_path):
    folder = write(tmp_path / "LLaDA2.1-mini", "llada2")
    assert load(folder, "llada2", family="llada2").block_length == 8


@pytest.mark.parametrize(
    ("model_type", "kind", "settings"),
    [
        ("edlm", "qwen3", {"family": "qwen3", "block_length": 32, "mask_token_id": MASK}),
    ],
)
def test_what_a_refusal_advises_loads(model_type, kind, settings, tmp_path):
    folder = write(tmp_path, f"a2d_{kind}")
    edit_json(folder / "config.json", model_type=model_type, architectures=["X"], bd_size=32)
    loaded = simsd.load(folder, **settings)
    assert (loaded.block_length, loaded.shift) == (32, settings.get("shift", False))
    config = simsd.GenerationConfig(max_new_tokens=32, end_token_ids=())
    assert len(simsd.generate(loaded, [[5, 6]], config=config)[0].tokens) == 32


def test_a_cached_snapshot_is_refused_by_the_name_of_its_repository(tmp_path):
    place = tmp_path / "models--inclusionAI--LLaDA2.1-flash" / "snapshots" / "0123abc"
    place.mkdir(parents=True)
    with pytest.raises(SimsdError, match="LLaDA2.1 is not supported: its token editing"):
        simsd.load(write(place, "llada2"))


BAD_LLADA2 = {
    "bias": ({"use_bias": True}, "use_bias must be False, got True"),
    "norm_head": ({"norm_head": True}, "norm_head must be False, got True"),
    "softmax": ({"score_function": "softmax"}, "score_function must be 'sigmoid', got 'softmax'"),
    "window": ({"use_sliding_window": True}, "got use_sliding_window=True"),
    "no shared experts": ({"num_shared_experts": None}, "needs num_experts and num_shared_experts of at least 1"),
    "too many experts": ({"num_experts_per_tok": 17}, "num_experts_per_tok must be from 1 to num_experts 16, got 17"),
    "groups": ({"n_group": 5}, "16 experts cannot be in 5 groups evenly"),
    "best groups": ({"topk_group": 5}, "topk_group must be from 1 to n_group 4, got 5"),
    "experts of the best groups": (
        {"num_experts_per_tok": 9},
        "num_experts_per_tok 9 exceeds the 8 experts of topk_group 2",
    ),
    "queries": ({"num_attention_heads": 8}, r"attention.query_key_value.weight has 128 rows, its configuration 192"),
}


@pytest.mark.parametrize("case", BAD_LLADA2)
def test_a_llada2_configuration_that_cannot_be_honoured_is_refused_in_one_line(case, tmp_path):
    changes, message = BAD_LLADA2[case]
    folder = write(tmp_path, "llada2")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(SimsdError, match=message) as error:
        load(folder, "llada2")
    assert "\n" not in str(error.value)


def test_family_and_shift_are_checked(tmp_path):
    folder = write(tmp_path, "llada2")
    with pytest.raises(SimsdError, match="family must be one of sdar, sdar_moe, .*, got 'llada3'"):
        simsd.load(folder, family="llada3")
    with pytest.raises(SimsdError, match="shift must be True or False, got 1"):
        load(folder, "llada2", shift=1)


def test_a_router_is_read_in_full_precision_whatever_the_weights_are(tmp_path):
    loaded = load(write(tmp_path, "llada2"), "llada2", dtype="bfloat16")
    gate = loaded.model.model.layers[1].mlp.gate
    assert (gate.weight.dtype, gate.e_score_correction_bias.dtype) == (torch.bfloat16, torch.float32)
    assert loaded.deterministic


# Layers


@each
def test_a_deterministic_modules_rows_do_not_notice_later_ones(name, tmp_path):
    loaded = load(write(tmp_path, name), name, deterministic=True)
    tokens = torch.tensor(fixture(name)["tokens"])
    with torch.no_grad():
        whole = loaded.model(tokens, use_cache=False).logits
        for rows in (8, 16, 24):
            assert torch.equal(loaded.model(tokens[:, :rows], use_cache=False).logits, whole[:, :rows])


def text_of(loaded: simsd.LoadedModel) -> list[int]:
    return simsd.generate(loaded, [[5, 6, 7]], max_new_tokens=16, end_token_ids=(), verify="none")[0].tokens


def write_bias(model) -> None:
    model.model.layers[0].self_attn.v_proj.bias.mul_(-30)


def replace_bias(model) -> None:
    projection = model.model.layers[1].self_attn.q_proj
    projection.bias = torch.nn.Parameter(torch.full_like(projection.bias, 3.0))


def replace_shared_experts(model) -> None:
    shared = model.model.layers[1].mlp.shared_experts
    shared.down_proj = torch.nn.Linear(shared.down_proj.in_features, shared.down_proj.out_features, bias=False)


def hook_shared_experts(model) -> None:
    model.model.layers[2].mlp.shared_experts.register_forward_hook(lambda module, inputs, out: 9 * out)


def write_router_bias(model) -> None:
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.linspace(0, 9, 16))


CHANGES = {
    "a bias": ("a2d_qwen2", write_bias, True),
    "another bias": ("a2d_qwen2", replace_bias, True),
    "no bias on keys": ("a2d_qwen2", lambda m: setattr(m.model.layers[0].self_attn.k_proj, "bias", None), False),
    "another module": ("llada2", replace_shared_experts, True),
    "a hook": ("llada2", hook_shared_experts, False),
    "the router's bias": ("llada2", write_router_bias, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_and_modules_that_change_count_at_once(change, tmp_path):
    name, apply, fused = CHANGES[change]
    loaded = load(write(tmp_path, name), name, deterministic=False)
    before = text_of(loaded)
    with torch.no_grad():
        apply(loaded.model)
    assert (obstacle(loaded.model) is None) == fused
    found = text_of(loaded)
    loaded.model.model.norm.register_forward_hook(lambda module, inputs, out: out)  # the stock modules run now
    assert obstacle(loaded.model) == "norm has a hook" or not fused
    assert found == text_of(loaded) != before
