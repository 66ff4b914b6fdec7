"""Pictures of whole pages, by way of the browser that kaleido also uses."""

import asyncio
import base64
import importlib.util
import threading
from pathlib import Path
from typing import Any

from graftlens.folder import write_whole
from graftlens.viz.export import PATIENCE

#: A browser does not paint more pixels than this in a row or a column.
MAX_PIXELS = 16384

#: True once every chart is drawn, nothing fades, and nothing says that it is still being filled.
_DRAWN = """
document.readyState === "complete" && !document.querySelector("[aria-busy=true]") &&
[...document.querySelectorAll(".chart")].every(chart => chart.querySelector(".main-svg")) &&
document.getAnimations().every(change => change.playState !== "running") &&
new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))
"""


def screenshot(
    html_path: str | Path,
    png_path: str | Path,
    *,
    width: int = 1280,
    height: int | None = None,
    scale: int | float = 2,
    dark: bool = False,
) -> Path:
    """Write a PNG of an HTML page to `png_path` and return it; it appears whole or not at all.

    Args:
        html_path: the page.
        png_path: the picture.
        width: of the window, in CSS pixels.
        height: of the window, in CSS pixels; the whole page if not given.
        scale: pixels of the picture for one CSS pixel.
        dark: ask the page for its dark colours.

    Raises:
        FileNotFoundError: there is no such page.
        ValueError: a size that is not positive, or a picture of more than `MAX_PIXELS` pixels per
            side.
        RuntimeError: no browser, or one that does not start, draw or answer.
    """
    for name, value in (("width", width), ("height", height), ("scale", scale)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value!r}; it must be greater than 0")
    if importlib.util.find_spec("choreographer") is None:
        raise RuntimeError(
            "a picture of a page needs kaleido's browser control, which is not installed: "
            "pip install 'graftlens[plots]'"
        )
    path = Path(html_path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no page {str(path)!r}; save it first")
    picture = _in_a_loop_of_its_own(path, width, height, scale, dark)
    return write_whole(png_path, picture)


def _in_a_loop_of_its_own(
    path: Path, width: int, height: int | None, scale: int | float, dark: bool
) -> bytes:
    """A notebook's thread has an event loop already, so this runs one in another thread."""
    found: list[bytes] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(asyncio.run(_taken(path, width, height, scale, dark)))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


async def _taken(
    path: Path, width: int, height: int | None, scale: int | float, dark: bool
) -> bytes:
    import choreographer
    from choreographer.errors import ChromeNotFoundError

    try:
        browser = choreographer.Browser()
    except ChromeNotFoundError:
        raise RuntimeError(
            "no Chrome or Chromium was found: install one, or name it in the environment variable "
            "BROWSER_PATH"
        ) from None
    try:
        await asyncio.wait_for(browser.open(), PATIENCE)
        return await asyncio.wait_for(_shot(browser, path, width, height, scale, dark), PATIENCE)
    except TimeoutError:
        raise RuntimeError(
            f"the browser did not draw {path.name} in {PATIENCE:g} seconds"
        ) from None
    finally:
        await asyncio.wait_for(browser.close(), PATIENCE)


async def _shot(
    browser: Any, path: Path, width: int, height: int | None, scale: int | float, dark: bool
) -> bytes:
    tab = await browser.create_tab("about:blank")

    async def ask(command: str, **params: object) -> dict[str, Any]:
        answer = await tab.send_command(command, params=params)
        if "error" in answer:
            raise RuntimeError(f"the browser refused {command}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def sized(tall: int) -> None:
        await ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=tall,
            deviceScaleFactor=scale,
            mobile=False,
        )

    async def drawn() -> None:
        while True:
            answer = await ask(
                "Runtime.evaluate", expression=_DRAWN, awaitPromise=True, returnByValue=True
            )
            if answer["result"].get("value") is True:
                return
            await asyncio.sleep(0.1)

    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    await ask("Emulation.setEmulatedMedia", features=[scheme])
    await ask("Emulation.setScrollbarsHidden", hidden=True)
    await sized(height or 900)
    await ask("Page.navigate", url=path.absolute().as_uri())
    await drawn()
    # Where no mouse can hover, as here, plotly always shows its buttons.
    hide = "document.head.append(Object.assign(document.createElement('style'), "
    hide += "{textContent: '.modebar {display: none}'}))"
    await ask("Runtime.evaluate", expression=hide)
    if height is None:
        layout = await ask("Page.getLayoutMetrics")
        height = int(layout["cssContentSize"]["height"])
    if max(width, height) * scale > MAX_PIXELS:
        raise ValueError(
            f"the picture would be {width * scale:g} × {height * scale:g} pixels; a browser paints "
            f"up to {MAX_PIXELS} per side: give height= or a smaller scale="
        )
    await sized(height)
    # Charts fit themselves to the window a little after it changes.
    await asyncio.sleep(0.5)
    await drawn()
    return base64.b64decode((await ask("Page.captureScreenshot", format="png"))["data"])
