"""The ways of training that eval.compare knows by name, as settings of the training program."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from largescale.config.derived import pacing_settings
from largescale.config.schema import Config
from largescale.config.serialise import flatten, to_dict
from largescale.config.validation import cli_flag
from largescale.curriculum import PACINGS
from largescale.errors import ConfigError

PACING = "curriculum.pacing"

METHODS: dict[str, dict[str, str]] = {
    "vanilla": {PACING: "none"},
    "curriculum": {PACING: "patience"},  # the paper's
    "naive": {PACING: "fixed"},  # its NaiveCL; the interval is the comparison's
    "anti": {"curriculum.order": "hard_first"},
    "separate": {"curriculum.stages": "separate"},
    "min_snr": {"noise.weighting": "min_snr"},
    "p2": {"noise.weighting": "p2"},
    "logit_normal": {"noise.sampling": "logit_normal"},
    "loss_second_moment": {"noise.sampling": "loss_second_moment"},
    "speed": {"noise.sampling": "speed", "noise.weighting": "p2"},
}
# What a method may change. The rest is the same for all: data, draws, weights at the start, budget.
OWN = ("curriculum.", "noise.", "optimizer.")


def _read_by() -> dict[str, list[str]]:
    """What only some pacings read, and which: two methods that differ in nothing else would be the
    same run twice."""
    found: dict[str, list[str]] = {}
    for name in PACINGS:
        settings = pacing_settings(name)
        if name != "none":
            settings += ["clusters", "n_clusters"]
        for setting in settings:
            found.setdefault(f"curriculum.{setting}", []).append(name)
    return found


_READ_BY = _read_by()


@dataclass(frozen=True)
class Method:
    name: str
    options: Mapping[str, str]  # section.field -> value

    @property
    def arguments(self) -> list[str]:
        """Of the training program."""
        return [part for key, value in self.options.items() for part in (cli_flag(key), value)]


def read_methods(text: str) -> list[Method]:
    """NAME[+NAME...][@FIELD=VALUE,...],...: FIELD is section.field, or a field of `curriculum`.
    Raises ConfigError."""
    names: list[str] = []
    for part in text.split(","):
        if "=" in part and "@" not in part and names and "@" in names[-1]:
            names[-1] += f",{part.strip()}"  # one more setting of the method before
        else:
            names.append(part.strip())
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ConfigError(f"--methods names {twice[0]} twice; name each once")
    return [read_method(name) for name in names]


def read_method(name: str) -> Method:
    """Raises ConfigError for what is unknown, contradictory, or of no effect."""
    if "/" in name:
        raise ConfigError(f"method {name!r} is also a folder's name; leave out the slash")
    words, _, settings = name.partition("@")
    parts: dict[str, Mapping[str, str]] = {word: known(word) for word in words.split("+")}
    if settings:
        parts["@"] = dict(setting(name, part) for part in settings.split(","))
    options: dict[str, str] = {}
    for part, chosen in parts.items():
        for key, value in chosen.items():
            if options.setdefault(key, value) != value:
                other = next(word for word, of in parts.items() if of.get(key, value) != value)
                raise ConfigError(
                    f"method {name!r}: {other} sets {key}={options[key]} and {part} {key}={value}; "
                    "leave out one of the two"
                )
    staged = {"curriculum.order", "curriculum.stages"} & options.keys()
    options.setdefault(PACING, "patience" if staged else "none")
    for key in options:
        if options[PACING] not in _READ_BY.get(key, (options[PACING],)):
            raise ConfigError(
                f"method {name!r}: {key} has no effect with {PACING}={options[PACING]}; leave it "
                f"out, or name a method whose pacing is {' or '.join(_READ_BY[key])}"
            )
    return Method(name, options)


def known(word: str) -> dict[str, str]:
    if word not in METHODS:
        near = difflib.get_close_matches(word, METHODS, n=1, cutoff=0)
        raise ConfigError(
            f"unknown method {word!r}; did you mean {near[0]!r}? There are: {', '.join(METHODS)}, "
            "and those joined by +"
        )
    return METHODS[word]


def setting(name: str, text: str) -> tuple[str, str]:
    key, equals, value = (part.strip() for part in text.partition("="))
    key = key.replace("-", "_") if "." in key else f"curriculum.{key.replace('-', '_')}"
    possible = [field for field, _ in flatten(to_dict(Config(""))) if field.startswith(OWN)]
    if key not in possible or not equals or not value:
        field = key.rpartition(".")[2]
        same = [other for other in possible if other.rpartition(".")[2] == field]
        near = same or difflib.get_close_matches(key, possible, n=1, cutoff=0)
        raise ConfigError(
            f"method {name!r}: {text!r} is no setting of a method; write FIELD=VALUE, such as "
            f"{near[0]}=..., with a field of {', '.join(section.rstrip('.') for section in OWN)}"
        )
    return key, value
