"""From images and captions to the rows of a set: the VAE and the text encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import tyro

from data_prep import images
from data_prep.content import content_hash
from data_prep.sources import Item, Source
from largescale.config.command_line import check_counts
from largescale.data.format import CaptionInfo, DatasetInfo
from largescale.encoders.text import EncodedCaption, TextEncoder, load_text_encoder
from largescale.encoders.vae import Vae, load_vae
from largescale.errors import ConfigError
from largescale.host.launch import env_local_rank
from largescale.models.half_precision import check_on_cpu

Content = npt.NDArray[Any]
"""An item once it is decoded: of an image its pixels, (3, R, R) uint8."""
EncodedRow = tuple[dict[str, Any], int, bytes]
"""A row as `Shard.add` takes it, the number of its captions that are cut, and the hash of its
content."""


class Encoding(Protocol):
    """How a source's items become rows."""

    device: torch.device  # on which `encode` works
    batch_size: int  # items that are encoded at a time
    vae: Vae | None  # which decodes what the rows store
    text: TextEncoder | None
    has_encoded: bool
    """Whether `vae` has made the latents here, of images to compare with what it decodes."""

    def info(self) -> DatasetInfo:
        """What the rows are."""

    def settings(self) -> dict[str, Any]:
        """What the rows depend on besides the source and `info`, to the byte; plain JSON. Its
        "crop" says in words what was done to the images."""

    def made_with(self) -> dict[str, str | None]:
        """Where each encoder lies, for the manifest."""

    def decode(self, item: Item) -> Content:
        """What an item holds. Raises Unusable for one that is to be left out, OSError, and
        DataError for a source that cannot be packed."""

    def encode(self, batch: list[tuple[Item, Content]]) -> list[EncodedRow]:
        """The rows of a batch."""


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    vae: Annotated[str | None, tyro.conf.arg(help_behavior_hint="(required)")] = None
    """The VAE that makes latents: a folder, or a name on the hub (stabilityai/sd-vae-ft-ema); none:
    pack pixels."""
    text_encoder: Annotated[
        str | None, tyro.conf.arg(help_behavior_hint="(required where there are captions)")
    ] = None
    """The text encoder of captions: open_clip:ViT-L-14/openai, or hf: and a folder or a name on the
    hub (hf:openai/clip-vit-large-patch14); none: pack the texts only."""
    max_tokens: int | None = None
    """Cut captions after so many tokens; by default the text encoder's own limit."""
    resolution: int = 256
    """Height and width of the images, in pixels, after ADM's centre crop."""
    mirror: bool = True
    """Pack the latents of the mirrored image too, for horizontal flips."""
    min_side: int | None = None
    """Leave out images with a shorter side than this; by default a quarter of the resolution."""
    max_pixels: int = images.MAX_PIXELS
    """Leave out images with more pixels than this, without decoding them."""
    batch_size: int = 64
    """Images that are encoded at a time."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What the encoders run on; by default a GPU if there is one."""
    precision: Literal["fp32", "bf16"] | None = None
    """What the encoders compute in; by default bf16 on a GPU, fp32 on a CPU."""

    def check_encoders(self) -> None:
        """Raises ConfigError for what no encoder can do."""
        check_counts(self, "resolution", "batch_size", "max_pixels", "max_tokens", "min_side")
        if self.vae is None:
            raise ConfigError(
                "give --vae a folder or a hub name (such as stabilityai/sd-vae-ft-ema) to pack "
                "latents, or --vae none to pack pixels"
            )
        if self.device == "cpu" and self.precision:
            check_on_cpu(self.precision, "--precision {}")


class Encoders:
    """The encoders of this process. Without a VAE images are stored as pixels, and without a text
    encoder captions as texts only.

    Raises ConfigError, before any is loaded, for options that do not fit the source.
    """

    def __init__(self, options: EncoderOptions, source: Source) -> None:
        self._options, self._source = options, source
        self.batch_size = options.batch_size
        # A quarter of the resolution: smaller images would be enlarged more than four times.
        self._min_side = options.min_side or max(options.resolution // 4, 1)
        self._check_text_encoder()
        if options.device == "cuda":
            # Of this rank, for every thread: memory that one takes elsewhere is on the first GPU.
            self.device = torch.device("cuda", env_local_rank() % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
            self.precision = options.precision or "bf16"
        else:
            self.device = torch.device("cpu")
            self.precision = options.precision or "fp32"
            torch.set_num_threads(1)  # see Packer.pools

        # "none" is a choice, of pixels or of texts; None is an option that was not given.
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.vae: Vae | None = None
        if options.vae is not None and options.vae != "none":
            self.vae = load_vae(options.vae, self.device, dtype)
        self.text: TextEncoder | None = None
        spec = options.text_encoder
        if source.captioned and spec is not None and spec != "none":
            self.text = load_text_encoder(spec, self.device, dtype, options.max_tokens)
        self.has_encoded = self.vae is not None

    def _check_text_encoder(self) -> None:
        """Raises ConfigError unless captions have a text encoder, and only they."""
        options = self._options
        # Texts without embeddings cannot be trained on, so they have to be asked for.
        if self._source.captioned and options.text_encoder is None:
            raise ConfigError(
                "the images have captions: give --text-encoder (such as open_clip:ViT-L-14/openai "
                "or hf:openai/clip-vit-large-patch14), or --text-encoder none to keep the texts "
                "only"
            )
        if not self._source.captioned and options.text_encoder not in (None, "none"):
            raise ConfigError(
                f"--text-encoder {options.text_encoder}: {self._source.name} has no captions; omit "
                "it"
            )
        if options.max_tokens is not None and options.text_encoder is None:
            raise ConfigError(
                f"--max-tokens {options.max_tokens} is a setting of --text-encoder; give both or "
                "none"
            )

    def info(self) -> DatasetInfo:
        """What the rows are."""
        side = self._options.resolution
        # Pixels, unless there is a VAE.
        info = DatasetInfo(
            name=self._source.name,
            num_classes=self._source.num_classes,
            kind="pixels",
            shape=(3, side, side),
        )
        if vae := self.vae:
            info = replace(
                info,
                kind=vae.kind,
                shape=vae.stored_shape(side),
                scale_factor=vae.scale_factor,
                latent_mean=vae.normalization.mean,
                latent_std=vae.normalization.std,
                encoders={"vae": vae.identity},
            )
        if text := self.text:
            info = replace(
                info,
                encoders=info.encoders | {"text": text.identity},
                captions=CaptionInfo(text.max_tokens, text.width, text.pooled_width),
            )
        return info

    def settings(self) -> dict[str, Any]:
        """What the rows depend on besides the source and the encoders."""
        settings: dict[str, Any] = {
            "crop": "ADM's centre crop",
            "min_side": self._min_side,
            "max_pixels": self._options.max_pixels,
            "mirror": self.vae is not None and self._options.mirror,
        }
        # Encoders round differently in another type, on another device and in another batch.
        if self.vae or self.text:
            settings |= {
                "precision": self.precision,
                "device": self.device.type,
                "batch_size": self.batch_size,
            }
        return settings

    def made_with(self) -> dict[str, str | None]:
        """Where each encoder lies; a folder by its full path."""
        scheme, _, where = (self._options.text_encoder or "").partition(":")
        text = f"{scheme}:{resolved(where)}" if self.text else None
        return {"vae": resolved(self._options.vae), "text_encoder": text}

    def decode(self, item: Item) -> Content:
        """The cropped image. Raises Unusable, and OSError for a file that cannot be read."""
        data = item.read()
        if self._source.captioned and not item.captions:
            raise images.Unusable("it has no caption")
        options = self._options
        return images.decode(data, options.resolution, self._min_side, options.max_pixels)

    def encode(self, batch: list[tuple[Item, Content]]) -> list[EncodedRow]:
        """The rows of a batch."""
        rows: list[dict[str, Any]] = []
        pictures: list[Content] = []
        for item, picture in batch:
            row: dict[str, Any] = {"id": item.id, "label": item.label}
            if self._source.captioned:
                row["captions"] = list(item.captions)
            rows.append(row)
            pictures.append(picture)
        self.encode_images(np.stack(pictures), rows)
        cut = self._encode_captions(rows) if self.text else [0] * len(rows)
        return list(zip(rows, cut, map(content_hash, pictures), strict=True))

    def encode_images(self, pixels: npt.NDArray[np.uint8], rows: list[dict[str, Any]]) -> None:
        """Adds to each row its image as it is stored, and the mirrored one where it is packed.
        `pixels`: (N, 3, R, R)."""
        stored: npt.NDArray[Any] = pixels
        mirrored: npt.NDArray[Any] | None = None
        # Pixels are mirrored when they are read. Latents are not those of the mirrored image.
        if self.vae:
            x = torch.from_numpy(pixels)
            if self.device.type == "cuda":
                x = x.pin_memory()
            x = x.to(self.device, non_blocking=True)
            stored = self.vae.encode(x).cpu().numpy()
            if self._options.mirror:
                mirrored = self.vae.encode(x.flip(-1)).cpu().numpy()
        for i, row in enumerate(rows):
            row["latent"] = stored[i]
            if mirrored is not None:
                row["latent_mirror"] = mirrored[i]

    def _encode_captions(self, rows: list[dict[str, Any]]) -> list[int]:
        """Adds to each row the embeddings of its captions; returns how many of them are cut."""
        assert self.text
        # All captions of the batch are encoded together, and then dealt out again.
        texts: list[str] = []
        for row in rows:
            texts += row["captions"]
        encoded = iter(self.text(texts))
        cut = []
        for row in rows:
            of_row = list(islice(encoded, len(row["captions"])))
            row["caption_tokens"] = [caption.tokens for caption in of_row]
            row["caption_pooled"] = [caption.pooled for caption in of_row]
            cut.append(self._count_cut(row["captions"], of_row))
        return cut

    def _count_cut(self, captions: Sequence[str], encoded: Sequence[EncodedCaption]) -> int:
        """How many of an image's captions are longer than what is kept."""
        assert self.text
        # Only captions that fill all tokens can be, so only these are tokenised again.
        full = []
        for text, encoding in zip(captions, encoded, strict=True):
            if len(encoding.tokens) == self.text.max_tokens:
                full.append(text)
        return len(self.text.cut(full))


def resolved(spec: str | None) -> str | None:
    """A local path made absolute; a hub name as it is."""
    if spec and Path(spec).expanduser().exists():
        return str(Path(spec).expanduser().resolve())
    return spec
