"""EDM (arXiv:2206.00364) with the curriculum, in plain PyTorch: u becomes sigma.

    python examples/edm.py
    torchrun --nproc-per-node 2 examples/edm.py

Needs largescale and torch. The same command again goes on from the checkpoint, as if it had never
stopped. The data are points on a spiral.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largescale.curriculum import Curriculum, PatiencePacing, sigma, uniform_clusters

BATCH = 256  # of each rank
P_MEAN, P_STD, SIGMA_DATA = -1.2, 1.2, 0.5


class Denoiser(nn.Module):
    """D(x; sigma), a network behind EDM's preconditioning (table 1). `level`: sigma, (N, 1)."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()]
        self.network = nn.Sequential(*hidden, nn.Linear(128, 2))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        total = level**2 + SIGMA_DATA**2
        output = self.network(torch.cat([x / total.sqrt(), level.log() / 4], dim=1))
        return SIGMA_DATA**2 / total * x + level * SIGMA_DATA / total.sqrt() * output


def spiral(n: int) -> Tensor:
    angle = 3 * math.pi * torch.rand(n, 1).sqrt()
    return torch.cat([angle.cos(), angle.sin()], dim=1) * angle * SIGMA_DATA / 5


def mean_over_ranks(loss: Tensor) -> float:
    """What the curriculum is shown, the same on every rank: otherwise their stages would part."""
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def save(path: Path, step: int, parts: dict[str, Any]) -> None:
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": step, **states}, f"{path}.part")
    os.replace(f"{path}.part", path)  # whole or not at all


def main(args: argparse.Namespace) -> None:
    rank, ranks = 0, 1
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    data, model = spiral(10_000), Denoiser()
    trained = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curriculum = Curriculum(uniform_clusters(args.clusters), PatiencePacing(args.patience))
    parts = {"model": model, "optimizer": optimizer, "curriculum": curriculum}
    step = 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    while step < args.steps:
        # All that is random follows from step and rank: no generator needs to be saved.
        random = torch.Generator().manual_seed(step * ranks + rank)
        x = data[torch.randint(len(data), (BATCH,), generator=random)]
        noise = torch.randn(BATCH, 2, generator=random)
        # In place of (P_mean + P_std * torch.randn(BATCH, 1)).exp().
        u = curriculum.lowest + torch.rand(BATCH, 1, generator=random) * (1 - curriculum.lowest)
        level = sigma(u, P_MEAN, P_STD)
        weight = (level**2 + SIGMA_DATA**2) / (level * SIGMA_DATA) ** 2
        loss = (weight * (trained(x + level * noise, level) - x).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        step += 1
        mean = mean_over_ranks(loss)
        curriculum.observe(mean)
        if rank == 0:
            print(f"step {step} loss {mean:.9g} u from {curriculum.lowest:.2f}", flush=True)
        if rank == 0 and step % args.save_every == 0:
            save(args.checkpoint, step, parts)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--patience", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, default=Path("edm.pt"))
    parser.add_argument("--save-every", type=int, default=100)
    main(parser.parse_args())
