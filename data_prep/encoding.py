"""From images and captions to the rows of a set: the VAE and the text encoder."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data_prep.content import content_hash
from data_prep.packing import Packing
from data_prep.sources import Item, Source
from largescale.data.format import CaptionInfo, DatasetInfo
from largescale.encoders.text import EncodedCaption, TextEncoder, load_text_encoder
from largescale.encoders.vae import Vae, load_vae
from largescale.errors import ConfigError
from largescale.host.launch import env_local_rank

Image = npt.NDArray[np.uint8]  # (3, R, R)


class Encoders:
    """The encoders of this process. Without a VAE images are stored as pixels, and without a text
    encoder captions as texts only.

    Raises ConfigError, before any is loaded, for options that do not fit the source.
    """

    def __init__(self, options: Packing, source: Source) -> None:
        self._options, self._source = options, source
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
        """What the rows depend on besides the encoders, to the byte: they round differently in
        another type, on another device and in another batch. Nothing where none is used."""
        if not self.vae and not self.text:
            return {}
        return {
            "precision": self.precision,
            "device": self.device.type,
            "batch_size": self._options.batch_size,
        }

    def encode(self, batch: list[tuple[Item, Image]]) -> list[tuple[dict[str, Any], int, bytes]]:
        """The rows of a batch, as `Shard.add` takes them, each with the number of its captions that
        are cut, and the hash of its image."""
        rows: list[dict[str, Any]] = []
        pictures: list[Image] = []
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
