"""python docs/make_reference.py [--check]: writes docs/reference.md, every option of every program.

--check writes nothing, and ends with status 1 where the page is not current.
"""

import dataclasses
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from largescale.config.ranges import range_of
from largescale.config.yaml_files import explanations

PAGE = Path(__file__).parent / "reference.md"
PROGRAMS = {  # program: the dataclass whose fields are its options
    "data_prep.imagenet": "data_prep.imagenet:ImageNet",
    "data_prep.coco": "data_prep.coco:Coco",
    "data_prep.folder": "data_prep.folder:Folder",
    "data_prep.webdataset": "data_prep.webdataset:WebDataset",
    "data_prep.latents": "data_prep.latents:Latents",
    "data_prep.parquet": "data_prep.parquet:Parquet",
    "data_prep.digits": "data_prep.digits:Digits",
    "data_prep.split": "data_prep.split:Split",
    "data_prep.emoji": "data_prep.emoji:Emoji",
    "data_prep.describe": "data_prep.describe:Describe",
    "largescale.status": "largescale.status:Status",
    "largescale.export": "largescale.export:Export",
    "largescale.convert": "largescale.convert:Convert",
    "largescale.ema": "largescale.ema:Ema",
    "largescale.requeue": "largescale.requeue:Requeue",
    "eval.sample": "eval.sample:Sample",
    "eval.score": "eval.score:Score",
    "eval.curve": "eval.curves.options:Curve",
    "eval.compare": "eval.compare:Compare",
    "eval.difficulty": "eval.difficulty_study.study:Study",
    "eval.gradients": "eval.gradients:Gradients",
    "eval.paper": "eval.paper:Paper",
    "eval.prompts": "eval.prompts:Freeze",
    "eval.digits": "eval.digits:Digits",
}


def type_text(hint: Any) -> str:
    """Such as `int or none`, or the choices."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return type_text(parts[0])
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(part) for part in parts if part is not type(None))
    if origin is tuple:
        several = " ..." if parts[-1] is Ellipsis else ""
        kinds = [type_text(part) for part in parts if part is not Ellipsis]
        return " ".join(kinds) + several
    return {Path: "path", str: "text", int: "whole number", float: "number", bool: "on or off"}[
        hint
    ]


def default_text(field: dataclasses.Field[Any]) -> str:
    if field.name == "device":
        return "a GPU if there is one"
    if field.default_factory is not dataclasses.MISSING:
        return "see text"
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None or field.default == ():
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    return "`" + " ".join(map(str, values)) + "`"


def rows(cls: type, prefix: str = "") -> Iterator[str]:
    """A line of a table for each field; those of nested dataclasses after their own headings."""
    hints, texts = typing.get_type_hints(cls, include_extras=True), explanations(cls)
    yield "| option | values | default | meaning |"
    yield "|---|---|---|---|"
    nested = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            nested.append((field.name, hint))
            continue
        flag = f"--{prefix}{field.name}".replace("_", "-")
        positional = typing.get_origin(hint) is typing.Annotated and "Positional" in str(hint)
        name = field.name.upper() if positional else flag
        stated = range_of(hint)
        values = type_text(hint) + (f", {stated.shown}" if stated else "")
        text = texts.get(field.name, "").replace("|", "\\|")
        yield f"| `{name}` | {values} | {default_text(field)} | {text} |"
    for name, hint in nested:
        yield ""
        yield f"### {prefix}{name}"
        yield ""
        doc = inspect.getdoc(hint) or ""
        if doc and not doc.startswith(f"{hint.__name__}("):  # what dataclass itself writes
            yield from (" ".join(doc.split()), "")
        yield from rows(hint, f"{prefix}{name}.")


def reference() -> str:
    """The page."""
    from largescale.config.schema import Config

    lines = [
        "# Reference",
        "",
        "Made by `python docs/make_reference.py` from the code; do not edit. Every program prints the",
        "same with `--help`.",
        "",
        "## largescale.train",
        "",
        "`python -m largescale.train PRESET [--config FILE] [--section.field VALUE ...]`: the defaults",
        "below are those of the fields; a preset sets its own, which `PRESET --help` shows. `--config`",
        "takes a YAML or JSON file with any of these settings, such as a run's `config.yaml`.",
        "",
        *rows(Config),
    ]
    for program, where in PROGRAMS.items():
        module, _, name = where.partition(":")
        cls = getattr(importlib.import_module(module), name)
        lines += ["", f"## {program}", "", *rows(cls)]
    return "\n".join(lines) + "\n"


def main() -> int:
    page = reference()
    if "--check" in sys.argv[1:]:
        current = PAGE.exists() and PAGE.read_text() == page
        if not current:
            print(f"{PAGE} is not current; run python docs/make_reference.py", file=sys.stderr)
        return 0 if current else 1
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
