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
from largescale.registry import look_up

PACING = "curriculum.pacing"

METHODS: dict[str, dict[str, str]] = {
    "vanilla": {PACING: "none"},
    # The paper's curriculum, and its NaiveCL, whose interval the comparison sets.
    "curriculum": {PACING: "patience"},
    "naive": {PACING: "fixed"},
    "anti": {"curriculum.order": "hard_first"},
    "separate": {"curriculum.stages": "separate"},
    "min_snr": {"noise.weighting": "min_snr"},
    "p2": {"noise.weighting": "p2"},
    "logit_normal": {"noise.sampling": "logit_normal"},
    "loss_second_moment": {"noise.sampling": "loss_second_moment"},
    "speed": {"noise.sampling": "speed", "noise.weighting": "p2"},
    "laplace": {"noise.sampling": "laplace"},
    # With @noise.beta_alpha=A,noise.beta_beta=B, which have no default.
    "beta": {"noise.sampling": "beta"},
    "mode": {"noise.sampling": "mode"},
    "cosine_map": {"noise.sampling": "cosine_map"},
}
# What a method may change. The rest is the same for all: data, draws, weights at the start, budget.
OWN = ("curriculum.", "noise.", "optimizer.")


def _read_by() -> dict[str, list[str]]:
    """The settings that only some pacings read -> those pacings: two methods that differ in nothing
    else would be the same run twice."""
    found: dict[str, list[str]] = {}
    for name in PACINGS:
        settings = pacing_settings(name)
        # Without a pacing there are no stages, so the clusters do nothing.
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
        """The options as arguments of the training program."""
        found = []
        for key, value in self.options.items():
            found += [cli_flag(key), value]
        return found


def read_methods(text: str) -> list[Method]:
    """Parse NAME[+NAME...][@FIELD=VALUE,...],...: FIELD is section.field, or a field of
    `curriculum`. Raises ConfigError."""
    names: list[str] = []
    for part in text.split(","):
        # The comma also separates settings: this is one more of the method before.
        if "=" in part and "@" not in part and names and "@" in names[-1]:
            names[-1] += f",{part.strip()}"
        else:
            names.append(part.strip())
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"--methods names {name} twice; name each once")
    return list(map(read_method, names))


def read_method(name: str) -> Method:
    """Parse one method. Raises ConfigError for what is unknown, contradictory, or of no effect."""
    if "/" in name:
        raise ConfigError(f"method {name!r} is also a folder's name; leave out the slash")
    words, _, settings = name.partition("@")
    parts: dict[str, Mapping[str, str]] = {}
    for word in words.split("+"):
        parts[word] = look_up(METHODS, word, "method")
    if settings:
        own: dict[str, str] = {}
        for part in settings.split(","):
            key, value = setting(name, part)
            if key in own:
                raise ConfigError(f"method {name!r} sets {key} twice; set it once")
            own[key] = value
        parts["@"] = own
    options = merge(name, parts)

    # An order or kind of stages means nothing without a pacing: then it is the paper's.
    staged = {"curriculum.order", "curriculum.stages"} & options.keys()
    options.setdefault(PACING, "patience" if staged else "none")
    # A setting that its pacing does not read would compare a method with itself.
    for key in options:
        if options[PACING] not in _READ_BY.get(key, (options[PACING],)):
            raise ConfigError(
                f"method {name!r}: {key} has no effect with {PACING}={options[PACING]}; leave it "
                f"out, or name a method whose pacing is {' or '.join(_READ_BY[key])}"
            )
    return Method(name, options)


def merge(name: str, parts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The settings of all parts of a method. Raises ConfigError where two of them contradict each
    other."""
    # The first part to set a field decides it; a later part may only agree.
    options: dict[str, str] = {}
    set_by: dict[str, str] = {}
    for part, chosen in parts.items():
        for key, value in chosen.items():
            if options.setdefault(key, value) != value:
                raise ConfigError(
                    f"method {name!r}: {set_by[key]} sets {key}={options[key]} and {part} "
                    f"{key}={value}; leave out one of the two"
                )
            set_by.setdefault(key, part)
    return options


def setting(name: str, text: str) -> tuple[str, str]:
    """(section.field, value) of one FIELD=VALUE. Raises ConfigError."""
    key, equals, value = map(str.strip, text.partition("="))
    key = key.replace("-", "_") if "." in key else f"curriculum.{key.replace('-', '_')}"
    possible = [field for field, _ in flatten(to_dict(Config(""))) if field.startswith(OWN)]
    if key not in possible or not equals or not value:
        # A field of this name in another section is meant more often than a similar word.
        field = key.rpartition(".")[2]
        same = [other for other in possible if other.endswith(f".{field}")]
        near = same or difflib.get_close_matches(key, possible, n=1, cutoff=0)
        sections = ", ".join(OWN).replace(".", "")
        raise ConfigError(
            f"method {name!r}: {text!r} is no setting of a method; write FIELD=VALUE, such as "
            f"{near[0]}=..., with a field of {sections}"
        )
    return key, value
