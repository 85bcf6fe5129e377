"""Weights in int8, int4 and float8: what a model made of them computes, keeps when it is saved, and refuses."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
    quantize_,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

import simsd
from benchmarks.cpu import load_memory
from simsd import SimsdError, tasks
from simsd.models import fused
from simsd.models.fused import FusedLayers, layers_of
from simsd.models.loading import LoadedModel
from simsd.models.quantized import data_of, is_quantized, quantization
from simsd.models.runner import ModelRunner
from simsd.models.stock import StockLayers
from simsd_kernels import INF
from small_checkpoints import MASK_ID, VOCABULARY, edit_json, stock_model, write_checkpoint
from test_families import NAMES, write
from test_loading_lora import lora, write_adapter

KINDS = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
WEIGHTS = "model.safetensors"
LONG = {"max_position_embeddings": 512}
WIDE = {"hidden_size": 64, "intermediate_size": 96}  # that int4 can hold
pytestmark = pytest.mark.usefixtures("one_thread")


def small(source=None, **arguments) -> LoadedModel:
    source = stock_model() if source is None else source
    return simsd.load(source, mask_token_id=MASK_ID, block_length=4, **arguments)


def random_tokens(rows: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, rows), generator=torch.Generator().manual_seed(1))


def causal(model: nn.Module, tokens: Tensor, layers=layers_of) -> Tensor:
    """Logits [R, V] of a causal forward as decoding makes it."""
    count, places = tokens.shape[1], 256
    runner = ModelRunner(LoadedModel(model, None, 4, MASK_ID, (), "a model"), 1, places, layers=layers)
    position = torch.arange(count, dtype=torch.int32)[None]
    birth = torch.full((1, places), INF, dtype=torch.int32)
    birth[:, :count] = position
    return runner.forward(tokens, position, position, position, birth, torch.full_like(birth, INF), torch.arange(count))


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def dequantized(model: LoadedModel) -> LoadedModel:
    """The same with the weights that its int8 values and scales stand for."""
    plain = {
        name: (weight.dequantize() if is_quantized(weight) else weight).detach()
        for name, weight in model.model.state_dict().items()
    }
    config = copy.deepcopy(model.config)
    del config.quantization_config
    twin = type(model.model)(config).eval()
    twin.load_state_dict(plain)
    return small(twin, deterministic=True)


def refusal(source, **arguments) -> str:
    with pytest.raises(SimsdError) as error:
        small(source, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(file, change=None, metadata=None) -> None:
    with safe_open(file, framework="pt") as opened:
        kept = opened.metadata()
    tensors = load_file(file)
    save_file((change or dict)(tensors), file, metadata=(metadata or dict)(kept))


# Texts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_int8_exact_decoding_emits_what_native_does_and_answers_as_before(dtype):
    items = [task for family in tasks.FAMILIES for task in tasks.held_out(family, 6, 0)]
    model, draft = simsd.load("tiny-target", quantize="int8", dtype=dtype), simsd.load("tiny-draft", quantize="int8")
    assert model.quantize == "int8" and model.deterministic and isinstance(layers_of(model.model), FusedLayers)
    assert model.weight_bytes < 0.45 * simsd.load("tiny-target").weight_bytes

    def decode(target, **settings):
        config = simsd.GenerationConfig(max_new_tokens=40, **settings)
        return simsd.generate(target, [task.prompt for task in items], draft, config=config)

    native, exact = decode(model, verify="none"), decode(model, verify="exact")
    assert [result.tokens for result in exact] == [result.tokens for result in native]
    sampled = [
        decode(model, verify=verify, temperature=1.0, strategy="entropy_bounded") for verify in ("none", "exact")
    ]
    assert [result.tokens for result in sampled[1]] == [result.tokens for result in sampled[0]]
    right = sum(tasks.is_correct(task, result.text) for task, result in zip(items, native, strict=True))
    before = decode(simsd.load("tiny-target"), verify="none")
    assert right >= sum(tasks.is_correct(task, result.text) for task, result in zip(items, before, strict=True)) - 1


def test_int4_decodes_by_torchaos_products_and_promises_nothing():
    model = simsd.load("tiny-target", quantize="int4")
    assert (model.quantize, model.deterministic, model.thin_linear) == ("int4", False, False)
    assert model.weight_bytes < 0.35 * simsd.load("tiny-target").weight_bytes
    items = tasks.held_out("facts", 4, 0)
    for verify in ("none", "exact"):
        config = simsd.GenerationConfig(max_new_tokens=24, verify=verify)
        results = simsd.generate(model, [task.prompt for task in items], simsd.load("tiny-draft"), config=config)
        assert sum(tasks.is_correct(task, result.text) for task, result in zip(items, results, strict=True)) >= 3


# Rows


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_in_int8_has_the_same_bits_beside_0_to_255_others(moe, dtype):
    model = small(stock_model(moe, **LONG), quantize="int8", dtype=dtype, deterministic=True).model
    tokens = random_tokens(256)
    every = causal(model, tokens)
    assert isinstance(layers_of(model), FusedLayers) and every.isfinite().all()
    for count in (*range(1, 36), *range(36, 256, 11), 255):
        assert torch.equal(causal(model, tokens[:, :count]), every[:count]), f"{count} rows"


@KINDS
def test_a_deterministic_modules_own_forward_has_them_too(moe):
    model = small(stock_model(moe, **LONG), quantize="int8", deterministic=True).model
    tokens = random_tokens(64).view(4, 16)
    every = logits_of(model, tokens)
    assert all(torch.equal(logits_of(model, tokens[i : i + 1])[0], every[i]) for i in range(4))


# Values


@KINDS
@pytest.mark.parametrize("deterministic", [True, False])
def test_int8_computes_with_what_values_and_scales_stand_for(moe, deterministic):
    model = small(stock_model(moe, **LONG), quantize="int8", deterministic=deterministic)
    assert model.deterministic == deterministic
    assert isinstance(layers_of(model.model), FusedLayers if deterministic else StockLayers)
    tokens, expected = random_tokens(24), dequantized(model)
    torch.testing.assert_close(causal(model.model, tokens), causal(expected.model, tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model.model, tokens), logits_of(expected.model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_takes_int8_from_its_published_layout(name, tmp_path):
    write(tmp_path, name)
    model = simsd.load(tmp_path, mask_token_id=5, block_length=4, quantize="int8")
    assert isinstance(layers_of(model.model), FusedLayers) and model.deterministic
    matrices = [w for name, w in model.model.named_parameters() if "_proj" in name and not name.endswith("bias")]
    assert len(matrices) >= 10 and all(map(is_quantized, matrices))
    tokens = random_tokens(24) % model.vocab_size
    torch.testing.assert_close(
        causal(model.model, tokens), causal(dequantized(model).model, tokens), rtol=1e-4, atol=1e-4
    )


def test_only_matrices_of_the_decoders_layers_are_quantized():
    model = small(stock_model(True), quantize="int8").model
    kinds = {name.removesuffix(".weight").split(".")[-1]: is_quantized(w) for name, w in model.named_parameters()}
    assert {name for name, quantized in kinds.items() if quantized} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    }
    others = {"embed_tokens", "q_norm", "k_norm", "gate", "input_layernorm", "post_attention_layernorm", "norm"}
    assert kinds.keys() - {name for name, quantized in kinds.items() if quantized} == {*others, "lm_head"}


@KINDS
def test_a_module_and_its_folder_give_the_same_values(moe, tmp_path):
    source = write_checkpoint(tmp_path, moe, extra={"mask_token_id": MASK_ID})
    kept = {name: value.clone() for name, value in source.state_dict().items()}
    models = [small(origin, quantize="int8", dtype="bfloat16").model for origin in (source, tmp_path)]
    weights = [[part for weight in model.parameters() for part in data_of(weight)] for model in models]
    assert len(weights[0]) > 30 and all(map(torch.equal, *weights))
    assert all(torch.equal(value, kept[name]) for name, value in source.state_dict().items())


def test_weights_that_are_not_finite_are_named():
    source = stock_model()
    with torch.no_grad():
        source.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    assert "not finite" in (message := refusal(source, quantize="int8"))
    assert "model.layers.1.mlp.up_proj.weight" in message


# Memory


@pytest.mark.parametrize("case", ["as stored", "experts one by one"])
def test_a_model_that_is_quantized_to_int8_is_never_whole_in_memory(tmp_path, case):
    """`python -m benchmarks load_memory` has the same of weights that stay as they are."""
    for name, mib in {"large": 180, "small": 8}.items():
        load_memory.write(tmp_path / name, mib, case)
    found = load_memory.measured(tmp_path / "large", tmp_path / "small", "simsd", "int8")
    assert 80 < found["bytes"] / 2**20 < 110
    assert 0.9 < found["peak"] < 1.5  # 36 MiB of buffers and of torchao's copies are much here


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_comes_to_lie_as_the_fused_layers_take_it(tmp_path, monkeypatch, dtype):
    write_checkpoint(tmp_path, shard="20KB", extra={"mask_token_id": MASK_ID})
    copied, join = [], fused.join

    def watched(parameters):
        before = parameters[0].data_ptr()
        joined = join(parameters)
        copied.append(joined.dtype == torch.int8 and joined.data_ptr() != before)
        return joined

    monkeypatch.setattr(fused, "join", watched)
    assert simsd.load(tmp_path, dtype=dtype, quantize="int8").quantize == "int8"
    assert len(copied) == 8 and not any(copied)


def test_an_adapter_is_merged_before_its_model_is_quantized(tmp_path):
    folder = write_adapter(tmp_path, lora("q_proj", "v_proj"))
    merged, tokens = simsd.load(folder).model, random_tokens(12)
    expected = simsd.load(merged, quantize="int8", deterministic=True)
    model = simsd.load(folder, quantize="int8", deterministic=True)
    assert model.quantize == "int8" and torch.equal(causal(model.model, tokens), causal(expected.model, tokens))
    simsd.load(tmp_path / "base", quantize="int8").model.save_pretrained(tmp_path / "base")
    message = refusal(folder)
    assert "base is quantized (int8): merge" in message and "then quantize=" in message


# Modules in memory


@KINDS
def test_a_module_that_torchao_quantized_is_taken_with_its_memory(moe):
    source, tokens = stock_model(moe).bfloat16(), random_tokens(12)
    quantize_(source, Int8WeightOnlyConfig(set_inductor_config=False))  # the head, too; no experts
    model = small(source)
    assert model.quantize == "int8" and model.deterministic and is_quantized(model.model.lm_head.weight)
    assert isinstance(layers_of(model.model), FusedLayers)
    for name, weight in source.named_parameters():
        for mine, other in zip(data_of(model.model.get_parameter(name)), data_of(weight), strict=False):
            assert mine.data_ptr() == other.data_ptr(), name
    assert causal(model.model, tokens).isfinite().all()
    again = simsd.load(model.model)
    assert again.model is model.model and simsd.load(model.model, quantize="int8").model is model.model


def test_dtype_changes_that_of_activations_alone():
    model = small(quantize="int8", dtype="bfloat16")
    cast = simsd.load(model.model, dtype="float32")
    assert (model.dtype, cast.dtype, cast.quantize) == (torch.bfloat16, torch.float32, "int8")
    first, second = (one.model.model.layers[0].mlp.up_proj.weight for one in (model, cast))
    assert torch.equal(first.qdata, second.qdata) and second.dtype == torch.float32
    assert causal(cast.model, random_tokens(5)).dtype == torch.float32


def test_a_model_in_training_mode_decodes_on_the_same_weights():
    model = small(quantize="int8")
    config = simsd.GenerationConfig(max_new_tokens=8, end_token_ids=())
    expected = simsd.generate(model, [[5, 6, 7]], config=config)[0].tokens
    model.model.train()
    assert simsd.generate(model, [[5, 6, 7]], config=config)[0].tokens == expected


def test_values_that_are_replaced_are_noticed():
    model = small(quantize="int8", deterministic=True).model
    before = causal(model, random_tokens(5))
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight.qdata = -weight.qdata
    after = causal(model, random_tokens(5))
    assert not torch.equal(after, before)
    weight.qdata.neg_()
    assert torch.equal(causal(model, random_tokens(5)), before)


# Checkpoints


@KINDS
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_what_is_saved_is_loaded(moe, shard, tmp_path):
    model = small(stock_model(moe), quantize="int8", dtype="bfloat16")
    model.model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if shard == "20KB" else 0)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    loaded, tokens = simsd.load(tmp_path), random_tokens(12)
    assert (loaded.quantize, loaded.dtype, loaded.deterministic) == ("int8", torch.bfloat16, True)
    assert torch.equal(causal(loaded.model, tokens), causal(model.model, tokens))
    loaded.model.save_pretrained(tmp_path / "again")
    assert torch.equal(causal(simsd.load(tmp_path / "again").model, tokens), causal(model.model, tokens))


def test_transformers_reads_what_is_saved(tmp_path):
    model, tokens = small(quantize="int8"), random_tokens(12)
    model.model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(stock.model.layers[0].mlp.up_proj.weight, Int8Tensor)
    torch.testing.assert_close(logits_of(stock, tokens), logits_of(model.model, tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(causal(small(stock, deterministic=True).model, tokens), causal(model.model, tokens))


@KINDS
def test_what_transformers_quantized_and_saved_is_loaded(moe, tmp_path):
    write_checkpoint(tmp_path / "plain", moe, extra={"mask_token_id": MASK_ID})
    how = TorchAoConfig(Int8WeightOnlyConfig())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how)
    stock.save_pretrained(tmp_path / "saved")
    loaded, tokens = simsd.load(tmp_path / "saved", deterministic=True), random_tokens(12)
    assert loaded.quantize == "int8" and isinstance(layers_of(loaded.model), FusedLayers)
    torch.testing.assert_close(
        causal(loaded.model, tokens), causal(dequantized(loaded).model, tokens), rtol=1e-4, atol=1e-4
    )
    if not moe:  # of a mixture transformers leaves the experts
        expected = simsd.load(tmp_path / "plain", quantize="int8", deterministic=True)
        assert torch.equal(causal(loaded.model, tokens), causal(expected.model, tokens))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in int8."""
    small(quantize="int8").model.save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_without_a_part_of_a_weight_is_refused(folder):
    part = "model.layers.0.mlp.up_proj._weight_scale"
    rewrite(folder / WEIGHTS, lambda tensors: {name: value for name, value in tensors.items() if name != part})
    assert f"tensors are missing: {part}" in refusal(folder)


def test_a_checkpoint_whose_scales_have_another_shape_is_refused(folder):
    part = "model.layers.0.mlp.up_proj._weight_scale"
    rewrite(folder / WEIGHTS, lambda tensors: tensors | {part: tensors[part][:-1].clone()})
    assert "model.layers.0.mlp.up_proj.weight is int8" in refusal(folder)


def test_a_checkpoint_that_does_not_say_how_it_was_quantized_is_refused(folder):
    rewrite(folder / WEIGHTS, metadata=lambda fields: {"format": "pt"})
    assert "torchao quantized it, its files do not say how" in refusal(folder)


def test_integers_that_torchao_did_not_store_are_refused_still(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k != "quantization_config"}))
    assert "quantized or integer weights are not read" in refusal(folder)


def test_a_checkpoint_in_int8_is_not_quantized_again(folder):
    assert simsd.load(folder, quantize="int8").quantize == "int8"
    message = refusal(folder, quantize="int4")
    assert "is quantized already, by int8, got quantize='int4'" in message


@pytest.mark.parametrize(
    ("config", "part"),
    {
        "activations": (Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), "quantizes activations, too"),
        "groups": (Int8WeightOnlyConfig(granularity=PerGroup(32), set_inductor_config=False), "one scale for each row"),
        "unpacked": (IntxWeightOnlyConfig(torch.int4, PerGroup(32)), "is torchao's IntxUnpackedToInt8Tensor"),
    }.values(),
    ids=["activations", "groups", "unpacked"],
)
def test_other_weights_of_torchaos_are_refused_by_name(config, part):
    source = stock_model(**WIDE)
    quantize_(source.model.layers, config)
    message = refusal(source)
    assert part in message and "model.layers.0." in message


def test_zero_points_are_refused():
    from torchao.quantization import MappingType

    source = stock_model()
    linear = source.model.layers[0].mlp.up_proj
    weight = Int8Tensor.from_hp(linear.weight.detach().abs(), granularity=PerRow(), mapping_type=MappingType.ASYMMETRIC)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    assert "no zero points" in refusal(source)


PUBLISHED = {
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False, "quant_method": "gptq", "sym": True},
    "awq": {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"},
    "fp8": {"activation_scheme": "dynamic", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"format": "pack-quantized", "quant_method": "compressed-tensors"},
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_checkpoints_quantized_by_others_are_refused_by_name(name, quantize, tmp_path):
    write_checkpoint(tmp_path, extra={"mask_token_id": MASK_ID})
    edit_json(tmp_path / "config.json", quantization_config=PUBLISHED[name])
    message = refusal(tmp_path, quantize=quantize)
    assert f"quantized by {name} are not supported" in message and "quantize=" in message


# Arguments


@pytest.mark.parametrize("given", ["int2", "fp8", "", 8, True, torch.int8, ["int8"]], ids=str)
def test_an_unknown_method_is_refused_before_anything_is_read(given):
    with pytest.raises(SimsdError, match=r"quantize must be int8, int4, float8 or None, got"):
        simsd.load("no-such-folder", quantize=given)


@pytest.mark.parametrize("argument", ["deterministic", "thin_linear"])
def test_int4_is_refused_where_bits_are_promised(argument):
    message = refusal(stock_model(**WIDE), quantize="int4", **{argument: True})
    assert "int4 weights are read by torchao's products" in message
    assert f"leave out {argument}=True, or take quantize='int8'" in message


def test_int4_is_refused_where_it_cannot_be_made():
    assert "[48, 32]: int4 takes rows in multiples of 16" not in refusal(stock_model(), quantize="int4")
    assert "down_proj.weight is [32, 48]: int4 takes" in refusal(stock_model(), quantize="int4")
    assert "a mixture's experts take quantize='int8'" in refusal(stock_model(True), quantize="int4")


def test_int4_that_is_packed_for_the_cpu_is_not_saved_and_not_cast(tmp_path):
    model = small(stock_model(**WIDE), quantize="int4")
    with pytest.raises(SimsdError, match="packed for the CPU cannot be saved: save the model that they were made of"):
        model.model.save_pretrained(tmp_path)
    assert simsd.load(model.model).model is model.model
    assert "was quantized in torch.float32, which stays" in refusal(model.model, dtype="bfloat16")


def test_float8_is_refused_on_devices_that_have_none(monkeypatch):
    message = "float8 weights need a GPU that has float8, got device cpu: quantize='int8' runs here"
    assert refusal(stock_model(), quantize="float8") == message
    check, config = quantization().check, stock_model().config
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(SimsdError, match=r"capability 8\.9 or higher, got 8\.0"):
        check("float8", config, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check("float8", config, torch.bfloat16, torch.device("cuda"))


def test_int4_on_cuda_asks_for_bfloat16():
    check, config = quantization().check, stock_model().config
    with pytest.raises(SimsdError, match=r"computes in bfloat16, got torch\.float32: pass dtype='bfloat16'"):
        check("int4", config, torch.float32, torch.device("cuda"))
    check("int4", config, torch.bfloat16, torch.device("cuda"))


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "simsd.models.quantization", None)
    message = refusal(stock_model(), quantize="int8")
    assert 'quantized weights need torchao: pip install "simsd-kernels[quantize]"' in message
    assert small().quantize is None


def test_an_engines_quantized_weights_are_not_replaced():
    model = small(quantize="int8")
    engine = simsd.Engine(model, max_batch=1, max_length=64)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(SimsdError, match=f"{name} of .* is quantized, which stays"):
        engine.update_weights({name: torch.zeros(48, 32)})
