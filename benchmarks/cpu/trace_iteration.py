"""What one decoding iteration launches on a GPU, counted without a GPU.

`iterate` runs on fake CUDA tensors (shapes and dtypes, no data, no weights in memory) at the sizes of published SDAR
models in bfloat16. Counted are kernel launches (of torch's ops and of ours), reads by the host, for which it would wait
for the device, and uploads of data that the host made. Fails where the host reads or uploads anything, since a CUDA
graph of such an iteration cannot be replayed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simsd.config import EngineConfig
from simsd.decode import iteration
from simsd.decode.exchange import Commands, Report
from simsd.decode.iteration import Shape, iterate
from simsd.decode.slots import Slots
from simsd.decode.temporal import judge
from simsd.engine.pages import places_of
from simsd.models.deterministic import make_deterministic
from simsd.models.families.sdar import SDARConfig, SDARMoeConfig
from simsd.models.loading import LoadedModel
from simsd.models.runner import ModelRunner
from simsd.models.weights import skeleton
from simsd_kernels import dispatch

from ..contest import Bench
from ..report import Table

TABLE = Table([("part", "{part}"), ("op", "{op}"), ("greedy", "{greedy}"), ("noise", "{noise}")])
LAYERS = Table([("layer of a forward", "{layer}"), ("launches", "{launches}")], "Of one layer:")
# Published SDAR models: hidden size, layers, heads of queries and of keys, width of the MLP.
_DENSE = {
    "1.7B": (2048, 28, 16, 8, 6144),
    "4B": (2560, 36, 32, 8, 9728),
    "8B": (4096, 36, 32, 8, 12288),
}
_EXPERTS = {"30B-A3B": (2048, 48, 32, 4, 768)}  # of each of 128 experts, 8 for each token
MODELS = (*_DENSE, *_EXPERTS)
VOCABULARY = 151936
MASK, ENDS, BANNED = 151669, (151645, 151643), 267  # ids of the vocabulary without a token, the mask's among them

DEVICE = "cuda:0"  # with its number: else torch would ask for the current one
STOP_IDS, CAPACITY = 8, 4096
PAGE_SIZE, KV_MEMORY = EngineConfig.page_size, 2**40


def draws(given: dict, of_law: bool = False) -> int:
    """Of sample_logits and whoever draws as it does: reads the logits, finishes, filters where that may be asked for
    (`of_law`: whether or not there is noise)."""
    filters = given["top_k"] is not None or given["top_p"] is not None
    return 3 if filters and (of_law or given["seed"] is not None) else 2


def rounds_of_plan(given: dict) -> int:
    """Where states have draws of their own, a round for each state that may be taken."""
    return 0 if given["draft_logits"] is None else (given["max_states"] - 1) * (draws(given) + 1)


# Kernels that a call of an op of ours launches at these sizes on an H100, by its arguments where they decide: what
# tests/emulated/test_cuda_launches.py counts on the kernels themselves.
KERNELS: dict[str, int | Callable[[dict], int]] = {
    "attention_plan": 2,
    "masked_attention": 2,
    "store_kv": 1,
    "qk_norm_rope_store": 1,
    "add_rms_norm": 1,
    "silu_mul": 1,
    "thin_linear": 1,
    "grouped_linear": 1,
    "sort_by_expert": 1,
    "combine_experts": 1,
    "sample_logits": draws,
    "reveal": 1,
    "plan_block": lambda given: 3 + rounds_of_plan(given),
    "verify_graph": lambda given: draws(given) + 2,
    # With noise a round for each step that a schedule may have.
    "propose_block": lambda given: 1 + given["rows"].shape[1] * (draws(given) + 1) if given["noise"] else 3,
    "advance_slots": 1,
    "block_verify": lambda given: 2 + (2 * draws(given, True) if given["rule"] == "mrs" else draws(given)),
}
# Torch's ops that launch more than one kernel on CUDA; all others count as one.
SEVERAL = {"aten::topk": 2, "aten::sort": 2, "aten::argsort": 2}
_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
_BY_TENSORS = ("aten::index", "aten::index_put", "aten::index_put_")


class HostRead(Exception):
    """The host asked for a value that is on the device."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A call that launches `kernels` kernels: part of the iteration, op, place in the source; arguments of our ops."""

    part: str
    op: str
    kernels: int
    place: str
    arguments: tuple = ()


class Launches(TorchDispatchMode):
    """Notes what is launched, and what is uploaded, while it is entered (inside a FakeTensorMode).

    Attributes:
        calls: each call that launches kernels. uploads: the places where data of the host went to the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Launch] = []
        self.uploads: list[str] = []

    @property
    def kernels(self) -> int:
        return sum(call.kernels for call in self.calls)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        with self:  # in inference mode, ops that consist of others come here whole
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if func._schema.name in _BY_TENSORS and torch.bool in [x.dtype for x in args[1] if x is not None]:
            raise HostRead(f"{place()}: {func.name()} by a mask")
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostRead(f"{place()}: {func.name()}") from error
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        devices = {x.device.type for x in made} | {x.device.type for x in given if x.dim()}
        if devices == {"cpu", "cuda"} or (func.name().startswith("aten::copy_") and _differ(args[:2])):
            if made and made[0].device.type == "cpu":
                raise HostRead(f"{place()}: {func.name()}")
            self.uploads.append(f"{place()}: {func.name()}")
        if any(x.device.type == "cuda" for x in (*given, *made)) and (kernels := kernels_of(func, args)):
            ours = func.namespace.startswith("simsd")
            self.calls.append(Launch(part(), func.name(), kernels, place(), args if ours else ()))
        return out


class Uploads(TorchFunctionMode):
    """Notes tensors that are made on the device from data of the host, where torch's dispatcher does not see it."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_function__(self, function, types, args=(), kwargs=None):
        uploads = self._launches.uploads
        before = len(uploads)
        out = function(*args, **(kwargs or {}))
        if function in self.MAKERS and out.device.type == "cuda" and len(uploads) == before:
            uploads.append(f"{place()}: {function.__name__}")
        return out


class WithoutCuda(TorchFunctionMode):
    """Does by torch's ops what a torch without CUDA refuses to do with CUDA tensors, fake ones or not."""

    METHODS = {
        Tensor.copy_: torch.ops.aten.copy_,
        Tensor.contiguous: torch.ops.aten.contiguous,
        Tensor.nonzero: torch.ops.aten.nonzero,
        Tensor.__invert__: torch.ops.aten.bitwise_not,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__getitem__:
            view, indices = _indexed(*args)
            return torch.ops.aten.index(view, indices) if indices else view
        if function is Tensor.__setitem__:
            x, index, value = args
            view, indices = _indexed(x, index)
            if not isinstance(value, Tensor) and (indices or not view.dim()):
                value = torch.tensor(value, dtype=x.dtype)  # what torch copies from the host
            if indices:
                torch.ops.aten.index_put_(view, indices, value)
            elif isinstance(value, Tensor):
                torch.ops.aten.copy_(view, value)
            else:
                view.fill_(value)
            return None
        return self.METHODS.get(function, function)(*args, **(kwargs or {}))


def _indexed(x: Tensor, index: object) -> tuple[Tensor, list[Tensor | None]]:
    """The view of x that the integers, slices and Nones of an index select, and the tensors that select from it."""
    index = index if isinstance(index, tuple) else (index,)
    indices: dict[int, Tensor] = {}
    dim = 0
    for n, one in enumerate(index):
        if one is None:
            x = x.unsqueeze(dim)
            dim += 1
        elif one is Ellipsis:
            dim = x.dim() - sum(other is not None for other in index[n + 1 :])
        elif isinstance(one, slice):
            x = x if one == slice(None) else torch.ops.aten.slice(x, dim, one.start, one.stop, one.step or 1)
            dim += 1
        elif isinstance(one, int):
            x = x.select(dim, one)
        else:
            indices[dim] = torch.tensor(one) if isinstance(one, list) else one
            dim += 1
    return x, [indices.get(n) for n in range(max(indices, default=-1) + 1)]


def _differ(tensors: tuple) -> bool:
    return len({x.device.type for x in tensors if isinstance(x, Tensor)}) > 1


def kernels_of(func: torch._ops.OpOverload, arguments: tuple) -> int:
    """Kernels that a call launches on CUDA."""
    name = func._schema.name
    if func.namespace.startswith("simsd"):
        kernels = KERNELS[name.split("::")[1]]
        if not callable(kernels):
            return kernels
        given = {one.name: one.default_value for one in func._schema.arguments}
        return kernels(given | dict(zip(given, arguments, strict=False)))
    if func.is_view or name in ("aten::_unsafe_view", *_ALLOCATIONS):
        return 0
    return SEVERAL.get(name, 1)


# The functions that the parts of an iteration are.
_PARTS = {
    inspect.unwrap(function).__code__: name
    for name, function in {
        "propose": iteration.propose,
        "plan": iteration.plan_states,
        "forward": ModelRunner.forward,
        "verify": iteration.walk_states,
        "judge": judge,
        "advance": iteration.advance,
        "keep logits": ModelRunner.keep_logits,
    }.items()
}
ORDER = ("propose", "draft forward", "plan", "forward", "verify", "judge", "advance", "keep logits", "elsewhere", "all")


def part() -> str:
    """The part of the iteration that the caller's caller is in."""
    found = [_PARTS[frame.f_code] for frame in _frames() if frame.f_code in _PARTS]
    if {"propose", "forward"} <= set(found):
        return "draft forward"
    return found[0] if found else "elsewhere"


def place() -> str:
    """File and line of ours that the innermost call comes from."""
    ours = ("python/simsd/", "simsd_kernels/")
    for frame in _frames():
        path = pathlib.PurePath(frame.f_code.co_filename).as_posix()
        if start := max(path.rfind(folder) for folder in ours) + 1:
            return f"{path[start - 1 :]}:{frame.f_lineno}"
    return "unknown"


def _frames() -> Iterator:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def fake_model(name: str, block_length: int, layers: int | None = None) -> LoadedModel:
    """A published model without data, as `simsd.load(..., device="cuda", deterministic=True)` makes it; call it inside
    a FakeTensorMode. `layers`: other than it has."""
    hidden, own, heads, key_heads, width = (_DENSE | _EXPERTS)[name]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers or own,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": 128,
        "intermediate_size": width,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "block_length": block_length,
        "mask_token_id": MASK,
        "eos_token_id": ENDS[0],
    }
    if name in _EXPERTS:
        experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": width}
        config = SDARMoeConfig(**settings | experts, norm_topk_prob=True)
    else:
        config = SDARConfig(**settings)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = skeleton(name, config)
        sizes = {key: value.shape for key, value in model.state_dict().items()}
    weights = {key: torch.empty(size, dtype=torch.bfloat16, device=DEVICE) for key, size in sizes.items()}
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(DEVICE)
    config.dtype = torch.bfloat16
    make_deterministic(model.eval())
    return LoadedModel(model, None, block_length, MASK, ENDS, name, deterministic=True, thin_linear=True)


@contextlib.contextmanager
def without_a_gpu() -> Iterator[None]:
    """Inside, tensors on DEVICE are fake, and every op of ours counts as compiled for CUDA."""
    with dispatch.assume("cuda"), FakeTensorMode(), WithoutCuda(), torch.inference_mode():
        yield


@contextlib.contextmanager
def counted() -> Iterator[Launches]:
    """What is launched and uploaded inside. Raises HostRead where the host would wait for the device."""
    launches = Launches()
    with launches, Uploads(launches):
        yield launches


def trace(
    target: str,
    draft: str | None,
    shape: Shape,
    batch: int = 1,
    block_length: int = 4,
    layers: int | None = None,
    top_logprobs: int = 0,
) -> Launches:
    """What one iteration launches; `layers` in place of the models' own numbers of them.

    Raises HostRead where the host would wait for the device.
    """
    with without_a_gpu():
        models = [name and fake_model(name, block_length, layers) for name in (target, draft)]
        banned = range(models[0].vocab_size - BANNED, models[0].vocab_size)
        lookahead = max(shape.lookahead, 1)
        sizes = batch, block_length, CAPACITY, lookahead, STOP_IDS, torch.device(DEVICE)
        slots = Slots(*sizes, top_logprobs, shape.states)
        slots.ban(banned, models[0].vocab_size)
        if shape.noise:
            slots.allow_noise(models[0].vocab_size, models[0].dtype)
        places = places_of(
            *models,
            slots=batch,
            capacity=CAPACITY,
            block_length=block_length,
            states=max(shape.states, 2),
            page_size=PAGE_SIZE,
            kv_memory=KV_MEMORY,
        )
        _, *runners = places.runners(*models)
        commands = Commands(batch, slots.device)
        report = Report.allocate(batch, lookahead, block_length, slots.device, top_logprobs=top_logprobs)
        report = report.of(shape.lookahead)
        logits = torch.empty(shape.logits_rows, models[0].vocab_size, dtype=models[0].dtype, device=slots.device)
        runners[0].keep_logits(logits)
        for _ in range(2):  # the second: tables are made in the first
            with counted() as launches:
                iterate(slots, commands, *runners, shape, report)
    return launches


def exact_shape(batch: int, block_length: int, lookahead: int, states: int, noise: bool = False, **changes) -> Shape:
    """An iteration in which the draft model proposes `lookahead` blocks, with one forward each."""
    shape = Shape(
        lookahead=lookahead,
        states=states,
        logits_rows=batch * states * block_length,
        draft_blocks=lookahead,
        keeps_logits=True,
        noise=noise,
    )
    return dataclasses.replace(shape, **changes)


def per_layer(target: str, batch: int, block_length: int, states: int) -> int:
    """Kernels of one layer of a forward."""
    shape = exact_shape(batch, block_length, 0, states)
    counts = []
    for layers in (1, 2):
        calls = trace(target, None, shape, batch, block_length, layers).calls
        counts.append(sum(call.kernels for call in calls if call.part == "forward"))
    return counts[1] - counts[0]


def counts(traced: dict[str, Launches]) -> dict[tuple[str, str], dict[str, int]]:
    """(part, op) to launches in each trace; op "" is all of a part."""
    found: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for name, launches in traced.items():
        for call in launches.calls:
            for key in ((call.part, ""), (call.part, call.op), ("all", "")):
                found[key][name] += call.kernels
    order = sorted(found, key=lambda key: (ORDER.index(key[0]), key[1]))
    return {key: {name: found[key][name] for name in traced} for key in order}


def run(bench: Bench, target: str, draft: str, batch: int, block_length: int, lookahead: int, states: int) -> None:
    """`batch`: slots; `lookahead`: drafted blocks; `states`: of blocks that the target sees of a slot."""
    if unknown := {target, draft} - set(MODELS):
        raise ValueError(f"unknown model {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    traced = {
        name: trace(target, draft, exact_shape(batch, block_length, lookahead, states, noise), batch, block_length)
        for name, noise in (("greedy", False), ("noise", True))
    }
    for (part, op), launches in counts(traced).items():
        bench.row(TABLE, part=part, op=op, **launches)
    for kind, name in (("dense", "8B"), ("experts", "30B-A3B")):
        bench.row(LAYERS, layer=kind, launches=per_layer(name, batch, block_length, states))
    uploads = [place for launches in traced.values() for place in launches.uploads]
    bench.note(f"reads by the host: 0; uploads: {', '.join(uploads) or 0}")
    if uploads:
        raise RuntimeError(f"the host uploads: {', '.join(uploads)}")
