"""Which runs a comparison trains: every method with every seed, alike in all else."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from eval.comparison.methods import Method
from eval.training_runs import Run, configure, differences
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.config.serialise import flatten, to_dict
from largescale.config.validation import cli_flag
from largescale.errors import ConfigError


def plan(
    preset: str,
    methods: Sequence[Method],
    *,
    seeds: int,
    out: Path,
    every: int | None,
    naive_interval: int | None,
    extra: Sequence[str],
) -> list[Run]:
    """The runs of a comparison: all methods of the first seed, then of the next, so that what is
    done first can be compared first. Raises ConfigError."""
    base = configure(preset, extra)
    steps = base.train.steps
    first = base.train.seed
    # Rounded up, for ten checkpoints at most.
    every = every or max(1, -(-steps // 10))
    # Every checkpoint that is scored has to be kept until then.
    fixed = {"checkpoint.every": str(every), "checkpoint.keep_every": str(every)}

    settings = []
    for method in methods:
        options = dict(method.options)
        # By default the naive curriculum has taken all its stages in half of the run.
        config = configure(preset, [*extra, *method.arguments])
        if config.curriculum.pacing == "fixed" and "curriculum.interval" not in options:
            interval = naive_interval or max(1, steps // (2 * config.curriculum.n_clusters))
            options["curriculum.interval"] = str(interval)
        settings.append(Method(method.name, options))

    # An option for all runs that is one of these would be overridden without a word.
    taken = {"output", *fixed}
    for method in settings:
        taken.update(method.options)
    check_extra(preset, base, taken)

    runs: list[Run] = []
    # Seed by seed, as the report can be written once a seed has all methods.
    for seed in range(first, first + seeds):
        for method in settings:
            own = {
                "train.seed": str(seed),
                "output": str(out / method.name / f"seed_{seed}"),
                **fixed,
            }
            arguments = [*extra, *method.arguments, *Method("", own).arguments]
            runs.append(Run(method.name, seed, configure(preset, arguments), (preset, *arguments)))
    # One seed is enough: with every seed the methods differ in the same settings.
    check_distinct(runs[: len(settings)])
    return runs


def check_distinct(runs: Sequence[Run]) -> None:
    """Raises ConfigError where two methods, each given by its run of one seed, are the same
    training."""
    for other, run in itertools.combinations(runs, 2):
        if not differences(to_dict(run.config), to_dict(other.config)):
            raise ConfigError(
                f"methods {other.method!r} and {run.method!r} are the same training with this "
                "preset; leave out one of the two"
            )


def check_extra(preset: str, base: Config, taken: set[str]) -> None:
    """Raises ConfigError for a setting of all runs that is also one of those that differ between
    the runs."""
    # What the options after -- have changed of the preset.
    before = dict(flatten(to_dict(PRESETS[preset]())))
    after = dict(flatten(to_dict(base)))
    for key in sorted(taken):
        if before.get(key) != after.get(key):
            raise ConfigError(
                f"{cli_flag(key)} after -- is for all runs, and the comparison sets it for each; "
                "leave it out there (methods: NAME@FIELD=VALUE; checkpoints: --every; folders: "
                "--out)"
            )
