"""An axis of a matplotlib figure in, the same axis with a scale that people can read, out."""

from typing import Any


def scale_log(axis: Any) -> None:
    """Make an `XAxis` or `YAxis` logarithmic, once all is drawn, with plain numbers at its ticks whatever its range."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))
    axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)) if high < 10 * low else decades)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
