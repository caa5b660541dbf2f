"""The curriculum as a callback of Lightning, for any module that draws its noise levels from
`self.noise_levels`; here one of flow matching.

    python examples/lightning_callback.py
    python examples/lightning_callback.py --devices 2

Needs largescale and pytorch-lightning. The same command again goes on from the checkpoint, as if
it had never stopped. The data are points on a spiral.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from largescale.curriculum import Curriculum, PatiencePacing, uniform_clusters


class CurriculumCallback(Callback):
    """Sets the module's noise levels, and shows the curriculum the loss of each step. Its state is
    in Lightning's checkpoints."""

    def __init__(self, curriculum: Curriculum):
        self.curriculum = curriculum

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any
    ) -> None:
        module.noise_levels = self.curriculum.active

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        # The same on every rank: otherwise their stages would part.
        loss = trainer.strategy.reduce(outputs["loss"], reduce_op="mean").item()
        self.curriculum.observe(loss)
        if trainer.is_global_zero:
            lowest = self.curriculum.lowest
            print(f"step {trainer.global_step} loss {loss:.9g} u from {lowest:.2f}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return self.curriculum.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(state_dict)


class FlowMatching(pl.LightningModule):
    noise_levels = (0.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()]
        self.network = nn.Sequential(*hidden, nn.Linear(128, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        # Lightning does not save generators: what is random follows from step and rank.
        random = torch.Generator().manual_seed(
            self.global_step * self.trainer.world_size + self.global_rank
        )
        low, high = self.noise_levels
        t = low + torch.rand(len(x), 1, generator=random).to(x) * (high - low)
        noise = torch.randn(x.shape, generator=random).to(x)
        velocity = self.network(torch.cat([(1 - t) * x + t * noise, t], dim=1))
        return (velocity - (noise - x)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def train_dataloader(self) -> DataLoader:
        angle = 3 * math.pi * torch.rand(2560, 1, generator=torch.Generator().manual_seed(0)).sqrt()
        data = TensorDataset(torch.cat([angle.cos(), angle.sin()], dim=1) * angle / 5)
        # It shuffles by seed and epoch.
        sampler = DistributedSampler(data, self.trainer.world_size, self.global_rank)
        return DataLoader(data, batch_size=256, sampler=sampler)


def main(args: argparse.Namespace) -> None:
    pl.seed_everything(0)
    curriculum = Curriculum(uniform_clusters(args.clusters), PatiencePacing(args.patience))
    checkpoint = ModelCheckpoint(args.checkpoint, save_last=True, every_n_epochs=args.save_every)
    trainer = pl.Trainer(
        accelerator="auto",
        devices=args.devices,
        max_epochs=args.epochs,
        callbacks=[CurriculumCallback(curriculum), checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = args.checkpoint / "last.ckpt"
    trainer.fit(FlowMatching(), ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--patience", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=10, help="epochs")
    parser.add_argument("--checkpoint", type=Path, default=Path("lightning_callback"))
    main(parser.parse_args())
