"""Pages that need nothing but themselves: the look that all reports share, and their pictures as SVG.

Everything that a page shows is escaped, and it may load nothing and run nothing: texts in it may be a model's.
"""

from __future__ import annotations

import importlib.resources
import io
from collections.abc import Callable
from typing import Any

import jinja2.sandbox
import markupsafe
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "PINK", "STYLE", "render", "svg"]

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#5F6B7A"
"""Colours that people with any common colour blindness can tell apart (Okabe and Ito 2008)."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10.5,
    "text.color": "#1C2733",
    "axes.edgecolor": "#C9D1DA",
    "axes.labelcolor": GREY,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8ECF0",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lmobj",
    "text.parse_math": False,
}


def render(package: str, name: str, **values: Any) -> str:
    """The page of a template.

    Args:
      package: that the template is a file of; it may extend `page.html.j2`, which has the look, title, subtitle, tiles.
      name: of the template.
      values: what the template shows; text in them is escaped.
    """
    loader = jinja2.DictLoader({"page.html.j2": _text("lmobj.train", "page.html.j2"), name: _text(package, name)})
    environment = jinja2.sandbox.SandboxedEnvironment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(**values)


def svg(draw: Callable[[Axes], None], size: tuple[float, float] = (6.2, 3.5)) -> tuple[str, markupsafe.Markup]:
    """A chart's title, and the chart as an SVG element that scales with the page.

    Args:
      draw: draws it, title at the left included.
      size: in inches, at which text has its size.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        draw(axes)
        title = axes.get_title("left")
        axes.set_title("")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return title, markupsafe.Markup(text[text.index("<svg") :])


def _text(package: str, name: str) -> str:
    return importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8")
