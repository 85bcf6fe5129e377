"""Traces are native decoding's, and a head learns from them what can be learned."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import simsd
from simsd.errors import SimsdError
from simsd.order.head import OrderHead, load_order_head
from simsd.order.run import train_order_head, unfinished
from simsd.order.traces import Traces, record_traces
from simsd.order.training import accuracies, examples_at, later_log_odds, loss, split, train
from stand_ins import random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, NEW = 8, 30
# The last block of these is partly known, and so is none.
PROMPTS = [[5, 6, 7], [9] * 11, [3, 1, 4, 1, 5, 9, 2, 6], [8, 8, 7, 5, 21, 13, 34, 40, 2, 3, 4, 5, 6, 7, 11]]


@pytest.fixture(scope="module")
def model():
    return random_sdar(0, block_length=LENGTH)


@pytest.fixture(scope="module")
def traces(model):
    return record_traces(model, PROMPTS, max_new_tokens=NEW, max_batch=3)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_traces_tell_the_texts_and_step_maps_of_native_decoding(model, temperature):
    settings = {"max_new_tokens": NEW, "temperature": temperature, "seed": 5}
    traces = record_traces(model, PROMPTS, max_batch=3, **settings)
    results = simsd.generate(model, PROMPTS, verify="none", **settings)
    told = {}
    for block, (number, start) in enumerate(zip(traces.prompt.tolist(), traces.start.tolist(), strict=True)):
        for position in range(LENGTH):
            if traces.rank[block, position] >= 0:
                drawn = int(traces.final[block, position]), int(traces.rank[block, position]) + 1
                told[number, start + position - len(PROMPTS[number])] = drawn
    for number, result in enumerate(results):
        tokens, steps = [*result.tokens, *result.cut_tokens], [*result.step_map, *result.cut_step_map]
        mine = {at: drawn for (prompt, at), drawn in told.items() if prompt == number}
        assert mine == dict(enumerate(zip(tokens, steps, strict=True)))


def test_traces_hold_the_probability_of_every_token_when_it_was_revealed(model, traces):
    results = simsd.generate(model, PROMPTS, verify="none", max_new_tokens=NEW)
    prob = traces.prob.gather(1, traces.rank.clamp(min=0)[:, None]).squeeze(1)
    for number, prompt in enumerate(PROMPTS):
        mine = [
            float(prob[block, position])
            for block in (traces.prompt == number).nonzero().flatten().tolist()
            for position in range(LENGTH)
            if traces.rank[block, position] >= 0
        ]
        shown = results[number].probs
        assert len(prompt) and mine[: len(shown)] == shown


def test_a_greedy_target_reveals_the_highest_log_odds_first(traces):
    for order, log_odds, rank in zip(traces.order, traces.log_odds, traces.rank, strict=True):
        for step in range(int((order >= 0).sum())):
            masked = rank >= step
            assert order[step] == log_odds[step].masked_fill(~masked, -torch.inf).argmax()


def test_known_positions_of_a_first_block_are_not_revealed(traces):
    first = int((traces.prompt == 0).nonzero()[0])
    assert traces.start[first] == 0 and sorted(traces.order[first].tolist()) == [-1, -1, -1, 3, 4, 5, 6, 7]
    assert traces.rank[first, :3].tolist() == [-1, -1, -1]


def test_traces_do_not_depend_on_the_batch(model, traces):
    alone = record_traces(model, PROMPTS, max_new_tokens=NEW, max_batch=1)
    for field in dataclasses.fields(Traces):
        assert torch.equal(getattr(traces, field.name), getattr(alone, field.name)), field.name


def test_no_tokens_leave_no_traces(model):
    assert len(record_traces(model, PROMPTS, max_new_tokens=0)) == 0


def test_sub_blocks_are_revealed_one_after_the_other_and_known_to_the_traces(model):
    model.config.sub_block_length = 4
    try:
        traces = record_traces(model, PROMPTS, max_new_tokens=NEW)
    finally:
        model.config.sub_block_length = None
    assert traces.sub_block.unique(dim=0).tolist() == [[0] * 4 + [1] * 4]
    for order in traces.order.tolist():
        parts = [position // 4 for position in order if position >= 0]
        assert parts == sorted(parts)


def neighbours(count: int, seed: int) -> Traces:
    """Traces of a made-up target: whoever stands beside what was just revealed is revealed next (the right one before
    the left one), which its log-odds know a step later and the head can know ahead; tokens change where they differ."""
    rng = random.Random(seed)
    made = {name: [] for name in ("order", "log_odds")}
    for _ in range(count):
        base = [rng.gauss(0, 1) for _ in range(LENGTH)]
        order, all_log_odds = [], []
        for _ in range(LENGTH):
            log_odds = list(base)
            for j in order:
                for i, more in ((j + 1, 9.0), (j - 1, 5.0)):
                    if 0 <= i < LENGTH:
                        log_odds[i] += more
            all_log_odds.append(log_odds)
            order.append(max((i for i in range(LENGTH) if i not in order), key=lambda i: log_odds[i]))
        made["order"].append(order)
        made["log_odds"].append(all_log_odds)
    order, log_odds = torch.tensor(made["order"]), torch.tensor(made["log_odds"])
    rank = order.argsort(1)
    masked = rank[:, None] >= torch.arange(LENGTH)[:, None]
    return Traces(
        prompt=torch.arange(count),
        start=torch.zeros(count, dtype=torch.int64),
        order=order,
        sub_block=torch.zeros_like(order),
        tokens=torch.ones(count, LENGTH, LENGTH, dtype=torch.int32),
        prob=log_odds.sigmoid() * masked,
        log_odds=log_odds * masked,
        entropy=torch.zeros_like(log_odds),
    )


def test_a_trained_head_tells_what_the_log_odds_of_an_earlier_state_cannot():
    head = train(neighbours(400, seed=1), neighbours(40, seed=3), steps=300)
    for row in accuracies(head, neighbours(100, seed=2)):
        assert row.head > row.rule + 0.15 and row.head > 0.7, row
        assert row.cases == 100 * (LENGTH - row.staleness)


def test_what_does_not_hold_on_other_prompts_is_not_learned():
    """A handful of blocks whose order is noise can be learned by heart, which no other block gains from."""
    made, few = torch.Generator().manual_seed(4), neighbours(6, seed=1)
    noise = dataclasses.replace(few, order=torch.rand(6, LENGTH, generator=made).argsort(1))
    held_out = neighbours(50, seed=2)
    places = torch.cartesian_prod(torch.arange(50), torch.arange(LENGTH - 1))
    judged_by = examples_at(held_out, held_out.rank, held_out.final, places)
    assert loss(train(noise, held_out, steps=200), judged_by) <= loss(OrderHead(LENGTH), judged_by)


def test_an_untrained_head_is_the_rule():
    assert all(row.head == row.rule for row in accuracies(OrderHead(LENGTH), neighbours(50, seed=2)))


def test_log_odds_of_later_states_are_those_that_plan_block_makes_of_a_head():
    torch.manual_seed(0)
    head, made = OrderHead(LENGTH), neighbours(20, seed=1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        block, step = 7, 2
        examples = examples_at(made, made.rank, made.final, torch.tensor([[block, step]]))
        later = later_log_odds(head, examples)[0]
        order = made.order[block].tolist()
        seen = torch.zeros(LENGTH, dtype=torch.bool).index_fill(0, torch.tensor(order[:step]), True)
        statistics = (getattr(made, name)[block, step] for name in ("prob", "log_odds", "entropy"))
        shift, pair = head(seen, *statistics)
    for more in range(1, LENGTH - step):
        expected = made.log_odds[block, step] + shift + pair[:, order[step : step + more]].sum(1)
        left = order[step + more :]
        torch.testing.assert_close(later[left, more - 1], expected[left])
        assert sorted(left) == examples.masked_later()[0, :, more - 1].nonzero().flatten().tolist()
        assert sorted(left) == examples.open_later()[0, :, more - 1].nonzero().flatten().tolist()
        assert examples.future[0, more] == order[step + more]


def test_only_the_leftmost_sub_block_with_anything_masked_competes():
    made = neighbours(1, seed=1)
    made = dataclasses.replace(
        made, order=torch.tensor([[2, 0, 1, 3, 7, 5, 4, 6]]), sub_block=torch.tensor([[0] * 4 + [1] * 4])
    )
    examples = examples_at(made, made.rank, made.final, torch.tensor([[0, 1]]))
    competing = [examples.open_later()[0, :, more].nonzero().flatten().tolist() for more in range(LENGTH - 1)]
    assert competing == [[1, 3], [3], [4, 5, 6, 7], [4, 5, 6], [4, 6], [6], []]


def test_the_split_holds_out_whole_prompts(traces):
    trained_on, held_out = split(traces, seed=0)
    assert set(trained_on.prompt.tolist()).isdisjoint(held_out.prompt.tolist())
    assert len(trained_on) + len(held_out) == len(traces) and len(set(held_out.prompt.tolist())) == 1


def test_training_resumed_gives_the_same_weights(tmp_path):
    traces = neighbours(60, seed=1), neighbours(10, seed=2)

    class Interrupt(Exception):
        pass

    def interrupt(step: int) -> None:
        if step == 130:
            raise Interrupt

    whole = train(*traces, steps=150, seed=3)
    with pytest.raises(Interrupt):
        train(*traces, steps=150, seed=3, checkpoint=tmp_path / "training.pt", advance=interrupt)
    done = []
    resumed = train(*traces, steps=150, seed=3, checkpoint=tmp_path / "training.pt", advance=done.append)
    assert done[0] == 100
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_seeds_differ_and_training_leaves_the_callers_noise_alone():
    traces = neighbours(60, seed=1)
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    one, other = (train(traces, neighbours(10, seed=2), steps=3, seed=seed).read.weight for seed in (0, 1))
    assert torch.rand(1) == expected
    assert not torch.equal(one, other)


def test_a_run_that_was_interrupted_goes_on_without_recording_again(tmp_path, model, monkeypatch):
    file, settings = tmp_path / "order.safetensors", {"steps": 120, "max_new_tokens": NEW}

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 110:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_order_head(model, PROMPTS, file, progress=interrupt, **settings)
    assert not file.exists() and unfinished(file).is_dir()
    with pytest.raises(SimsdError, match=r"unfinished holds the work of a run with steps 120, not 60"):
        train_order_head(model, PROMPTS, file, **settings | {"steps": 60})
    with pytest.raises(SimsdError, match="of a run with other prompts"):
        train_order_head(model, PROMPTS[:3], file, **settings)
    with monkeypatch.context() as patched:
        patched.setattr("simsd.order.run.record_traces", None)
        report = train_order_head(model, PROMPTS, file, **settings)
    assert not unfinished(file).exists() and report.prompts == len(PROMPTS)
    train_order_head(model, PROMPTS, tmp_path / "whole.safetensors", **settings)
    resumed, whole = (load_order_head(one, model) for one in (file, tmp_path / "whole.safetensors"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("name", ["traces.safetensors", "training.pt"])
def test_unfinished_work_that_is_damaged_is_named(tmp_path, model, name):
    file = tmp_path / "order.safetensors"

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "training" and done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_order_head(model, PROMPTS, file, steps=101, max_new_tokens=8, progress=interrupt)
    (unfinished(file) / name).write_bytes(b"no")
    with pytest.raises(SimsdError, match=f"{name} cannot be read .*remove"):
        train_order_head(model, PROMPTS, file, steps=101, max_new_tokens=8)


@pytest.mark.parametrize(
    ("prompts", "settings", "match"),
    [
        ([], {}, "two or more, got 0"),
        ([[5, 6, 7]] * 4, {}, "two or more, got 1"),
        (PROMPTS, {"steps": 0}, "steps must be an integer >= 1"),
        (PROMPTS, {"max_new_tokens": 0}, "no block took two steps"),
        (PROMPTS, {"max_new_tokens": 10_000}, "512 positions"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(tmp_path, model, prompts, settings, match):
    with pytest.raises(SimsdError, match=match):
        train_order_head(model, prompts, tmp_path / "order.safetensors", **{"steps": 1} | settings)
    assert not (tmp_path / "order.safetensors").exists()


def test_blocks_of_one_token_have_no_order(tmp_path):
    with pytest.raises(SimsdError, match="blocks of 1 token"):
        train_order_head(random_sdar(0, block_length=1), PROMPTS, tmp_path / "order.safetensors", steps=1)
