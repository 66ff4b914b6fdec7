"""docs/howto/extending.md is what these tests do: a toy component, family and measure, by their
rows; and a family that needs a new fact."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
from shown import ROOT, blocks

#: The page's blocks in their order: the file, and the line that each goes before.
PLACES = (
    ("components.py", '    LN1_POST = "ln1_post", '),
    ("model/arch.py", "def supported() "),
    ("model/forward.py", '        if arch.qk_norm != "none":\n            self.q_norm = '),
    ("model/forward.py", "        return out.unflatten(0, places)\n\n    def _qk_norm"),
    ("metrics.py", "def measures() "),
)


#: The same for the blocks of a family with a new fact.
FACT_PLACES = (
    ("model/arch.py", "    qkv_clip: float | None = None\n"),
    ("model/arch.py", "def _gpt2("),
    ("model/arch.py", "def supported() "),
    ("model/arch.py", '    match name:\n        case "n_layers"'),
    ("model/forward.py", "        attn_out = self.hook_attn_out(attn_out)\n"),
    ("model/forward.py", "        mlp_out = self.hook_mlp_out(mlp_out)\n"),
    ("lens/attribution.py", "        chosen = self.mask[C.O, layer]\n"),
)


def extended(folder: Path, within: str, places: Sequence[tuple[str, str]], program: str) -> None:
    """Put the page's blocks into a copy of the library, and run a program of tests/ on it."""
    library = folder / "graftlens"
    shutil.copytree(ROOT / "graftlens", library, ignore=shutil.ignore_patterns("__pycache__"))
    shown = [b.text for b in blocks("docs/howto/extending.md", within=within)]
    named = re.compile(r"\A# graftlens/([\w/.]+)[^\n]*\n(.*)", re.S)
    parts = [named.findall(block)[0] for block in shown]
    assert [name for name, _ in parts] == [name for name, _ in places]
    for (name, block), (_, before) in zip(parts, places, strict=True):
        text = (library / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{name} has changed: where does this go now? {before!r}"
        indent = before[: len(before) - len(before.lstrip())]
        added = textwrap.indent(block, indent) + ("\n\n" if not indent else "")
        (library / name).write_text(text.replace(before, added + before), encoding="utf-8")
    path = os.pathsep.join((str(folder), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / program)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(library / "__init__.py"), "it ran the extended copy"


@pytest.mark.slow
def test_a_component_a_family_and_a_measure_are_added_as_the_docs_say(tmp_path: Path) -> None:
    """A list of components that somebody keeps beside the table would lack the toy."""
    extended(tmp_path, "extending", PLACES, "toyfamily.py")


def test_a_family_with_a_new_fact_is_added_as_the_docs_say(tmp_path: Path) -> None:
    """Hugging Face's own Granite is what it is compared with."""
    extended(tmp_path, "new fact", FACT_PLACES, "newfact.py")
