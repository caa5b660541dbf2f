"""python -m eval.sample RUN_OR_EXPORT --out DIR: samples, as many of each class, or of captions or prompts.

    DIR/cfg1.5/samples.npz        arr_0 (N, H, W, 3) uint8 and arr_1 (N,) int64 labels: ADM's layout, for its evaluator;
                                  of a text-to-image model arr_1 are the texts. Of a latent model without --vae
                                  latents.npz, with arr_0 (N, C, H, W) float32 as the model has them
    DIR/cfg1.5/grid.png           the first 100, ten columns (latents show three channels, undecoded)
    DIR/cfg1.5/provenance.json    all that the samples depend on; written last, so a set that has one is whole

A whole set with the same provenance is left alone: to go on after an interruption, run the same command again.
Under torchrun or srun the ranks share the samples; sample i is the same whoever draws it.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from PIL import Image
from torch import nn
from tqdm import tqdm

import largescale
from eval.conditions import Conditions, make_conditions
from largescale.build import latent_shape
from largescale.distributed import Ranks
from largescale.encoders.vae import Vae, load_vae
from largescale.errors import ConfigError, LargescaleError
from largescale.files import write_atomically
from largescale.images import grid, titled, to_uint8
from largescale.launch import env_world_size, leave, print_error
from largescale.sampling import SamplingConfig, draw_samples
from largescale.signals import serve_stop_signals, stop_requested
from largescale.weights import load_trained

PROVENANCE, GRID = "provenance.json", "grid.png"


@dataclass(frozen=True)
class Sample:
    source: Annotated[Path, tyro.conf.Positional]
    """A run directory, such as runs/digits, or an export."""
    out: Path
    """Gets a folder for each cfg_scale."""
    num_samples: int = 1000
    cfg_scale: tuple[float, ...] = (1.5,)
    """One or more; 1 is no guidance."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    steps: int = 250
    seed: int = 0
    prompts: tuple[str, ...] = ()
    """Of a text-to-image model: sample i has prompt i % n."""
    captions: Path | None = None
    """Or a packed data set: sample i has a caption of its row i % n."""
    text_encoder: str | None = None
    """For prompts: where the encoder that the data were packed with lies now; by default where it was then."""
    vae: str | None = None
    """Of a latent model: likewise the VAE, to decode the samples with; none: keep latents."""
    cfg_channels: int | None = None
    """Guide the first k channels only; by default all of the image's."""
    batch_size: int = 250
    """Images drawn at a time, by each rank: a matter of speed and memory, not of what is drawn."""
    step: int | None = None
    """Which checkpoint of a run; the newest valid one by default."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"

    def check(self) -> None:
        """Raises ConfigError before any work is done, not after the first of several scales."""
        for key, value in {"num_samples": self.num_samples, "batch_size": self.batch_size}.items():
            if value < 1:
                raise ConfigError(f"{key}={value} must be at least 1; set --{key.replace('_', '-')}")
        for scale in self.cfg_scale:
            if not 0 <= scale < math.inf:
                raise ConfigError(f"cfg_scale={scale} must be 0 or more; 1 is no guidance, the paper uses 1.5")
        if not self.cfg_scale:
            raise ConfigError("--cfg-scale names no scale; give one or more, such as --cfg-scale 1.5 2.0")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch sees no CUDA device; to sample here: --device cpu")


class Sampler:
    """A trained model, and this process's part in sampling from it. Without a launcher no process group is made."""

    def __init__(self, options: Sample, ranks: Ranks | None):
        self.options, self.ranks = options, ranks
        self.rank, self.world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
        self.device = ranks.device if ranks else torch.device(options.device)
        self.trained = load_trained(options.source, options.step)
        self.weights_sha256 = weights_sha256(self.trained.model)
        self.trained.model.to(self.device)
        self.pixels = self.trained.info["data_info"]["kind"] == "pixels"
        if not self.trained.config.model.class_dropout_prob and set(options.cfg_scale) != {1.0}:
            raise ConfigError("the model was trained with class_dropout_prob=0 and knows no null label to guide with; "
                              "set --cfg-scale 1")
        made_with = self.trained.info.get("made_with", {})
        self.conditions = make_conditions(
            self.trained, options.num_samples, options.captions, options.prompts,
            options.text_encoder or made_with.get("text_encoder"), self.device)
        vae = options.vae or made_with.get("vae") or "none"
        self.vae = None if vae == "none" else self.decoder(vae)

    def decoder(self, spec: str) -> Vae:
        """Raises ConfigError for a VAE that is not the one that made the model's latents."""
        encoder = self.trained.info["data_info"].get("encoders", {}).get("vae")
        if encoder is None:
            raise ConfigError("the model draws pixels, or latents of no VAE that its data name; leave out --vae")
        vae = load_vae(spec, self.device)
        if vae.identity != encoder:
            raise ConfigError(f"--vae {spec} is {vae.identity}, the model was trained with {encoder}")
        return vae

    def __call__(self, cfg_scale: float) -> None:
        """Collective. One sample set: left alone where it is whole already, otherwise drawn and written by rank 0."""
        o = self.options
        config = SamplingConfig(o.sampler, o.steps, cfg_scale, o.cfg_channels, clip_denoised=self.pixels, seed=o.seed)
        folder, file = o.out / f"cfg{cfg_scale}", "samples.npz" if self.pixels or self.vae else "latents.npz"
        provenance = self.provenance(config)
        what = (f"{folder}: {o.num_samples} images, {o.sampler} {o.steps} steps, cfg_scale {cfg_scale}, seed {o.seed}, "
                f"checkpoint step {self.trained.info['step']}")
        if self.gather(is_whole(folder, file, provenance))[0]:
            self.say(f"{what}; already drawn, left alone")
            return
        start = time.perf_counter()
        x = self.draw(config, folder.name)
        seconds = time.perf_counter() - start
        if self.rank == 0:
            save(folder, file, self.decoded(x) if self.vae else x, self.conditions, provenance)
        self.say(f"{what}; {seconds:.1f} s, {o.num_samples / seconds:.1f} images/s")

    def draw(self, config: SamplingConfig, name: str) -> npt.NDArray[Any]:
        """All samples, on every rank: pixels (N, H, W, 3) uint8, or (N, C, H, W) float32 as a latent model has them."""
        model, n = self.trained.config.model, self.options.num_samples
        mine = slice(self.rank, None, self.world_size)
        bar = tqdm(
            total=n, desc=name, unit="image", dynamic_ncols=True, disable=self.rank != 0,
            mininterval=0.5 if sys.stderr.isatty() else 20,
        )
        with bar, torch.inference_mode():
            share = self.together(lambda: draw_samples(
                self.trained.model, self.trained.diffusion, config, index=range(n)[mine],
                condition=self.conditions.of, shape=latent_shape(model), num_classes=model.num_classes,
                batch_size=self.options.batch_size, device=self.device,
                progress=lambda drawn: bar.update(min(drawn * self.world_size, n - bar.n)),  # the others keep pace
                stop=stop_requested,
            ))
        drawn = to_uint8(share) if self.pixels else share.numpy()
        x = np.empty((n, *drawn.shape[1:]), drawn.dtype)
        for rank, part in enumerate(self.gather(drawn)):
            x[rank :: self.world_size] = part
        return x

    def decoded(self, x: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Latents (N, C, H, W) -> images (N, H, W, 3)."""
        assert self.vae
        parts = tqdm(torch.from_numpy(x).split(16), "decode", unit="batch", delay=2, dynamic_ncols=True)
        return np.concatenate([self.vae.decode(part).permute(0, 2, 3, 1).numpy() for part in parts])

    def provenance(self, config: SamplingConfig) -> dict[str, Any]:
        """As plain JSON values. Not in it: batch size and number of ranks, which change the rounding only."""
        c = self.trained.config
        return {
            "sampling": asdict(config),
            "num_samples": self.options.num_samples,
            **self.conditions.facts,
            **({"decoder": self.vae.identity} if self.vae else {}),
            "device": self.device.type,  # torch draws other noise on each type
            "run": c.name,
            "model": asdict(c.model),
            "diffusion": asdict(c.diffusion),
            "weights": "ema",
            "weights_sha256": self.weights_sha256,  # two runs can agree in all of the rest
            **self.trained.info,
            "versions": {"torch": str(torch.__version__), "largescale": largescale.__version__},
        }

    def together(self, action: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self.ranks.together(action) if self.ranks else action()

    def gather(self, value: Any) -> list[Any]:
        return self.ranks.all_gather_object(value) if self.ranks else [value]

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def weights_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def is_whole(folder: Path, file: str, provenance: dict[str, Any]) -> bool:
    if not all((folder / name).exists() for name in (file, GRID, PROVENANCE)):
        return False
    found: dict[str, Any] = json.loads((folder / PROVENANCE).read_text())
    return found == provenance


def save(folder: Path, file: str, x: npt.NDArray[Any], conditions: Conditions, provenance: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROVENANCE).unlink(missing_ok=True)  # first: what is half replaced is not whole
    temporary = folder / f"{file}.tmp"
    with temporary.open("wb") as opened:
        np.savez(opened, x, conditions.stored)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(folder / file)
    images = x[:100] if file == "samples.npz" else to_uint8(torch.from_numpy(x[:100]))
    titles, columns = conditions.titles, min(10, len(images))
    scale = max(1, (96 if titles else 64) // images.shape[2])
    sheet = titled(images, titles[:100], columns, scale) if titles else grid(images, columns, scale)
    Image.fromarray(sheet).save(folder / GRID)
    write_atomically(folder / PROVENANCE, json.dumps(provenance, indent=1))


def run(options: Sample) -> None:
    options.check()
    # Ranks that finish early wait for the last one's share, not for ten minutes only.
    ranks = Ranks(options.device, timeout_s=3600) if env_world_size() > 1 else None
    try:
        sampler = Sampler(options, ranks)
        for cfg_scale in options.cfg_scale:
            sampler(cfg_scale)
    finally:
        if ranks:
            ranks.close()


def main(args: list[str] | None = None) -> int:
    options = tyro.cli(Sample, args=args, description=__doc__, prog="python -m eval.sample")
    serve_stop_signals()
    try:
        run(options)
    except LargescaleError as error:
        print_error(error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    leave(main())
