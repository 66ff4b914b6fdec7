"""The demo and the command line: quickly on a tiny model, and for real where marked."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from command import graftlens
from families import save_checkpoint, tiny_model
from shown import marked, module
from toytokenizers import gpt2_style
from waiting import HANG, until

from graftlens import __version__
from graftlens import demo as demo_module
from graftlens.demo import demo

SMALL = {"facts": 6, "epochs": 1, "progress": False}


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in SmolLM2's place; the toy tokenizer needs more tokens a text than it does."""
    tokenizer = gpt2_style()
    folder = save_checkpoint(
        tiny_model("llama", 3, vocab_size=len(tokenizer)), tmp_path / "base", tokenizer
    )
    (folder / "provenance.json").write_text(json.dumps({"route": "test"}))
    monkeypatch.setattr(demo_module, "smollm2", lambda: folder)
    configs = demo_module.demo_configs

    def roomy(*args: object, **options: object) -> object:
        movies, recipe = configs(*args, **options)  # type: ignore[arg-type]
        return movies, recipe.model_copy(update={"max_length": 512})

    monkeypatch.setattr(demo_module, "demo_configs", roomy)
    monkeypatch.setattr(demo_module, "evaluation_prompts", _short_prompts)
    return folder


def _short_prompts(facts: object, *, templates: object, seed: int) -> object:
    from graftlens.data import evaluation_prompts

    return evaluation_prompts(facts, templates=["headline", "new_film"], seed=seed)  # type: ignore[arg-type]


def test_the_demo_end_to_end_and_again(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    first = demo(tmp_path / "out", **SMALL, say=said.append)
    assert len(first.table) == 6 * 2 * 8
    assert first.report == tmp_path / "out" / "report.html"
    page = first.report.read_text()
    for fact in ("FE+LT", "headline", "new_film", "sft @ ~(first_entity + last)", __version__):
        assert fact.replace("(", "(") in page
    top = page[page.index("class='glimpse'") : page.index("class='lead'")]
    assert top.count("<p class='sentence'>") == 2
    assert top.index("<strong>FE+LT</strong>") < top.index("<strong>(FE+LT)^C</strong>")
    assert "followed by what the model says" in top
    assert "<dt>FE</dt>" in page
    assert page.count("<dt>from</dt><dd><code>") == 2
    assert any("FE+LT" in line for line in said), "the table is printed"

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a second run evaluates nothing")

    monkeypatch.setattr(demo_module, "evaluate", never)
    again = demo(tmp_path / "out", **SMALL, say=said.append)
    pd.testing.assert_frame_equal(
        again.table.drop(columns=["top_tokens", "top_probs"]),
        first.table.drop(columns=["top_tokens", "top_probs"]),
        check_dtype=False,
    )
    pd.testing.assert_frame_equal(again.summary, first.summary)


def test_half_written_results_are_made_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What an interruption can leave: a table without its key, a key without its table."""
    first = demo(tmp_path / "out", **SMALL, say=lambda line: None)
    (folder,) = (f for f in (tmp_path / "out").iterdir() if f.is_dir())
    for damage in ("results.json", "results.parquet"):
        (folder / damage).unlink()
        (folder / f"{damage}.tmp").write_text("half")
        again = demo(tmp_path / "out", **SMALL, say=lambda line: None)
        assert again.table["rank"].tolist() == first.table["rank"].tolist()
    (folder / "results.json").write_text("{")
    assert len(demo(tmp_path / "out", **SMALL, say=lambda line: None).table) == len(first.table)


def test_other_settings_have_their_own_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    demo(tmp_path, **SMALL, say=lambda line: None)
    demo(tmp_path, **SMALL | {"facts": 7}, say=lambda line: None)
    assert sorted(f.name for f in tmp_path.glob("facts-*")) == [
        "facts-6-epochs-1-seed-0",
        "facts-7-epochs-1-seed-0",
    ]
    with pytest.raises(ValueError, match="facts=5: the demo needs 6 or more"):
        demo(tmp_path, facts=5)


def test_help_and_version_say_what_there_is() -> None:
    shown = graftlens("--help")
    assert shown.returncode == 0
    assert "demo" in shown.stdout
    assert graftlens("--version").stdout.strip() == f"graftlens {__version__}"
    page = graftlens("demo", "--help").stdout
    for option in ("--out", "--facts", "--epochs", "--seed"):
        assert option in page


def test_wrong_words_are_one_clear_error(tmp_path: Path) -> None:
    few = graftlens("demo", "--facts", "3")
    assert few.returncode == 2
    assert "--facts" in few.stderr
    assert "Traceback" not in few.stderr
    file = tmp_path / "file"
    file.write_text("")
    blocked = graftlens("demo", "--out", str(file), "--facts", "6", "--epochs", "1")
    assert blocked.returncode == 1
    assert blocked.stderr.startswith("graftlens: ")
    assert "Traceback" not in blocked.stderr


class _Outside(HTMLParser):
    """Whatever a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]


@pytest.fixture(scope="module")
def real_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The README's demo, run for real by its command, interrupted once on the way."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "graftlens.cli", "demo"]
    first = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    log = folder / "graftlens-runs/demo/facts-40-epochs-6-seed-0/finetune/run.json"
    until(lambda: log.exists() or first.poll() is not None)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=HANG)
    assert first.returncode == 130, errors
    assert "Run the same command again" in errors
    assert "Traceback" not in errors
    subprocess.run(command, cwd=folder, check=True)
    yield folder
    shutil.rmtree(folder / "graftlens-runs/demo")


@pytest.mark.slow
@pytest.mark.real
def test_the_demo_shows_the_finding(real_demo: Path) -> None:
    """The targets on the headline template, from the demo's own table."""
    run = real_demo / "graftlens-runs/demo" / "facts-40-epochs-6-seed-0"
    table = pd.read_parquet(run / "results.parquet")
    assert table["reason"].isna().all()
    headline = table[table["template"] == "headline"]
    top5 = (headline["rank"] <= 5).groupby(headline["graft"]).mean()
    assert top5["PRE"] <= 0.05
    assert top5["SFT"] >= 0.95
    assert top5["FE+LT"] >= top5["SFT"] - 0.10
    assert top5["(FE+LT)^C"] <= 0.05
    outside = _Outside()
    outside.feed((real_demo / "graftlens-runs/demo" / "report.html").read_text())
    assert outside.found == [], "the report opens offline"


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(("page", "lines"), [("README.md", 10), ("docs/index.md", 12)])
def test_the_examples_print_what_they_show(page: str, lines: int, real_demo: Path) -> None:
    code, shown = marked(page, "example"), marked(page, "output")
    assert len([line for line in code.splitlines() if line.strip()]) <= lines
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=real_demo,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    # Rounding differs between machines: the words must agree, numbers to two digits.
    assert _words(ran.stdout) == _words(shown)
    for ours, theirs in zip(_numbers(ran.stdout), _numbers(shown), strict=True):
        assert ours == pytest.approx(theirs, abs=0.05)


@pytest.mark.slow
@pytest.mark.real
def test_the_picture_shows_what_the_demo_found(real_demo: Path) -> None:
    draw = module("draw")
    found = draw.seen(real_demo / "graftlens-runs/demo/facts-40-epochs-6-seed-0")
    kept = json.loads(draw.SEEN.read_text(encoding="utf-8"))
    rights = [graft.pop("right") for each in (found, kept) for graft in each["grafts"].values()]
    assert json.loads(json.dumps(found)) == kept
    for ours, theirs in zip(rights[:2], rights[2:], strict=True):
        assert ours == pytest.approx(theirs, abs=0.05)


def _words(text: str) -> list[str]:
    return [w for w in text.split() if not _is_number(w)]


def _numbers(text: str) -> list[float]:
    return [float(w) for w in text.split() if _is_number(w)]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
