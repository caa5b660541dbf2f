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

    text: str  # what messages and --help have after "must be"
    holds: Callable[[float], bool]

    def violation(self, value: Any) -> str:
        """What the value must be and is not; empty where it is. What is no number, as "auto", is
        fine."""
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            if not -math.inf < number < math.inf:
                return "finite"
            if not self.holds(number):
                return self.text
        return ""


ANY_NUMBER = Range("finite", lambda value: True)


def at_least(low: int, zero_means: str = "") -> Range:
    """`zero_means`: where 0 is no amount, what it stands for."""
    note = f", 0 for {zero_means}" if zero_means else ""
    return Range(f"at least {low}{note}", lambda value: value >= low)


def above(low: int) -> Range:
    return Range(f"above {low}", lambda value: value > low)


def between(low: int, high: int, closed: Literal["both", "left"] = "both") -> Range:
    """`closed`: whether both ends are in it, or the lower one only."""
    if closed == "left":
        return Range(f"in [{low}, {high})", lambda value: low <= value < high)
    return Range(f"in [{low}, {high}]", lambda value: low <= value <= high)


def one_of(*values: int) -> Range:
    return Range(" or ".join(map(str, values)), lambda value: value in values)


def range_of(annotation: Any) -> Range | None:
    """That a field's annotation states."""
    for note in getattr(annotation, "__metadata__", ()):
        if isinstance(note, Range):
            return note
    return None


def ranges_in_help() -> "ConstructorRegistry":
    """For tyro.cli: --help says each field's range."""
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    inside = False

    @registry.struct_rule
    def show_ranges(info: "StructTypeInfo") -> "StructConstructorSpec | None":
        # tyro asks this rule first; its own rules answer when this one asks tyro.
        nonlocal inside
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
    """Its help in one paragraph, with its range after it."""

    stated = range_of(field.type)

    def help_text() -> str:
        text = field.helptext() if callable(field.helptext) else field.helptext
        must = f"Must be {stated.text}." if stated else ""
        return " ".join([*(text or "").split(), must]).strip()

    kind: Any = field.type
    if stated is not None:
        kind = get_args(kind)[0]  # without its notes tyro is faster
    return dataclasses.replace(field, type=kind, helptext=help_text)
