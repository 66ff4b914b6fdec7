"""HTML from the templates next to this module; values are escaped where they are shown.

What is not escaped is safe inside a script or a style element: JSON, the package's own scripts and
styles, plotly and CircuitsVis.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from graftlens.viz import theme
from graftlens.viz.spelling import characters, visible

#: Marks a file as a page that graftlens wrote and may overwrite.
GENERATOR = '<meta name="generator" content="graftlens">'


def render(template: str, **values: object) -> str:
    """The HTML of a template with these values.

    Raises:
        jinja2.UndefinedError: a value that the template uses is missing.
    """
    return _environment().get_template(template).render(values)


def as_json(value: object) -> Markup:
    """JSON that may be inside a script element; a number that is not finite is null."""
    # Inside a script element only "<" can end it or start a comment.
    said = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    return Markup(said.replace("<", "\\u003c"))


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("graftlens.viz"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., object]] = {
        "characters": characters,
        "figure_json": _figure_json,
        "json": as_json,
        "relative": _relative,
        "visible": visible,
    }
    made.filters.update(filters)
    made.tests["list_or_tuple"] = lambda value: isinstance(value, list | tuple)
    made.globals.update(
        asset=_asset,
        generator=Markup(GENERATOR),
        looks={"light": asdict(theme.LIGHT), "dark": asdict(theme.DARK)},
        plotly=lambda: Markup(get_plotlyjs()),
        sft_color=theme.source_color("sft"),
        warn_color=theme.AMBER,
    )
    return made


def _asset(name: str) -> Markup:
    """A script or a style sheet of the package."""
    where = resources.files("graftlens.viz").joinpath("assets", name)
    return Markup(where.read_text(encoding="utf-8"))


def _figure_json(figure: go.Figure) -> Markup:
    return as_json(json.loads(figure.to_json()))


def _relative(target: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(target, folder)).as_posix())


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
