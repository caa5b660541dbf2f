"""Pictures of numbers as SVG, which stays sharp and small, and whose colours the page's style sheet
sets."""

import base64
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from largescale.page.markup import text
from largescale.page.series import Curve

# In the SVG's own unit, of which a phone shows about 0.85 pixels, and a screen one.
_WIDTH, _HEIGHT = 420, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 16, 24
# Styles of lines that the page has; more lines begin again.
STYLES = 8
# A logarithmic axis from this ratio on.
_LOG_FROM = 8.0
# Of viridis, which can be read in grey and by the colour blind.
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Line:
    name: str
    curve: Curve


@dataclass(frozen=True)
class Stage:
    """A stage of the curriculum: the steps from `first` to `last`, on noise levels from `lowest` to
    `highest`."""

    name: str
    index: int
    first: int
    last: int
    lowest: float | None
    highest: float | None


Scale = Callable[[float], float]


def short(value: float) -> str:
    """A number in few characters, such as 1.2M or 3e-5."""
    size = abs(value)
    if not math.isfinite(value):
        return "not finite"
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def place(step: float) -> str:
    """A place on the axis to the right: a step, or a share."""
    return short(step) if 0 < step < 1 else f"{step:,.0f}"


def ticks(low: float, high: float, *, log: bool = False, most: int = 5) -> list[float]:
    """Round numbers from low to high."""
    if log:
        return _log_ticks(low, high, most)
    # Of numbers so large, the difference is not finite.
    if not 0 < high - low < math.inf:
        return [low]
    step = 10.0 ** math.floor(math.log10(high - low))
    for factor in (0.1, 0.2, 0.5, 1.0, 2.0):
        if (high - low) / (step * factor) <= most:
            break
    step *= factor
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + i) * step for i in range(count)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**d for d, f in itertools.product(decades, factors)]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    last_step: float,
    stages: Sequence[Stage] = (),
    marks: Sequence[tuple[int, str]] = (),
    log: bool = True,
    percent: bool = False,
    over: str = "step",
) -> str:
    """Curves over steps: the mean of each bin as a line, on a band from the lowest to the highest.

    `stages` are bands behind them, `marks` short lines on top at steps, with what happened. `log`:
    the axis may be logarithmic. `percent`: they are changes in percent, and the axis is fine near 0
    and coarse far from it. `over`: what takes the place of a step."""
    low = min(float(line.curve.low.min()) for line in lines)
    high = max(float(line.curve.high.max()) for line in lines)
    log = log and low > 0 and high / low >= _LOG_FROM
    if percent:
        kind, low, high = "percent", min(low, 0.0), max(high, 0.0)
    else:
        kind = "logarithmic" if log else "linear"
    y = _y_scale(low, high, kind)
    x = _x_scale(last_step)
    parts = [*_bands(stages, x), *_y_axis(low, high, y, kind), *_x_axis(last_step, x)]
    for step, what in marks:
        parts.append(
            f'<path class="mark" d="M{x(step):.1f} {_TOP}v12"><title>{text(what)}</title></path>'
        )
    for number, line in enumerate(lines):
        parts += _curve(line, number % STYLES, x, y)
    spoken = "; ".join(_spoken(line, over) for line in lines)
    return _svg(f"{title} over {over}s, {kind}: {spoken}", parts)


def _svg(spoken: str, parts: Sequence[str], height: float = _HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{text(spoken)}">'
        f"{''.join(parts)}</svg>"
    )


def _x_scale(last_step: float) -> Scale:
    width = _WIDTH - _LEFT - _RIGHT
    return lambda step: _LEFT + width * min(step / last_step if last_step > 0 else 0.0, 1.0)


# What is drawn at equal distances on each kind of axis.
_CONVERT: dict[str, Scale] = {
    "linear": lambda value: value,
    "logarithmic": math.log,
    "percent": lambda value: math.asinh(value / 2),
}


def _y_scale(low: float, high: float, kind: str) -> Scale:
    convert = _CONVERT[kind]
    bottom, top = convert(low), convert(high)
    # Halved, as the difference of two large numbers may not be finite.
    span = top / 2 - bottom / 2
    height = _HEIGHT - _TOP - _BOTTOM

    def y(value: float) -> float:
        share = (convert(value) / 2 - bottom / 2) / span if span > 0 else 0.5
        return _HEIGHT - _BOTTOM - height * share

    return y


def _x_axis(last_step: float, x: Scale, height: float = _HEIGHT) -> Iterator[str]:
    base = height - _BOTTOM
    for step in ticks(0, last_step, most=4):
        # The last one would leave the picture.
        anchor = "end" if x(step) > _WIDTH - 30 else "middle"
        yield f'<path class="tick" d="M{x(step):.1f} {base:g}v4"/>'
        yield (
            f'<text x="{x(step):.1f}" y="{height - 7:g}" text-anchor="{anchor}">{short(step)}</text>'
        )
    yield f'<path class="axis" d="M{_LEFT} {base:g}H{_WIDTH - _RIGHT}"/>'


def _y_axis(low: float, high: float, y: Scale, kind: str) -> Iterator[str]:
    values = ticks(low, high, log=kind == "logarithmic")
    if kind == "percent":
        values = _percent_ticks(low, high, y)
    for value in values:
        at = y(value)
        yield f'<path class="rule" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>'


def _percent_ticks(low: float, high: float, y: Scale) -> list[float]:
    found = [0.0]
    for factor, power in itertools.product((1, 3), range(-6, 7)):
        found += [factor * 10.0**power, -factor * 10.0**power]
    # As many as there is room for, from 0 outwards.
    kept: list[float] = []
    for value in sorted(found, key=abs):
        if low <= value <= high and all(abs(y(value) - y(other)) >= 18 for other in kept):
            kept.append(value)
    return kept


def _bands(stages: Sequence[Stage], x: Scale) -> Iterator[str]:
    for number, stage in enumerate(stages):
        left, right = x(stage.first), x(stage.last)
        yield (
            f'<rect class="b{number % 2}" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"><title>{text(stage.name)}, steps '
            f"{stage.first:,} to {stage.last:,}</title></rect>"
        )
        # Where there is room for it.
        if right - left > 16:
            yield (
                f'<text class="small" x="{(left + right) / 2:.1f}" y="{_TOP - 4}" '
                f'text-anchor="middle">{stage.index}</text>'
            )


def _curve(line: Line, style: int, x: Scale, y: Scale) -> Iterator[str]:
    c = line.curve
    across = [f"{x(step):.1f}" for step in c.step]
    if c.thinned:
        upper = [f"{at} {y(value):.1f}" for at, value in zip(across, c.high, strict=True)]
        lower = [f"{at} {y(value):.1f}" for at, value in zip(across, c.low, strict=True)]
        yield f'<path class="range s{style}" d="M{"L".join(upper + lower[::-1])}Z"/>'
    points = [f"{at} {y(value):.1f}" for at, value in zip(across, c.mean, strict=True)]
    title = f"<title>{text(line.name)}</title>"
    yield f'<path class="line s{style}" d="M{"L".join(points)}">{title}</path>'
    # Few points are shown as such, and a single one is no line.
    if len(points) <= 30:
        for point in points:
            at, height = point.split()
            yield f'<circle class="s{style}" cx="{at}" cy="{height}" r="2.2"/>'


def _spoken(line: Line, over: str) -> str:
    c = line.curve
    return (
        f"{line.name} from {short(c.mean[0])} at {over} {place(c.step[0])} to {short(c.mean[-1])} "
        f"at {over} {place(c.step[-1])}, lowest {short(c.low.min())}, highest {short(c.high.max())}"
    )


def curriculum_chart(title: str, stages: Sequence[Stage], last_step: int, edges: int) -> str:
    """The noise axis, upwards, over steps: the noise levels that each stage trained on.

    `edges`: the number of clusters, 0 where it is not known."""
    x = _x_scale(last_step)
    height = _HEIGHT - _TOP - _BOTTOM
    width = _WIDTH - _LEFT - _RIGHT
    parts = [f'<rect class="off" x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}"/>']
    for stage in stages:
        if stage.lowest is None or stage.highest is None:
            continue
        left, right = x(stage.first), x(stage.last)
        parts.append(
            f'<rect class="on" x="{left:.1f}" y="{_TOP + height * (1 - stage.highest):.1f}" '
            f'width="{max(right - left, 0.5):.1f}" '
            f'height="{height * (stage.highest - stage.lowest):.1f}"><title>{text(stage.name)}: u in '
            f"[{stage.lowest:.3g}, {stage.highest:.3g}), steps {stage.first:,} to {stage.last:,}"
            "</title></rect>"
        )
    # Where a stage begins, and the levels of the axis.
    for stage in stages[1:]:
        parts.append(f'<path class="edge" d="M{x(stage.first):.1f} {_TOP}v{height}"/>')
    for level, name in ((0.0, "0 clean"), (0.5, "0.5"), (1.0, "1 noise")):
        at = _TOP + height * (1 - level) + 4
        parts.append(f'<text x="{_LEFT - 5}" y="{at:g}" text-anchor="end">{name}</text>')
    parts += _x_axis(last_step, x)
    clusters = f", in {edges} clusters" if edges else ""
    spoken = (
        f"{title}: noise levels that are trained on, over steps{clusters}, {len(stages)} stages"
    )
    return _svg(spoken, parts)


def heat_map(
    title: str, names: Sequence[str], steps: np.ndarray, values: np.ndarray, last_step: int
) -> str:
    """Numbers of several things over steps as colours, the first thing at the bottom.

    `steps`: the edges of the bins, (bins + 1,); `values`: (things, bins), NaN where there is none.
    """
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    log = low > 0 and high / low >= _LOG_FROM
    x = _x_scale(last_step)
    left, right = x(float(steps[0])), x(float(steps[-1]))
    # A bin can go on after the last step.
    shown = right - left
    whole = (steps[-1] - steps[0]) / max(last_step, 1) * (_WIDTH - _LEFT - _RIGHT)
    height = _HEIGHT - _BOTTOM - 4
    parts = [
        f'<svg x="{left:.1f}" y="4" width="{max(shown, 1):.1f}" height="{height}">'
        f'<image href="{_png(values[::-1], low, high, log=log)}" width="{max(whole, 1):.1f}" '
        f'height="{height}" preserveAspectRatio="none"/></svg>'
    ]
    # As many names as there is room for.
    each = math.ceil(len(names) / 12)
    for row in range(0, len(names), each):
        at = 4 + height * (1 - (row + 0.5) / len(names)) + 4
        parts.append(
            f'<text x="{_LEFT - 5}" y="{at:.1f}" text-anchor="end">{text(names[row])}</text>'
        )
    parts += _x_axis(last_step, x)
    spoken = f"{title} over steps as colours, from {short(low)} to {short(high)}; numbers below"
    kind = "logarithmic" if log else "linear"
    scale = (
        f'<p class="scale"><span>{short(low)}</span><img alt="{kind} scale of colours" src="{_scale()}">'
        f"<span>{short(high)}</span></p>"
    )
    return _svg(spoken, parts) + scale


def _png(values: np.ndarray, low: float, high: float, *, log: bool) -> str:
    """A pixel for each value, transparent where there is none, as a data URI."""
    known = np.isfinite(values)
    clipped = np.where(known, np.clip(values, low, high), low)
    if log:
        clipped, low, high = np.log(clipped), math.log(low), math.log(high)
    share = (clipped - low) / (high - low) if high > low else np.zeros_like(clipped)
    anchors = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(share, anchors, channel) for channel in zip(*_COLOURS, strict=True)]
    pixels = np.stack([*channels, 255.0 * known], axis=-1).round().astype(np.uint8)
    return data_uri(Image.fromarray(pixels, "RGBA"), "PNG")


def _scale() -> str:
    return _png(np.linspace(0, 1, 64)[None], 0, 1, log=False)


def data_uri(image: Image.Image, kind: str) -> str:
    """An image inside the page. `kind`: PNG or JPEG."""
    file = io.BytesIO()
    image.save(file, kind, optimize=True, **({"quality": 75} if kind == "JPEG" else {}))
    content = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{content}"


def stacked_bar(shares: Sequence[tuple[int, str, float]], width: float = 1.0) -> str:
    """Shares of a whole beside each other: (style, name, share). `width`: of the bar, up to 1."""
    parts = []
    left = 0.0
    for style, name, share in shares:
        parts.append(
            f'<rect class="k{style}" x="{left:.2f}" width="{400 * width * share:.2f}" height="16">'
            f"<title>{text(name)} {share:.1%}</title></rect>"
        )
        left += 400 * width * share
    spoken = ", ".join(f"{name} {share:.1%}" for _, name, share in shares if share > 5e-4)
    return (
        f'<svg class="bar" viewBox="0 0 400 16" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(spoken)}">{"".join(parts)}</svg>'
    )
