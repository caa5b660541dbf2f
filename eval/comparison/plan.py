"""Which runs a comparison trains: every method with every seed, alike in all else."""

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
    """Of each seed all methods, so that what is done first can be compared first. Raises
    ConfigError."""
    base = configure(preset, extra)
    steps, first = base.train.steps, base.train.seed
    every = every or max(1, -(-steps // 10))
    fixed = {"checkpoint.every": str(every), "checkpoint.keep_every": str(every)}
    runs, settings = list[Run](), list[Method]()
    for method in methods:
        options = dict(method.options)
        config = configure(preset, [*extra, *method.arguments])
        if config.curriculum.pacing == "fixed" and "curriculum.interval" not in options:
            interval = naive_interval or max(1, steps // (2 * config.curriculum.n_clusters))
            options["curriculum.interval"] = str(interval)
        settings.append(Method(method.name, options))
    check_extra(
        preset, base, {"output", *fixed, *(key for method in settings for key in method.options)}
    )
    for seed in range(first, first + seeds):
        for method in settings:
            own = {
                "train.seed": str(seed),
                "output": str(out / method.name / f"seed_{seed}"),
                **fixed,
            }
            arguments = [*extra, *method.arguments, *Method("", own).arguments]
            runs.append(Run(method.name, seed, configure(preset, arguments), (preset, *arguments)))
    for i, run in enumerate(runs[: len(settings)]):
        for other in runs[:i]:
            if not differences(to_dict(run.config), to_dict(other.config)):
                raise ConfigError(
                    f"methods {other.method!r} and {run.method!r} are the same training with this "
                    "preset; leave out one of the two"
                )
    return runs


def check_extra(preset: str, base: Config, taken: set[str]) -> None:
    """Settings for all runs cannot be those that tell the runs apart."""
    before, after = (dict(flatten(to_dict(config))) for config in (PRESETS[preset](), base))
    if both := sorted(key for key in taken if before.get(key) != after.get(key)):
        raise ConfigError(
            f"{cli_flag(both[0])} after -- is for all runs, and the comparison sets it for each; "
            "leave it out there (methods: NAME@FIELD=VALUE; checkpoints: --every; folders: --out)"
        )
