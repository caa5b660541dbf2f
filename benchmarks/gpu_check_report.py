"""What benchmarks/gpu_check.py writes: the results of its stages as Markdown, and the verdicts."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from train_step import report as step_tables
from train_step import table, table_of_ways

from largescale.config.deepspeed import load_ds_config
from largescale.config.presets import PRESETS
from largescale.planning.batch_size import gib
from largescale.planning.memory import memory

# The bars: MFU of DiT-L/2 on an H100, times as fast as fast-DiT, share of the time outside steps.
MFU = 0.5
TIMES_FAST_DIT = 2.5
OUTSIDE = 0.02

Result = dict[str, Any]


def trouble(kind: str, result: Result | None) -> str | None:
    """Why a stage that ended well has failed all the same."""
    if kind == "tests":
        return None
    if result is None:
        return "it wrote no result"
    if kind not in ("step", "steps"):
        return None
    for way in ways(result):
        # A micro batch that does not fit is a result.
        if way["error"] and "memory" not in way["error"].lower():
            return f"{way['name']}: {way['error']}"
    return None if any("step_s" in way for way in ways(result)) else "no way was measured"


def ways(result: Result | None) -> list[Result]:
    """All ways that a stage of benchmarks/train_step.py measured, each with its batch."""
    found = []
    for batch in (result or {"batches": []})["batches"]:
        found += [way | {"batch": batch["batch"]} for way in batch["ways"]]
    return found


# ---- the sections


def compared(result: Result, report: Result) -> list[str]:
    """Ways of taking a step, and how many times as fast as each peer ours is."""
    lines = []
    for batch in result["batches"]:
        lines += [
            "",
            f"Micro batch {batch['batch']}:",
            *table_of_ways(batch["ways"], batch["base"]),
        ]
        for way in batch["ways"]:
            for peer, times in way.get("times_as_fast_as", {}).items():
                if times:
                    lines += ["", f"{way['name']} is {times:.2f} times as fast as {peer}."]
    return lines


def step(result: Result, report: Result) -> list[str]:
    """Everything of a step of ours: its parts too, and the memory beside its estimate."""
    lines = []
    for batch in result["batches"]:
        lines += [
            "",
            f"Micro batch {batch['batch']}:",
            *step_tables(batch["ways"], batch["base"]).split("\n"),
        ]
    rows = [["memory", "estimated", "measured"]]
    for way in ways(result):
        if way["kind"] == "ours" and "peak_bytes" in way:
            config = PRESETS[result["preset"]]()
            train = replace(
                config.train,
                activation_checkpointing=way["checkpointing"],
                device="cpu" if report["rehearsal"] else "cuda",
            )
            ds = load_ds_config(f"ds_configs/zero2_{way['precision']}.json")
            parts = memory(replace(config, train=train), ds, 1, way["batch"])
            name = f"{way['name']}, micro batch {way['batch']}"
            rows.append([name, gib(sum(parts.values())), gib(way["peak_bytes"])])
    return lines + table(*rows)


def predict(result: Result, report: Result) -> list[str]:
    return ["", f"For a card like {result['card'].upper()}; shown beside the measured ones below."]


def profile(result: Result, report: Result) -> list[str]:
    """Each kind of kernel, measured and predicted, and where in the step it was launched."""
    measured: dict[str, float] = {}
    for kinds in result["parts"].values():
        for kind, seconds in kinds.items():
            measured[kind] = measured.get(kind, 0.0) + seconds
    by_part = [["launched in, ms", *measured]]
    for part, kinds in result["parts"].items():
        by_part.append([part, *[f"{1e3 * kinds.get(kind, 0.0):.2f}" for kind in measured]])

    measured["gaps"] = result["gaps_s"]
    predicted = predicted_parts(report["stages"]["predict_l2"].get("result"))
    rows = [["kind of kernel, ms", "predicted", "measured"]]
    for kind in dict.fromkeys([*predicted, *measured]):
        cells = []
        for times in (predicted, measured):
            cells.append(f"{1e3 * times[kind]:.2f}" if kind in times else "")
        rows.append([kind, *cells])
    rows.append(["step", f"{1e3 * sum(predicted.values()):.2f}", f"{1e3 * result['span_s']:.2f}"])

    largest = ["", "The largest operations:", "", "```", *result["largest"].splitlines(), "```"]
    return [*table(*rows), *table(*by_part), *largest]


def predicted_parts(result: Result | None) -> dict[str, float]:
    """The roofline's parts by the kinds of a profile; its fp32 parts are mostly products."""
    if not result:
        return {}
    parts = result["steps"][0]["parts"]
    return {
        "matrix products": parts["matrix products"] + parts["embedding and final layer, fp32"],
        "attention": parts["attention"],
        "elementwise": parts["elementwise"],
        "optimizer": parts["optimizer"],
        "communication": parts["gradient reduction"] + parts["all-gather"],
        "gaps": parts["gaps"],
    }


def run(result: Result, report: Result) -> list[str]:
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] else ""
    rows = [["outside forward, backward and optimizer", "share of the time"]]
    for name, share in result["shares"].items():
        seconds = result["events_s"].get(name)
        each = f", {seconds:.2f} s each" if seconds is not None else ""
        rows.append([f"{name}{each}", f"{share:.2%}"])
    rows.append(["in all, at the preset's intervals", f"{result['outside']:.2%}"])
    drawn = result["sampling"]
    return [
        "",
        f"{1e3 * result['step_s']:.1f} ms a step, {result['images_s']:,.1f} images/s{mfu}, "
        f"{result['memory_gib']:.2f} GiB. This short run: {result['goodput']}.",
        *table(*rows),
        "",
        f"eval.sample: {drawn['samples']} samples, 50 steps of DDIM with guidance, "
        f"{drawn['images_s']:.2f} images/s with compiling.",
    ]


def sampling(result: Result, report: Result) -> list[str]:
    rows = [["way", "images", "images/s", "of the base", "of the peak"]]
    for way in result["ways"]:
        name = f"{way['way']}, {way['sampler']}"
        cells = [f"{way['images_s']:.2f}", f"{way['ratio']:.2f} x", f"{way['of_peak']:.0%}"]
        rows.append([name, str(way["images"]), *cells])
    return [*table(*rows), "", f"The base is {result['ways'][0]['base']}."]


def recompiles(result: Result, report: Result) -> list[str]:
    return ["", f"{result['recompilations']} recompilations.", "", *code(result["lines"])]


def faults(result: Result, report: Result) -> list[str]:
    """When and how the ranks ended, and what rank 0 printed."""
    rows = [["rank 1 is", "time limit, s", "rank 0 ended", "rank 1 ended"]]
    lines = []
    for name, found in result.items():
        ends = []
        for rank in "01":
            after = found["after_s"].get(rank)
            status = found["statuses"][rank]
            ends.append("not" if after is None else f"after {after:.1f} s, status {status}")
        rows.append([name, f"{found['time_limit_s']:g}", *ends])
        lines += ["", f"{name}: rank 0 printed", "", *code(found["said"])]
    return [*table(*rows), *lines]


def all_gather(result: Result, report: Result) -> list[str]:
    rows = [["elements a rank", "bytes mod 16", "ms"]]
    for elements, seconds in result["seconds"].items():
        rows.append([f"{int(elements):,}", str(2 * int(elements) % 16), f"{1e3 * seconds:.3f}"])
    return table(*rows)


def code(lines: list[str]) -> list[str]:
    return ["```", *lines, "```"] if lines else []


SECTIONS: dict[str, Callable[[Result, Result], list[str]]] = {
    "step": step,
    "steps": compared,
    "predict": predict,
    "profile": profile,
    "run": run,
    "sampling": sampling,
    "recompiles": recompiles,
    "faults": faults,
    "all_gather": all_gather,
}


def section(name: str, found: Result, report: Result) -> list[str]:
    """One stage: its result, and for one that failed its last lines."""
    lines = ["", f"## {found['title']}", ""]
    if "missing" in found:
        return [*lines, f"`{name}` was not run: {found['missing']}."]
    seconds = f"{found['seconds']:.0f} s"
    command = shlex.join(found["command"])
    lines.append(f"`{command}`, {found['date']}, {seconds}: {found['status']}.")
    if found["kind"] == "tests" or found["status"] != "done":
        lines += ["", *code(found["last_lines"])]
    if found.get("result") and found["kind"] in SECTIONS:
        try:
            lines += SECTIONS[found["kind"]](found["result"], report)
        # A stage that failed may have left half of its result: the others are to be seen.
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            lines += ["", f"Its result cannot be shown ({error!r}): see stages/{name}.result.json."]
    return lines


# ---- the whole


def markdown(report: Result) -> str:
    """The report, ready for docs/benchmarks.md."""
    versions = [f"{name} {number}" for name, number in report["versions"].items()]
    lines = [f"# Measured on {report['gpus']} x {report['card']}", ""]
    if report["rehearsal"]:
        lines = [
            "# Rehearsed on a CPU",
            "",
            "**Rehearsed on a CPU with tiny models: no number below says anything about a GPU.**",
            "",
        ]
    lines += [
        f"`python benchmarks/gpu_check.py`, {report['date']}, commit {report['commit']}.",
        f"Driver, power limit, clock: {report['driver']}. {', '.join(versions)}.",
    ]
    for name, found in report["stages"].items():
        lines += section(name, found, report)
    lines += ["", "## Verdicts", "", *[f"- {verdict}" for verdict in report["verdicts"]]]
    return "\n".join(lines) + "\n"


def verdicts(report: Result) -> list[str]:
    """Each bar: met, missed, or not measured and why."""
    if report["rehearsal"]:
        return ["no verdicts: rehearsed on a CPU"]
    stages = report["stages"]
    return [
        mfu_verdict(report),
        verdict(
            f"{TIMES_FAST_DIT:g} times as fast as fast-DiT",
            times_fast_dit(stages["against_fast_dit"].get("result")),
            lambda times: times >= TIMES_FAST_DIT,
            "{:.2f} times",
            why_not(stages["against_fast_dit"]),
        ),
        verdict(
            f"at most {OUTSIDE:.0%} of the time outside the step",
            (stages["run_l2"].get("result") or {}).get("outside"),
            lambda share: share <= OUTSIDE,
            "{:.2%}",
            why_not(stages["run_l2"]),
        ),
    ]


def mfu_verdict(report: Result) -> str:
    """Of the fastest way of ours in half precision, at any micro batch."""
    stages = report["stages"]
    measured = ways(stages["step_l2"].get("result")) + ways(stages["kernels_l2"].get("result"))
    shares = [way["of_peak"] for way in measured if way["kind"] == "ours" and "of_peak" in way]
    best = max(shares, default=None)
    if best is not None and "H100" not in report["card"]:
        return (
            f"{MFU:.0%} MFU of DiT-L/2 on an H100: not measured (the card is {report['card']}; "
            f"there it is {best:.1%} of the card's peak)"
        )
    bar = f"{MFU:.0%} MFU of DiT-L/2 on an H100"
    return verdict(bar, best, lambda mfu: mfu >= MFU, "{:.1%}", why_not(stages["step_l2"]))


def times_fast_dit(result: Result | None) -> float | None:
    """How many times as fast as fast-DiT the fastest of ours is."""
    found = []
    for way in ways(result):
        for peer, times in way.get("times_as_fast_as", {}).items():
            if peer.startswith("fast-DiT") and times:
                found.append(times)
    return max(found, default=None)


def verdict(bar: str, value: float | None, met: Callable[[float], bool], how: str, why: str) -> str:
    if value is None:
        return f"{bar}: not measured ({why})"
    return f"{bar}: {'met' if met(value) else 'missed'} ({how.format(value)})"


def why_not(found: Result) -> str:
    return str(found.get("missing") or found["status"])
