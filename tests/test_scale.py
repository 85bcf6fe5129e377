"""benchmarks/cpu/scale.py: what it counts is what the models have, and what it times is a full engine."""

from __future__ import annotations

import pytest

from benchmarks.cpu import scale
from benchmarks.cpu import trace_iteration as tracing
from simsd.engine.pages import page_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bytes_are_those_of_the_models_and_of_what_slots_hold():
    """One forward of the target and two of the draft, here of the same size."""
    slots, context, states = 2, 1024, 3
    launches = tracing.trace("1.7B", "1.7B", tracing.exact_shape(slots, 4, 2, states), slots)
    gb, products = scale.moved(launches, context)
    with tracing.without_a_gpu():
        model = tracing.fake_model("1.7B", 4)
        matrices = {name: p for name, p in model.model.named_parameters() if p.dim() == 2 and "embed" not in name}
        weights, token = sum(map(scale.nbytes, matrices.values())), page_bytes(model, 1)
    assert gb["weights"] == pytest.approx(3 * weights / 1e9)
    assert gb["keys and values"] == pytest.approx(3 * slots * context * token / 1e9)
    rows = [rows for _, rows in scale.attentions(launches)][:: len(scale.attentions(launches)) // 3]
    assert gb["scratch"] == pytest.approx(2 * sum(rows) * token / 1e9)
    logits = slots * 4 * (states + 2)  # of the states, and of each block that the draft proposes
    assert gb["logits"] == pytest.approx(2 * 2 * logits * tracing.VOCABULARY / 1e9)
    lm_head = matrices["lm_head.weight"].numel()
    layers = 2 * (sum(rows) * (weights / 2 - lm_head) + logits * lm_head)
    assert products == pytest.approx(layers + sum(rows) * context * 4 * 16 * 128 * 28)
    longer, shorter = (scale.held("1.7B", "1.7B", slots, tokens, states) for tokens in (2 * context, context))
    assert longer - shorter == 2 * slots * context * token


def test_every_slot_is_taken_while_an_engine_is_timed():
    running = scale.Running(scale.tiny(0, 2), scale.tiny(1, 1), slots=3, context=70, iterations=2)
    for _ in range(2 + scale.WARM_UP):
        taken = running.iterate()
        assert min(taken.values()) > 0 and sum(taken[part] for part in scale.PARTS) == pytest.approx(taken["ms"])
        used, owned = running.pages()
        assert 3 * 2 <= used <= owned
    with pytest.raises(RuntimeError, match="no longer all taken"):
        for _ in range(1000):
            running.iterate()
