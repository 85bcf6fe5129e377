"""An op's definition: what schema, fake, checks, binding and documentation make of it."""

import importlib
import inspect
import math
import pathlib

import pytest
import torch

import simsd_kernels
from simsd_kernels.ops import SCHEMAS
from simsd_kernels.signature import FLOATING, Argument, Number, Result, Signature

SIGNATURE = Signature(
    "toy",
    (
        Argument("logits", FLOATING, "N V", "What the model says.", least=(("V", 1),)),
        Argument("rows", torch.int32, "B L", "Rows of logits.", low=-1, high="N-1"),
        Argument("seen", torch.int64, "B", written=True),
        Argument("weight", torch.float32, "B blocks*L", low=0.0, high=1.0, bounds="a probability"),
        Argument("draft", FLOATING, "B D", optional=True),
        Argument("top", torch.int32, "B", "How many.", optional=True, high="min(V, 9)"),
        Argument("banned", torch.int64, "n", optional=True, written=True, low=0, high="D-1"),
    ),
    (Number("blocks", "How many blocks.", 1, "L"), Number("stride", low="blocks+1")),
    (Result("out", torch.int64, "B (blocks+2)*L"), Result("prob", torch.float32, "N")),
    most=(("L", 8),),
)
SIZES = {"blocks": 3, "stride": 9, "N": 5, "V": 7, "B": 2, "L": 4, "D": 6, "n": 1}


def good(**changed):
    made = {
        "logits": torch.zeros(5, 7, dtype=torch.bfloat16),
        "rows": torch.tensor([[0, 1, 2, 3], [4, -1, -1, -1]], dtype=torch.int32),
        "seen": torch.zeros(2, dtype=torch.int64),
        "weight": torch.zeros(2, 12),
        "draft": torch.zeros(2, 6),
        "top": torch.tensor([3, 7], dtype=torch.int32),
        "banned": torch.tensor([5]),
        "blocks": 3,
        "stride": 9,
    }
    return made | changed


def check(**changed):
    return SIGNATURE.check(*good(**changed).values())


def test_schema_is_the_one_that_torch_reads():
    assert SIGNATURE.schema == (
        "(Tensor logits, Tensor rows, Tensor(a!) seen, Tensor weight, Tensor? draft, Tensor? top, Tensor(b!)? banned,"
        " int blocks, int stride) -> (Tensor out, Tensor prob)"
    )
    read = torch._C.parse_schema("toy" + SIGNATURE.schema)
    assert [argument.name for argument in read.arguments] == list(good())
    assert [argument.name for argument in read.arguments if argument.is_write] == ["seen", "banned"]
    assert [result.name for result in read.returns] == ["out", "prob"]


@pytest.mark.parametrize("results, schema", [((), "()"), ((Result("out", torch.int64, "N"),), "(Tensor out)")])
def test_schema_of_an_op_with_at_most_one_result(results, schema):
    signature = Signature("toy", (Argument("x", torch.int64, "N"),), results=results)
    assert signature.schema == f"(Tensor x) -> {schema}"
    assert len(torch._C.parse_schema("toy" + signature.schema).returns) == len(results)


def test_call_by_position_is_the_call_by_name():
    made = good()
    first = list(made.values())[:4]
    named = {name: made[name] for name in list(made)[4:]}
    by_position, by_name = SIGNATURE.bind(tuple(first), named), SIGNATURE.bind((), dict(reversed(made.items())))
    assert all(a is b is c for a, b, c in zip(by_position, by_name, made.values(), strict=True))
    assert SIGNATURE.named(by_name) == made


def test_optional_arguments_that_are_left_out_are_none():
    made = {name: value for name, value in good().items() if name not in ("draft", "top", "banned")}
    assert SIGNATURE.bind((), made)[4:] == (None, None, None, 3, 9)


@pytest.mark.parametrize(
    "positions, left_out, added, message",
    [
        (0, "rows", {}, r"toy\(\) missing 1 required .*'rows'"),
        (0, "stride", {}, r"toy\(\) missing 1 required keyword-only argument: 'stride'"),
        (0, None, {"row": 1}, r"toy\(\) got an unexpected keyword argument 'row'"),
        (2, None, {"rows": 1}, r"toy\(\) got multiple values for argument 'rows'"),
        (5, None, {}, r"toy\(\) takes 4 positional arguments but 5"),
    ],
)
def test_call_with_missing_unknown_or_doubled_arguments_is_refused_by_name(positions, left_out, added, message):
    made = good()
    given = tuple(made.values())[:positions]
    named = {name: value for name, value in list(made.items())[positions:] if name != left_out}
    with pytest.raises(TypeError, match=message):
        SIGNATURE.bind(given, named | added)


def test_numbers_alone_are_given_by_name():
    signature = Signature("toy", (Argument("x", torch.int64, "N"),), (Number("count"),))
    x = torch.zeros(1)
    assert signature.bind((x,), {"count": 3}) == (x, 3)
    with pytest.raises(TypeError, match="takes 1 positional argument but 2"):
        signature.bind((x, 3), {})


def test_sizes_are_those_of_the_first_argument_with_the_letter():
    assert check() == SIZES
    assert SIGNATURE.sizes(tuple(good().values())) == SIZES
    assert check(draft=None, banned=None) == {k: v for k, v in SIZES.items() if k not in "Dn"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_has_the_shapes_types_and_device_of_the_results(device):
    values = [value.to(device) if torch.is_tensor(value) else value for value in good().values()]
    out, prob = SIGNATURE.fake(*values)
    assert (out.shape, out.dtype) == ((2, 20), torch.int64) and out.device.type == device
    assert (prob.shape, prob.dtype) == ((5,), torch.float32) and prob.device.type == device


def test_fake_of_one_result_is_a_tensor_and_of_none_is_none():
    x = torch.zeros(3, dtype=torch.int64)
    one = Signature("toy", (Argument("x", torch.int64, "N"),), results=(Result("out", torch.int32, "2*N N 1"),))
    assert one.fake(x).shape == (6, 3, 1)
    assert Signature("toy", one.arguments).fake(x) is None
    assert Signature("toy", one.arguments, results=(Result("out", torch.int32, ""),)).fake(x).shape == ()


REFUSED = [
    ("logits", 3.0, TypeError, "logits must be a tensor, got float"),
    ("logits", None, TypeError, "logits must be a tensor, got NoneType"),
    ("logits", torch.zeros(5), ValueError, r"logits must be \[N, V\] = \[any, any\], got \[5\]"),
    ("logits", torch.zeros(5, 0), ValueError, r"logits must have V >= 1, got \[5, 0\] for \[N, V\]"),
    ("logits", torch.zeros(5, 7).int(), TypeError, "logits must be torch.float32 or .*, got torch.int32"),
    ("rows", torch.zeros(2, 4), TypeError, "rows must be torch.int32, got torch.float32"),
    ("rows", torch.full((2, 4), 5).int(), ValueError, r"rows must be in \[-1, 4\], got 5"),
    ("rows", torch.full((2, 4), -2).int(), ValueError, r"rows must be in \[-1, 4\], got -2"),
    ("seen", torch.zeros(3, dtype=torch.int64), ValueError, r"seen must be \[B\] = \[2\], got \[3\]"),
    ("weight", torch.zeros(2, 13), ValueError, r"weight must be \[B, blocks\*L\] = \[2, 12\], got \[2, 13\]"),
    ("weight", torch.full((2, 12), 1.5), ValueError, "weight must be a probability, got 1.5"),
    ("weight", torch.full((2, 12), math.nan), ValueError, "weight must be a probability, got nan"),
    ("weight", torch.zeros(2, 12, device="meta"), ValueError, "one device, got logits on cpu.*weight on meta"),
    ("top", torch.zeros(2), TypeError, "top must be torch.int32"),
    ("top", torch.tensor([0, 8], dtype=torch.int32), ValueError, "top must be at most 7, got 8"),
    ("top", [3, 7], TypeError, "top must be a tensor, got list"),
    ("banned", torch.tensor([[1]]), ValueError, r"banned must be \[n\] = \[any\], got \[1, 1\]"),
    ("banned", torch.tensor([6]), ValueError, r"banned must be in \[0, 5\], got 6"),
    ("banned", torch.tensor([1, -1]), ValueError, r"banned must be in \[0, 5\], got -1"),
    ("blocks", 3.0, TypeError, "blocks must be an integer, got 3.0"),
    ("blocks", True, TypeError, "blocks must be an integer, got True"),
    ("blocks", None, TypeError, "blocks must be an integer, got None"),
    ("stride", 3, ValueError, "stride must be >= 4, got 3"),
]


@pytest.mark.parametrize("name, value, error, message", REFUSED)
def test_what_the_definition_does_not_allow_is_refused_by_name(name, value, error, message):
    with pytest.raises(error, match=f"^toy: .*{message}"):
        check(**{name: value})


@pytest.mark.parametrize("blocks, message", [(0, r"in \[1, 4\], got 0"), (5, r"in \[1, 4\], got 5")])
def test_number_is_bounded_by_a_size(blocks, message):
    with pytest.raises(ValueError, match=f"toy: blocks must be {message}"):
        check(blocks=blocks, weight=torch.zeros(2, blocks * 4))


def test_size_beyond_the_most_is_refused():
    rows, weight = torch.zeros(2, 9, dtype=torch.int32), torch.zeros(2, 27)
    with pytest.raises(ValueError, match="toy: L must be at most 8, got 9"):
        check(rows=rows, weight=weight)


def test_bound_by_an_argument_that_is_left_out_is_not_looked_at():
    assert check(draft=None, banned=torch.tensor([100]))["n"] == 1


def test_empty_arguments_are_within_any_bounds():
    empty = {"rows": torch.zeros(0, 4, dtype=torch.int32), "weight": torch.zeros(0, 12), "draft": torch.zeros(0, 6)}
    empty |= {"seen": torch.zeros(0, dtype=torch.int64), "top": torch.zeros(0, dtype=torch.int32)}
    assert check(**empty, banned=torch.zeros(0, dtype=torch.int64))["B"] == 0


def test_values_of_other_devices_are_trusted():
    wild = {"rows": torch.full((2, 4), 99).int(), "weight": torch.full((2, 12), math.nan)}
    values = [value.to("meta") if torch.is_tensor(value) else value for value in good(**wild).values()]
    assert SIGNATURE.check(*values) == SIZES


def test_checks_and_binding_compile_into_a_graph():
    def function(made):
        values = SIGNATURE.bind((), made)
        return values[0] + SIGNATURE.check(*values)["N"]

    made = good()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(made), function(made))
    with pytest.raises(Exception, match="seen must be"):
        compiled(made | {"seen": torch.zeros(3, dtype=torch.int64)})


def test_op_of_a_signature_passes_torchs_own_checks():
    library = torch.library.Library("simsd_test_signature", "DEF")
    library.define("toy" + SIGNATURE.schema)

    def toy(*values):
        sizes = SIGNATURE.check(*values)
        values[2].add_(1)
        if values[6] is not None:
            values[6].mul_(2)
        shape = sizes["B"], (sizes["blocks"] + 2) * sizes["L"]
        return torch.zeros(shape, dtype=torch.int64), torch.zeros(sizes["N"])

    library.impl("toy", toy, "CompositeExplicitAutograd")
    torch.library.register_fake("simsd_test_signature::toy", SIGNATURE.fake, lib=library)
    op = torch.ops.simsd_test_signature.toy.default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, tuple(good(banned=torch.tensor([1])).values()), test_utils=tests)
    torch.library.opcheck(op, tuple(good(draft=None, top=None, banned=None).values()), test_utils=tests)


def test_documentation_says_of_every_argument_what_it_is():
    @SIGNATURE.document
    def toy(*given, backend=None, **named):
        """Does something.

        Args:
            {arguments}
            backend: which.
        """

    said = [line.strip() for line in toy.__doc__.splitlines()]
    assert said[3:13] == [
        "logits: float32, bfloat16 or float16 [N, V]. What the model says.",
        "rows: int32 [B, L]; in [-1, N-1]. Rows of logits.",
        "seen: int64 [B], written.",
        "weight: float32 [B, blocks*L]; a probability.",
        "draft: float32, bfloat16 or float16 [B, D] or None.",
        "top: int32 [B] or None; at most min(V, 9). How many.",
        "banned: int64 [n] or None, written; in [0, D-1].",
        "blocks: in [1, L]. How many blocks.",
        "stride: >= blocks+1.",
        "backend: which.",
    ]
    assert list(inspect.signature(toy).parameters) == [*good(), "backend"]
    assert inspect.signature(toy).parameters["draft"].default is None
    assert inspect.signature(toy).parameters["stride"].kind is inspect.Parameter.KEYWORD_ONLY


def test_long_documentation_is_wrapped():
    signature = Signature("toy", (Argument("x", torch.int64, "N", "Word upon word upon-word. " * 20),))

    @signature.document
    def toy():
        """
        {arguments}
        """

    lines = toy.__doc__.strip().splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= 120
    assert all(line.startswith(" " * 12) for line in lines[1:]) and not any(line.endswith("-") for line in lines)


def defined():
    """Signatures of the package's own ops, by op."""
    folders = pathlib.Path(simsd_kernels.__file__).parent.glob("*/arguments.py")
    modules = [importlib.import_module(f"simsd_kernels.{path.parent.name}.arguments") for path in folders]
    return {module.SIGNATURE.op: module.SIGNATURE for module in modules if hasattr(module, "SIGNATURE")}


@pytest.mark.parametrize("op", sorted(defined()))
def test_op_is_registered_and_called_as_it_is_defined(op):
    signature = defined()[op]
    assert SCHEMAS[op] == signature.schema
    function = getattr(simsd_kernels, op)
    names = [one.name for one in (*signature.arguments, *signature.numbers)]
    assert list(inspect.signature(function).parameters) == [*names, "backend"]
    assert "{arguments}" not in function.__doc__ and all(f" {name}: " in function.__doc__ for name in names)
