"""Every op with what all of them are tested with: random arguments, what is refused, which arguments are lanes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

import advances
import plans
import proposals
import simsd_kernels
import test_add_rms_norm
import test_advance_slots
import test_block_verify
import test_combine_experts
import test_grouped_linear
import test_masked_attention
import test_plan_block
import test_propose_block
import test_qk_norm_rope_store
import test_reveal
import test_sample_logits
import test_silu_mul
import test_sort_by_expert
import test_store_kv
import test_thin_linear
import test_verify_graph
import walks
from backends import FLOATS
from simsd_kernels import dispatch


@dataclasses.dataclass(frozen=True)
class Op:
    """An op and its arguments.

    Attributes:
        make: seed -> random keyword arguments on the CPU.
        good, refused: arguments that bad input is tried in, and (name, value, ...) of bad input.
        lanes: arguments whose first dimension runs over what must not depend on each other; none where it all does.
        alone: arguments and a lane -> the arguments of that lane alone; None: `lanes` cut to it.
        changed: arguments written in place.
        right: raises unless the outputs, on the CPU, are right; None: they are the reference's.
    """

    name: str
    function: Callable
    make: Callable[[int], dict]
    good: Callable[[], dict]
    refused: list
    lanes: tuple[str, ...]
    changed: tuple[str, ...] = ()
    right: Callable[[dict, tuple], None] | None = None
    alone: Callable[[dict, int], dict] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def overload(self):
        return dispatch.overload("simsd", self.name)

    def lane_alone(self, made: dict, lane: int) -> dict:
        if self.alone is not None:
            return self.alone(made, lane)
        return {n: v[lane : lane + 1] if n in self.lanes and torch.is_tensor(v) else v for n, v in made.items()}


def on(device: torch.device, made: dict) -> dict:
    """Arguments of their own on `device`."""
    return {name: value.clone().to(device) if torch.is_tensor(value) else value for name, value in made.items()}


def call(op: Op, made: dict, backend: str | None) -> tuple[torch.Tensor, ...]:
    """Outputs, then the arguments written in place; skips, saying why, where the backend does not serve such a call."""
    try:
        out = op.function(**made, backend=backend)
    except RuntimeError as error:
        if "cannot serve this call" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        pytest.skip(f"{op.name}: {next((line for line in lines if line.startswith(f'{backend}:')), lines[0])}")
    return outputs(out) + tuple(made[name] for name in op.changed)


def outputs(out) -> tuple[torch.Tensor, ...]:
    return (out,) if torch.is_tensor(out) else tuple(out or ())


def compare(out: tuple, expected: tuple) -> None:
    """Integers alike, floats to a few roundings."""
    for n, (given, wanted) in enumerate(zip(out, expected, strict=True)):
        given, wanted = given.cpu(), wanted.cpu()
        assert given.dtype == wanted.dtype and given.shape == wanted.shape, f"output {n}"
        if given.is_floating_point():
            close = {"rtol": 5e-6, "atol": 5e-6, "equal_nan": True}
            torch.testing.assert_close(given, wanted, **close, msg=lambda m, n=n: f"output {n}: {m}")
        else:
            wrong = int((given != wanted).sum())
            assert not wrong, f"output {n} differs in {wrong} of {wanted.numel()}"


def same_bits(out: tuple, expected: tuple) -> bool:
    """Alike to the last bit, NaN included."""
    return all(
        a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip((x[..., None] for x in out), (x[..., None] for x in expected), strict=True)
    )


def check(op: Op, made: dict, out: tuple) -> None:
    """`made`: the arguments on the CPU, as they were before the call."""
    out = tuple(x.cpu() for x in out)
    if op.right is not None:
        op.right(made, out)
        return
    compare(out, call(op, on(torch.device("cpu"), made), "reference"))


# reveal


def reveal_case(seed: int) -> dict:
    return on(torch.device("cpu"), test_reveal.random_batch(seed))


def reveal_good() -> dict:
    return test_reveal.block([True, False, True, True], threshold=0.5)


# verify_graph, plan_block


def graph_case(seed: int) -> dict:
    made = test_verify_graph.random_case(seed)
    return {name: made[name] for name in walks.ORDER}


def plan_case(seed: int) -> dict:
    return plans.random_case(seed, logits=seed % 3 == 0)


# propose_block, advance_slots


def propose_case(seed: int) -> dict:
    chance = random.Random(seed)
    return proposals.random_case(
        seed, seed % 2, batch=chance.choice([1, 3, 8]), length=chance.choice([1, 4, 32, 64]),
        dtype=chance.choice(FLOATS), filters=seed % 3 > 0,
    )  # fmt: skip


def advance_case(seed: int) -> dict:
    chance = random.Random(seed)
    sizes = *(chance.choice([1, 5, 64]), chance.choice([0, 2, 4]), chance.choice([1, 4, 32, 64])), 1 + seed, seed % 4
    return advances.random_case(seed, sizes)


def by_name(names: tuple[str, ...], values) -> dict:
    return dict(zip(names, values, strict=True))


VERIFIED = (
    *("target_logits", "draft_ids", "known", "drafted", "temperature", "top_k", "top_p", "seed", "position"),
    *("revealed", "draft_logits", "coin", "residual"),
)
WALKED = tuple(name for name in walks.ORDER if name not in walks.SHARED)
PROPOSED = tuple(name for name in proposals.TENSORS if name not in ("logits", "banned_ids"))
ops = simsd_kernels
OPS = [
    Op(
        "masked_attention", ops.masked_attention, test_masked_attention.random_arguments,
        test_masked_attention.good_arguments, test_masked_attention.REFUSED,
        ("q", "k", "v", "clock", "birth", "death", "kv_len"), right=lambda made, out: None,
    ),
    Op(
        "store_kv", ops.store_kv, test_store_kv.random_arguments, test_store_kv.good_arguments,
        test_store_kv.REFUSED, ("k", "v", "k_cache", "v_cache", "slots"), ("k_cache", "v_cache"),
    ),
    Op(
        "qk_norm_rope_store", ops.qk_norm_rope_store, test_qk_norm_rope_store.random_arguments,
        test_qk_norm_rope_store.good_arguments, test_qk_norm_rope_store.REFUSED,
        ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "slots"), ("k_cache", "v_cache"), lambda made, out: None,
    ),
    Op(
        "add_rms_norm", ops.add_rms_norm, test_add_rms_norm.random_arguments, test_add_rms_norm.random_case,
        test_add_rms_norm.REFUSED, ("residual", "x"), ("residual",),
        lambda made, out: test_add_rms_norm.assert_as_modules(*out, made),
    ),
    Op(
        "silu_mul", ops.silu_mul, test_silu_mul.random_arguments, test_silu_mul.good_arguments, test_silu_mul.REFUSED,
        ("gate_up",), right=lambda made, out: test_silu_mul.assert_as_module(*out, **made),
    ),
    Op(
        "sample_logits", ops.sample_logits, test_sample_logits.random_arguments, test_sample_logits.good_arguments,
        test_sample_logits.REFUSED, test_sample_logits.NAMES[:-1],
    ),
    Op(
        "thin_linear", ops.thin_linear, test_thin_linear.random_arguments, test_thin_linear.good_arguments,
        test_thin_linear.REFUSED, ("x",), right=lambda made, out: test_thin_linear.assert_right(*out, **made),
    ),
    Op(
        "grouped_linear", ops.grouped_linear, test_grouped_linear.random_arguments, test_grouped_linear.good_arguments,
        test_grouped_linear.REFUSED, ("x",), right=lambda made, out: test_grouped_linear.assert_right(*out, **made),
        alone=test_grouped_linear.row_alone,
    ),
    Op(
        "sort_by_expert", ops.sort_by_expert, test_sort_by_expert.random_arguments, test_sort_by_expert.random_case,
        test_sort_by_expert.REFUSED, (),
    ),
    Op(
        "combine_experts", ops.combine_experts, test_combine_experts.random_arguments,
        test_combine_experts.random_case, test_combine_experts.REFUSED, ("weights", "places"),
        right=lambda made, out: test_combine_experts.assert_right(*out, **made),
    ),
    Op(
        "reveal", ops.reveal, reveal_case, reveal_good, test_reveal.REFUSED,
        tuple(reveal_good()), test_reveal.WRITTEN,
    ),
    Op(
        "block_verify", ops.block_verify, test_block_verify.random_arguments, test_block_verify.good_arguments,
        test_block_verify.REFUSED,
        VERIFIED,
    ),
    Op(
        "verify_graph", ops.verify_graph, graph_case, test_verify_graph.good_arguments, test_verify_graph.REFUSED,
        WALKED,
    ),
    Op(
        "propose_block", ops.propose_block, propose_case, test_propose_block.good_arguments,
        test_propose_block.REFUSED, PROPOSED, tuple(proposals.WRITTEN),
    ),
    Op(
        "advance_slots", ops.advance_slots, advance_case, advances.slot, test_advance_slots.REFUSED,
        tuple(advances.ORDER), tuple(advances.WRITTEN),
    ),
    Op("plan_block", ops.plan_block, plan_case, test_plan_block.good_arguments, test_plan_block.REFUSED, ()),
]  # fmt: skip

OPS_BY_NAME = {op.name: op for op in OPS}

each_op = pytest.mark.parametrize("op", OPS, ids=str)
