"""The CUDA kernels of sample_logits, run on the CPU, against the definition, C++ and the golden noise."""

from __future__ import annotations

import json
import math
import pathlib

import pytest
import torch

from backends import unsafe
from simsd_kernels import dispatch, noise, sample_logits
from test_sample_logits import NAMES, REFUSED, arguments, random_logits, sample

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 2, 3, 4, 7, 8, 9, 31, 33, 255, 257, 1000, 1023, 1024, 1025, 2048, 2055, 3073, 5000)
STATISTICS = ("prob", "log_odds", "entropy", "logsumexp")
KEYED = json.loads((pathlib.Path(__file__).parents[1] / "golden_noise.json").read_text())["cases"]


class Dice:
    """Choices that follow from a seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, *choices):
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def each(self, count, *choices):
        return torch.tensor([self.pick(*choices) for _ in range(count)])


def random_values(dice, *shape):
    """Logits of every kind that a kernel may meet."""
    logits = dice.normal(*shape) * dice.pick(0.1, 1.0, 4.0, 30.0)
    kind = dice.pick("plain", "plain", "ties", "constant", "spike", "holes", "infinite", "few")
    if kind == "ties":
        logits = logits.round()
    elif kind == "constant":
        logits = torch.zeros(shape) + dice.pick(0.0, -3.0, 1e4)
    elif kind == "spike":
        logits[..., int(dice.integers(0, shape[-1]))] += dice.pick(30.0, 200.0, 5000.0)
    elif kind == "holes":
        logits[dice.uniform(*shape) < 0.3] = dice.pick(-INF, math.nan)
    elif kind == "infinite":
        logits[dice.uniform(*shape) < 2 / shape[-1]] = INF
    elif kind == "few":
        logits[dice.uniform(*shape) < 1 - 2 / shape[-1]] = -INF
    return logits


def laid_out(dice, logits):
    """The same values in another layout: as they are, padded, misaligned by an element, or column by column."""
    *outer, vocabulary = logits.shape
    match dice.pick("dense", "padded", "misaligned", "columns"):
        case "padded":
            return logits.new_full((*outer, (vocabulary + 23) // 8 * 8), math.nan)[..., :vocabulary].copy_(logits)
        case "misaligned":
            return logits.new_full((*outer, vocabulary + 9), math.nan)[..., 1 : vocabulary + 1].copy_(logits)
        case "columns":
            columns = logits.new_full((vocabulary, *outer, 2), math.nan)[..., 1]
            return columns.movedim(0, -1).copy_(logits)
    return logits


def random_banned(dice, vocabulary):
    match dice.pick("none", "none", "some", "all but one"):
        case "some" if vocabulary > 1:
            spared = int(dice.integers(0, vocabulary))
            ids = dice.integers(0, vocabulary, min(vocabulary, 40))
            return ids[ids != spared].tolist()
        case "all but one":
            spared = int(dice.integers(0, vocabulary))
            return [id for id in range(vocabulary) if id != spared]
    return None


def random_case(seed):
    dice = Dice(seed)
    rows, vocabulary = dice.pick(1, 1, 2, 3, 5), dice.pick(*VOCABULARIES)
    logits = laid_out(dice, random_values(dice, rows, vocabulary).to(dice.pick(*DTYPES)))
    filtered = dice.pick(False, True)
    settings = {
        "temperature": dice.each(rows, 0.0, 0.3, 0.9, 1.0, 1.0, 7.0, 1e6),
        "top_k": dice.each(rows, 0, 1, 2, 7, vocabulary // 2, vocabulary, vocabulary + 5) if filtered else 0,
        "top_p": dice.each(rows, 1.0, 1.0, 0.0, 0.3, 0.9, 0.999) if filtered else 1.0,
        "seed": dice.integers(-(2**63), 2**63 - 1, rows),
        "position": dice.integers(-(2**31), 2**31 - 1, rows),
        "revealed": dice.integers(-(2**63), 2**63 - 1, rows),
        "banned": random_banned(dice, vocabulary),
    }
    return logits, settings


def row_of(logits, settings, row):
    def one(value):
        return value[row : row + 1] if torch.is_tensor(value) else value

    return logits[row : row + 1], {name: one(value) for name, value in settings.items()}


@pytest.mark.parametrize("seed", range(400))
def test_tokens_and_statistics_are_those_of_the_definition(seed):
    logits, settings = random_case(seed)
    out = sample(logits, backend="cuda", **settings)
    heat = torch.where(settings["temperature"] > 0, settings["temperature"], 1.0)
    magnitude = min(float((logits.float().nan_to_num(0.0).abs().amax(dim=1) / heat).max()), 1e30)
    for backend, epsilon in (("cpu", 0.0), ("reference", 2.0**-23)):  # the reference sums in float32
        expected = sample(logits, backend=backend, **settings)
        assert torch.equal(out.token, expected.token), backend
        for name in STATISTICS:
            close = {"rtol": 5e-6, "atol": 5e-6 + epsilon * magnitude}
            torch.testing.assert_close(getattr(out, name), getattr(expected, name), **close, msg=name)
    row = seed % logits.shape[0]
    one, alone = row_of(logits, settings, row)
    again = sample(one, backend="cuda", **alone)
    assert all(torch.equal(a[row : row + 1], b) for a, b in zip(out, again, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 1e30])
@pytest.mark.parametrize("vocabulary", [1000, 4099])
def test_noise_alone_decides_between_equal_logits(vocabulary, temperature):
    rows = 30
    seed, position, revealed = torch.arange(rows) << 40, torch.arange(rows, dtype=torch.int32), torch.arange(rows) << 50
    words = noise.words(seed, position, revealed, vocabulary)
    logits = random_logits(rows, vocabulary) if temperature > 1 else torch.zeros(rows, vocabulary)
    out = sample(logits, temperature=temperature, seed=seed, position=position, revealed=revealed, backend="cuda")
    assert torch.equal(out.token, words.argmin(dim=1))


@pytest.mark.parametrize("case", KEYED, ids=lambda case: f"seed={case['seed']}")
def test_every_golden_word_tips_the_balance_where_it_should(case):
    """Two ids, one ahead by the difference of their noise and a little more, or a little less."""
    words = torch.tensor(case["words"], dtype=torch.float64)
    variate = -torch.log(-torch.log1p(-((words + 0.5) / 2**32).clamp(max=noise.LARGEST_UNIFORM)))
    ids = case["ids"]
    logits, expected = [], []
    for i in range(len(ids)):
        other = (i + 1) % len(ids)
        for little, winner in ((1e-4, ids[i]), (-1e-4, ids[other])):
            row = torch.full((max(ids) + 1,), -INF)
            row[ids[i]], row[ids[other]] = float(variate[other] - variate[i] + little), 0.0
            logits.append(row)
            expected.append(winner)
    key = {name: case[name] for name in ("seed", "revealed")}
    position = torch.full((len(expected),), case["position"])
    out = sample(torch.stack(logits), position=position, backend="cuda", **key)
    assert out.token.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_aligned_row_without_filters_is_read_once(dtype):
    logits = random_logits(3, 5000, dtype=dtype)
    take = lambda: json.loads(torch.ops.simsd_emulated.take_counters())  # noqa: E731
    row_bytes = 5000 * dtype.itemsize
    for temperature in (0.0, 1.0, 0.7):
        take()
        sample(logits, temperature=temperature, backend="cuda")
        counters = take()
        assert counters["loaded_bytes"] == 3 * row_bytes and counters["launches"] == 2
    sample(logits[1:2], top_k=20, position=torch.tensor([1]), backend="cuda")
    filtered = take()["loaded_bytes"]
    sample(logits, top_k=torch.tensor([0, 20, 0]), backend="cuda")
    assert take()["loaded_bytes"] == 2 * row_bytes + filtered


def test_a_filter_reads_segments_that_cannot_matter_once_more_at_most():
    logits = random_logits(1, 64 * 1024) - 20.0
    logits[0, 5000:5064] += 40.0  # one segment has all that top-k keeps
    torch.ops.simsd_emulated.take_counters()
    sample(logits, top_k=50, backend="cuda")
    loaded = json.loads(torch.ops.simsd_emulated.take_counters())["loaded_bytes"]
    assert loaded < 2.1 * logits.numel() * 4


@pytest.mark.parametrize("seed", range(20))
def test_many_ties_at_the_edge_of_top_p_go_by_id(seed):
    dice = Dice(seed)
    vocabulary = 3000
    logits = dice.normal(1, vocabulary).round().expand(60, vocabulary)
    top_p = float(dice.uniform())
    settings = {"temperature": 100.0, "top_p": top_p, "seed": seed}
    out = sample(logits, backend="cuda", **settings)
    assert torch.equal(out.token, sample(logits, backend="reference", **settings).token)


def test_values_that_the_api_refuses_are_harmless():
    logits = random_logits(4, 2000)
    given = dict(zip(NAMES, arguments(logits, temperature=1.0, banned=[3]), strict=True))
    plain = dispatch.operator("sample_logits", "cuda")(**given)
    odd = {
        **given,
        "top_k": torch.full((4,), -3, dtype=torch.int32),
        "top_p": torch.full((4,), 1.5),
        "banned_ids": torch.tensor([-1, 3, 2000, 2**40, -(2**62)]),
    }
    assert all(torch.equal(a, b) for a, b in zip(plain, dispatch.operator("sample_logits", "cuda")(**odd), strict=True))
    cold = dispatch.operator("sample_logits", "cuda")(**{**given, "temperature": torch.full((4,), -1.0)})
    assert torch.equal(cold[0], sample(logits, temperature=0.0, banned=[3], backend="reference").token)
    everything = dispatch.operator("sample_logits", "cuda")(**{**given, "banned_ids": torch.arange(2000)})
    assert everything[0].tolist() == [0] * 4 and everything[1].tolist() == [0.0] * 4


def test_bad_input_is_refused_as_by_the_cpu_op():
    good = dict(zip(NAMES, arguments(torch.zeros(2, 5), banned=[1] * 5), strict=True))
    for name, value in unsafe(REFUSED, good):
        if name == "banned_ids" and value.dtype == torch.int64:
            continue  # values are trusted on a GPU
        said = []
        for backend in ("cpu", "cuda"):
            with pytest.raises(RuntimeError, match="sample_logits: ") as refusal:
                dispatch.operator("sample_logits", backend)(**{**good, name: value})
            said.append(str(refusal.value).splitlines()[0])
        assert said[0] == said[1]


def test_automatic_choice_is_left_to_cpu_tensors():
    good = arguments(torch.zeros(2, 5))
    assert sample_logits(*good, backend="cuda").token.tolist() == sample_logits(*good).token.tolist()
