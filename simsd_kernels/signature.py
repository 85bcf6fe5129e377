"""An op's arguments, defined once: schema, fake implementation, checks and documentation all come from the definition.

A shape is a string of dimensions. A letter stands for a size that the first argument with it gives; everything else is
an expression of letters and of the op's integer arguments: "B (K+2)*L". Bounds are numbers or such expressions.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from simsd_kernels import validate

FLOATING = (*validate.FLOATS, torch.float64)  # what `reference` takes
_NAMES = {
    torch.int64: "int64",
    torch.int32: "int32",
    torch.float32: "float32",
    FLOATING: "float32, bfloat16 or float16",
}


_NAMED = r"\b(?!(?:max|min|inf|None)\b)[A-Za-z_]\w*"  # sizes in an expression


def _derived() -> Any:
    """A field that __post_init__ works out, once: torch.compile traces no parsing of expressions."""
    return dataclasses.field(init=False, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Argument:
    """A tensor argument.

    Attributes:
        dtype: one dtype, or a tuple of those allowed.
        shape: dimensions, blank-separated.
        about: what it is, for the documentation.
        optional: may be None. written: updated in place.
        low, high: bounds of its values (NaN is outside), looked at on the CPU, unless they go by an optional argument
            that was left out; None: any. bounds: the same in words.
        least: dimension -> the smallest size it may have.
    """

    name: str
    dtype: torch.dtype | tuple[torch.dtype, ...]
    shape: str
    about: str = ""
    optional: bool = False
    written: bool = False
    low: float | str | None = None
    high: float | str | None = None
    bounds: str = ""
    least: tuple[tuple[str, int], ...] = ()

    dtypes: tuple[torch.dtype, ...] = _derived()
    dims: tuple[str, ...] = _derived()
    sizes: Callable = _derived()
    range: Callable = _derived()
    range_of: tuple[str, ...] = _derived()  # the sizes that `range` goes by

    def __post_init__(self) -> None:
        dims = tuple(self.shape.split())
        for name, value in {
            "dtypes": (self.dtype,) if isinstance(self.dtype, torch.dtype) else self.dtype,
            "dims": dims,
            "sizes": _function(*dims, as_tuple=True),
            "range": _function(self.low, self.high),
            "range_of": tuple(re.findall(_NAMED, f"{self.low} {self.high}")) if self.bounded else (),
        }.items():
            object.__setattr__(self, name, value)

    @property
    def bounded(self) -> bool:
        return self.low is not None or self.high is not None


@dataclasses.dataclass(frozen=True)
class Number:
    """An integer argument; it follows the tensors and is given by name."""

    name: str
    about: str = ""
    low: int | str = 0
    high: int | str | None = None
    bounds: str = ""

    range: Callable = _derived()

    def __post_init__(self) -> None:
        object.__setattr__(self, "range", _function(self.low, self.high))


@dataclasses.dataclass(frozen=True)
class Result:
    """A tensor result, on the device of the first argument."""

    name: str
    dtype: torch.dtype
    shape: str

    sizes: Callable = _derived()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", _function(*self.shape.split(), as_tuple=True))


@dataclasses.dataclass(frozen=True)
class Signature:
    """Name, arguments (tensors, then numbers) and results of an op; `most` bounds dimensions: ("L", 64)."""

    op: str
    arguments: tuple[Argument, ...]
    numbers: tuple[Number, ...] = ()
    results: tuple[Result, ...] = ()
    most: tuple[tuple[str, int], ...] = ()

    python: inspect.Signature = _derived()
    _bind: Callable = _derived()
    _places: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = _derived()  # of each letter: (argument, dimension)

    def __post_init__(self) -> None:
        object.__setattr__(self, "python", self._python())
        object.__setattr__(self, "_bind", self._binder())
        places: dict[str, list[tuple[int, int]]] = {}
        for n, argument in enumerate(self.arguments):
            for axis, size in enumerate(argument.dims):
                if len(size) == 1 and size.isalpha():
                    places.setdefault(size, []).append((n, axis))
        object.__setattr__(self, "_places", tuple((letter, tuple(found)) for letter, found in places.items()))

    @property
    def schema(self) -> str:
        """For torch.library, without the op's name."""
        aliases = iter("abcdefghijklmnopqrstuvwxyz")
        parts = []
        for argument in self.arguments:
            kind = f"Tensor({next(aliases)}!)" if argument.written else "Tensor"
            parts.append(f"{kind}{'?' if argument.optional else ''} {argument.name}")
        parts += [f"int {number.name}" for number in self.numbers]
        results = ", ".join(f"Tensor {result.name}" for result in self.results)
        return f"({', '.join(parts)}) -> ({results})"

    def bind(self, given: tuple, named: dict[str, Any]) -> tuple:
        """The op's arguments in their order, from a call's; optional ones that are missing are None.

        Raises TypeError for a missing, unknown or doubled one.
        """
        return self._bind(*given, **named)

    def named(self, values: tuple) -> dict[str, Any]:
        """The op's arguments by name."""
        return dict(zip((one.name for one in (*self.arguments, *self.numbers)), values, strict=True))

    def sizes(self, values: tuple) -> dict[str, int]:
        """The dimensions by letter, and the integer arguments by name, where `check` would find right ranks."""
        numbers = values[len(self.arguments) :]
        known = {number.name: value for number, value in zip(self.numbers, numbers, strict=True)}
        for letter, places in self._places:
            for n, axis in places:
                if values[n] is not None:
                    known[letter] = values[n].shape[axis]
                    break
        return known

    def fake(self, *values) -> tuple[Tensor, ...] | Tensor | None:
        """The results as a compiler sees them: shapes and dtypes alone."""
        sizes, like = self.sizes(values), values[0]
        out = tuple(like.new_empty(result.sizes(sizes), dtype=result.dtype) for result in self.results)
        return out if len(out) > 1 else out[0] if out else None

    def check(self, *values) -> dict[str, int]:
        """Raises TypeError or ValueError where an argument is not what the definition says; returns `sizes`."""
        op = self.op
        tensors, numbers = values[: len(self.arguments)], values[len(self.arguments) :]
        for number, value in zip(self.numbers, numbers, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
                raise TypeError(f"{op}: {number.name} must be an integer, got {value!r}")
        given = []
        for argument, value in zip(self.arguments, tensors, strict=True):
            if value is None and argument.optional:
                continue
            validate.tensor(op, argument.name, value)
            if value.dim() != len(argument.dims):
                _refuse_shape(op, argument, value, [None] * len(argument.dims))
            given.append((argument, value))
        sizes = self.sizes(values)
        device = given[0][1].device
        for argument, value in given:
            if tuple(value.shape) != argument.sizes(sizes):
                _refuse_shape(op, argument, value, argument.sizes(sizes))
            if value.dtype not in argument.dtypes:
                validate.dtype(op, argument.name, value, argument.dtypes)
            if value.device != device:
                validate.same_device(op, **{argument.name: value for argument, value in given})
            for letter, least in argument.least:
                if sizes[letter] < least:
                    raise ValueError(
                        f"{op}: {argument.name} must have {letter} >= {least}, got {list(value.shape)} for"
                        f" {_shape(argument)}"
                    )
        for letter, most in self.most:
            if sizes[letter] > most:
                raise ValueError(f"{op}: {letter} must be at most {most}, got {sizes[letter]}")
        for number, value in zip(self.numbers, numbers, strict=True):
            low, high = number.range(sizes)
            if value < low or (high is not None and value > high):
                raise ValueError(f"{op}: {number.name} must be {_range(number, low, high)}, got {value}")
        for argument, value in given:
            if argument.bounded and all(name in sizes for name in argument.range_of):
                low, high = argument.range(sizes)
                ends = -math.inf if low is None else low, math.inf if high is None else high
                validate.within(op, argument.name, value, *ends, _range(argument, low, high))
        return sizes

    def document(self, function: Callable) -> Callable:
        """Gives a public function the op's Python signature, and replaces {arguments} in its docstring."""
        lines = []
        for argument in self.arguments:
            what = _NAMES.get(argument.dtype) or " or ".join(_NAMES.get(t, str(t)) for t in argument.dtypes)
            marks = f"{' or None' if argument.optional else ''}{', written' if argument.written else ''}"
            bounds = f"; {_range(argument, argument.low, argument.high)}" if argument.bounded else ""
            lines.append(f"{argument.name}: {what} {_shape(argument)}{marks}{bounds}. {argument.about}")
        for number in self.numbers:
            lines.append(f"{number.name}: {_range(number, number.low, number.high)}. {number.about}")
        wrap = functools.partial(
            textwrap.fill, break_on_hyphens=False, width=120, initial_indent=" " * 8, subsequent_indent=" " * 12
        )
        function.__doc__ = function.__doc__.replace("        {arguments}", "\n".join(map(wrap, lines)))
        backend = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None")
        parameters = [*self.python.parameters.values(), backend]
        function.__signature__ = self.python.replace(parameters=parameters)
        return function

    def _python(self) -> inspect.Signature:
        """As a Python function has it: by position or name up to the first optional argument, then by name."""
        optional = [argument.optional for argument in self.arguments]
        first = optional.index(True) if True in optional else len(optional)
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter(
                argument.name,
                kinds[n >= first],
                default=None if argument.optional else inspect.Parameter.empty,
                annotation="Tensor | None" if argument.optional else "Tensor",
            )
            for n, argument in enumerate(self.arguments)
        ]
        parameters += [inspect.Parameter(number.name, kinds[1], annotation="int") for number in self.numbers]
        return inspect.Signature(parameters)

    def _binder(self) -> Callable:
        """A function of this signature that returns its arguments, which binds ten times as fast as `inspect` does."""
        plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in self.python.parameters.values()]
        names = "".join(f"{parameter.name}, " for parameter in plain)
        made: dict[str, Any] = {}
        exec(f"def {self.op}{self.python.replace(parameters=plain)}: return ({names})", made)
        return made[self.op]


def _function(*expressions: float | str | None, as_tuple: bool = False) -> Callable[[dict[str, int]], Any]:
    """The expressions' values as a function of `Signature.sizes`: one value, or a tuple."""
    parts = [
        re.sub(_NAMED, lambda name: f"sizes[{name[0]!r}]", one) if isinstance(one, str) else f"constants[{n}]"
        for n, one in enumerate(expressions)
    ]
    source = f"({''.join(f'{part}, ' for part in parts)})" if as_tuple or len(parts) > 1 else parts[0]
    return eval(f"lambda sizes, constants=constants: {source}", {"constants": expressions})


def _shape(argument: Argument) -> str:
    return f"[{', '.join(argument.dims)}]"


def _refuse_shape(op: str, argument: Argument, value: Tensor, expected: Sequence) -> None:
    wanted = ", ".join("any" if size is None else str(size) for size in expected)
    raise ValueError(f"{op}: {argument.name} must be {_shape(argument)} = [{wanted}], got {list(value.shape)}")


def _range(bounded: Argument | Number, low, high) -> str:
    if bounded.bounds:
        return bounded.bounds
    if low is None:
        return f"at most {high}"
    return f">= {low}" if high is None else f"in [{low}, {high}]"
