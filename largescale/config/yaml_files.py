"""Configs as YAML files that a person reads and edits: written with a comment on each field, and
read as if each of their settings stood on the command line."""

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.config.serialise import flatten, to_dict, with_current_names
from largescale.errors import ConfigError

# Of one start, not of the run.
OF_A_START = ("output", "dry_run", "fit_ranks", "print_config", "verbose", "profile")
PRESET = "preset"
_BOOL = "tag:yaml.org,2002:bool"


@functools.cache
def explanations(cls: type) -> dict[str, str]:
    """Field -> the text below it in the source, those of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        # A text below a field is in the source only: Python does not keep it.
        (tree,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            text = after.value if isinstance(after, ast.Expr) else None
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[node.target.id] = " ".join(text.value.split())
    return found


# ---- writing


def to_yaml(config: Config) -> str:
    """All settings of a run as YAML, each with what it means; those that differ from the preset's
    say so."""
    lines = [
        "# Settings for python -m largescale.train --config FILE; any part of them is enough. Options on",
        "# the command line come after these.",
    ]
    # A run that has a name of its own does not say which preset it began with.
    usual = config
    if config.name in PRESETS:
        usual = PRESETS[config.name]()
        lines.append(f"{PRESET}: {config.name}")
    lines += _lines(config, "", dict(flatten(to_dict(usual))))
    return "\n".join(lines) + "\n"


def _lines(settings: Any, prefix: str, usual: dict[str, Any]) -> Iterator[str]:
    """The lines of a dataclass; `prefix` is the path to it, such as "model.unet."."""
    indent = "  " * prefix.count(".")
    cls: type = type(settings)
    texts = explanations(cls)
    for field in dataclasses.fields(settings):
        value, key = getattr(settings, field.name), prefix + field.name
        if key in OF_A_START:
            continue
        if dataclasses.is_dataclass(value):
            yield ""
            yield f"{indent}{field.name}:"
            yield from _lines(value, f"{key}.", usual)
            continue
        for line in textwrap.wrap(texts.get(field.name, ""), 96 - len(indent)):
            yield f"{indent}# {line}"
        # YAML has no tuples.
        plain = list(value) if isinstance(value, tuple) else value
        differs = "" if usual.get(key) == plain else f"  # the preset has {_text(usual.get(key))}"
        yield f"{indent}{field.name}: {_text(plain)}{differs}"


def _text(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


# ---- reading


def read_options(path: Path) -> tuple[str | None, list[str]]:
    """The preset that a file of settings names, or None, and its settings as command-line options.
    Raises ConfigError for what is no such file, and for a setting that does not exist, with the
    nearest."""
    tree = _read(path)
    # An empty file sets nothing, which is no mistake.
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {path} must have settings by their names, as --print-config writes them"
        )
    tree = dict(tree)
    preset = tree.pop(PRESET, None)
    options = list(_options(Config, with_current_names(tree), "", path))
    return None if preset is None else str(preset), options


def _read(path: Path) -> Any:
    """What is in the file, as plain values. Raises ConfigError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Words are words, as in YAML 1.2: off may be a choice, and 2026-01-31 a name."""

        yaml_implicit_resolvers = _without(
            yaml.SafeLoader.yaml_implicit_resolvers, _BOOL, "tag:yaml.org,2002:timestamp"
        )

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            # Of two, YAML would take the last one without a word.
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise ConfigError(
                        f"--config {path} has {key.value} twice, the second time in line {line}; "
                        "keep one of them"
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(_BOOL, re.compile("true|True|TRUE|false|False|FALSE"), [*"tTfF"])
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        tab = "; indent with spaces" if "\\t" in reason else ""
        raise ConfigError(f"--config {path} is neither YAML nor JSON: {reason}{tab}") from error


def _without(resolvers: dict[Any, Any], *tags: str) -> dict[Any, Any]:
    """YAML's rules for what an unquoted word is, but for those of some types."""
    left = {}
    for first, rules in resolvers.items():
        left[first] = [(tag, pattern) for tag, pattern in rules if tag not in tags]
    return left


def _options(cls: Any, values: dict[Any, Any], prefix: str, path: Path) -> Iterator[str]:
    """The command-line options of a section."""
    kinds = get_type_hints(cls)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in OF_A_START:
            raise ConfigError(
                f"--config {path} has {key}, which is of one start and not of the run; give it on the "
                "command line"
            )
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, n=1)
            meant = f"did you mean {prefix}{near[0]}? " if near else ""
            raise ConfigError(
                f"--config {path} has the setting {key}, which does not exist; {meant}"
                "--print-config writes all that there are"
            )
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            # A section of which every line is a comment.
            value = {} if value is None else value
            if not isinstance(value, dict):
                raise ConfigError(f"--config {path}: {key} must have settings of its own below it")
            yield from _options(kind, value, f"{key}.", path)
        else:
            yield from _option(key, kind, value, path)


def _option(key: str, kind: Any, value: Any, path: Path) -> Iterator[str]:
    """The words of one option; what its value must be is the command line's to check."""
    section, _, name = key.replace("_", "-").rpartition(".")
    flag = f"--{section}.{name}" if section else f"--{name}"
    if isinstance(value, dict) or (isinstance(value, bool) != (kind is bool)):
        must = "be true or false" if kind is bool else "be one value, or a list of them"
        raise ConfigError(f"--config {path}: {key}={value} must {must}")
    if isinstance(value, bool):
        yield flag if value else f"--{section}.no-{name}" if section else f"--no-{name}"
    elif isinstance(value, list):
        yield flag
        yield from map(str, value)
    else:
        yield f"{flag}={value}"
