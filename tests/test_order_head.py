"""The order head: what it is before training, what it survives, and which files it is read from."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from simsd.errors import NotFoundError, SimsdError
from simsd.order.head import KEY, OrderHead, load_order_head, save_order_head
from stand_ins import random_sdar

LENGTH = 8


@pytest.fixture(scope="module")
def model():
    return random_sdar(0, block_length=LENGTH)


@pytest.fixture
def disturbed_head():
    torch.manual_seed(0)
    head = OrderHead(LENGTH)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return head


@pytest.fixture
def file(tmp_path, model, disturbed_head):
    save_order_head(disturbed_head, tmp_path / "order.safetensors", model, {"prompts": 3})
    return tmp_path / "order.safetensors"


def statistics(*shape: int) -> tuple[torch.Tensor, ...]:
    """revealed, prob, log_odds, entropy [..., L]"""
    made = torch.Generator().manual_seed(1)
    log_odds = 5 * torch.randn(*shape, LENGTH, generator=made)
    entropy = 3 * torch.rand(*shape, LENGTH, generator=made)
    return torch.rand(*shape, LENGTH, generator=made) < 0.4, log_odds.sigmoid(), log_odds, entropy


def test_an_untrained_head_changes_nothing():
    head = OrderHead(LENGTH)
    shift, pair = head(*statistics(2, 3))
    assert shift.shape == (2, 3, LENGTH) and pair.shape == (2, 3, LENGTH, LENGTH)
    assert not shift.any() and not pair.any()
    assert head.sharpness == 1


def test_it_is_small():
    assert 20_000 < sum(parameter.numel() for parameter in OrderHead(16).parameters()) < 100_000


def test_what_it_says_of_a_state_does_not_depend_on_the_others(disturbed_head):
    given = statistics(3, 4)
    shift, pair = disturbed_head(*given)
    alone = disturbed_head(*(x[1, 2] for x in given))
    torch.testing.assert_close(shift[1, 2], alone[0])
    torch.testing.assert_close(pair[1, 2], alone[1])


def test_statistics_of_revealed_positions_are_not_read(disturbed_head):
    revealed, *given = statistics(5)
    others = [torch.where(revealed, 17.0, x) for x in given]
    (shift, pair), (shift_too, pair_too) = disturbed_head(revealed, *given), disturbed_head(revealed, *others)
    assert torch.equal(shift[~revealed], shift_too[~revealed]) and torch.equal(pair, pair_too)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
def test_bad_statistics_give_finite_results(disturbed_head, value):
    revealed, *given = statistics(4)
    for bad in range(3):
        broken = [x.index_fill(-1, torch.tensor([0, 5]), value) if n == bad else x for n, x in enumerate(given)]
        for result in disturbed_head(revealed, *broken):
            assert result.isfinite().all()


@pytest.mark.parametrize("revealed", [torch.zeros(LENGTH).bool(), torch.ones(LENGTH).bool()], ids=["none", "all"])
def test_nothing_and_everything_revealed_give_finite_results(disturbed_head, revealed):
    for result in disturbed_head(revealed, *statistics()[1:]):
        assert result.isfinite().all()


def test_no_result_decides_what_is_computed(disturbed_head):
    """As a CUDA graph needs it: a trace under fake tensors fails at the first look at a value."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [torch.empty(2, 3, LENGTH, dtype=dtype) for dtype in (torch.bool, *[torch.float32] * 3)]
        shift, pair = disturbed_head(*given)
    assert shift.shape == (2, 3, LENGTH) and pair.shape == (2, 3, LENGTH, LENGTH)


def test_a_saved_head_comes_back(file, model, disturbed_head):
    loaded = load_order_head(file, model)
    given = statistics(4)
    for mine, theirs in zip(disturbed_head(*given), loaded(*given), strict=True):
        assert torch.equal(mine, theirs)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_file_tells_what_it_was_trained_on(file, model):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()[KEY])
    assert about["block_length"] == LENGTH and about["training"] == {"prompts": 3}
    assert about["model"]["name"] == model.name and about["model"]["vocab_size"] == model.vocab_size


def test_another_block_length_is_refused(file, model):
    with pytest.raises(SimsdError, match=r"blocks of 8 tokens.* in blocks of 4: .*--block-length 4$"):
        load_order_head(file, model, block_length=4)


def test_another_model_is_refused(file):
    other = random_sdar(0, block_length=LENGTH, hidden_size=48)
    with pytest.raises(SimsdError, match=r"hidden_size 32, not 48.*simsd train-order$"):
        load_order_head(file, other)


def test_a_missing_file_is_named(tmp_path, model):
    with pytest.raises(NotFoundError, match=r"none.safetensors is not there"):
        load_order_head(tmp_path / "none.safetensors", model)


def rewrite(file, tensors=None, **about):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        kept = json.loads(opened.metadata()[KEY])
    save_file(load_file(file) if tensors is None else tensors, file, metadata={KEY: json.dumps(kept | about)})


def test_damaged_files_are_refused_in_one_line(file, model):
    tensors = load_file(file)
    kept = file.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(SimsdError, match=match) as raised:
            load_order_head(file, model)
        assert "\n" not in str(raised.value) and str(file) in str(raised.value)

    rewrite(file, tensors | {"place": torch.full_like(tensors["place"], float("nan"))})
    refused("its place holds values that are not finite")
    rewrite(file, {name: tensor for name, tensor in tensors.items() if name != "place"})
    refused("damaged.*place")
    rewrite(file, tensors | {"place": tensors["place"][:, :3].contiguous()})
    refused("damaged.*place")
    rewrite(file, tensors, version=99)
    refused("version 99; this simsd reads 1")
    file.write_bytes(kept[: len(kept) // 2])
    refused("no order head")
    file.write_text("hello")
    refused("no order head")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {KEY: "[1]"}, {KEY: "{"}])
def test_other_safetensors_are_refused(tmp_path, model, metadata):
    save_file({"place": torch.zeros(2)}, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(SimsdError, match="no order head"):
        load_order_head(tmp_path / "model.safetensors", model)


def test_a_folder_is_refused(tmp_path, model):
    with pytest.raises(SimsdError, match="no order head"):
        load_order_head(tmp_path, model)


def test_a_published_spot_drafter_is_refused_unread(tmp_path, model):
    file = tmp_path / "sdar8b_b16.pt"
    file.write_bytes(b"anything")
    with pytest.raises(SimsdError, match=r"SPOT's published drafters.*32 most probable.*simsd train-order"):
        load_order_head(file, model)
