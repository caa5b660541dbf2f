"""tyro makes the parser of a program's options once in a process of the tests, not at each of their thousands of calls.

It is the larger part of reading a command line, 30 ms. Two calls have one parser where they have the same options, with
the same defaults.
"""

from types import SimpleNamespace
from typing import Any

from tyro import _parsers, _unsafe_cache

_made: dict[tuple[Any, ...], Any] = {}
_make = _parsers.ParserSpecification.from_callable_or_type


def _made_once(kind: Any, **options: Any) -> Any:
    if options["parent_classes"]:  # of one group of options, inside another's
        return _make(kind, **options)
    key = (kind, options["description"], repr(options["default_instance"]))  # by repr: 1 is not 1.0
    if key not in _made:
        _made[key] = _make(kind, **options)
    return _made[key]


def keep_parsers() -> None:
    _parsers.ParserSpecification.from_callable_or_type = _made_once  # type: ignore[assignment, method-assign]
    # Where it sees pytest, tyro checks a tenth of what it has cached by computing it anew: half of a parse.
    _unsafe_cache.sys = SimpleNamespace(modules={})  # type: ignore[attr-defined]
