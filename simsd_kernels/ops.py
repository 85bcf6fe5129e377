"""Schemas and fake (meta) implementations of every `torch.ops.simsd.*` operator.

An op exists, with a `reference` implementation, as soon as this module is imported; the compiled library only adds
implementations for its own dispatch keys. Argument meanings are documented once, in each op folder's `api.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simsd_kernels import dispatch

LIBRARY = torch.library.Library("simsd", "DEF")

SCHEMAS = {
    "masked_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor clock, Tensor birth, Tensor death, Tensor? kv_len=None,"
        " float? scale=None, Tensor? block_table=None) -> Tensor"
    ),
    "store_kv": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
    "qk_norm_rope_store": (
        "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin,"
        " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, float eps) -> Tensor"
    ),
    "sample_logits": (
        "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, Tensor position,"
        " Tensor revealed, Tensor? banned_ids=None)"
        " -> (Tensor token, Tensor prob, Tensor log_odds, Tensor entropy, Tensor logsumexp)"
    ),
    "thin_linear": "(Tensor x, Tensor weight) -> Tensor",
    "reveal": (
        "(Tensor(a!) tokens, Tensor(b!) revealed, Tensor(c!) step_map, Tensor proposal, Tensor prob,"
        " Tensor log_odds, Tensor entropy, Tensor step, Tensor schedule, str strategy, float threshold) -> Tensor"
    ),
    "block_verify": (
        "(Tensor target_logits, Tensor draft_ids, Tensor known, Tensor drafted, Tensor temperature,"
        " Tensor? top_k=None, Tensor? top_p=None, Tensor? seed=None, Tensor? position=None,"
        " Tensor? revealed=None, Tensor? draft_logits=None, Tensor? coin=None, Tensor? residual=None,"
        " Tensor? banned_ids=None, str rule='match')"
        " -> (Tensor accepted, Tensor bonus, Tensor tokens, Tensor target_ids, Tensor prob)"
    ),
    "block_verify.graph": (
        "(Tensor target_logits, Tensor rows, Tensor states, Tensor revealed, Tensor block, Tensor clean,"
        " Tensor cleaned, Tensor depth, Tensor start, Tensor step, Tensor step_map, Tensor prob, Tensor origin,"
        " Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? seed, Tensor? banned_ids, Tensor schedule,"
        " str strategy, float threshold)"
        " -> (Tensor progress, Tensor revealed, Tensor tokens, Tensor step_map, Tensor prob, Tensor origin)"
    ),
    "plan_block": (
        "(Tensor tokens, Tensor revealed, Tensor start, Tensor step, Tensor blocks_left, Tensor clean, Tensor depth,"
        " Tensor prob, Tensor log_odds, Tensor entropy, Tensor trust, Tensor power, Tensor? draft_logits,"
        " Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? seed, Tensor? banned_ids, Tensor schedule,"
        " str strategy, float threshold, float floor, int mask_id, int max_copies, int max_rows, int scratch,"
        " int slots, int stride)"
        " -> (Tensor tokens, Tensor positions, Tensor slots, Tensor clock, Tensor birth, Tensor death,"
        " Tensor states, Tensor revealed, Tensor block, Tensor cleaned, Tensor reach)"
    ),
}

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)

# Before the op folders register kernels of their own: what is there now is the compiled library's.
dispatch.probe(SCHEMAS)


def implement(
    op: str,
    reference: Callable,
    triton: Callable | None = None,
    triton_obstacle: Callable | None = None,
    gradients: tuple[Callable, Callable] | None = None,
) -> None:
    """Registers what serves `torch.ops.simsd.<op>` where the compiled library does not, and its gradients.

    Args:
        op: a name of SCHEMAS.
        reference: checks its arguments and serves any device.
        triton: the same by Triton, on CUDA tensors.
        triton_obstacle: called with the op's arguments; why `triton` cannot serve them, or None.
        gradients: setup_context and backward of `torch.library.register_autograd`, whichever backend serves. None: an
            argument that requires grad is refused (see `refuse_gradients`).
    """

    def on_any_device(first, *others):
        dispatch.note_reference(first.device)
        return reference(first, *others)

    for library in (LIBRARY, dispatch.EMULATED) if dispatch.EMULATION else (LIBRARY,):
        if gradients is None:
            library.impl(op, _without_gradients(library.ns, op), "Autograd", with_keyset=True)
        else:
            save, backward = gradients
            torch.library.register_autograd(f"{library.ns}::{op}", backward, setup_context=save, lib=library)
    LIBRARY.impl(op, on_any_device if dispatch.load_library() else reference, "CompositeExplicitAutograd")
    if triton is None or dispatch.compiled_obstacle(op, "CUDA") is None:
        return

    def on_cuda(*arguments):
        if dispatch.triton_obstacle() or triton_obstacle(*arguments):
            return reference(*arguments)
        return triton(*arguments)

    LIBRARY.impl(op, on_cuda, "CUDA")


def refuse_gradients(op: str, *arguments: object) -> None:
    """Raises RuntimeError where autograd would expect gradients of `op`, which has none.

    `arguments`: the op's own, in their order."""
    if not torch.is_grad_enabled():
        return
    for number, value in enumerate(arguments):
        if isinstance(value, Tensor) and value.requires_grad:
            name = dispatch.overload("simsd", op)._schema.arguments[number].name
            raise RuntimeError(
                f"{op}: has no backward, but {name} requires grad: call it under torch.no_grad(), or give it"
                f" {name}.detach()"
            )


def _without_gradients(namespace: str, op: str) -> Callable:
    """What autograd runs for an op without gradients. Under torch.inference_mode() the dispatcher skips it."""
    overload = dispatch.overload(namespace, op)
    written = [n for n, argument in enumerate(overload._schema.arguments) if argument.is_write]

    def autograd(keyset, *arguments):
        refuse_gradients(op, *arguments)
        # As torch.library.register_autograd does, which takes no op that writes in place.
        with torch._C._AutoDispatchBelowAutograd():
            out = overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
        # A backward that had saved the old contents must notice, as with torch's own in-place operations.
        for number in written:
            if not arguments[number].is_inference():
                torch.autograd.graph.increment_version(arguments[number])
        return out

    return autograd


def fake(op: str) -> Callable:
    """Registers the decorated function as what `torch.ops.simsd.<op>` is to a compiler: shapes and dtypes alone."""

    def register(function: Callable) -> Callable:
        torch.library.register_fake(f"simsd::{op}", function, lib=LIBRARY)
        if dispatch.EMULATION:
            torch.library.register_fake(f"simsd_emulated::{op}", function, lib=dispatch.EMULATED)
        return function

    return register


@fake("masked_attention")
def _(q, k, v, clock, birth, death, kv_len=None, scale=None, block_table=None) -> Tensor:
    return q.new_empty(q.shape)


@fake("store_kv")
def _(k, v, k_cache, v_cache, slots) -> None:
    return None


@fake("qk_norm_rope_store")
def _(q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, slots, eps) -> Tensor:
    batch, rows, heads, dim = q.shape
    return q.new_empty((batch, heads, rows, dim))


@fake("sample_logits")
def _(logits, temperature, top_k, top_p, seed, position, revealed, banned_ids=None):
    rows = logits.shape[:1]
    statistic = [logits.new_empty(rows, dtype=torch.float32) for _ in range(4)]
    return logits.new_empty(rows, dtype=torch.int64), *statistic


@fake("thin_linear")
def _(x, weight) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@fake("reveal")
def _(tokens, revealed, step_map, proposal, prob, log_odds, entropy, step, schedule, strategy, threshold) -> Tensor:
    return torch.empty_like(revealed)


@fake("block_verify")
def _(
    target_logits,
    draft_ids,
    known,
    drafted,
    temperature,
    top_k=None,
    top_p=None,
    seed=None,
    position=None,
    revealed=None,
    draft_logits=None,
    coin=None,
    residual=None,
    banned_ids=None,
    rule="match",
):
    batch, length = draft_ids.shape
    return (
        known.new_empty((batch,)),
        draft_ids.new_empty((batch,)),
        draft_ids.new_empty((batch, length)),
        draft_ids.new_empty((batch, length)),
        target_logits.new_empty((batch, length), dtype=torch.float32),
    )


@fake("block_verify.graph")
def _(target_logits, rows, states, revealed, block, clean, cleaned, depth, start, step, step_map, prob, origin, *_):
    batch, ahead, length = clean.shape
    shape = (batch, ahead + 2, length)
    return (
        step.new_empty((batch, 7)),
        revealed.new_empty((batch,)),
        states.new_empty(shape),
        step_map.new_empty(shape),
        prob.new_empty(shape),
        origin.new_empty(shape),
    )


@fake("plan_block")
def _(tokens, revealed, start, step, blocks_left, clean, depth, prob, *rest):
    max_copies, _, _, slots, _ = rest[-5:]
    batch, ahead, length = clean.shape
    rows = (batch, (ahead + max_copies) * length)
    return (
        tokens.new_empty(rows),
        *(start.new_empty(rows) for _ in range(3)),
        *(start.new_empty((batch, slots)) for _ in range(2)),
        tokens.new_empty((batch, max_copies, length)),
        revealed.new_empty((batch, max_copies)),
        start.new_empty((batch, max_copies)),
        start.new_empty((batch,)),
        prob.new_empty((batch, max_copies)),
    )
