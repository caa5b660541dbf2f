"""Captions to the hidden states that a denoiser attends to, by a text encoder of open_clip or
transformers."""

import difflib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from largescale.encoders.identity import library, loading, locate, silence, weights_identity
from largescale.errors import ConfigError, DataError

BATCH = 256  # captions in one forward pass

Encode = Callable[[list[str]], tuple[Tensor, Tensor, Tensor]]
"""B captions -> tokens (B, T, width), pooled (B, pooled_width), real tokens of each (B,) int64"""

Count = Callable[[list[str], int], list[int]]
"""captions, limit -> tokens of each, its start and end included, as far as the limit"""

Loaded = tuple[str, Any, int | None, Callable[[int, torch.device], Encode], Count]
"""name without a path, model in float32 on the CPU, most tokens it takes, (max_tokens, the model's
device) -> Encode, Count"""

# What transformers calls models whose text encoder is CLIP's.
CLIP_TYPES = ("clip", "clip_text_model")
# transformers has 10^30 for "no limit".
LARGEST_LIMIT = 10**6


class EncodedCaption(NamedTuple):
    # (n, width), last hidden states of the real tokens, start and end included
    tokens: npt.NDArray[np.float16]
    pooled: npt.NDArray[np.float16]  # (pooled_width,)


@dataclass(frozen=True, slots=True)
class TextEncoder:
    identity: str  # library, model and hash of the weights, wherever they came from
    max_tokens: int  # longer captions are cut there; their end token stays
    width: int
    pooled_width: int
    encode: Encode = field(repr=False)
    count: Count = field(repr=False)
    # Tokenizers, and the hook on open_clip's hidden states, serve one thread at a time.
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> list[EncodedCaption]:
        """Encodes captions, each independently of the others but for rounding. Raises DataError for
        values that are not finite."""
        encoded: list[EncodedCaption] = []
        for first in range(0, len(captions), BATCH):
            with self.lock:
                tokens, pooled, lengths = self.encode(list(captions[first : first + BATCH]))
            tokens = tokens.half().cpu()
            pooled = pooled.half().cpu()
            for of_tokens, of_pooled, n in zip(tokens, pooled, lengths.tolist(), strict=True):
                real = of_tokens[:n]
                if not (real.isfinite().all() and of_pooled.isfinite().all()):
                    raise DataError(
                        f"{self.identity} is not finite in float16 for the caption "
                        f"{captions[len(encoded)]!r}; try computing in bfloat16 or float32"
                    )
                # Copies, which do not keep the batch alive.
                encoded.append(EncodedCaption(real.numpy().copy(), of_pooled.numpy().copy()))
        return encoded

    def cut(self, captions: Sequence[str]) -> list[str]:
        """The captions that are longer than max_tokens."""
        if not captions:
            return []
        # One token more than the limit is enough to know.
        with self.lock:
            counts = self.count(list(captions), self.max_tokens + 1)
        return [caption for caption, n in zip(captions, counts, strict=True) if n > self.max_tokens]


def load_text_encoder(
    spec: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    max_tokens: int | None = None,
) -> TextEncoder:
    """Loads the text encoder that `spec` names; max_tokens is its own limit unless given. Raises
    DataError.

        open_clip:MODEL/TAG         a model and a tag of its pretrained weights, e.g. ViT-L-14/openai
        open_clip:MODEL/PATH        local weights; ViT-L-14//weights/clip.bin is the file
                                    /weights/clip.bin. OpenAI's, DFN's and MetaCLIP's need
                                    MODEL-quickgelu here; a tag knows its activation
        open_clip:local-dir:DIR     a folder with open_clip_config.json and weights; on the hub,
                                    hf-hub:NAME
        hf:NAME_OR_DIR              CLIP, T5 and BERT-like encoders of transformers, from the hub or
                                    a folder
    """
    scheme, _, source = spec.partition(":")
    loaders = {"open_clip": _load_open_clip, "hf": _load_hf}
    if scheme not in loaders or not source:
        raise DataError(
            f"a text encoder is open_clip:MODEL/WEIGHTS or hf:NAME_OR_DIR, not {spec!r}; "
            "try open_clip:ViT-L-14/openai"
        )
    name, model, limit, bind, count = loaders[scheme](source)

    # Captions are cut at the limit that is asked for, within the encoder's own.
    kept = limit if max_tokens is None else max_tokens
    if kept is None:
        raise DataError(f"{spec} says nowhere how many tokens it takes; give a maximum, e.g. 128")
    if not 2 <= kept <= (limit or kept):
        raise DataError(
            f"max_tokens={kept}: {spec} takes from 2 to {limit or 'any number of'} tokens"
        )

    # The identity is of the weights in float32, so it comes before the cast.
    identity = f"{scheme}:{name} {weights_identity(model)}"
    with silence():
        model.eval().requires_grad_(False).to(device, dtype)

    encode = bind(kept, device)
    width, pooled_width = _try_out(encode, spec, kept, device)
    return TextEncoder(identity, kept, width, pooled_width, encode, count)


def load_text_encoder_of_model(
    spec: str, trained_with: str | None, device: torch.device, max_tokens: int
) -> TextEncoder:
    """The text encoder that `spec` names, where it is the one that made a model's captions, by its
    identity `trained_with`. Raises ConfigError for another one, DataError where there is none."""
    # The same name can be another version: identities compare the weights.
    encoder = load_text_encoder(spec, device, max_tokens=max_tokens)
    # Another version of the same encoder is another language to the model.
    if encoder.identity != trained_with:
        raise ConfigError(
            f"the text encoder {spec} is {encoder.identity}, the model was trained with "
            f"{trained_with}"
        )
    return encoder


def _try_out(encode: Encode, spec: str, max_tokens: int, device: torch.device) -> tuple[int, int]:
    """The widths of tokens and pooled vector. Raises DataError where a text of that length cannot
    be encoded: otherwise the first long caption would fail, hours later."""
    try:
        with torch.inference_mode():
            tokens, pooled, _ = encode([""])
            encode(["a " * max_tokens])
            if device.type == "cuda":
                # A GPU reports an index out of range only when it is waited for.
                torch.cuda.synchronize(device)
    except (IndexError, RuntimeError) as error:
        raise DataError(
            f"{spec} cannot encode a text of {max_tokens} tokens ({error}); give a smaller "
            "--max-tokens"
        ) from error
    return tokens.shape[-1], pooled.shape[-1]


def _load_open_clip(source: str) -> Loaded:
    """A CLIP of open_clip, without its image tower."""
    open_clip = library("open_clip")
    if source.startswith(("local-dir:", "hf-hub:")):
        name, weights, quick_gelu = source, None, False
    else:
        name, weights, quick_gelu = open_clip_weights(open_clip, source)
    with loading(
        f"open_clip:{source}",
        "without a network give the file of the weights: --text-encoder open_clip:MODEL/FILE",
    ):
        if not _has_clip_text_encoder(open_clip.get_model_config(name)["text_cfg"]):
            raise DataError(
                f"open_clip:{name} has another text encoder than CLIP's; try hf:DIR with that "
                "encoder"
            )
        model = open_clip.create_model(
            name, weights, force_quick_gelu=quick_gelu, weights_only=True, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    del model.visual

    # open_clip returns the pooled output only; a hook catches the hidden states of all tokens.
    tower = getattr(model, "text", model)
    hidden: list[Tensor] = []
    tower.ln_final.register_forward_hook(lambda module, args, output: hidden.append(output))

    def bind(max_tokens: int, device: torch.device) -> Encode:
        def encode(captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
            ids = tokenizer(captions, context_length=max_tokens)
            # The position embedding has a row for each of the 77 tokens.
            ids = F.pad(ids, (0, tower.context_length - max_tokens)).to(device)
            pooled = model.encode_text(ids)
            return hidden.pop(), pooled, _open_clip_lengths(ids)

        return encode

    def count(captions: list[str], limit: int) -> list[int]:
        counts: list[int] = _open_clip_lengths(tokenizer(captions, context_length=limit)).tolist()
        return counts

    # The activation changes what is computed, and is not part of the weights.
    shown = type(model).__name__ if weights is None else name.removesuffix("-quickgelu")
    if "QuickGELU" in {type(module).__name__ for module in tower.modules()}:
        shown += "-quickgelu"
    return shown, model, tower.context_length, bind, count


def _has_clip_text_encoder(text_cfg: dict[str, Any]) -> bool:
    """Whether open_clip's text tower is CLIP's own, whose pooled output is the end token's."""
    for key in ("hf_model_name", "hf_tokenizer_name", "embed_cls"):
        if text_cfg.get(key):
            return False
    return bool(text_cfg.get("pool_type", "argmax") == "argmax")


def _open_clip_lengths(ids: Tensor) -> Tensor:
    """Real tokens of each text, (B,): the end token has the highest number of the vocabulary."""
    return ids.argmax(dim=1) + 1


def open_clip_weights(open_clip: Any, source: str) -> tuple[str, str, bool]:
    """The model, the tag or file, and whether the tag's weights were trained with QuickGELU, from
    MODEL/TAG or MODEL/PATH."""
    name, _, weights = source.partition("/")
    # Architectures that open_clip knows, each with the tags of its pretrained weights.
    models = open_clip.list_models()
    if name not in models:
        near = difflib.get_close_matches(name, models, n=3, cutoff=0.3)
        raise DataError(
            f"open_clip has no model {name!r}; the nearest are "
            f"{', '.join(near) or ', '.join(models[:3])}"
        )

    # A tag comes before a path of the same name.
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights.lower().replace("-", "_") in tags:
        return name, weights, bool(open_clip.get_pretrained_cfg(name, weights).get("quick_gelu"))
    path = Path(weights).expanduser()
    if not weights or not path.exists():
        raise DataError(
            f"open_clip:{source}: {weights!r} is neither a tag of {name} ({', '.join(tags)}) nor a "
            f"path (a path from the root has two slashes: open_clip:{name}//weights/FILE)"
        )
    if path.is_dir():
        files = _weight_files(path)
        if len(files) != 1:
            raise DataError(
                f"{path} has {len(files)} files that may be the weights; "
                f"name one: open_clip:{name}/{path}/FILE"
            )
        path = files[0]
    return name, str(path), False


def _weight_files(folder: Path) -> list[Path]:
    """The files in a folder that may be open_clip's weights; one where there is no doubt."""
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    files = [file for file in sorted(folder.iterdir()) if file.suffix in suffixes]
    # The hub's folders have transformers' files too, and the same weights in two formats.
    own = [file for file in files if file.name.startswith("open_clip")]
    return sorted(folder.glob("open_clip*.safetensors")) or own or files


def _load_hf(source: str) -> Loaded:
    """CLIP, T5 or a BERT-like encoder of transformers."""
    source, remedy = locate(source, "--text-encoder hf:DIR")
    transformers = library("transformers")
    with loading(f"hf:{source}", remedy):
        transformers.utils.logging.disable_progress_bar()
        model, missing = _hf_model(transformers, source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, padding_side="right", truncation_side="right", trust_remote_code=False
        )
        limits = [
            tokenizer.model_max_length,
            _positions(model),
            _sentence_limit(transformers, source),
        ]

    # Texts are cut at the lowest of what tokenizer, network and sentence-transformers say.
    known = [limit for limit in limits if limit and 0 < limit < LARGEST_LIMIT]
    lowest = min(known, default=None)
    _check_hf(source, type(model).__name__, missing, tokenizer, remedy)
    clip = isinstance(model, transformers.CLIPTextModelWithProjection)

    def bind(max_tokens: int, device: torch.device) -> Encode:
        return lambda captions: _encode_hf(model, tokenizer, captions, max_tokens, clip, device)

    def count(captions: list[str], limit: int) -> list[int]:
        tokens = tokenizer(captions, truncation=True, max_length=limit)["input_ids"]
        return list(map(len, tokens))

    return type(model).__name__, model, lowest, bind, count


def _check_hf(source: str, kind: str, missing: list[str], tokenizer: Any, remedy: str) -> None:
    """Raises DataError for an encoder that lacks weights, padding or words."""
    if missing:
        # Folders of diffusers have CLIP's text model without its projection.
        lacks_projection = missing == ["text_projection.weight"]
        advice = "give the complete CLIP" if lacks_projection else "fetch the folder anew"
        raise DataError(
            f"hf:{source} lacks {len(missing)} weights of a {kind}, the first is {missing[0]}; "
            f"{advice}"
        )
    if tokenizer.pad_token is None:
        raise DataError(
            f"hf:{source} has no padding token; CLIP, T5 and BERT-like text encoders work"
        )
    if tokenizer("a cat")["input_ids"] == tokenizer("two dogs")["input_ids"]:
        raise DataError(
            f"hf:{source} has no tokenizer.json or other vocabulary: all words would be one; "
            f"{remedy}"
        )


def _encode_hf(
    model: Any,
    tokenizer: Any,
    captions: list[str],
    max_tokens: int,
    clip: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Encodes captions: tokens (B, T, width), pooled (B, width), and each caption's number of
    tokens (B,)."""
    # CLIP was trained on texts that are padded to the full length.
    batch = tokenizer(
        captions,
        truncation=True,
        max_length=max_tokens,
        padding="max_length" if clip else "longest",
        return_tensors="pt",
    ).to(device)
    mask = batch["attention_mask"]  # (B, T)
    output = model(input_ids=batch["input_ids"], attention_mask=mask)
    tokens = output.last_hidden_state  # (B, T, width)
    if clip:
        return tokens, output.text_embeds, mask.sum(dim=1)
    # Other encoders have no pooled output of their own: the mean of the real tokens.
    weights = mask[..., None].float()
    pooled = (tokens.float() * weights).sum(dim=1) / weights.sum(dim=1)
    return tokens, pooled, mask.sum(dim=1)


def _hf_model(transformers: Any, source: str) -> tuple[Any, list[str]]:
    """The encoder in float32, and which of its weights are missing."""
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type in CLIP_TYPES:
        # Of both towers, the text's. Its own projection_dim is wrong in some configs (laion's).
        if config.model_type == "clip":
            config.text_config.projection_dim = config.projection_dim
            config = config.text_config
        loader = transformers.CLIPTextModelWithProjection
    elif hasattr(config, "text_config"):
        raise DataError(
            f"hf:{source} is a {config.model_type}; CLIP, T5 and BERT-like text encoders work"
        )
    elif type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        loader = transformers.AutoModelForTextEncoding  # of T5, the encoder only
    else:
        loader = transformers.AutoModel
    model, report = loader.from_pretrained(
        source,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
    )

    # The pooler is not used. Some folders lack it, and random weights would make the identity
    # random.
    if hasattr(model, "pooler"):
        model.pooler = None
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    return model, sorted(missing)


def _positions(model: Any) -> int | None:
    """How many tokens have a position embedding; None where it is not stated."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    if not positions:
        return positions
    # Models like RoBERTa count positions from behind the padding's.
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            padding = module.padding_idx
            return positions if padding is None else positions - padding - 1
    return positions


def _sentence_limit(transformers: Any, source: str) -> int | None:
    """The limit of sentence-transformers, which may be below the network's."""
    try:
        path = transformers.utils.cached_file(source, "sentence_bert_config.json")
    except OSError:
        return None
    return json.loads(Path(path).read_text()).get("max_seq_length")
