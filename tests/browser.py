"""A headless Chromium for tests of pages, without a network."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

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
