"""DDPM with the curriculum, with diffusers and accelerate: u becomes timesteps.

    python examples/diffusers_accelerate.py
    accelerate launch --num-processes 2 examples/diffusers_accelerate.py
    torchrun --nproc-per-node 2 examples/diffusers_accelerate.py --cpu

Needs largescale, diffusers and accelerate. The same command again goes on from the checkpoint, as
if it had never stopped. The data are pictures of a bright spot.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from largescale.curriculum import Curriculum, PatiencePacing, timesteps, uniform_clusters

BATCH = 8  # of each rank


def spots(n: int) -> Tensor:
    """Pictures (n, 1, 16, 16) in [-1, 1]."""
    x, y = 16 * torch.rand(2, n, 1, 1, 1)
    along = torch.arange(16.0)
    return 2 * torch.exp(-((along - x) ** 2 + (along[:, None] - y) ** 2) / 8) - 1


def network() -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator(
        cpu=args.cpu, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    )
    ranks = accelerator.num_processes
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(spots(256)), batch_size=BATCH, shuffle=True, drop_last=True)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    curriculum = Curriculum(uniform_clusters(args.clusters), PatiencePacing(args.patience))
    accelerator.register_for_checkpointing(curriculum)
    if args.checkpoint.exists():
        accelerator.load_state(args.checkpoint)
    step = curriculum.observations  # one a step

    while step < args.steps:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        for (images,) in accelerator.skip_first_batches(loader, done):
            # All that is random follows from step and rank. Accelerate restores generators too,
            # but then the loader draws from them as it starts.
            random = torch.Generator().manual_seed(step * ranks + accelerator.process_index)
            noise = torch.randn(images.shape, generator=random).to(images)
            # In place of torch.randint(0, 1000, (BATCH,)).
            u = curriculum.lowest + torch.rand(BATCH, generator=random) * (1 - curriculum.lowest)
            t = timesteps(u, 1000).to(images.device)
            noisy = noise_scheduler.add_noise(images, noise, t)
            loss = (model(noisy, t).sample - noise).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

            step += 1
            # The same on every rank: otherwise their stages would part.
            mean = accelerator.reduce(loss.detach(), reduction="mean").item()
            curriculum.observe(mean)
            accelerator.print(f"step {step} loss {mean:.9g} u from {curriculum.lowest:.2f}")
            if step % args.save_every == 0:
                accelerator.save_state(args.checkpoint)
            if step == args.steps:
                break
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--patience", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, default=Path("diffusers_accelerate"))
    parser.add_argument("--save-every", type=int, default=100)
    main(parser.parse_args())
