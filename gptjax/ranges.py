"""Ranges of the numbers in a config, written in their types: `every: Count = 1000`. `config.build` checks them.

Numbers of a plain `int` or `float` type are finite and at least 0. Whole numbers fit in int32 and floats in float32,
which is what a device computes with.
"""

import dataclasses
import numbers
import os
import typing
from typing import Annotated

from gptjax.errors import InputError

INT_MAX, FLOAT_MAX = 2**31 - 1, 3.4028234663852886e38


@dataclasses.dataclass(frozen=True)
class Range:
    """low <= value <= high, without an end that is open; also: values outside it that have a meaning of their own."""

    low: float = 0
    high: float = FLOAT_MAX
    open_low: bool = False
    open_high: bool = False
    also: tuple = ()

    def __contains__(self, value) -> bool:
        low = value > self.low if self.open_low else value >= self.low
        return value in self.also or (low and (value < self.high if self.open_high else value <= self.high))

    def brief(self) -> str:
        """For --help: without the ends that only a device's numbers have; '' where any number is in it."""
        if self.high in (INT_MAX, FLOAT_MAX):
            text = str(dataclasses.replace(self, high=FLOAT_MAX))
            return "" if text == "finite" else text
        return str(self) if self.open_low or self.open_high else f"{self.low:g} to {self.high:,.10g}"

    def __str__(self):
        ends = [f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"] * (self.low > -FLOAT_MAX)
        if self.high < FLOAT_MAX:
            ends.append(f"below {self.high:,.10g}" if self.open_high else f"at most {self.high:,.10g}")
        return " and ".join(ends or ["finite"]) + "".join(f", or {value}" for value in self.also)


WHOLE, NON_NEGATIVE = Range(0, INT_MAX), Range()

Count = Annotated[int, Range(1, INT_MAX)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Axis = Annotated[int, Range(1, INT_MAX, also=(-1,))]  # -1 = all the devices that are left
Layers = Annotated[int, Range(0, INT_MAX, also=(-1,))]  # -1 = nothing at all
Positive = Annotated[float, Range(open_low=True)]
Real = Annotated[float, Range(-FLOAT_MAX)]
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]
PositiveShare = Annotated[float, Range(0, 1, open_low=True)]
Seconds = Annotated[float, Range(0, 1e9, open_low=True)]  # of a timer, whose library has a limit


def split(hint) -> tuple:
    """(type without None, its Range or None, whether None is allowed) of a field's type with its annotations."""
    optional = type(None) in typing.get_args(hint)
    if optional:
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    range_ = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)), None)
    kind = hint.__origin__ if range_ else hint
    return kind, range_ or {int: WHOLE, float: NON_NEGATIVE}.get(kind), optional


def metavar(hint) -> str:
    """A field's type as --help writes it: INT, FLOAT, BOOL, TEXT, pre|post, (TEXT, ...); of a mapping its values'."""
    kind, *_ = split(hint)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        return f"({metavar(arguments[0])}, ...)"
    if arguments:
        return metavar(arguments[1])
    return {int: "INT", float: "FLOAT", bool: "BOOL"}.get(kind, "TEXT")


def check(value, hint, path: str):
    """InputError, by the name `path`, for a value that is not of the field's type or outside its range."""
    kind, range_, optional = split(hint)
    if value is None:
        if not optional:
            raise InputError(f"{path} is not set: give it with --{path}=...")
        return
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise InputError(f"{path}={value!r} must be a list, as ({value!r},).")
        for i, item in enumerate(value):
            check(item, arguments[0], f"{path}[{i}]")
    elif isinstance(value, dict) and len(arguments) == 2:
        for key, item in value.items():
            check(item, arguments[1], f"{path}.{key}")
    elif kind in _TYPES:
        types, words = _TYPES[kind]
        # True is an int to Python, and never meant as one
        if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{path}={value!r} must be {words}.")
        if range_ and value not in range_:  # neither NaN nor an infinity is in any
            raise InputError(f"{path}={value!r} must be {range_}.")


_TYPES = {
    int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number"), bool: (bool, "True or False"),
    str: ((str, os.PathLike), "text"),
}  # fmt: skip
