"""The learning rate and the EMA's decay of each optimizer step: pure functions of how many steps
were applied before it."""

import math
from collections.abc import Callable, Iterator

from largescale.config.schema import Config, OptimizerConfig
from largescale.power_ema import decay, state_key
from largescale.registry import look_up

# The share of the run that wsd decays in, unless optimizer.decay_steps says otherwise.
WSD_DECAY = 0.1
_BARS = "▁▂▃▄▅▆▇█"


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of the update after `step` applied ones: the warm-up, which rises by equal
    steps from 0, times the schedule."""
    o = config.optimizer
    rate = look_up(SCHEDULES, o.schedule, "optimizer.schedule")(o, step, config.train.steps)
    return rate * min(1.0, step / o.warmup_steps) if o.warmup_steps else rate


def ema_decay(config: Config, step: int) -> float:
    """The EMA's decay in the update after `step` applied ones. With ema_rampup its half-life is at
    most that share of the steps so far, as in EDM's code: 0.5 ** (1 / (ema_rampup step))."""
    o = config.optimizer
    if not o.ema_rampup:
        return o.ema_decay
    return min(o.ema_decay, 0.5 ** (1 / (o.ema_rampup * step)) if step else 0.0)


def power_ema_decays(config: Config, step: int) -> dict[str, float]:
    """The decays of the averages of optimizer.ema_widths in the update after `step` applied ones,
    by their names in the optimizer's state."""
    return {state_key(width): decay(width, step + 1) for width in config.optimizer.ema_widths}


def _constant(o: OptimizerConfig, step: int, steps: int) -> float:
    return o.lr


def _cosine(o: OptimizerConfig, step: int, steps: int) -> float:
    share = _share_of_decay(o, step, steps)
    return o.final_lr + (o.lr - o.final_lr) * (1 + math.cos(math.pi * share)) / 2


def _linear(o: OptimizerConfig, step: int, steps: int) -> float:
    return o.lr + (o.final_lr - o.lr) * _share_of_decay(o, step, steps)


def _inverse_sqrt(o: OptimizerConfig, step: int, steps: int) -> float:
    reference = decay_steps(o, steps)
    return o.lr * math.sqrt(reference / max(step, reference)) if reference else o.lr


# At step `steps`, which is after the last update, each that decays is at final_lr.
SCHEDULES: dict[str, Callable[[OptimizerConfig, int, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _linear,
}


def decay_steps(o: OptimizerConfig, steps: int) -> int:
    """optimizer.decay_steps, or what stands for it where it is not given. `steps`: of the run."""
    if o.decay_steps is not None:
        return o.decay_steps
    after_warmup = max(1, steps - o.warmup_steps)
    if o.schedule == "inverse_sqrt":
        return o.warmup_steps
    return max(1, round(WSD_DECAY * steps)) if o.schedule == "wsd" else after_warmup


def _share_of_decay(o: OptimizerConfig, step: int, steps: int) -> float:
    """How much of the decay lies behind `step`, from 0 to 1."""
    length = decay_steps(o, steps)
    # wsd decays at the end of the run, the others from the end of the warm-up.
    start = max(o.warmup_steps, steps - length) if o.schedule == "wsd" else o.warmup_steps
    return min(1.0, max(0.0, (step - start) / length))


def described(config: Config) -> str:
    """The learning rate over the run in one line: a curve, and its values."""
    o = config.optimizer
    steps = config.train.steps
    if o.schedule == "constant" and not o.warmup_steps:
        return f"{o.lr:g}, constant"
    curve = list(_sampled(config, 40))
    top = max(rate for _, rate in curve)
    drawn = "".join(
        _BARS[round(rate / top * (len(_BARS) - 1))] if top else " " for _, rate in curve
    )
    warmup = f"from 0 to {o.lr:g} in {o.warmup_steps:,} steps, " if o.warmup_steps else ""
    ends = "" if o.schedule == "constant" else f", {learning_rate(config, steps):.3g} at the end"
    return f"{drawn} {warmup}{o.schedule}{ends}"


def _sampled(config: Config, n: int) -> Iterator[tuple[int, float]]:
    """(step, learning rate) at n steps, from the first to the last."""
    for i in range(n):
        step = round(i * (config.train.steps - 1) / (n - 1))
        yield step, learning_rate(config, step)


def schedule_note(config: Config) -> str:
    """A note on a schedule that is shorter or longer than the run; empty where it ends with it."""
    o = config.optimizer
    steps = config.train.steps
    if o.warmup_steps >= steps:
        return (
            f"optimizer.warmup_steps={o.warmup_steps:,} is not over at the end of the run, step "
            f"{steps:,}: the learning rate never reaches {o.lr:g}"
        )
    if o.schedule == "inverse_sqrt" and not 0 < decay_steps(o, steps) < steps:
        return (
            f"the learning rate of the inverse_sqrt schedule is constant: it falls from "
            f"optimizer.decay_steps on, {decay_steps(o, steps):,}, by default the warm-up's end; "
            f"set --optimizer.decay-steps below {steps:,}"
        )
    # The others have no end that could miss the run's.
    if o.schedule not in ("cosine", "linear", "wsd"):
        return ""
    # wsd begins to fall so late that it ends with the run, but not before the warm-up is over.
    end = (
        max(o.warmup_steps, steps - decay_steps(o, steps))
        if o.schedule == "wsd"
        else o.warmup_steps
    )
    end += decay_steps(o, steps)
    if end == steps:
        return ""
    if end < steps:
        then = f"the last {steps - end:,} steps have the learning rate {o.final_lr:g}"
    else:
        then = (
            f"the learning rate ends at {learning_rate(config, steps):.3g}, not at {o.final_lr:g}"
        )
    return (
        f"the {o.schedule} schedule ends at step {end:,}, the run at step {steps:,}: {then}; to "
        f"end together, leave out --optimizer.decay-steps"
    )
