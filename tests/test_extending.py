"""docs/howto/extending.md is what this test does: a toy component, family and measure, by their
rows."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from shown import ROOT, blocks

#: The page's blocks in their order: the file, and the line that each goes before.
PLACES = (
    ("components.py", '    LN1_POST = "ln1_post", '),
    ("model/arch.py", "def supported() "),
    ("model/forward.py", '        if arch.qk_norm != "none":\n            self.q_norm = '),
    ("model/forward.py", "        return out.unflatten(0, places)\n\n    def _qk_norm"),
    ("metrics.py", "def measures() "),
)


def test_a_component_a_family_and_a_measure_are_added_as_the_docs_say(tmp_path: Path) -> None:
    """A list of components that somebody keeps beside the table would lack the toy."""
    library = tmp_path / "graftlens"
    shutil.copytree(ROOT / "graftlens", library, ignore=shutil.ignore_patterns("__pycache__"))
    shown = [b.text for b in blocks("docs/howto/extending.md", within="extending")]
    named = re.compile(r"\A# graftlens/([\w/.]+)[^\n]*\n(.*)", re.S)
    parts = [named.findall(block)[0] for block in shown]
    assert [name for name, _ in parts] == [name for name, _ in PLACES]
    for (name, block), (_, before) in zip(parts, PLACES, strict=True):
        text = (library / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{name} has changed: where does this go now? {before!r}"
        indent = before[: len(before) - len(before.lstrip())]
        added = textwrap.indent(block, indent) + ("\n\n" if not indent else "")
        (library / name).write_text(text.replace(before, added + before), encoding="utf-8")
    path = os.pathsep.join((str(tmp_path), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "toyfamily.py")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(library / "__init__.py"), "it ran the extended copy"
