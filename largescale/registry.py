"""A choice by name, looked up in its table: the one place where an unknown name is refused."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from largescale.errors import ConfigError

T = TypeVar("T")


def look_up(table: Mapping[str, T], name: str, key: str) -> T:
    """The entry of a name in a table. Raises ConfigError, with the nearest name and all of them, for
    an unknown one. `key`: the setting, such as curriculum.pacing."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown {key} {name!r}; {meant}choose one of {', '.join(table)}")
