"""What each sample is told: balanced classes, captions of a packed data set, prompts, or nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from largescale.config import ModelConfig
from largescale.data.loader import to_condition
from largescale.data.shards import ShardDataset
from largescale.encoders.text import load_text_encoder
from largescale.errors import ConfigError
from largescale.images import balanced_labels
from largescale.models.conditioning import Condition
from largescale.weights import Trained


@dataclass(frozen=True)
class Conditions:
    of: Callable[[Sequence[int]], Condition]            # of these sample numbers, on the CPU
    stored: npt.NDArray[Any]                            # (N,) beside the samples: int64 labels, or texts
    facts: dict[str, Any]                               # for the provenance

    @property
    def titles(self) -> list[str] | None:
        return None if self.stored.dtype == np.int64 else self.stored.tolist()


def make_conditions(trained: Trained, n: int, captions: Path | None, prompts: Sequence[str], text_encoder: str | None,
                     device: torch.device) -> Conditions:
    """Of samples 0 .. n - 1. Raises ConfigError for a model that is told something else, or captions encoded by another
    encoder than the one that it was trained with."""
    model = trained.config.model
    if not model.caption_tokens:
        if captions or prompts:
            raise ConfigError("the model was not trained on captions; leave out --captions and --prompts")
        return _labels(model, n)
    if bool(captions) == bool(prompts):
        raise ConfigError("the model was trained on captions: give --prompts TEXT ..., or --captions DIR, a packed "
                          "data set whose captions to use" + (", not both" if captions else ""))
    encoder = trained.info["data_info"].get("encoders", {}).get("text")
    if captions:
        return _of_data(ShardDataset(captions), model, n, encoder)
    if text_encoder is None:
        raise ConfigError(f"--prompts needs --text-encoder, the one that the model was trained with: {encoder}")
    return _of_prompts(prompts, text_encoder, model, n, encoder, device)


def _labels(model: ModelConfig, n: int) -> Conditions:
    labels = np.array(balanced_labels(n, max(model.num_classes, 1)), np.int64)
    said = f"sample i has class i % {model.num_classes}" if model.num_classes else "none"
    return Conditions(lambda index: torch.from_numpy(labels[list(index)]), labels, {"labels": said})


def _of_data(data: ShardDataset, model: ModelConfig, n: int, encoder: str | None) -> Conditions:
    found = data.info.encoders.get("text")
    if data.info.captions is None or found != encoder:
        raise ConfigError(f"{data.path} has captions encoded by {found}, the model was trained with {encoder}; "
                          "pack them with that one")
    rows, turn = np.arange(n) % len(data), np.arange(n) // len(data)
    texts = data.texts(rows)
    choice = np.array([(k % len(of_row) + 0.5) / len(of_row) for k, of_row in zip(turn, texts, strict=True)])

    def of(index: Sequence[int]) -> Condition:
        part = list(index)
        gathered = data.gather(rows[part], choice=choice[part])
        return to_condition({name: torch.from_numpy(values) for name, values in gathered.items()})

    stored = np.array([of_row[k % len(of_row)] for k, of_row in zip(turn, texts, strict=True)])
    return Conditions(of, stored, {"captions": f"sample i has row i % {len(data)}'s, in turn",
                                   "captions_of": data.fingerprint})


def _of_prompts(prompts: Sequence[str], spec: str, model: ModelConfig, n: int, encoder: str | None,
                device: torch.device) -> Conditions:
    if empty := [i for i, prompt in enumerate(prompts) if not prompt.strip()]:
        raise ConfigError(f"prompt {empty[0]} of --prompts is empty; give a text, or --cfg-scale 0 to sample without")
    encode = load_text_encoder(spec, device, max_tokens=model.caption_tokens)
    if encode.identity != encoder:
        raise ConfigError(f"--text-encoder {spec} is {encode.identity}, the model was trained with {encoder}")
    each = encode(list(prompts))                        # one encoding a prompt
    rows = {
        "caption_tokens": torch.zeros(len(each), model.caption_tokens, model.caption_width, dtype=torch.float16),
        "caption_length": torch.tensor([len(prompt.tokens) for prompt in each]),
        "caption_pooled": torch.from_numpy(np.stack([prompt.pooled for prompt in each])),
    }
    for row, prompt in zip(rows["caption_tokens"], each, strict=True):
        row[: len(prompt.tokens)] = torch.from_numpy(prompt.tokens)

    def of(index: Sequence[int]) -> Condition:
        part = torch.tensor(list(index)) % len(each)
        return to_condition({name: values[part] for name, values in rows.items()})

    stored = np.array([prompts[i % len(prompts)] for i in range(n)])
    return Conditions(of, stored, {"prompts": list(prompts), "text_encoder": encode.identity})
