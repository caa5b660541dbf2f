"""Sample grids of a run, small, as a strip over training."""

import re
from pathlib import Path

from PIL import Image

from largescale.page.charts import data_uri
from largescale.page.markup import text

# Pictures of a strip, and the width of each.
MOST = 12
_WIDTH = 280
# Of a preview's larger side that is opened: no grid of ours has more.
_LARGEST = 20_000


def strip(run_dir: Path, most: int) -> str:
    """At most so many of the run's previews, from the first to the last."""
    found: list[tuple[int, Path]] = []
    for path in run_dir.glob("samples/step_*.png"):
        match = re.fullmatch(r"step_(\d+)\.png", path.name)
        if match:
            found.append((int(match[1]), path))
    found.sort()
    if len(found) > most:
        last = len(found) - 1
        found = [found[round(i * last / (most - 1))] for i in range(most)]

    pictures = []
    for step, path in found:
        content = picture(path, f"samples at step {step:,}", _WIDTH)
        pictures.append(f"<li>{content}<span>step {step:,}</span></li>")
    if not pictures:
        return ""
    return (
        '<ol class="strip" tabindex="0" role="region" aria-label="samples over training">'
        f"{''.join(pictures)}</ol>"
    )


def picture(path: Path, spoken: str, width: int) -> str:
    """A picture of at most this width; `spoken`: what it shows."""
    found = _small(path, width)
    if not found:
        return f'<p class="note">{text(path.name)} cannot be read</p>'
    return f'<img src="{found}" alt="{text(spoken)}">'


def _small(path: Path, width: int) -> str | None:
    """The picture at this width, as a data URI; None where it cannot be read."""
    # A run that draws it at present has not written all of it.
    try:
        with Image.open(path) as image:
            if max(image.size) > _LARGEST:
                return None
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if small.width > width:
        height = max(1, round(small.height * width / small.width))
        small = small.resize((width, height), Image.Resampling.LANCZOS)
    return data_uri(small, "JPEG")
