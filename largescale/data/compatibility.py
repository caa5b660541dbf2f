"""Whether a data set is one that the model of a config can be trained on."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from largescale.config.schema import Config
from largescale.data.shards import ShardDataset, check_flip
from largescale.errors import DataError
from largescale.host.launch import env_local_rank, local_world_size
from largescale.models.build import latent_shape


def open_dataset(config: Config, rank: int = 0, world_size: int = 1) -> ShardDataset:
    """The data set, checked against the model; ranks share the hashing. Raises DataError."""
    # Rank r verifies every world_size-th file: no file is hashed twice. Copies are verified as
    # such.
    verify = config.data.verify and config.data.stage is None
    dataset = ShardDataset(config.data.path, verify, slice(rank, None, world_size))
    if dataset.info.x_shape != latent_shape(config.model):
        raise DataError(
            f"{config.data.path} holds {dataset.info.kind} of shape {dataset.info.x_shape}, the "
            f"model takes {latent_shape(config.model)}{_other_stride(dataset, config)}; set "
            "--model.in-channels and --model.input-size, or choose other data"
        )
    dataset.normalize(config.data.normalize)
    check_condition(dataset, config)

    # Mirrored latents have to be stored, and augmented ones cannot be.
    if config.data.horizontal_flip:
        check_flip(dataset.info, dataset.has_mirror)
    if config.data.augment and dataset.info.kind != "pixels":
        raise DataError(
            f"{config.data.path} holds {dataset.info.kind}, and augmentation is of pixels; set "
            "--data.augment 0"
        )
    return dataset


def read_copy(config: Config, dataset: ShardDataset, copy: Path) -> None:
    """Have a data set's files read from a copy on this node's disk; the node's ranks share the
    hashing. Raises DataError."""
    part = slice(env_local_rank(), None, local_world_size(os.environ))
    dataset.read_copy(copy, config.data.verify, part)


def _other_stride(dataset: ShardDataset, config: Config) -> str:
    """A remark where the latents are of an encoder with another stride than the model is for."""
    encoder = dataset.info.encoders.get("vae")
    side = dataset.info.x_shape[1]
    if encoder is None or side == config.model.input_size:
        return ""
    factor = side / config.model.input_size
    times = f"{factor:g} times as large" if factor > 1 else f"{1 / factor:g} times as small"
    return (
        f", and these latents of {encoder} are {times}: an encoder of another stride, or images of "
        "another resolution"
    )


_ALIKE = (
    "kind",
    "shape",
    "num_classes",
    "scale_factor",
    "latent_mean",
    "latent_std",
    "encoders",
    "captions",
)


def check_alike(validation: ShardDataset, training: ShardDataset, option: str) -> None:
    """Raises DataError where the sets are not of one kind, but for their names. `option`: the one
    that names the held-out images."""
    for key in _ALIKE:
        theirs = getattr(validation.packed, key)
        ours = getattr(training.packed, key)
        if theirs != ours:
            raise DataError(
                f"{option} {validation.path} has {key}={theirs}, the training set {training.path} "
                f"has {ours}; pack it in the same way, or leave it out"
            )


def open_validation(
    config: Config,
    training: ShardDataset,
    rank: int = 0,
    world_size: int = 1,
    copy: Path | None = None,
    option: str = "--data.validation",
) -> ShardDataset | None:
    """The held-out images of data.validation, checked against the training set; None where there
    are none. Ranks share the comparison of ids. `copy`: a folder with copies of the files, which
    are read in their place. `option`: the one that names the set. Raises DataError."""
    if config.data.validation is None:
        return None
    part = slice(rank, None, world_size)
    dataset = ShardDataset(config.data.validation, config.data.verify and copy is None, part)
    if copy is not None:
        read_copy(config, dataset, copy)
    check_alike(dataset, training, option)
    dataset.normalize_as(training)
    shared = _shared_rows(dataset, training, part)
    if shared:
        raise DataError(
            f"{option} {dataset.path} shares {len(shared):,} rows with the training set "
            f"{training.path}, such as {shared[0]}: its loss would not be that of held-out images; "
            "set a part aside with python -m data_prep.split"
        )
    return dataset


def _shared_rows(validation: ShardDataset, training: ShardDataset, part: slice) -> list[str]:
    """The ids of rows of these training shards that the other set has too, with the same content."""
    # Several rows: older versions gave an id again to what was added to a set.
    rows: dict[str, list[int]] = {}
    for row, id in validation.ids():
        rows.setdefault(id, []).append(row)
    shared = []
    for row, id in training.ids(part):
        if id not in rows:
            continue
        # Numbers, such as 00017, are the ids of many sets.
        ours = training.gather(np.array([row]))["latent"]
        theirs = validation.gather(np.array(rows[id]))["latent"]
        if (ours == theirs).all(axis=(1, 2, 3)).any():
            shared.append(id)
    return shared


def check_condition(dataset: ShardDataset, config: Config) -> None:
    """Raises DataError for data without the labels or captions that the model takes."""
    model = config.model
    info = dataset.info
    path = config.data.path
    if model.num_classes and not info.num_classes:
        without = "--model.num-classes 0 --model.class-dropout-prob 0"
        # Without classes there is nothing to guide previews with.
        if config.telemetry.preview_cfg_scale != 1:
            without += " --telemetry.preview-cfg-scale 1"
        raise DataError(
            f"{path} has no labels, the model wants {model.num_classes} classes; choose other "
            f"data, or train without: {without}"
        )
    # Fewer labels than the model has classes are fine: `validation.remarks` reports them.
    if 0 < model.num_classes < info.num_classes:
        raise DataError(
            f"{path} has labels up to {info.num_classes - 1}, the model's classes end at "
            f"{model.num_classes - 1}; set --model.num-classes {info.num_classes}"
        )
    if not model.max_caption_tokens:
        return

    # Captions of another encoder have other shapes, and other meanings.
    if info.captions is None:
        raise DataError(
            f"{path} has no encoded captions; pack it with --text-encoder, or choose other data"
        )
    wanted = (model.max_caption_tokens, model.caption_width, model.caption_pooled_width)
    if (found := dataclasses.astuple(info.captions)) != wanted:
        raise DataError(
            f"{path} has captions of (tokens, width, pooled width) {found}, the model takes "
            f"{wanted}; set --model.max-caption-tokens {found[0]} --model.caption-width {found[1]} "
            f"--model.caption-pooled-width {found[2]}"
        )
