"""The text of a model card: its metadata, and its sections in Markdown."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from largescale.checkpoint.weights import EXPORT_CONFIG
from largescale.config.schema import Config
from largescale.config.serialise import from_dict
from largescale.curriculum.curriculum import stage
from largescale.interop.diffusers_pipeline import PipelineFacts
from largescale.interop.markdown import code, plain, table

GRID = "grid.png"
# In a comment, which tells our cards from other people's.
MARK = "written by largescale.export"
# Rows of the table of transitions; the middle of a longer one is left out.
MOST_ROWS = 40
_OBJECTIVES = {
    "gaussian": "noise prediction (DDPM)",
    "flow": "velocity prediction (SiT)",
    "edm": "preconditioned denoising (EDM)",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from, besides what the export itself says."""

    description: dict[str, Any]
    """Config and provenance, as exports carry them."""
    parameters: int | None
    license: str | None = None
    datasets: tuple[str, ...] = ()
    """Names of data sets on the hub."""
    scores: tuple[dict[str, Any], ...] = ()
    """Rows of eval.score and eval.curve."""
    grid: bool = False
    """Whether a sample grid lies beside the card."""
    diffusers: bool = False
    """Whether the folder is a pipeline of diffusers'."""
    pipeline: PipelineFacts | None = None
    """What was found when the pipeline was written; None where only the card is."""
    repository: str | None = None
    """The name on the hub."""


def card_text(facts: CardFacts) -> str:
    """The whole card."""
    config = from_dict(facts.description["config"])
    parts = [
        front_matter(facts, config),
        f"<!-- {MARK}; without this line the next export leaves the card as it is -->\n",
        f"# {plain(config.name)}\n",
        _summary(facts, config),
    ]
    if facts.grid:
        parts.append(f"![samples]({GRID})\n")
    parts.append("## Use\n")
    if facts.diffusers:
        parts.append(_use_in_diffusers(facts, config))
    parts.append(_use_here(facts, config))
    if facts.scores:
        parts.append(_scores(facts.scores))
    parts.append(_training(facts, config))
    parts.append(_curriculum(facts, config))
    if facts.diffusers:
        parts.append(_differences(facts, config))
    licence = facts.license and f"{code(facts.license)}."
    parts.append(f"## Licence\n\n{licence or 'None was given when this card was written.'}\n")
    return "\n".join(parts)


# ---- the metadata


def front_matter(facts: CardFacts, config: Config) -> str:
    """The card's metadata. Each value is written as JSON, which YAML contains, so that no name can
    break it."""
    conditional = "class-conditional" if config.model.num_classes else "unconditional"
    if config.model.max_caption_tokens:
        conditional = "text-to-image"
    # The hub has no task for images of classes.
    task = "text-to-image" if config.model.max_caption_tokens else "unconditional-image-generation"
    tags = ["largescale", "diffusion", config.model.architecture, config.diffusion.objective]
    values: dict[str, Any] = {
        "library_name": "diffusers" if facts.diffusers else "largescale",
        "pipeline_tag": task,
        "tags": [*tags, conditional, "curriculum-learning"],
        "license": facts.license,
        "datasets": list(facts.datasets),
    }
    if facts.scores:
        values["model-index"] = [_index(facts, config, task)]
    lines = [f"{key}: {as_yaml(value)}" for key, value in values.items() if value]
    return "\n".join(["---", *lines, "---", ""])


def _index(facts: CardFacts, config: Config, task: str) -> dict[str, Any]:
    """The scores as the hub's leaderboards read them."""
    results = []
    for row in facts.scores:
        metrics = []
        for name, (value, error) in row["figures"].items():
            metrics.append({"type": name.lower(), "name": name, "value": value, "error": error})
        data = row["reference"] or _data(facts)
        results.append(
            {
                "task": {"type": task},
                "dataset": {"name": data, "type": data},
                "metrics": metrics,
            }
        )
    return {"name": config.name, "results": results}


def as_yaml(value: Any) -> str:
    """A value on one line of YAML."""
    text = json.dumps(value, ensure_ascii=False)
    # What is not printable, such as a line separator, has an escape in YAML too. Half of a
    # surrogate pair is not a character.
    shown = []
    for character in text:
        code = ord(character)
        if character.isprintable():
            shown.append(character)
        elif 0xD800 <= code < 0xE000:
            shown.append("\\uFFFD")
        else:
            shown.append(f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}")
    return "".join(shown)


# ---- the sections


def _data(facts: CardFacts) -> str:
    return str(facts.description["data_info"].get("name") or "unknown data")


def _network(config: Config) -> str:
    model = config.model
    if model.architecture == "ddpmpp":
        return "A DDPM++ U-Net"
    return (
        f"A DiT (patch size {model.patch_size}, width {model.hidden_size}, {model.depth} blocks, "
        f"{model.num_heads} heads)"
    )


def _summary(facts: CardFacts, config: Config) -> str:
    d, model = facts.description, config.model
    kind = "pixels" if d["data_info"]["kind"] == "pixels" else "latents"
    shape = f"({model.in_channels}, {model.input_size}, {model.input_size})"
    size = f" of {facts.parameters / 1e6:,.1f} million parameters" if facts.parameters else ""
    seen = d.get("samples_seen")
    images = f", {seen:,} images" if isinstance(seen, int) else ""
    condition = "without labels"
    if model.max_caption_tokens:
        condition = "with captions"
    elif model.num_classes:
        condition = f"with {model.num_classes:,} classes"
    weights = "raw weights" if d.get("weights") == "raw" else "EMA weights"
    if "ema" in d:
        weights = f"weights averaged by a power function of width {d['ema']['width']:g}"
    return (
        f"{_network(config)}{size}, trained {condition} on {plain(_data(facts))}: {kind} {shape}, "
        f"{_OBJECTIVES[config.diffusion.objective]}, {d['step']:,} steps{images}. These are the "
        f"{weights} in {d.get('dtype', 'fp32')}.\n"
    )


def _where(facts: CardFacts) -> str:
    return facts.repository or "FOLDER"


def _use_in_diffusers(facts: CardFacts, config: Config) -> str:
    own = facts.pipeline.reasons if facts.pipeline else ()
    # Where it is not known whether the folder carries code, the call has to work if it does.
    trust = ", trust_remote_code=True" if own or facts.pipeline is None else ""
    model = config.model
    asked = "class_labels=[1, 2]" if model.num_classes else "num_images=2"
    guided = ", guidance_scale=1.5" if model.num_classes and model.class_dropout_prob else ""
    vae = "" if facts.pipeline is None or facts.pipeline.vae else ", vae=vae"
    if facts.description["data_info"]["kind"] == "pixels":
        vae = ""
    lines = [
        "With diffusers:\n",
        "    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler\n",
        f'    pipe = DiffusionPipeline.from_pretrained("{_where(facts)}"{vae}{trust})',
        f"    image = pipe({asked}{guided}, num_inference_steps=50).images[0]",
        "    pipe.scheduler = DPMSolverMultistepScheduler.from_config(",
        '        pipe.scheduler.config, timestep_spacing="linspace")    # DPM-Solver++\n',
    ]
    if vae:
        lines.append(
            "The folder carries no VAE: `vae` is the one that the latents were made with, "
            f"{plain(_encoder(facts))}.\n"
        )
    return "\n".join(lines)


def _encoder(facts: CardFacts) -> str:
    return str(facts.description["data_info"].get("encoders", {}).get("vae") or "not known here")


def _use_here(facts: CardFacts, config: Config) -> str:
    where = "FOLDER"
    fetch = f"    hf download {_where(facts)} --local-dir {where}\n" if facts.repository else ""
    convert = ""
    if facts.diffusers:
        # eval.sample and largescale.load read our own layout only.
        convert = f"    python -m largescale.convert {where} --out EXPORT\n"
        where = "EXPORT"
    guided = config.model.class_dropout_prob and (
        config.model.num_classes or config.model.max_caption_tokens
    )
    scale = "1.5" if guided else "1"
    asked = "labels=[1, 2]" if config.model.num_classes else "n=2"
    if config.model.max_caption_tokens:
        asked = 'prompts=["a red bus"]'
    return (
        "With largescale:\n\n"
        f"{fetch}{convert}    python -m eval.sample {where} --out samples --num-samples 100 "
        f"--cfg-scale {scale}\n\n"
        "or from Python:\n\n"
        "    import largescale\n\n"
        f'    model = largescale.load("{where}")\n'
        f"    images = model.sample({asked}, cfg_scale={scale}, steps=50, seed=0)    # uint8\n"
    )


def _scores(rows: Sequence[dict[str, Any]]) -> str:
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row["figures"]))
    shown = []
    for row in rows:
        figures = []
        for name in names:
            value = row["figures"].get(name)
            figures.append(f"{value[0]:.5g} ± {value[1]:.2g}" if value else "")
        how = [row["sampler"] or "", row["steps"] or "", row["cfg_scale"] or ""]
        shown.append([row["step"], *how, row["n"], row["reference"], *figures])
    head = [
        "step",
        "sampler",
        "sampling steps",
        "guidance",
        "images",
        "reference",
        *map(plain, names),
    ]
    return f"## Scores\n\n{table(head, shown)}\n"


def _training(facts: CardFacts, config: Config) -> str:
    d, diffusion, noise = facts.description, config.diffusion, config.noise
    schedule = f"{diffusion.schedule}, {diffusion.timesteps:,} timesteps"
    if diffusion.objective == "flow":
        schedule = f"{diffusion.interpolant} interpolant"
    elif diffusion.objective == "edm":
        schedule = f"ln sigma of mean {diffusion.p_mean} and deviation {diffusion.p_std}"
    optimizer = config.optimizer
    draw = noise.sampling if noise.shift == 1 else f"{noise.sampling} (shift {noise.shift})"
    rows = [
        ("data", _data(facts)),
        ("noise", schedule),
        ("learned variance", "yes" if config.model.learn_sigma else "no"),
        ("draw and weighting of noise levels", f"{draw}, {noise.weighting}"),
        ("mirrored at random", "yes" if config.data.horizontal_flip else "no"),
        ("steps", f"{d['step']:,} of {config.train.steps:,}"),
        ("global batch", f"{config.train.global_batch_size:,}"),
        ("AdamW", f"lr {optimizer.lr}, betas {optimizer.betas}, decay {optimizer.weight_decay}"),
        ("EMA decay", optimizer.ema_decay),
        ("labels dropped", config.model.class_dropout_prob),
        ("precision", d.get("precision", "unknown")),
        ("seed", config.train.seed),
    ]
    of = "`largescale.json`" if facts.diffusers else f"`{EXPORT_CONFIG}`"
    return f"## Training\n\n{table(['setting', 'value'], rows)}\n\nAll settings are in {of}.\n"


def _curriculum(facts: CardFacts, config: Config) -> str:
    c = config.curriculum
    if c.pacing == "none":
        return "## Curriculum\n\nNone: all noise levels from the first step on.\n"
    state = facts.description.get("curriculum") or {}
    n = len(state["edges"]) - 1 if "edges" in state else c.n_clusters
    text = (
        f"## Curriculum\n\nThat of [arXiv:2403.10348](https://arxiv.org/abs/2403.10348): {n} "
        f"clusters of noise levels ({c.clusters}), {c.order}, {c.stages}; pacing {c.pacing}"
    )
    if c.pacing == "patience" and c.loss_smoothing:
        smoothed = f"on losses smoothed by {c.loss_smoothing}, which is not the paper's"
        text += f", patience {c.patience} {smoothed}.\n"
    elif c.pacing == "patience":
        text += f", patience {c.patience}.\n"
    else:
        text += f", {c.interval} steps.\n"
    rows = [(f"{step:,}", index, stage(index, n)) for step, index in state.get("transitions", [])]
    if not rows:
        return f"{text}\nNo transition up to this step.\n"
    # A run with hundreds of stages would bury the rest of the card.
    if len(rows) > MOST_ROWS:
        half = MOST_ROWS // 2
        rows = [*rows[:half], ("...", "...", "..."), *rows[-half:]]
    return f"{text}\n{table(['step', 'curriculum index', 'stage'], rows)}\n"


def _differences(facts: CardFacts, config: Config) -> str:
    """What diffusers computes otherwise."""
    pipeline = facts.pipeline
    lines = ["## How this differs in diffusers\n"]
    if pipeline is None:
        lines.append("- Not measured: this card was written without the weights.")
    elif pipeline.reasons:
        lines.append(
            "- The folder carries code, which `trust_remote_code=True` runs: a pipeline"
            + (" and a transformer" if pipeline.own_transformer else "")
            + f", because {'; '.join(pipeline.reasons)}."
        )
    else:
        lines.append("- `DiTPipeline` is exact for this model; the folder carries no code.")
    if pipeline and pipeline.stock_off:
        worst = max(pipeline.stock_off.values())
        by_time = ", ".join(f"{off:.1g} at t = {t}" for t, off in pipeline.stock_off.items())
        lines.append(
            "- diffusers' own `DiTTransformer2DModel` opens the weights too, and is off: one "
            f"forward pass by up to {worst:.1g} of the output's range ({by_time}). No other "
            "weights make it exact, as its frequencies are others."
        )
    if pipeline and pipeline.off:
        worst = max(pipeline.off.values())
        lines.append(
            "- The network in this folder gives largescale's outputs to within "
            f"{max(worst, 1e-7):.1g} of their range, in fp32."
        )
    ddim = "--sampler ddim --steps 50"
    if pipeline and not pipeline.reasons:
        ddim = "--sampler ddim --steps ddim50"
    lines.append(
        f"- DDIM in 50 steps is `eval.sample {ddim}`, DPM-Solver++ in 25 `eval.sample --sampler "
        "dpm++2m --steps 25`: from the same noise, the same image up to rounding."
    )
    if config.model.learn_sigma:
        lines.append(
            "- The pipeline drops the learned variance, so DDPM's samples have another variance "
            "than those of `eval.sample --sampler ddpm`. DDIM and DPM-Solver++ do not use it."
        )
    return "\n".join(lines) + "\n"
