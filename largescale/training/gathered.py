"""A copy of a run's network with weights that are gathered from all ranks."""

from torch import nn

from largescale.config.schema import Config
from largescale.distributed.ranks import Ranks
from largescale.engine.deepspeed_engine import Engine
from largescale.models.build import Network, build_model


def gather_model(config: Config, engine: Engine, ranks: Ranks, weights: str) -> Network:
    """The network in fp32 and in eval mode on this rank's device, with the `weights` of that name:
    "master", "ema", or another average of the optimizer's state. Collective."""
    model = build_model(config.model).to(ranks.device).eval()
    # What follows the parameters is ZeRO's padding to a multiple of the number of ranks.
    flat = ranks.all_gather_flat(engine.partition(weights))[: engine.numel]
    nn.utils.vector_to_parameters(flat, [p for p in model.parameters() if p.requires_grad])

    # Fixed values, such as position embeddings, are no part of the state.
    for ours, trained in zip(model.parameters(), engine.module.parameters(), strict=True):
        if not ours.requires_grad:
            ours.data.copy_(trained)
    return model
