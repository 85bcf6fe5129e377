"""Every op on the GPU: right, the same whatever rides along, in a compiled graph, in a captured one, on any stream."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import (
    BACKENDS,
    DEVICE,
    OPS_BY_NAME,
    SEEDS,
    call,
    check,
    compare,
    each_backend,
    each_op,
    needs_gpu,
    on,
    same_bits,
)

import plans
import simsd_kernels
from simsd_kernels import dispatch

ANY_LENGTH = ("banned_ids",)  # arguments that may have any


@each_op
@each_backend
@pytest.mark.parametrize("seed", SEEDS)
def test_right_on_random_arguments(op, backend, seed):
    made = op.make(seed)
    check(op, made, call(op, on(DEVICE, made), backend))


@each_op
@pytest.mark.parametrize("seed", SEEDS[:10])
def test_dispatcher_serves_what_the_function_serves(op, seed):
    made = op.make(seed)
    given = on(DEVICE, made)
    out = op.overload(**given)
    out = (out,) if torch.is_tensor(out) else tuple(out or ())
    check(op, made, (*out, *(given[name] for name in op.changed)))


@each_op
@each_backend
@pytest.mark.parametrize("seed", SEEDS[:12])
def test_lane_is_bit_identical_alone_and_twice(op, backend, seed):
    made = op.make(seed)
    if "block_table" in made:
        pytest.skip("a lane's pages are not its own")
    whole = call(op, on(DEVICE, made), backend)
    assert same_bits(call(op, on(DEVICE, made), backend), whole), "two calls differ"
    size = made[op.lanes[0]].shape[0] if op.lanes else 0
    for lane in {0, size // 2, size - 1} if size else ():
        out = call(op, on(DEVICE, op.lane_alone(made, lane)), backend)
        assert same_bits(out, tuple(x[lane : lane + 1] for x in whole)), f"lane {lane} of {size}"


@pytest.mark.parametrize("op", [OPS_BY_NAME["plan_block"]], ids=str)
@each_backend
@pytest.mark.parametrize("seed", SEEDS[:12])
def test_a_slot_is_planned_alone_as_in_company(op, backend, seed):
    made = op.make(seed) | {"row_budget": plans.ints(10**6), "logits_rows": 10**5}
    fields = simsd_kernels.Plan._fields
    whole = dict(zip(fields, call(op, on(DEVICE, made), backend), strict=True))
    for slot in range(len(made["start"])):
        alone = dict(zip(fields, call(op, on(DEVICE, plans.alone(made, slot)), backend), strict=True))
        for name in plans.PER_SLOT_RESULTS:
            assert torch.equal(alone[name][0], whole[name][slot]), name


@each_op
def test_opcheck(op):
    torch.library.opcheck(op.overload, (), on(DEVICE, op.good()))


@each_op
@each_backend
@pytest.mark.skipif(dispatch.interpreting(), reason="not run: nothing compiles Triton's interpreter")
def test_compiles_into_a_larger_graph(op, backend):
    made = op.make(1)
    expected = call(op, on(DEVICE, made), backend)

    def step(given):
        out = op.function(**given, backend=backend)
        return (out,) if torch.is_tensor(out) else tuple(out or ())

    given = on(DEVICE, made)
    torch._dynamo.reset()
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(given)
    assert same_bits((*out, *(given[name] for name in op.changed)), expected)


@each_op
@each_backend
@needs_gpu
@pytest.mark.parametrize("seed", [1, 2, 3, 5, 7])
def test_captured_graph_replays_what_eager_gives(op, backend, seed):
    made = op.make(seed)
    first = call(op, on(DEVICE, made), backend)
    fixed = on(DEVICE, made)
    call(op, on(DEVICE, made), backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(op, fixed, backend)
    turned = {n: v.roll(1, -1) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in made.items()}
    for arguments, expected in ((made, first), (turned, call(op, on(DEVICE, turned), backend)), (made, first)):
        for output in out:
            output.fill_(float("nan") if output.is_floating_point() else -77)
        for name, value in arguments.items():
            if torch.is_tensor(value):
                fixed[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(out, expected)


@each_op
@each_backend
@needs_gpu
def test_two_streams_do_not_disturb_each_other(op, backend):
    made = [op.make(seed) for seed in (1, 2)]
    expected = [call(op, on(DEVICE, given), backend) for given in made]
    streams = [torch.cuda.Stream() for _ in made]
    copies = [[on(DEVICE, given) for _ in range(20)] for given in made]
    torch.cuda.synchronize()
    found = [[], []]
    for turn in range(20):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[n].append(call(op, copies[n][turn], backend))
    torch.cuda.synchronize()
    for n in range(2):
        assert all(same_bits(out, expected[n]) for out in found[n])


@each_op
def test_bad_input_is_refused_in_the_same_words_as_on_the_cpu(op):
    compared = 0
    good = op.good()
    for name, value, *_ in op.refused:
        on_device = value.to(DEVICE) if torch.is_tensor(value) and value.device.type == "cpu" else value
        host, device = refusal(op, {**good, name: value}), refusal(op, {**on(DEVICE, good), name: on_device})
        assert host is not None, name
        usual = good.get(name)
        if torch.is_tensor(value) and torch.is_tensor(usual) and value.dtype == usual.dtype:
            if value.shape == usual.shape or (name in ANY_LENGTH and value.dim() == 1):
                continue  # a matter of values, which are trusted on a GPU: looking at them would make the host wait
        compared += 1
        words = "one device" if "one device" in host[1] else host[1]
        assert device is not None and device[0] is host[0] and words in device[1], (name, host, device)
    assert compared >= 3


def refusal(op, made):
    try:
        op.function(**on_its_own(made))
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    return None


def on_its_own(made):
    return {n: v.clone() if torch.is_tensor(v) and v.device.type != "meta" else v for n, v in made.items()}


@each_op
def test_compiled_library_refuses_wrong_shapes_and_types_itself(op):
    key = DEVICE.type.upper()
    if reason := dispatch.compiled_obstacle(op.name, key):
        pytest.skip(reason)
    good = op.good()
    for name, value, *_ in op.refused:
        if not torch.is_tensor(value) or value.device.type == "meta" or not torch.is_tensor(good.get(name)):
            continue
        if value.dtype == good[name].dtype and (value.shape == good[name].shape or name in ANY_LENGTH):
            continue
        with pytest.raises(RuntimeError, match=f"{op.name}: "):
            op.overload(**{**on(DEVICE, good), name: value.to(DEVICE)})


@each_op
@needs_gpu
def test_backends_agree(op):
    for seed in SEEDS[:5]:
        made = op.make(seed)
        if op.right is None:
            compare(*(call(op, on(DEVICE, made), backend) for backend in BACKENDS))
        else:
            for backend in BACKENDS:
                check(op, made, call(op, on(DEVICE, made), backend))
