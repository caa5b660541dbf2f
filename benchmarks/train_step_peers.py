"""What benchmarks/train_step.py compares ours with: `PEERS[kind](job)` builds one and returns the
function that takes its step.

Each takes images that lie in memory, with labels: it has nothing to read. Its weights are ours; in
its first steps it is given our t, noise and dropped labels too, in all others it draws them itself.
Each reads its loss after every step where its own program does.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import count
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from ports import free_port
from torch import Tensor, nn

from largescale.condition import drop
from largescale.config.derived import make_curriculum
from largescale.config.schema import Config, ModelConfig
from largescale.data.loader import Loader, to_x_start
from largescale.data.shards import ShardDataset
from largescale.diffusion.build import build_objective
from largescale.models.build import build_model, latent_shape
from largescale.models.compile import what_to_compile
from largescale.models.dit import DiT
from largescale.randomness import step_draws

# First steps, which all ways take with the same draws.
GIVEN = 2
# x_start, y; t and noise, which a peer draws where they are None.
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
# Takes a step; returns loss and mse, of which diffusers has the latter only.
Step = Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class Job:
    """What one way has to do."""

    kind: str
    precision: str
    config: Config
    checkout: str | None = None

    @cached_property
    def device(self) -> torch.device:
        return torch.device(self.config.train.device)

    def autocast(self) -> Any:
        """The context of the forward pass in this precision."""
        half = self.precision == "bf16"
        return (
            torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext()
        )

    def accelerator(self) -> Any:
        """Hugging Face's accelerator, in this precision; where it is not installed, what it does on
        one rank."""
        if not find_spec("accelerate"):
            return Autocast(self)
        from accelerate import Accelerator

        # It meets itself at a port, by default a fixed one, which a test may have handed on.
        os.environ["MASTER_PORT"] = str(free_port())
        mixed = {"fp32": "no", "bf16": "bf16"}[self.precision]
        return Accelerator(mixed_precision=mixed, cpu=self.device.type == "cpu")

    def adamw(self, model: nn.Module, **more: Any) -> torch.optim.Optimizer:
        """The optimizer of DiT's train.py, with the preset's settings."""
        o = self.config.optimizer
        return torch.optim.AdamW(
            model.parameters(),
            lr=o.lr,
            betas=o.betas,
            eps=o.eps,
            weight_decay=o.weight_decay,
            **more,
        )

    def inputs(self) -> Iterator[Inputs]:
        """The inputs of our first steps; then the same images in turn, with t and noise left to the
        peer to draw."""
        c = self.config
        dataset = ShardDataset(c.data.path)
        dataset.normalize(c.data.normalize)
        objective = build_objective(c)
        active = make_curriculum(c).active
        size = c.train.global_batch_size
        shape = latent_shape(c.model)
        batches = []
        with Loader(
            dataset,
            seed=c.train.seed,
            global_batch_size=size,
            micro_batch_size=size,
            rank=0,
            world_size=1,
            flip=c.data.horizontal_flip,
        ) as loader:
            for step in range(GIVEN):
                rows = {}
                for name, values in loader.batch(step).items():
                    rows[name] = values[0].to(self.device)
                # The draws of the trainer's step, by seed and step.
                draws = step_draws(
                    c.train.seed,
                    step,
                    size,
                    shape,
                    dropout_prob=c.model.class_dropout_prob,
                    posterior=True,
                    device=self.device,
                )
                x = to_x_start(
                    rows["latent"], dataset.info.kind, dataset.info.normalization, draws.posterior
                )
                batches.append((x, rows["label"]))
                yield (
                    x,
                    drop(rows["label"], draws.dropout, c.model.num_classes),
                    objective.draw(draws.v, *active),
                    draws.noise,
                )
        for i in count():
            yield *batches[i % GIVEN], None, None


class Autocast:
    """What accelerate does to a model and its loss on one rank."""

    def __init__(self, job: Job):
        self._job = job

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        forward = model.forward

        def in_autocast(*args: Any, **kwargs: Any) -> Any:
            with self._job.autocast():
                return forward(*args, **kwargs)

        model.forward = in_autocast
        return model, optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()


@contextlib.contextmanager
def importable_accelerate() -> Iterator[None]:
    """A context in which a program that imports accelerate, as fast-DiT's does, can be imported
    without it."""
    if find_spec("accelerate"):
        yield
        return
    # diffusers looks for accelerate once, and must not find the stand-in.
    with contextlib.suppress(ImportError):
        from diffusers.models import AutoencoderKL  # noqa: F401
    stand_in: Any = ModuleType("accelerate")
    stand_in.Accelerator = Autocast
    sys.modules["accelerate"] = stand_in
    try:
        yield
    finally:
        del sys.modules["accelerate"]


def same_weights(config: ModelConfig) -> DiT:
    """Our model with random weights, the same in every process."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    # adaLN-Zero starts as a function that is 0 everywhere: a wrong one would not be noticed.
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4 / config.hidden_size**0.5, generator=generator)
    return model


def drop_labels(model: nn.Module, probability: float) -> None:
    """Set the probability with which peers drop labels, in their models."""
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = probability


def modules_of(checkout: str) -> tuple[Any, Any, Any]:
    """The models, diffusion and train of a checkout."""
    sys.path.insert(0, checkout)
    import diffusion
    import models

    with importable_accelerate():
        import train
    return models, diffusion, train


def dit(job: Job, fast: bool = False) -> Step:
    """The body of the loop of facebookresearch/DiT's train.py, or of fast-DiT's, which differs by
    accelerate and, in its model, checkpointing. Without DDP; its train.py has no autocast, so bf16
    is not its own. Sets TF32."""
    its_models, its_diffusion, its_train = modules_of(str(job.checkout))
    names = (
        "input_size",
        "patch_size",
        "in_channels",
        "hidden_size",
        "depth",
        "num_heads",
        "mlp_ratio",
        "class_dropout_prob",
        "num_classes",
        "learn_sigma",
    )
    model = its_models.DiT(**{name: getattr(job.config.model, name) for name in names})
    model.load_state_dict(same_weights(job.config.model).state_dict())
    model.to(job.device)

    # In the order of its main().
    ema = deepcopy(model)
    its_train.requires_grad(ema, False)
    diffusion = its_diffusion.create_diffusion(timestep_respacing="")
    opt = job.adamw(model)
    its_train.update_ema(ema, model, decay=0)
    model.train()
    ema.eval()
    if fast:
        accelerator = job.accelerator()
        model, opt = accelerator.prepare(model, opt)

    def network(*args: Any, **kwargs: Any) -> Tensor:
        with contextlib.nullcontext() if fast else job.autocast():
            return model(*args, **kwargs).float()

    def step() -> tuple[float, Tensor]:
        x, y, t, noise = next(inputs)
        # Labels that are given are dropped already.
        drop_labels(model, job.config.model.class_dropout_prob if t is None else 0.0)
        if t is None:
            t = torch.randint(0, diffusion.num_timesteps, (x.shape[0],), device=job.device)
        losses = diffusion.training_losses(network, x, t, {"y": y}, noise=noise)
        loss = losses["loss"].mean()
        opt.zero_grad()
        if fast:
            accelerator.backward(loss)
        else:
            loss.backward()
        opt.step()
        its_train.update_ema(ema, model, decay=job.config.optimizer.ema_decay)
        return loss.item(), losses["mse"].detach().mean()

    inputs = job.inputs()
    return step


def hugging_face(job: Job) -> Step:
    """Hugging Face's model, noise scheduler and EMA, in the loop of its examples, with accelerate.
    It has no vb term."""
    accelerator = job.accelerator()
    from diffusers import DDPMScheduler, DiTTransformer2DModel
    from diffusers.training_utils import EMAModel

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    m = job.config.model
    model = DiTTransformer2DModel(
        num_attention_heads=m.num_heads,
        attention_head_dim=m.hidden_size // m.num_heads,
        in_channels=m.in_channels,
        out_channels=2 * m.in_channels,
        num_layers=m.depth,
        sample_size=m.input_size,
        patch_size=m.patch_size,
        num_embeds_ada_norm=m.num_classes,
    )
    # Not strict: the fixed pos_embed is its own.
    model.load_state_dict(renamed(same_weights(m).state_dict(), m.depth), strict=False)
    model.to(job.device).train()
    ema = EMAModel(model.parameters(), decay=job.config.optimizer.ema_decay, foreach=True)
    ema.to(job.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    model, opt = accelerator.prepare(model, job.adamw(model))

    def step() -> tuple[None, float]:
        x, y, t, noise = next(inputs)
        drop_labels(model, job.config.model.class_dropout_prob if t is None else 0.0)
        if t is None or noise is None:
            noise = torch.randn_like(x)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),), device=x.device)
        output = model(scheduler.add_noise(x, noise, t), timestep=t, class_labels=y).sample
        # The other channels are the variance, which it does not train.
        predicted = output[:, : x.shape[1]]
        loss = F.mse_loss(predicted.float(), noise.float())
        accelerator.backward(loss)
        opt.step()
        opt.zero_grad()
        ema.step(model.parameters())
        return None, loss.detach().item()

    inputs = job.inputs()
    return step


def renamed(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """DiT's weights by diffusers' names; each of its blocks embeds t and y by itself."""
    new = {}
    for kind in ("weight", "bias"):
        new[f"pos_embed.proj.{kind}"] = state[f"x_embedder.proj.{kind}"]
        new[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        new[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
    for i in range(depth):
        its = f"transformer_blocks.{i}"
        mine = f"blocks.{i}"
        labels = state["y_embedder.embedding_table.weight"]
        new[f"{its}.norm1.emb.class_embedder.embedding_table.weight"] = labels
        names = {
            "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "norm1.linear": f"{mine}.adaLN_modulation.1",
            "attn1.to_out.0": f"{mine}.attn.proj",
            "ff.net.0.proj": f"{mine}.mlp.fc1",
            "ff.net.2": f"{mine}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            # Our product of queries, keys and values is three of theirs.
            parts = state[f"{mine}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                new[f"{its}.attn1.to_{name}.{kind}"] = part
            for theirs, name in names.items():
                new[f"{its}.{theirs}.{kind}"] = state[f"{name}.{kind}"]
    return new


def ddp(job: Job) -> Step:
    """Our model and loss in PyTorch's DistributedDataParallel, one rank, with its fastest AdamW and
    EMA."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    c = job.config
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    gpu = job.device.type == "cuda"
    dist.init_process_group("nccl" if gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    module = same_weights(c.model).to(job.device)
    # One fused update for all weights.
    weights = [p.detach() for p in module.parameters() if p.requires_grad]
    ema = [p.clone() for p in weights]
    objective = build_objective(c)
    opt = job.adamw(module, fused=True)
    what = what_to_compile(c.train.compile, c.train.device)
    if what == "blocks":
        for block in module.blocks:
            block.compile()
    elif what == "model":
        module.compile()
    model = DistributedDataParallel(module)

    def step() -> tuple[Tensor, Tensor]:
        x, y, t, noise = next(inputs)
        if t is None or noise is None:
            t = torch.randint(0, c.diffusion.timesteps, (len(x),), device=x.device)
            noise = torch.randn_like(x)
            dropped = torch.rand(len(x), device=x.device) < c.model.class_dropout_prob
            y = drop(y, dropped, c.model.num_classes)
        with job.autocast():
            losses = objective.training_losses(model, x, t, noise, y)
        losses.loss.mean().backward()
        opt.step()
        opt.zero_grad()
        torch._foreach_lerp_(ema, weights, 1 - c.optimizer.ema_decay)
        return losses.loss.detach().mean(), losses.mse.detach().mean()

    inputs = job.inputs()
    return step


PEERS: dict[str, Callable[[Job], Step]] = {
    "dit": dit,
    "fast-dit": partial(dit, fast=True),
    "diffusers": hugging_face,
    "ddp": ddp,
}
