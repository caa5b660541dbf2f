"""What each sample is conditioned on: a class, a caption of a packed data set, a prompt, or
nothing; found when it is asked for."""

import operator
import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from eval.prompts import read_prompts
from largescale.checkpoint.weights import Trained
from largescale.condition import Condition
from largescale.config.schema import ModelConfig
from largescale.data.loader import encoded_condition, to_condition
from largescale.data.shards import ShardDataset
from largescale.encoders.text import (
    EncodedCaption,
    TextEncoder,
    load_text_encoder_of_model,
)
from largescale.errors import ConfigError
from largescale.host.files import is_unicode
from largescale.host.launch import env_rank, printable
from largescale.randomness import stream_seed

# Of encoded prompts in a process; COCO's 30,000 by CLIP ViT-L/14 take as much.
CACHE_BYTES = 2**29
# Labels that one generator draws: a generator a sample would take 10 us each.
_LABELS_A_BLOCK = 4096
# Cut prompts that are listed at most.
_CUT_SHOWN = 20

Numbers = npt.NDArray[np.int64]


class Conditions(ABC):
    """The conditions of samples 0 .. n - 1, a function of their numbers. Raises IndexError for any
    other number."""

    def __init__(self, n: int, facts: dict[str, Any], num_classes: int = 0) -> None:
        """`facts`: all that the conditions depend on, plain JSON, for the provenance.
        `num_classes`: of a data set of the samples; 0 without labels."""
        self.n = n
        self.facts = facts
        self.num_classes = num_classes

    @abstractmethod
    def of(self, index: Sequence[int]) -> Condition:
        """The model's input for these samples, on the CPU."""

    def labels(self, index: Sequence[int]) -> Numbers:
        """The labels stored beside these samples, (len(index),); 0 where they have none."""
        return np.zeros_like(self._numbers(index))

    def texts(self, index: Sequence[int]) -> list[str] | None:
        """The texts stored beside these samples, one each; None where they have none."""
        return None

    def prepare(self) -> None:  # noqa: B027  most have nothing to load
        """Load what `of` would load when first called, so that what is wrong with it is an error
        now."""

    def _numbers(self, index: Sequence[int]) -> Numbers:
        """These sample numbers as an array. Raises IndexError outside [0, n)."""
        # A negative number would silently be another sample's.
        numbers = np.asarray(index, np.int64)
        if not 0 <= numbers.min(initial=0) <= numbers.max(initial=0) < self.n:
            raise IndexError(
                f"samples {numbers.min()} to {numbers.max()} do not lie in [0, {self.n})"
            )
        return numbers


def make_conditions(
    trained: Trained,
    *,
    n: int,
    seed: int = 0,
    labels: Literal["balanced", "drawn"] = "balanced",
    classes: Sequence[int] = (),
    prompts: Sequence[str] = (),
    prompts_file: Path | None = None,
    captions: Path | None = None,
    text_encoder: str | None = None,
    device: torch.device,
) -> Conditions:
    """The conditions of samples 0 .. n - 1: balanced labels, unless something else is given.

    seed: of drawn labels. text_encoder: encodes prompts on `device`; loaded when the first of them
    is asked for, and not otherwise. Raises ConfigError for conditions of another kind than the
    model was trained on, and DataError for a file of prompts or a data set that cannot be used.
    """
    # Checked first: options of labels for a model of captions, and the reverse.
    model = trained.config.model
    texts = {"--prompts": prompts, "--prompts-file": prompts_file, "--captions": captions}
    given = [option for option, value in texts.items() if value]
    of_labels = ["--labels drawn"] if labels == "drawn" else []
    of_labels += ["--classes"] if classes else []
    _check_given(model, given, of_labels)
    if not model.max_caption_tokens:
        return _of_labels(trained.num_classes, n, seed, of_labels, classes)

    # Captions of a data set are encoded already; prompts need the encoder of the training.
    trained_with = trained.info["data_info"].get("encoders", {}).get("text")
    if captions:
        return OfData(n, ShardDataset(captions), trained_with)
    load = _encoder_loader(given[0], text_encoder, trained_with, model, device)
    texts_of, facts = _prompt_list(prompts, prompts_file)
    facts["text_encoder"] = trained_with
    return OfPrompts(n, texts_of, EncodingCache(load), model, facts)


def _encoder_loader(
    option: str,
    text_encoder: str | None,
    trained_with: str | None,
    model: ModelConfig,
    device: torch.device,
) -> Callable[[], TextEncoder]:
    """The function that loads the text encoder. Raises ConfigError where there is none to load; the
    function does for another one than the model was trained with. `option`: gave the prompts."""
    # Both are errors now: the encoder itself is loaded when the first prompt is asked for.
    if text_encoder is None:
        raise ConfigError(
            f"{option} needs --text-encoder, the one that the model was trained with: "
            f"{trained_with}"
        )
    if trained_with is None:
        raise ConfigError(
            f"{option}: the model's data do not say which text encoder made their captions; give "
            "--captions, a packed data set whose captions to use"
        )

    def load() -> TextEncoder:
        return load_text_encoder_of_model(
            text_encoder, trained_with, device, model.max_caption_tokens
        )

    return load


def _check_given(model: ModelConfig, given: list[str], of_labels: list[str]) -> None:
    """Raises ConfigError for options of text without a text-to-image model, and the reverse."""
    if not model.max_caption_tokens:
        if given:
            raise ConfigError(
                f"the model was not trained on captions; leave out {' and '.join(given)}"
            )
        return
    if of_labels:
        raise ConfigError(
            f"the model was trained on captions, not on labels; leave out {' and '.join(of_labels)}"
        )
    # Sample i takes its text from one list; of two it would not be known which.
    if len(given) != 1:
        several = f"; one of them, not {' and '.join(given)}" if given else ""
        raise ConfigError(
            "the model was trained on captions: give --prompts TEXT ..., or --captions DIR, a "
            f"packed data set whose captions to use, or --prompts-file FILE{several}"
        )


def _prompt_list(
    prompts: Sequence[str], prompts_file: Path | None
) -> tuple[list[str], dict[str, Any]]:
    """The prompts, and their entry in provenance.json. Raises ConfigError and DataError."""
    # A file is recorded by its hash, prompts of the command line as they are.
    if prompts_file:
        read = read_prompts(prompts_file)
        fact = {"name": read.source["name"], "sha256": read.sha256, "count": len(read.texts)}
        return read.texts, {"prompts_file": fact}
    for i, prompt in enumerate(prompts):
        # Bytes of a command line that are not UTF-8 arrive as surrogates, which are no text.
        if not is_unicode(prompt):
            raise ConfigError(
                f"prompt {i} of --prompts is not UTF-8: {prompt!r}; give it in UTF-8, or with "
                "--prompts-file"
            )
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ConfigError(
                f"prompt {i} of --prompts is empty; give a text, or --cfg-scale 0 to sample without"
            )
    return list(prompts), {"prompts": list(prompts)}


class OfLabels(Conditions):
    """Labels of samples; for an unconditional model 0, which it ignores."""

    def __init__(
        self,
        n: int,
        num_classes: int,
        label_of: Callable[[Numbers], Numbers],
        facts: dict[str, Any],
    ) -> None:
        """`label_of`: sample numbers -> their labels."""
        super().__init__(n, facts, num_classes)
        self._label_of = label_of

    def of(self, index: Sequence[int]) -> Condition:
        return torch.from_numpy(self.labels(index))

    def labels(self, index: Sequence[int]) -> Numbers:
        return self._label_of(self._numbers(index))


def _of_labels(
    num_classes: int, n: int, seed: int, given: list[str], classes: Sequence[int]
) -> OfLabels:
    """Labels as the options ask for them. `given`: the options of labels. Raises ConfigError."""
    # An unconditional model takes a label, and ignores it.
    if not num_classes:
        if given:
            raise ConfigError(
                f"the model was trained without labels; leave out {' and '.join(given)}"
            )
        return OfLabels(n, 0, np.zeros_like, {"labels": "none"})
    if len(given) > 1:
        raise ConfigError("--classes sets the label of each sample; leave out --labels drawn")

    # --classes: in turn.
    if classes:
        for label in classes:
            if not 0 <= label < num_classes:
                raise ConfigError(
                    f"--classes: label {label} lies outside the classes 0..{num_classes - 1} that "
                    "the model was trained on; leave it out"
                )
        each = np.array(classes, np.int64)
        return OfLabels(
            n,
            num_classes,
            lambda i: each[i % len(each)],
            {"labels": f"sample i has classes[i % {len(each)}]", "classes": each.tolist()},
        )

    # --labels drawn: uniformly.
    if given:
        return OfLabels(
            n,
            num_classes,
            _drawn(seed, num_classes),
            {
                "labels": f"sample i has a class drawn uniformly of {num_classes}, by (seed, i)",
                "labels_seed": seed,
            },
        )

    # By default all classes in turn.
    return OfLabels(
        n,
        num_classes,
        lambda i: i % num_classes,
        {"labels": f"sample i has class i % {num_classes}"},
    )


def _drawn(seed: int, num_classes: int) -> Callable[[Numbers], Numbers]:
    """The function that draws labels by (seed, i). Golden values in the tests pin them."""

    @lru_cache(maxsize=64)
    def block(number: int) -> Numbers:
        generator = torch.Generator().manual_seed(stream_seed(seed, "label", number))
        u = torch.rand(_LABELS_A_BLOCK, dtype=torch.float64, generator=generator)
        # u <= 1 - 2**-53, so it rounds to below num_classes.
        drawn: Numbers = (u * num_classes).long().numpy()
        return drawn

    def label_of(index: Numbers) -> Numbers:
        # Samples are asked for in any order, and some at a time: by the blocks that hold them.
        labels = np.empty_like(index)
        numbers, within = np.divmod(index, _LABELS_A_BLOCK)
        for number in np.unique(numbers):
            here = numbers == number
            labels[here] = block(int(number))[within[here]]
        return labels

    return label_of


class OfData(Conditions):
    """Captions of a data set: sample i has one of row i % len(data), the first, the next time round
    the second, and so on."""

    def __init__(self, n: int, data: ShardDataset, trained_with: str | None) -> None:
        # Captions by another encoder are another language to the model.
        found = data.info.encoders.get("text")
        if data.info.captions is None or found != trained_with:
            raise ConfigError(
                f"{data.path} has captions encoded by {found}, the model was trained with "
                f"{trained_with}; pack them with that one"
            )
        super().__init__(
            n,
            {
                "captions": f"sample i has row i % {len(data)}'s, in turn",
                "captions_of": data.fingerprint,
            },
        )
        self._data = data

    def of(self, index: Sequence[int]) -> Condition:
        rows, captions, turns = self._chosen(index)
        # The middle of caption k's share of [0, 1).
        counts = np.array(list(map(len, captions)))
        gathered = {}
        for name, values in self._data.gather(
            rows, choice=(np.array(turns) + 0.5) / counts
        ).items():
            gathered[name] = torch.from_numpy(values)
        return to_condition(gathered)

    def texts(self, index: Sequence[int]) -> list[str]:
        _, captions, turns = self._chosen(index)
        return list(map(operator.getitem, captions, turns))

    def _chosen(self, index: Sequence[int]) -> tuple[Numbers, list[list[str]], list[int]]:
        """The row of each sample, all captions of it, and which of them is the sample's."""
        # How often the data set was gone through before, and the row in it.
        rounds, rows = np.divmod(self._numbers(index), len(self._data))
        captions = self._data.texts(rows)
        turns = [k % len(of_row) for k, of_row in zip(rounds.tolist(), captions, strict=True)]
        return rows, captions, turns


class EncodingCache:
    """Encodings of texts, each made once while it is kept: the last used, up to `limit` bytes."""

    def __init__(self, load: Callable[[], TextEncoder], limit: int = CACHE_BYTES) -> None:
        self._load = load
        self._limit = limit
        # In the order of use, the last used at the end.
        self._kept: OrderedDict[str, EncodedCaption] = OrderedDict()
        self.nbytes = 0

    @cached_property
    def encoder(self) -> TextEncoder:
        """The text encoder; loaded when it is first needed."""
        return self._load()

    def __call__(self, texts: Sequence[str]) -> list[EncodedCaption]:
        """The encodings of these texts, in their order. Raises what loading the encoder and
        encoding raise."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._kept]
        if missing:
            for text, encoded in zip(missing, self.encoder(missing), strict=True):
                self._kept[text] = encoded
                self.nbytes += _nbytes(encoded)

        # Taken before any of them may have to go.
        found = [self._kept[text] for text in texts]
        for text in texts:
            self._kept.move_to_end(text)
        # The least recently used goes first.
        while self.nbytes > self._limit:
            _, dropped = self._kept.popitem(last=False)
            self.nbytes -= _nbytes(dropped)
        return found


def _nbytes(encoded: EncodedCaption) -> int:
    return encoded.tokens.nbytes + encoded.pooled.nbytes


class OfPrompts(Conditions):
    """Prompts in turn: sample i has prompt i % len(prompts)."""

    def __init__(
        self,
        n: int,
        prompts: Sequence[str],
        encodings: EncodingCache,
        model: ModelConfig,
        facts: dict[str, Any],
    ) -> None:
        super().__init__(n, facts)
        self._prompts = prompts
        self._encodings = encodings
        self._model = model

    def prepare(self) -> None:
        """Load the encoder; rank 0 reports prompts that it cuts, as two that start alike would be
        drawn as one."""
        encoder = self._encodings.encoder
        # Every rank loads the encoder; the report of one is enough.
        if env_rank() != 0:
            return
        cut = encoder.cut(self._prompts)
        if not cut:
            return
        lines = [printable(text[:100]) for text in cut[:_CUT_SHOWN]]
        if len(cut) > _CUT_SHOWN:
            lines.append("...")
        print(
            f"{len(cut):,} of {len(self._prompts):,} prompts are cut, as they are longer than "
            f"{encoder.max_tokens} tokens:",
            *lines,
            sep="\n  ",
            file=sys.stderr,
            flush=True,
        )

    def of(self, index: Sequence[int]) -> Condition:
        m = self._model
        return encoded_condition(
            self._encodings(self.texts(index)),
            m.max_caption_tokens,
            m.caption_width,
            m.caption_pooled_width,
        )

    def texts(self, index: Sequence[int]) -> list[str]:
        return [self._prompts[i % len(self._prompts)] for i in self._numbers(index).tolist()]
