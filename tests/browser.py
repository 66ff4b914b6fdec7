"""A headless Chromium for tests of pages, without a network."""

import asyncio
import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from waiting import HANG

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

#: Keeps what a page complains of, and gives it with the answer of a probe.
_WATCH = """<script>const complaints = [];
addEventListener("error", e => complaints.push(String(e.message || e.target.src)), true);
addEventListener("unhandledrejection", e => complaints.push(String(e.reason)));
addEventListener("securitypolicyviolation", e => complaints.push("policy: " + e.blockedURI));
</script>"""
_PROBE = """<script>addEventListener("load", () => setTimeout(async () => {
  const found = await (async () => { %s })();
  const said = document.createElement("pre");
  said.id = "probe";
  said.textContent = JSON.stringify({found, complaints});
  document.body.append(said);
}, 1500));</script>"""

#: True once every chart is drawn and nothing says that it is still being filled.
_DRAWN = """document.readyState === "complete" && !document.querySelector("[aria-busy=true]") &&
  [...document.querySelectorAll(".chart")].every(chart => chart.closest("[hidden]") ||
    chart.querySelector(".main-svg")) &&
  new Promise(done => setTimeout(() => requestAnimationFrame(() => done(true)), 250))"""


@dataclass(frozen=True)
class View:
    """How a page is looked at."""

    width: int = 1400
    dark: bool = False
    print: bool = False


def chromium() -> str:
    """Where Chromium is; the test is skipped if it is nowhere."""
    for name in (os.environ.get("BROWSER_PATH"), *NAMES):
        if name and (found := shutil.which(name)):
            return found
    pytest.skip(
        f"no Chromium: none of {', '.join(NAMES)} is in PATH, and BROWSER_PATH is not set. Install "
        "one (Debian: apt-get install chromium)"
    )


def ask(page: Path, script: str, folder: Path, *, width: int = 1200, height: int = 3000):
    """What `script` (the body of an async function) returns in a page, and its complaints."""
    source = page.read_text(encoding="utf-8")
    copy = folder / f"probed-{page.name}"
    head, body = source.index("<title>"), source.rindex("</body>")
    copy.write_text(
        source[:head] + _WATCH + source[head:body] + _PROBE % script + source[body:],
        encoding="utf-8",
    )
    command = [
        chromium(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},{height}",
        "--virtual-time-budget=15000",
        "--dump-dom",
        copy.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    copy.unlink()
    said = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert said, f"the page did not answer; the browser said {done.stderr[-2000:]}"
    answer = json.loads(html.unescape(said[1]))
    return answer["found"], answer["complaints"]


def look(
    pages: Mapping[str, Path | str],
    views: Sequence[View],
    script: str,
    *,
    click: str | None = None,
) -> dict[tuple[str, View], Any]:
    """What `script` (the body of an async function) returns in every page (a file, or an address)
    and view, in one browser.

    `click` is the body of a function that returns a point of the window, [x, y], which a mouse
    moves to and clicks before the script runs.
    """
    pytest.importorskip("choreographer")
    os.environ.setdefault("BROWSER_PATH", chromium())
    return asyncio.run(_looked(pages, views, script, click))


async def _looked(
    pages: Mapping[str, Path | str], views: Sequence[View], script: str, click: str | None
) -> dict[tuple[str, View], Any]:
    import choreographer

    found = {}
    browser = choreographer.Browser()
    await asyncio.wait_for(browser.open(), HANG)
    try:
        for name, page in pages.items():
            tab = await browser.create_tab("about:blank")

            async def ask(command: str, tab: Any = tab, **params: object) -> dict[str, Any]:
                sent = tab.send_command(command, params=params)
                answer = await asyncio.wait_for(sent, HANG)
                assert "error" not in answer, f"{command}: {answer['error']}"
                return answer["result"]

            async def value(expression: str, ask: Any = ask) -> Any:
                options = {"awaitPromise": True, "returnByValue": True}
                answer = await ask("Runtime.evaluate", expression=expression, **options)
                assert "exceptionDetails" not in answer, answer["exceptionDetails"]
                return answer["result"].get("value")

            async def drawn(value: Any = value) -> None:
                while await value(_DRAWN) is not True:
                    await asyncio.sleep(0.05)

            for number, view in enumerate(views):
                scheme = {
                    "name": "prefers-color-scheme",
                    "value": "dark" if view.dark else "light",
                }
                medium = "print" if view.print else "screen"
                await ask("Emulation.setEmulatedMedia", media=medium, features=[scheme])
                size = {"width": view.width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                await ask("Emulation.setDeviceMetricsOverride", **size)
                if number == 0:
                    url = page if isinstance(page, str) else page.absolute().as_uri()
                    await ask("Page.navigate", url=url)
                await drawn()
                if view.print:
                    await value("dispatchEvent(new Event('beforeprint')), null")
                if click is not None:
                    x, y = await value(f"(async () => {{ {click} }})()")
                    for kind in ("mouseMoved", "mouseMoved", "mousePressed", "mouseReleased"):
                        pressed = {} if kind == "mouseMoved" else {"button": "left"}
                        at = {"x": x, "y": y, "clickCount": 1} | pressed
                        await ask("Input.dispatchMouseEvent", type=kind, **at)
                        await asyncio.sleep(0.1)
                    await drawn()
                found[name, view] = await value(f"(async () => {{ {script} }})()")
                if view.print:
                    await value("dispatchEvent(new Event('afterprint')), null")
            await browser.close_tab(tab.target_id)
    finally:
        await asyncio.wait_for(browser.close(), HANG)
    return found
