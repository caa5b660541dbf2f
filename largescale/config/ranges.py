"""The range of a number in the config, stated on its field: `steps: Annotated[int, at_least(1)]`.
It is checked before a run starts, and shown by --help."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from tyro.constructors import (
        ConstructorRegistry,
        StructConstructorSpec,
        StructFieldSpec,
        StructTypeInfo,
    )


@dataclass(frozen=True)
class Range:
    """Which finite numbers a field takes; of a tuple, each of its numbers."""

    text: str  # what messages have after "must be"
    holds: Callable[[float], bool]
    at_most: float | None = None
    """An upper end that no sensible run comes near: beyond it a typing error would run out of
    memory or time, or overflow."""

    @property
    def shown(self) -> str:
        """What --help has after "must be"."""
        return self.text if self.at_most is None else f"{self.text}, at most {self.at_most:_}"

    def violation(self, value: Any) -> str:
        """The part of the range that the value violates; empty where it is inside. What is not a
        number, such as "auto", is always inside."""
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            # Not only infinities: NaN would pass the test of any range.
            if not -math.inf < number < math.inf:
                return "finite"
            if not self.holds(number):
                return self.text
            if self.at_most is not None and number > self.at_most:
                return f"at most {self.at_most:_}"
        return ""


def at_least(low: float, at_most: float | None = None, zero_means: str = "") -> Range:
    """`zero_means`: where 0 is no amount, what it stands for."""
    note = f", 0 for {zero_means}" if zero_means else ""
    return Range(f"at least {low}{note}", lambda value: value >= low, at_most)


def above(low: int, at_most: float | None = None) -> Range:
    return Range(f"above {low}", lambda value: value > low, at_most)


def between(low: float, high: float, closed: Literal["both", "left"] = "both") -> Range:
    """`closed`: whether both ends are in it, or the lower one only."""
    if closed == "left":
        return Range(f"in [{low}, {high})", lambda value: low <= value < high)
    return Range(f"in [{low}, {high}]", lambda value: low <= value <= high)


def one_of(*values: int) -> Range:
    return Range(" or ".join(map(str, values)), lambda value: value in values)


def range_of(annotation: Any) -> Range | None:
    """The range that a field's annotation states, if any."""
    # What stands behind the type in Annotated[type, ...].
    for note in getattr(annotation, "__metadata__", ()):
        if isinstance(note, Range):
            return note
    return None


def ranges_in_help() -> "ConstructorRegistry":
    """A registry for tyro.cli that shows each field's range in --help."""
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    inside = False

    @registry.struct_rule
    def show_ranges(info: "StructTypeInfo") -> "StructConstructorSpec | None":
        nonlocal inside
        # tyro asks this rule first. Where this rule asks tyro in turn, it has to decline, so that
        # tyro's own rules answer.
        if inside or not dataclasses.is_dataclass(info.type):
            return None
        inside = True
        try:
            spec: Any = ConstructorRegistry.get_struct_spec(info)
        finally:
            inside = False
        return dataclasses.replace(spec, fields=tuple(map(with_range, spec.fields)))

    return registry


def with_range(field: "StructFieldSpec") -> "StructFieldSpec":
    """The field with its help text as one paragraph that ends with its range."""
    stated = range_of(field.type)

    # tyro computes help texts only when they are shown, so this does too.
    def help_text() -> str:
        text = field.helptext() if callable(field.helptext) else field.helptext
        must = f"Must be {stated.shown}." if stated else ""
        return " ".join([*(text or "").split(), must]).strip()

    kind: Any = field.type
    if stated is not None:
        kind = get_args(kind)[0]  # tyro is faster without the annotations
    return dataclasses.replace(field, type=kind, helptext=help_text)
