"""How a run stands in words: what largescale.status prints, and its page shows."""

import contextlib
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Any

from largescale.curriculum import stage
from largescale.host.sizes import size_text
from largescale.monitoring.run_facts import Facts
from largescale.monitoring.run_record import duration


def network(m: Facts) -> str:
    if m.get("architecture") == "ddpmpp":
        u = m["unet"]
        channels = f"{u['model_channels']} channels times {u['channel_mult']}"
        return f"DDPM++, {u['num_blocks']} blocks a resolution, {channels}"
    return (
        f"DiT, {m['depth']} blocks of width {m['hidden_size']}, {m['num_heads']} heads, patches of "
        f"{m['patch_size']}"
    )


def curriculum_lines(c: Facts) -> list[str]:
    """Where the curriculum stands, on one line, and then its transitions, on one or more."""
    index = c["index"]
    if index is None:
        return ["nothing is known yet"]
    now = f"index {index}, "
    if index and c["n_clusters"]:
        now += f"{stage(index, c['n_clusters'])}, "

    # At index 0 training is on all levels, unless it is restricted to a cluster. Where no highest
    # level was recorded it is 1.
    lowest = c["lowest"]
    highest = c["highest"]
    if index or (lowest, highest) not in ((0, 1), (None, None), (0, None)):
        end = 1 if highest is None else highest
        now += f"training on u in [{number(lowest, '.3g')}, {number(end, '.3g')})"
    else:
        now += "complete: all noise levels"
    if index and c["pacing"] == "patience":
        patience = f"{number(c['patience'], 'd')} of {c['max_patience']}"
        now += f", patience {patience}, best loss {number(c['best_loss'])}"

    history = ", ".join(f"{index} at {step:,}" for step, index in c["transitions"])
    transitions = f"transitions: {history}" if history else "no transition so far"
    return [now, *textwrap.wrap(transitions, 105)]


def checkpoint_state(c: Facts, f: Facts) -> str:
    if not c["finished"]:
        return "not finished"
    if c["problem"]:
        return "DAMAGED: " + c["problem"].replace(f"{Path(f['run'], 'checkpoints')}/", "")
    state = "valid" if f["verified"] else "sizes right, hashes not checked"
    if c["passed_over"]:
        state += f", but start {f['starts'][-1]['number']} skipped it"
    return state


def progress(f: Facts) -> str:
    step = f["step"]
    steps = f["steps"]
    if not steps:
        return f"step {step:,}"
    return f"step {step:,} of {steps:,} ({100 * step / steps:.1f} %)"


def on_one_line(text: str) -> str:
    # The message of an error may have several lines.
    return " ".join(text.split())


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def number(value: Any, how: str = ".4f") -> str:
    return format(value, how) if isinstance(value, int | float) else "-"


def date(unix_s: float | None) -> str:
    # A damaged record can have a year that does not exist.
    with contextlib.suppress(OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M:%S") if unix_s else "-"
    return "-"


def skip_row(skip: Facts) -> tuple[str, ...]:
    return f"{skip['at']:,}", counted(skip["count"], "step"), skip["why"]


def event_row(row: Facts) -> tuple[str, ...]:
    return f"{row['step']:,}", row["text"] if "text" in row else row["event"]


def checkpoint_row(f: Facts, c: Facts) -> tuple[str, ...]:
    return (
        f"{c['step']:,}",
        date(c["written_unix_s"]),
        size_text(c["bytes"]),
        number(c["world_size"], "d"),
        c["reason"],
        number(c["index"], "d"),
        checkpoint_state(c, f),
    )


def start_row(f: Facts, start: Facts) -> tuple[str, ...]:
    # Only of the newest start it can be open how it ends.
    newest = start in f["starts"][-1:]
    return (
        str(start["number"]),
        date(start["began_unix_s"]),
        f"{start['job']}/{start['restart']}" if start["job"] else "-",
        str(start["world_size"]),
        f"{start['from_step']:,}",
        f"{start['step']:,}",
        duration(max(0.0, start["seen_unix_s"] - start["began_unix_s"])),
        start["ended"] or (f["standing"] if newest else "killed"),
    )


def checkpoints_summary(f: Facts) -> str:
    done = [c for c in f["checkpoints"] if c["finished"]]
    if not done:
        return "no checkpoint yet"
    state = "all valid" if f["verified"] else "sizes right, hashes not checked"
    if f["damaged"]:
        steps = ", ".join(map("{:,}".format, f["damaged"]))
        state = f"damaged: {steps}"

    # The newest comes first.
    newest = "none can be used"
    for c in done:
        if c["usable"]:
            newest = f"newest {c['step']:,}"
            break
    return f"{counted(len(done), 'checkpoint')} ({state}; {newest})"
