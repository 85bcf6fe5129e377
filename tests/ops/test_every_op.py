"""What holds for every op: its bits depend on nothing around a lane, no graph and no stream; bad input is refused."""

from __future__ import annotations

import pytest
import torch

from backends import HAS_GPU, backends, compiled, device_of, kernels, sized
from every_op import OPS, call, on, outputs, same_bits
from simsd_kernels import dispatch

ANY_LENGTH = ("text",)  # arguments that may have any
OF_ROWS = ("silu_mul", "add_rms_norm", "thin_linear")  # [..., D]: one dimension is one row
OWN_WORDS = ("store_kv",)  # whose CUDA kernel says otherwise what is wrong
# Whose reference takes float64.
FLOAT64 = ("masked_attention", "masked_attention_backward", "add_rms_norm", "silu_mul", "combine_experts")
FLOAT64 += ("grouped_linear", "thin_linear", "qk_norm_rope_store")
UNTRACED = ("plan_block",)  # whose reference asks what is in its tensors
SEEDS = range(24 if HAS_GPU else sized(3, interpreted=1))

each_op = pytest.mark.parametrize("op", OPS, ids=str)
each_refusal = pytest.mark.parametrize(
    "op, name, value, error, message",
    [pytest.param(op, *case, id=f"{op}-{n}-{case[0]}") for op in OPS for n, case in enumerate(op.refused)],
)


@pytest.mark.parametrize("op", [op for op in OPS if op.name in FLOAT64], ids=str)
def test_float64_is_left_to_the_reference(op, backend):
    wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in op.good().items()}
    if backend == "reference":
        narrow, out = (outputs(op.function(**made, backend=backend)) for made in (op.good(), wide))
        for given, expected in zip(out, narrow, strict=True):
            torch.testing.assert_close(given, expected.double(), rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(RuntimeError, match=f"{backend}: supports float32, bfloat16 and float16, got torch.float64"):
        op.function(**on(device_of(backend), wide), backend=backend)


@each_op
@compiled
def test_dispatcher_serves_what_the_function_serves(op, backend):
    for seed in SEEDS:
        made, given = op.make(seed), on(device_of(backend), op.make(seed))
        out = outputs(dispatch.operator(op.name, backend)(**given))
        expected = call(op, on(device_of(backend), made), backend)
        assert same_bits((*out, *(given[name] for name in op.changed)), expected)


@each_op
@kernels
@pytest.mark.parametrize("number", SEEDS[:12])
def test_lane_is_bit_identical_alone_and_twice(op, backend, number):
    device, made = device_of(backend), op.make(number)
    if made.get("block_table") is not None:
        pytest.skip("a lane's pages are not its own")
    whole = call(op, on(device, made), backend)
    assert same_bits(call(op, on(device, made), backend), whole), "two calls differ"
    is_one_row = op.name in OF_ROWS and made[op.lanes[0]].dim() == 1
    size = made[op.lanes[0]].shape[0] if op.lanes and not is_one_row else 0
    for lane in {0, size // 2, size - 1} if size else ():
        out = call(op, on(device, op.lane_alone(made, lane)), backend)
        assert same_bits(out, tuple(x[lane : lane + 1] for x in whole)), f"lane {lane} of {size}"


@each_op
def test_opcheck(op):
    torch.library.opcheck(op.overload, (), on(device_of("cuda"), op.good()))


@each_op
@pytest.mark.skipif(dispatch.interpreting(), reason="not run: nothing compiles Triton's interpreter")
def test_compiles_into_a_larger_graph(op, backend):
    if backend == "reference" and op.name in UNTRACED:
        pytest.skip("the reference is not traced")
    made = op.make(1)
    expected = call(op, on(device_of(backend), made), backend)

    function, written = op.function, op.changed

    def step(given):
        made = {name: x if name in written or not torch.is_tensor(x) else x * 1 for name, x in given.items()}
        return outputs(function(**made, backend=backend))

    given = on(device_of(backend), made)
    torch._dynamo.reset()
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(given)
    assert same_bits((*out, *(given[name] for name in written)), expected)


@each_op
@backends("gpu", "triton", "cuda")
@pytest.mark.parametrize("number", [1, 2, 3, 5, 7])
def test_captured_graph_replays_what_eager_gives(op, backend, number):
    device, made = device_of(backend), op.make(number)
    first = call(op, on(device, made), backend)
    fixed = on(device, made)
    call(op, on(device, made), backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(op, fixed, backend)
    turned = {n: v.roll(1, -1) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in made.items()}
    for arguments, expected in ((made, first), (turned, call(op, on(device, turned), backend)), (made, first)):
        for output in out:
            output.fill_(float("nan") if output.is_floating_point() else -77)
        for name, value in arguments.items():
            if torch.is_tensor(value):
                fixed[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(out, expected)


@each_op
@backends("gpu", "triton", "cuda")
def test_two_streams_do_not_disturb_each_other(op, backend):
    device, made = device_of(backend), [op.make(number) for number in (1, 2)]
    expected = [call(op, on(device, given), backend) for given in made]
    streams = [torch.cuda.Stream() for _ in made]
    copies = [[on(device, given) for _ in range(20)] for given in made]
    torch.cuda.synchronize()
    found = [[], []]
    for turn in range(20):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[n].append(call(op, copies[n][turn], backend))
    torch.cuda.synchronize()
    for n in range(2):
        assert all(same_bits(out, expected[n]) for out in found[n])


@each_refusal
def test_bad_input_is_refused_by_name_and_writes_nothing(op, name, value, error, message):
    good = op.good()
    before = on(torch.device("cpu"), good)
    with pytest.raises(error, match=message):
        op.function(**{**good, name: value})
    assert same_bits(tuple(good[n] for n in op.changed), tuple(before[n] for n in op.changed))


@each_op
@backends("gpu")
def test_bad_input_is_refused_in_the_same_words_as_on_the_cpu(op):
    device, good = device_of("cuda"), op.good()
    for name, value, error, message in op.refused:
        if not is_unsafe(op, name, value):
            continue  # a matter of values, which are trusted on a GPU: looking at them would make the host wait
        value = value.to(device) if torch.is_tensor(value) and value.device.type == "cpu" else value
        with pytest.raises(error, match="one device" if "one device" in message else message):
            op.function(**{**on(device, good), name: value})


def is_unsafe(op, name: str, value) -> bool:
    """Whether what is refused is more than the values in a tensor: its shape, its type."""
    usual = op.good().get(name)
    if not (torch.is_tensor(value) and torch.is_tensor(usual) and value.dtype == usual.dtype):
        return True
    return value.shape != usual.shape and not (name in ANY_LENGTH and value.dim() == usual.dim())


def on_meta(value) -> bool:
    return torch.is_tensor(value) and value.device.type == "meta"


@each_op
@compiled
def test_compiled_library_refuses_wrong_shapes_and_types_itself(op, backend):
    """And the CUDA kernels, where they take CPU tensors, in the words of the CPU's."""
    device, checked = device_of(backend), 0
    for name, value, *_ in op.refused:
        good = on(device, op.good())
        if type(value) not in (torch.Tensor, int) or type(value) is not type(good.get(name)):
            continue  # the dispatcher refuses it
        if not is_unsafe(op, name, value) or on_meta(value):
            continue
        checked += 1
        said = []
        for library in {dispatch.operator(op.name, backend), *([op.overload] if device.type == "cpu" else [])}:
            with pytest.raises(RuntimeError, match=f"^{op.name}: ") as refused:
                library(**{**good, **on(device, {name: value})})
            said.append(str(refused.value))
        assert op.name in OWN_WORDS or len(set(said)) == 1, said
    assert checked
