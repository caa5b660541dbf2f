"""Models with class labels or captions, and data sets of captions."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from eval.drawing.conditions import Conditions, make_conditions
from largescale.checkpoint.weights import Trained
from largescale.config.presets import PRESETS
from largescale.models.build import build_model

CPU = torch.device("cpu")
TOKENS, WIDTH, POOLED = 5, 8, 6                         # as tests.conftest.CAPTIONED
ENCODER = "fake:encoder"


def trained(encoder: str | None = None, network: bool = False, **model: Any) -> Trained:
    config = PRESETS["debug"]()
    config = replace(config, model=replace(config.model, depth=1, **model))
    encoders = {"text": encoder} if encoder else {}
    net = build_model(config.model) if network else nn.Identity()
    return Trained(net, cast(Any, None), config, {"data_info": {"kind": "pixels", "encoders": encoders}})


def text_model(encoder: str | None = ENCODER, **model: Any) -> Trained:
    return trained(encoder, num_classes=0, **{"max_caption_tokens": TOKENS, "caption_width": WIDTH, "caption_pooled_width": POOLED} | model)


def made(model: Trained, n: int = 1000, **options: Any) -> Conditions:
    return make_conditions(model, n=n, device=CPU, **options)
