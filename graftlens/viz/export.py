"""Figures as files: a page of their own, and pictures by way of kaleido and a Chrome."""

import asyncio
import contextlib
import hashlib
import html
import importlib.util
import json
import re
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from graftlens.folder import at_home, write_whole
from graftlens.viz import theme
from graftlens.viz.page import Figure
from graftlens.viz.render import render

Format = Literal["html", "png", "svg"]

#: Width of a picture in pixels; a PNG has twice as many, for print.
WIDTH = 1000
SCALE = 2

#: Seconds until a browser that does not start, or a figure that is not drawn, is given up.
PATIENCE = 90.0


@dataclass(frozen=True)
class Written:
    """Where a figure was written."""

    paths: dict[str, Path]
    """Format -> file."""
    skipped: dict[str, str]
    """Format -> why there is no file."""


def write_figure(
    figure: go.Figure,
    stem: str | Path,
    *,
    formats: Sequence[str] = get_args(Format),
    title: str = "",
    shared: bool = False,
) -> Written:
    """Write a figure to `stem`.html, `stem`.png and `stem`.svg; each appears whole or not at all.

    The HTML opens without a network. It is one file of 5 MB, most of it plotly's script; `shared`,
    it loads the script from a file next to it, which all figures of the folder share.

    Pictures have the ground of the figure's `look`, white unless it is dark, and need kaleido
    (`graftlens[plots]`) and a Chrome or Chromium; without them they are skipped with the reason,
    and so is a figure that the browser fails to draw. The browser starts for each call, or once for
    all calls inside `exporter()`.

    Raises:
        ValueError: an unknown format.
    """
    stem = at_home(stem)
    for name in formats:
        if name not in get_args(Format):
            raise ValueError(f"unknown format {name!r}; choose from {', '.join(get_args(Format))}")
    paths: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    with exporter() as browser:
        for name in formats:
            path = stem.with_name(f"{stem.name}.{name}")
            if name == "html":
                paths[name] = write_whole(path, _own_page(figure, title or stem.name, path, shared))
                continue
            picture = browser.draw(figure, name, title)
            if isinstance(picture, bytes):
                paths[name] = write_whole(path, picture)
            else:
                skipped[name] = picture
    return Written(paths, skipped)


@contextlib.contextmanager
def exporter() -> "Iterator[Browser]":
    """Keep one browser for all figures written inside; it starts with the first picture.

    Inside another `exporter()` its browser is used.
    """
    outer = _browser.get()
    if outer is not None:
        yield outer
        return
    browser = Browser()
    token = _browser.set(browser)
    try:
        yield browser
    finally:
        _browser.reset(token)
        browser.close()


class Browser:
    """A Chrome behind kaleido, in an event loop of its own, because kaleido's own server waits
    forever for a browser that did not start."""

    def __init__(self) -> None:
        self._kaleido: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._why = ""

    def draw(self, figure: go.Figure, format: str, title: str = "") -> bytes | str:
        """A picture of the figure, or why there is none."""
        if not self._open():
            return self._why
        options: dict[str, Any] = {"format": format, "width": WIDTH}
        options["scale"] = SCALE if format == "png" else 1
        try:
            drawn = self._wait(self._kaleido.calc_fig(_on_ground(figure, title), opts=options))
        except TimeoutError:
            # The next figure would only wait as long again.
            self.close()
            self._kaleido, self._why = None, f"the browser did not answer in {PATIENCE:g} seconds"
            return self._why
        except Exception as error:  # a figure that cannot be drawn must not end a run
            return f"the browser did not draw it: {_said(error)}"
        return _settled(drawn) if format == "svg" else drawn

    def close(self) -> None:
        """End the browser, if it was started."""
        if self._loop is None:
            return
        if self._kaleido is not None:
            with contextlib.suppress(Exception):
                self._wait(self._kaleido.close())
        self._stop()

    def _open(self) -> bool:
        if self._kaleido is not None or self._why:
            return self._kaleido is not None
        if importlib.util.find_spec("kaleido") is None:
            self._why = "kaleido is not installed: pip install 'graftlens[plots]'"
            return False
        import kaleido
        from kaleido.errors import ChromeNotFoundError

        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        try:
            self._kaleido = self._wait(_started(kaleido.Kaleido))
        except ChromeNotFoundError:
            self._why = (
                "no Chrome or Chromium was found: install one, or name it in the environment "
                "variable BROWSER_PATH"
            )
        except Exception as error:  # whatever a browser may do at its start
            self._why = f"the browser did not start: {_said(error)}"
        if self._kaleido is None:
            self._stop()
        return self._kaleido is not None

    def _wait(self, task: Coroutine[Any, Any, Any]) -> Any:
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(task, self._loop)
        try:
            return future.result(PATIENCE)
        except BaseException:
            future.cancel()
            raise

    def _stop(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


_browser: ContextVar[Browser | None] = ContextVar("browser", default=None)


async def _started(kind: Any) -> Any:
    # MathJax would be fetched from the network, and no label here is mathematics.
    made = kind(mathjax=False, timeout=PATIENCE)
    await made.open()
    return made


def _on_ground(figure: go.Figure, title: str) -> dict[str, Any]:
    made = go.Figure(figure)
    look = theme.DARK if made.layout.font.color == theme.DARK.text else theme.LIGHT
    made.update_layout(paper_bgcolor=look.surface, plot_bgcolor=look.surface)
    made.update_layout(font_family="DejaVu Sans, Arial, sans-serif")
    if title:
        top = (made.layout.margin.t or 0) + 34
        made.update_layout(
            margin_t=top,
            height=(made.layout.height or 430) + 34,
            title={
                "text": html.escape(title),
                "x": 0.01,
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"t": 12},
                "font": {"size": 16, "color": look.text},
            },
        )
    found: dict[str, Any] = json.loads(made.to_json())
    # Plotly would give each trace a random id and write it into the picture.
    for number, trace in enumerate(found["data"]):
        trace["uid"] = f"trace{number}"
    return found


def _settled(svg: bytes) -> bytes:
    """The same picture with plotly's random ids numbered, so that equal figures are equal files."""
    known: dict[bytes, bytes] = {}
    for found in re.findall(rb'id="(?:top)?defs-([0-9a-f]{6})"', svg):
        known.setdefault(found, b"%06d" % len(known))
    for random, fixed in known.items():
        svg = svg.replace(random, fixed)
    return svg


def _said(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if words else ''}{words[:300]}"


def _own_page(figure: go.Figure, title: str, path: Path, shared: bool) -> str:
    script = _shared_script(path.parent) if shared else None
    return render("figure.html", title=title, figure=Figure("", title, figure), script=script)


def _shared_script(folder: Path) -> str:
    """The name of the file in a folder that has plotly's script, which is written once."""
    content = get_plotlyjs().encode()
    name = f"plotly-{hashlib.sha256(content).hexdigest()[:10]}.js"
    file = folder / name
    if not (file.is_file() and file.read_bytes() == content):
        write_whole(file, content)
    return name
