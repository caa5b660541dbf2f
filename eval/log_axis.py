"""Logarithmic axes of pictures, labelled with plain numbers."""

from typing import Any


def plain_log_axis(axis: Any) -> None:
    """Labels a logarithmic axis (`xaxis` or `yaxis` of matplotlib's axes) 1, 2, 5, 10, 20 and so on."""
    from matplotlib.ticker import LogLocator

    # matplotlib's own labels are powers, and 6 x 10^-2 where the axis spans less than a decade.
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}")
