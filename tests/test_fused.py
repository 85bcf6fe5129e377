"""The fused layers: the stock modules to rounding, on the modules' own weights, and only where they know everything."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import simsd
from simsd.models.deterministic import make_deterministic
from simsd.models.families.sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM
from simsd.models.fused import FusedLayers, layers_of
from simsd.models.loading import LoadedModel
from simsd.models.runner import ModelRunner
from simsd.models.stock import StockLayers
from simsd.models.weights import join
from simsd_kernels import INF, dispatch
from small_checkpoints import BASE, MASK_ID, MOE, VOCABULARY, stock_model, write_checkpoint

KINDS = pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = {
    "grouped heads": {},
    "one head for all": {"num_attention_heads": 6, "num_key_value_heads": 1},
    "a head for each": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 20},
    "tied": {"tie_word_embeddings": True},
    "odd sizes": {"hidden_size": 40, "intermediate_size": 50, "moe_intermediate_size": 28, "head_dim": 6},
    "one layer, another epsilon": {"num_hidden_layers": 1, "rms_norm_eps": 1e-3},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "rope_theta": None},
}
ROWS = 24


def load(moe: bool = False, dtype: str = "float32", deterministic: bool = True, **changes) -> simsd.LoadedModel:
    source = stock_model(moe, **changes)
    return simsd.load(source, mask_token_id=MASK_ID, block_length=4, dtype=dtype, deterministic=deterministic)


def random_tokens(rows: int = ROWS, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, rows), generator=torch.Generator().manual_seed(seed))


def causal(model: nn.Module, tokens: Tensor, layers=layers_of) -> Tensor:
    """Logits [R, V] of a causal forward."""
    count = tokens.shape[1]
    runner = ModelRunner(LoadedModel(model, None, 4, MASK_ID, (), "a model"), 1, ROWS, layers=layers)
    position = torch.arange(count, dtype=torch.int32)[None]
    birth = torch.full((1, ROWS), INF, dtype=torch.int32)
    birth[:, :count] = position
    death = torch.full_like(birth, INF)
    return runner.forward(tokens, position, position, position, birth, death, torch.arange(count))


def stock(model: nn.Module, tokens: Tensor) -> Tensor:
    return causal(model, tokens, StockLayers)


def is_fused(model: nn.Module) -> bool:
    return isinstance(layers_of(model), FusedLayers)


@KINDS
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "plain"])
def test_they_are_the_stock_modules_to_rounding(moe, changes, deterministic):
    loaded = load(moe, deterministic=deterministic, **changes)
    assert is_fused(loaded.model)
    found, expected = causal(loaded.model, random_tokens()), stock(loaded.model, random_tokens())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_in_16_bits_they_are_as_near_to_the_truth_as_the_stock_modules(dtype, changes):
    loaded = load(dtype=dtype, **changes)
    exact = simsd.load(copy.deepcopy(loaded.model), dtype="float32", mask_token_id=MASK_ID)
    truth = stock(exact.model, random_tokens())
    found, plain = causal(loaded.model, random_tokens()).float(), stock(loaded.model, random_tokens()).float()
    assert is_fused(loaded.model)
    assert (found - truth).norm() <= 1.25 * (plain - truth).norm()
    assert (found - truth).abs().max() <= 2 * (plain - truth).abs().max()


@pytest.mark.parametrize("threads", [1, 2])
@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [SHAPES["grouped heads"], SHAPES["odd sizes"]], ids=["even sizes", "odd sizes"])
def test_rows_do_not_notice_how_many_they_are(moe, dtype, changes, threads):
    loaded, tokens, before = load(moe, dtype, **changes), random_tokens(), torch.get_num_threads()
    assert layers_of(loaded.model).row_invariant
    try:
        torch.set_num_threads(threads)
        whole = causal(loaded.model, tokens)
        for rows in (1, 2, 3, 4, 5, 7, 16, 23):
            assert torch.equal(causal(loaded.model, tokens[:, :rows]), whole[:rows]), f"{rows} rows"
    finally:
        torch.set_num_threads(before)


def test_without_deterministic_rows_are_torchs():
    model = load(deterministic=False).model
    assert is_fused(model) and not layers_of(model).row_invariant


def storage_bytes(*models: nn.Module) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


@KINDS
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_nothing_is_stored_twice_and_a_source_still_shares_its_weights(moe, changes):
    source = stock_model(moe, **changes)
    needed = storage_bytes(source)
    loaded = simsd.load(source, mask_token_id=MASK_ID)
    again = simsd.load(source, mask_token_id=MASK_ID, block_length=8)
    assert is_fused(loaded.model) and is_fused(again.model)
    assert storage_bytes(source, loaded.model, again.model) == needed
    before = causal(loaded.model, random_tokens())
    with torch.no_grad():
        source.model.layers[1].self_attn.k_proj.weight.mul_(-1)
    for model in (loaded.model, again.model):
        after = causal(model, random_tokens())
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, stock(model, random_tokens()), rtol=1e-4, atol=1e-4)


def test_a_module_of_inference_tensors_is_served():
    with torch.inference_mode():
        source = stock_model()
    loaded = simsd.load(source, mask_token_id=MASK_ID)
    torch.testing.assert_close(causal(loaded.model, random_tokens()), stock(loaded.model, random_tokens()))


def shifted(model: nn.Module) -> dict[str, Tensor]:
    """A state dict of other values."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator).to(value)
        for name, value in model.state_dict().items()
    }


def replace_one(model: nn.Module) -> None:
    layer = model.model.layers[1]
    layer.mlp.up_proj.weight.data = -layer.mlp.up_proj.weight.data


def reassign_one(model: nn.Module) -> None:
    model.model.layers[0].self_attn.v_proj.weight = nn.Parameter(torch.ones(32, 32))


def replace_output(model: nn.Module) -> None:
    model.model.layers[0].self_attn.o_proj = nn.Linear(64, 32, bias=False)


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(shifted(model)),
    "load_state_dict, assigned": lambda model: model.load_state_dict(shifted(model), assign=True),
    "in place": lambda model: [p.data.mul_(0.5) for p in model.parameters()],
    "data of one": replace_one,
    "another parameter": reassign_one,
    "another module": replace_output,
    "a norm": lambda model: setattr(model.model.norm, "weight", nn.Parameter(torch.full((32,), 2.0))),
    "the head": lambda model: setattr(model.lm_head.weight, "data", torch.ones(VOCABULARY, 32)),
    "the embedding": lambda model: model.set_input_embeddings(nn.Embedding(VOCABULARY, 32)),
    "an epsilon": lambda model: setattr(model.model.layers[0].input_layernorm, "variance_epsilon", 1.0),
    "the epsilon of queries": lambda model: setattr(model.model.layers[1].self_attn.q_norm, "variance_epsilon", 1.0),
    "the scale of attention": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.7),
    "angles": lambda model: setattr(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq * 0.5),
    "the scale of angles": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 0.5),
    "the order of layers": lambda model: model.model.layers.insert(0, model.model.layers.pop(1)),
    "there and back": lambda model: model.to(torch.float64).to(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "plain"])
def test_weights_that_change_count_at_once(change, deterministic):
    model = load(deterministic=deterministic).model
    before = causal(model, random_tokens())
    with torch.no_grad():
        change(model)
    after = causal(model, random_tokens())
    torch.testing.assert_close(after, stock(model, random_tokens()), rtol=1e-4, atol=1e-4)
    is_the_same = change is CHANGES["there and back"]
    assert torch.equal(after, before) == is_the_same


def test_new_weights_are_joined_again_and_the_old_ones_are_gone():
    model = load().model
    needed = storage_bytes(model)
    model.load_state_dict(shifted(model), assign=True)
    causal(model, random_tokens())
    assert is_fused(model) and storage_bytes(model) == needed


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_model_that_is_cast_is_fused_in_its_new_dtype(dtype):
    model, tokens = load().model, random_tokens()
    wide = causal(model, tokens)
    model.to(simsd.models.loading.DTYPES[dtype])
    logits = causal(model, tokens)
    assert str(logits.dtype) == f"torch.{dtype}" and is_fused(model)
    assert (logits.float() - wide).norm() <= 1.25 * (stock(model, tokens).float() - wide).norm()


@KINDS
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_a_fused_model_can_be_saved_copied_and_loaded(moe, changes, tmp_path):
    write_checkpoint(tmp_path / "in", moe, **changes)
    loaded = simsd.load(tmp_path / "in", mask_token_id=MASK_ID, deterministic=True)
    assert is_fused(loaded.model)
    expected = causal(loaded.model, random_tokens())
    loaded.model.save_pretrained(tmp_path / "out")
    torch.save(loaded.model.state_dict(), tmp_path / "state")
    other = load(moe, **changes)
    with torch.no_grad():
        [p.zero_() for p in other.model.parameters()]
    other.model.load_state_dict(torch.load(tmp_path / "state"))
    again = simsd.load(tmp_path / "out", mask_token_id=MASK_ID, deterministic=True)
    for model in (again.model, other.model, copy.deepcopy(loaded.model)):
        assert is_fused(model)
        assert torch.equal(causal(model, random_tokens()), expected)


def test_a_copy_has_weights_of_its_own():
    model = load().model
    expected, copied = causal(model, random_tokens()), copy.deepcopy(model)
    causal(copied, random_tokens())
    with torch.no_grad():
        [p.zero_() for p in copied.parameters()]
    assert torch.equal(causal(model, random_tokens()), expected)
    assert not causal(copied, random_tokens()).any()


def test_training_goes_on_after_decoding():
    model, tokens = load(deterministic=False).model, random_tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = causal(model, tokens)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    after = causal(model, tokens)
    assert is_fused(model) and not torch.equal(after, before)
    torch.testing.assert_close(after, stock(model, tokens), rtol=1e-4, atol=1e-4)


def test_a_model_is_not_kept_alive():
    import gc
    import weakref

    for deterministic in (True, False):
        model = load(deterministic=deterministic).model
        causal(model, random_tokens())
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None


def test_parameters_that_lie_side_by_side_are_not_copied():
    whole = torch.randn(7, 5)
    parameters = [nn.Parameter(part) for part in whole.split([2, 4, 1])]
    joined = join(parameters)
    assert joined.data_ptr() == whole.data_ptr() and torch.equal(joined, whole)
    for order in ([0, 2], [1, 0, 2], [0, 0, 1]):
        some = [nn.Parameter(whole.split([2, 4, 1])[i]) for i in order]
        expected = torch.cat([parameter.detach() for parameter in some])
        joined = join(some)
        assert joined.data_ptr() != whole.data_ptr() and torch.equal(joined, expected)
        assert torch.equal(torch.cat([parameter.detach() for parameter in some]), expected)


class Launches(TorchDispatchMode):
    """Notes calls that compute. Each of ours is one kernel (tests/ops says so op by op), attention two."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        # In inference mode a reshape arrives as such, whether it copies or not.
        computes = not made or any(x.untyped_storage()._cdata not in given for x in made)
        if computes and function.namespace != "prim" and function.overloadpacket is not torch.ops.aten.empty_like:
            self.names += [str(function)] * (2 if "masked_attention" in str(function) else 1)
        return out


def fake_model(moe: bool, layers: int) -> LoadedModel:
    """SDAR-8B's or SDAR-30B-A3B's layers, without memory, on a GPU that is not there."""
    sizes = BASE | {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "head_dim": 128}
    sizes |= {"num_key_value_heads": 8, "num_hidden_layers": layers, "attn_implementation": "simsd"}
    if moe:
        experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "hidden_size": 2048}
        sizes |= MOE | experts
    with torch.device("meta"):
        model = (SDARMoeForCausalLM(SDARMoeConfig(**sizes)) if moe else SDARForCausalLM(SDARConfig(**sizes))).eval()
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    dtype = torch.float32 if values is module._buffers else torch.bfloat16
                    empty = torch.empty(value.shape, dtype=dtype, device="cuda")
                    values[name] = nn.Parameter(empty, False) if values is module._parameters else empty
    make_deterministic(model)
    return LoadedModel(model, None, 4, MASK_ID, (), "fake", True, True)


def launches(moe: bool, layers: int) -> list[str]:
    batch, rows, kv_slots = 2, 20, 1024
    with FakeTensorMode():
        loaded = fake_model(moe, layers)
        runner = ModelRunner(loaded, batch, kv_slots)
        assert not runner.packed and is_fused(loaded.model)
        tokens, index = (torch.empty(shape, dtype=torch.int64, device="cuda") for shape in ((batch, rows), (24,)))
        positions, slots, clock = (torch.empty_like(tokens, dtype=torch.int32) for _ in range(3))
        birth, death = (torch.empty((batch, kv_slots), dtype=torch.int32, device="cuda") for _ in range(2))
        runner.forward(tokens, positions, slots, clock, birth, death, index)  # makes the table of angles
        with Launches() as noted:
            logits = runner.forward(tokens, positions, slots, clock, birth, death, index)
    assert logits.shape == (24, VOCABULARY) and logits.device.type == "cuda" and logits.dtype == torch.bfloat16
    return noted.names


@KINDS
def test_a_layer_takes_11_launches_with_experts_20_and_no_host_read(moe, monkeypatch):
    for op, key in dispatch._compiled_obstacles:  # as with CUDA kernels, whether or not this installation has them
        if key == "CUDA":
            monkeypatch.setitem(dispatch._compiled_obstacles, (op, key), None)
    few, more = launches(moe, 1), launches(moe, 3)
    assert (len(more) - len(few)) / 2 <= (20 if moe else 11), more
    assert len(few) - (20 if moe else 11) <= 8, few
