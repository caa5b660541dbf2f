"""python docs/draw_densities.py [OUT]: the densities of docs/baselines.md as a picture, from the samplers themselves.

Above, over the noise level u; below, over log SNR, for data of unit variance. On the left the cosine schedule of
diffusion.objective=gaussian, on the right flow matching.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from largescale.config.schema import Config, DiffusionConfig, ModelConfig, NoiseConfig
from largescale.diffusion.build import build_noise_sampler, build_objective

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BINS = 1000
OBJECTIVES = {
    "cosine schedule": DiffusionConfig(),
    "flow matching, linear": DiffusionConfig("flow"),
}
# name: the settings, and the line
DENSITIES = {
    "uniform": (NoiseConfig(), "#bbbbbb", "-"),
    "laplace": (NoiseConfig("laplace"), "#ee6677", "-"),
    "logit_normal": (NoiseConfig("logit_normal"), "#4477aa", "-"),
    "mode, s = 1.29": (NoiseConfig("mode"), "#228833", "-"),
    "cosine_map": (NoiseConfig("cosine_map"), "#ccbb44", "-"),
    "beta (1, 2), an example": (NoiseConfig("beta", beta_alpha=1.0, beta_beta=2.0), "#aa3377", "-"),
    "speed": (NoiseConfig("speed"), "#66ccee", "-"),
    "uniform, shift = 3": (NoiseConfig(shift=3.0), "#777777", "--"),
    "logit_normal, shift = 3": (NoiseConfig("logit_normal", shift=3.0), "#4477aa", "--"),
}


def densities(
    diffusion: DiffusionConfig, noise: NoiseConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log SNR in the middle of the bins of the noise axis, and the densities over u and over log SNR, (BINS,) each."""
    config = Config("", model=ModelConfig(learn_sigma=False), diffusion=diffusion, noise=noise)
    objective = build_objective(config)
    v = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    u, _ = build_noise_sampler(config, objective).warp(v, 0.0, 1.0)
    edges = np.arange(BINS + 1) / BINS
    mass = np.diff(np.interp(edges, u.numpy(), v.numpy(), left=0, right=1))
    log_snr = np.array([objective.log_snr_at(edge) for edge in edges])
    return (log_snr[1:] + log_snr[:-1]) / 2, mass * BINS, mass / -np.diff(log_snr)


def main(out: Path) -> None:
    plots, rows = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharey="row")
    u = (np.arange(BINS) + 0.5) / BINS
    for (title, diffusion), over_u, over_snr in zip(OBJECTIVES.items(), *rows, strict=True):
        for label, (noise, color, style) in DENSITIES.items():
            if noise.shift != 1 and diffusion.objective != "flow":
                continue
            log_snr, of_u, of_snr = densities(diffusion, noise)
            line = {
                "color": color,
                "linestyle": style,
                "linewidth": 4 if label == "uniform" else 1.4,
                "label": label,
            }
            over_u.plot(u, of_u, **line)
            over_snr.plot(log_snr[1:-1], of_snr[1:-1], **line)
        over_u.set(title=title, xlabel="noise level u", xlim=(0, 1), yscale="log", ylim=(0.02, 12))
        over_snr.set(xlabel="log SNR", xlim=(9, -9), yscale="log", ylim=(0.002, 1.5))
    rows[0, 0].set_ylabel("density over u")
    rows[1, 0].set_ylabel("density over log SNR")
    handles, labels = rows[0, 1].get_legend_handles_labels()
    plots.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    plots.savefig(out, dpi=80)
    Image.open(out).convert("RGB").quantize(64).save(out, optimize=True)  # a third of the size


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/densities.png"))
