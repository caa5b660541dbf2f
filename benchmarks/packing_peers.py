"""The peers' side of benchmarks/packing.py: their commands; and as a program, LightningDiT's script."""

import argparse
import os
import runpy
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ENVIRONMENT = Path(__file__).parent / ".venv-packing"

Command = list[Any]


def img2dataset(folder: Path, cores: int, args: argparse.Namespace, name: str) -> Command:
    urls = folder / f"{name}.txt"
    files = sorted((folder / name / "n0").iterdir())
    urls.write_text("".join(f"file://{file}\n" for file in files))
    command = [ENVIRONMENT / "bin/img2dataset", "--url_list", urls, "--output_folder"]
    command += [folder / "out", "--image_size", args.resolution, "--resize_mode", "center_crop"]
    command += ["--output_format", "webdataset", "--processes_count", 1]
    return [*command, "--thread_count", cores, "--disallowed_header_directives", "[]"]


def lightningdit(folder: Path, cores: int, args: argparse.Namespace, name: str) -> Command:
    command = [sys.executable, __file__, args.lightningdit, args.device, args.resolution]
    command += [folder / "vae.pt", "--data_path", folder / name, "--output_path", folder / "out"]
    command += ["--config", folder / "vae.yaml", "--image_size", args.resolution]
    return [*command, "--batch_size", max(args.batch), "--num_workers", cores]


def run_theirs(
    clone: str, device: str, resolution: int, weights: str, arguments: list[str]
) -> None:
    """Runs their extract_features.py as it is, on a GPU or with the CPU in its place."""
    import torch
    import torch.distributed as dist

    sys.path.insert(0, clone)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    start_group = dist.init_process_group
    if device == "cpu":
        dist.init_process_group = lambda backend: start_group("gloo")
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 1
        torch.cuda.set_device = lambda device: None
        torch.nn.Module.cuda = lambda module: module
        torch.Tensor.cuda = lambda tensor: tensor
        loader = torch.utils.data.DataLoader.__init__
        torch.utils.data.DataLoader.__init__ = lambda self, *args, **more: loader(
            self, *args, **{**more, "pin_memory": False}
        )
    if find_spec("omegaconf") is None:  # which they read two values with
        params = SimpleNamespace(embed_dim=32)
        config = SimpleNamespace(ckpt_path=weights, model=SimpleNamespace(params=params))
        stand_in: Any = types.ModuleType("omegaconf")
        stand_in.OmegaConf = SimpleNamespace(load=lambda path: config)
        sys.modules["omegaconf"] = stand_in
    from tokenizer.vavae import VA_VAE

    VA_VAE.__init__.__defaults__ = (resolution, 0.5, True)  # their program leaves it at 256
    sys.argv = ["extract_features.py", *arguments]
    runpy.run_path(f"{clone}/extract_features.py", run_name="__main__")


def make_autoencoder(folder: Path, clone: str) -> Path:
    """Weights of their class, and the config that names them."""
    import torch

    sys.path.insert(0, clone)
    from tokenizer.autoencoder import AutoencoderKL

    torch.manual_seed(0)
    file = folder / "vae.pt"
    model = AutoencoderKL(embed_dim=32, ch_mult=(1, 1, 2, 2, 4))
    torch.save({"state_dict": model.state_dict()}, file)
    (folder / "vae.yaml").write_text(f"ckpt_path: {file}\nmodel:\n  params:\n    embed_dim: 32\n")
    return file


if __name__ == "__main__":
    clone, device, resolution, weights, *rest = sys.argv[1:]
    run_theirs(clone, device, int(resolution), weights, rest)
