"""The common style of the project's plots."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


@contextmanager
def figure_axes(path: Path, title: str, n_columns: int = 1, width: float = 6.4) -> Iterator[list[Axes]]:
    """Axes to draw on, each `width` inches wide; the figure is saved at the end of the context. Needs no display."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * n_columns, 4.4), layout="constrained")
        axes = figure.subplots(1, n_columns, squeeze=False)[0]
        figure.suptitle(title)
        yield list(axes)
        figure.savefig(path, dpi=130, metadata={"Software": None})
