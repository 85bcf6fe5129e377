"""Schemas and fake (meta) implementations of every `torch.ops.simsd.*` operator.

An op exists, with a `reference` implementation, as soon as this module is imported; the compiled library only adds
implementations for its own dispatch keys. Argument meanings are documented once, in each op folder's `api.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simsd_kernels import dispatch
from simsd_kernels.advance_slots import arguments as advance_slots
from simsd_kernels.attention_plan.size import words_of
from simsd_kernels.plan_block import arguments as plan_block
from simsd_kernels.propose_block import arguments as propose_block
from simsd_kernels.reveal import arguments as reveal
from simsd_kernels.verify_graph import arguments as verify_graph

LIBRARY = torch.library.Library("simsd", "DEF")
LIBRARIES = (LIBRARY, dispatch.EMULATED) if dispatch.EMULATION else (LIBRARY,)

SCHEMAS = {
    "masked_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor clock, Tensor birth, Tensor death, Tensor? kv_len=None,"
        " float? scale=None, Tensor? block_table=None, Tensor? plan=None) -> Tensor"
    ),
    "attention_plan": (
        "(Tensor clock, Tensor birth, Tensor death, int group, int pages, Tensor? kv_len=None,"
        " Tensor? block_table=None) -> Tensor"
    ),
    "masked_attention_backward": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor clock, Tensor birth, Tensor death,"
        " Tensor? kv_len=None, float? scale=None) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "store_kv": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
    "qk_norm_rope_store": (
        "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin,"
        " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, float eps) -> Tensor"
    ),
    "add_rms_norm": "(Tensor? x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    "silu_mul": "(Tensor gate_up) -> Tensor",
    "sample_logits": (
        "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, Tensor position,"
        " Tensor revealed, Tensor? banned=None)"
        " -> (Tensor token, Tensor prob, Tensor log_odds, Tensor entropy, Tensor logsumexp, Tensor draw_logprob)"
    ),
    "thin_linear": "(Tensor x, Tensor weight, Tensor? scale=None) -> Tensor",
    "reveal": reveal.SIGNATURE.schema,
    "grouped_linear": "(Tensor x, Tensor weight, Tensor offsets, Tensor? scale=None) -> Tensor",
    "sort_by_expert": "(Tensor experts, int n_experts) -> (Tensor offsets, Tensor rows, Tensor places)",
    "combine_experts": "(Tensor y, Tensor weights, Tensor places) -> Tensor",
    "block_verify": (
        "(Tensor target_logits, Tensor draft_ids, Tensor known, Tensor drafted, Tensor temperature,"
        " Tensor? top_k=None, Tensor? top_p=None, Tensor? seed=None, Tensor? position=None,"
        " Tensor? revealed=None, Tensor? draft_logits=None, Tensor? coin=None, Tensor? residual=None,"
        " Tensor? banned=None, str rule='match')"
        " -> (Tensor accepted, Tensor bonus, Tensor tokens, Tensor target_ids, Tensor prob, Tensor draw_logprob)"
    ),
    "verify_graph": verify_graph.SIGNATURE.schema,
    "advance_slots": advance_slots.SIGNATURE.schema,
    "propose_block": propose_block.SIGNATURE.schema,
    "plan_block": plan_block.SIGNATURE.schema,
}

WITHOUT_CUDA = ("masked_attention_backward",)  # no CUDA kernel of its own: Triton serves CUDA tensors

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)

# Before the op folders register kernels of their own: what is there now is the compiled library's.
dispatch.probe(SCHEMAS)


_references: dict[str, Callable] = {}


def serving(op: str, device: torch.device) -> Callable:
    """What serves `op` by the automatic choice (or SIMSD_BACKEND), as a function of the schema's arguments by position:
    for callers who know that they are right, since compiled ops check what memory safety needs and no more."""
    backend = dispatch.choose_for(op, device)
    return _references[op] if backend == "reference" else dispatch.operator(op, backend)


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

    _references[op] = reference

    def on_any_device(*arguments):
        dispatch.note_reference(next(x.device for x in arguments if isinstance(x, Tensor)))
        return reference(*arguments)

    for library in LIBRARIES:
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


def fake(op: str, libraries: tuple[torch.library.Library, ...] = LIBRARIES) -> Callable:
    """Registers the decorated function as what `torch.ops.simsd.<op>` is to a compiler: shapes and dtypes alone."""

    def register(function: Callable) -> Callable:
        for library in libraries:
            torch.library.register_fake(f"{library.ns}::{op}", function, lib=library)
        return function

    return register


@fake("masked_attention")
def _(q, k, v, clock, birth, death, kv_len=None, scale=None, block_table=None, plan=None) -> Tensor:
    batch, heads, rows, dim = q.shape
    return q.new_empty((batch, rows, heads, dim)).transpose(1, 2)


@fake("attention_plan", (LIBRARY,))
def _(clock, birth, death, group, pages, kv_len=None, block_table=None) -> Tensor:
    compiled = clock.device.type == "cuda" and dispatch.compiled_obstacle("attention_plan", "CUDA") is None
    return clock.new_empty((words_of("cuda" if compiled else "reference", clock, birth, group),))


@fake("attention_plan", LIBRARIES[1:])
def _(clock, birth, death, group, pages, kv_len=None, block_table=None) -> Tensor:
    return clock.new_empty((words_of("cuda", clock, birth, group),))


@fake("masked_attention_backward")
def _(dout, q, k, v, out, clock, birth, death, kv_len=None, scale=None) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))


@fake("store_kv")
def _(k, v, k_cache, v_cache, slots) -> None:
    return None


@fake("qk_norm_rope_store")
def _(q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, slots, eps) -> Tensor:
    batch, rows, heads, dim = q.shape
    return q.new_empty((batch, heads, rows, dim))


@fake("add_rms_norm")
def _(x, residual, weight, eps) -> Tensor:
    return residual.new_empty(residual.shape)


@fake("silu_mul")
def _(gate_up) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@fake("sample_logits")
def _(logits, temperature, top_k, top_p, seed, position, revealed, banned=None):
    rows = logits.shape[:1]
    statistic = [logits.new_empty(rows, dtype=torch.float32) for _ in range(5)]
    return logits.new_empty(rows, dtype=torch.int64), *statistic


@fake("thin_linear")
def _(x, weight, scale=None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@fake("grouped_linear")
def _(x, weight, offsets, scale=None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


@fake("sort_by_expert")
def _(experts, n_experts):
    tokens, choices = experts.shape
    sizes = (n_experts + 1,), (tokens * choices,), (tokens, choices)
    return tuple(experts.new_empty(size, dtype=torch.int32) for size in sizes)


@fake("combine_experts")
def _(y, weights, places) -> Tensor:
    return y.new_empty((places.shape[0], y.shape[1]))


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
    banned=None,
    rule="match",
):
    batch, length = draft_ids.shape
    return (
        known.new_empty((batch,)),
        draft_ids.new_empty((batch,)),
        draft_ids.new_empty((batch, length)),
        draft_ids.new_empty((batch, length)),
        *(target_logits.new_empty((batch, length), dtype=torch.float32) for _ in range(2)),
    )


for _op in (advance_slots, plan_block, propose_block, reveal, verify_graph):
    fake(_op.SIGNATURE.op)(_op.SIGNATURE.fake)
