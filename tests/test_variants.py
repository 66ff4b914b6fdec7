"""Lists in an experiment's config: every combination, in its own folder, on one page."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import graftlens
from needs import needs
from tinybase import tiny_base

from graftlens import ConfigError, read_results
from graftlens.engines import submit
from graftlens.experiment import variants as module
from graftlens.experiment.variants import folder_of, launch_variants, variants

EXPERIMENT: dict[str, Any] = {
    "title": "T",
    "question": "Q?",
    "model": "m",
    "recipe": {"epochs": 1, "batch_size": 8, "warmup_steps": 0},
    "datasets": {"films": {"n_facts": 6, "texts_per_fact": 2, "directions": ["ab"]}},
    "models": {"sft": {"data": "films"}},
    "parts": {
        "p": {
            "title": "P",
            "prompts": {"dataset": "films", "templates": ["headline"], "distractors": 2},
            "grafts": {"PRE": "none", "SFT": "sft @ all", "FE": "sft @ first_entity"},
        }
    },
}


def written(folder: Path, **change: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT | change, sort_keys=False))
    return path


def test_every_combination_is_an_experiment(tmp_path: Path) -> None:
    two = [{"n_facts": 6, "seed": 0}, {"n_facts": 6, "seed": 1}]
    path = written(tmp_path, model=["a/x", "b/y"], datasets={"films": two})
    found = variants(str(path))
    assert [v.label for v in found] == ["x-films-1", "x-films-2", "y-films-1", "y-films-2"]
    assert [(v.named.config.model, v.named.config.datasets["films"].seed) for v in found] == [
        ("a/x", 0), ("a/x", 1), ("b/y", 0), ("b/y", 1),
    ]  # fmt: skip
    assert [v.named.name for v in found] == ["mine-films-1", "mine-films-2"] * 2
    assert len({folder_of(v, None) for v in found}) == 4
    assert folder_of(found[1], tmp_path / "out") == tmp_path / "out" / "x-films-2"
    (alone,) = variants(str(written(tmp_path, model="a/x")))
    assert (alone.label, folder_of(alone, "out")) == ("", Path("out"))
    assert next(v.label for v in variants(str(path), ["model=[c,d]"])) == "c"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": []}, "model: write a name, or a list of names"),
        ({"model": ["a/x", "a/x"]}, "name each model once"),
        ({"datasets": {"films": []}}, "datasets.films: the list is empty"),
        ({"datasets": {"films": [{"n_fact": 3}, {}]}}, "unknown key 'n_fact'"),
    ],
)
def test_bad_lists_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        variants(str(written(tmp_path, **change)))


@pytest.mark.slow
def test_the_command_runs_all_and_compares_them(tmp_path: Path) -> None:
    bases = [str(tiny_base(tmp_path / f"base{seed}", seed=seed)) for seed in (0, 1)]
    written(tmp_path, model=bases)
    dry = graftlens("run", "mine.yaml", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "--- base0" in dry.stdout
    assert "--- base1" in dry.stdout
    done = graftlens("run", "mine.yaml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "compared.html")
    page = (tmp_path / "out" / "compared.html").read_text()
    means = []
    for label in ("base0", "base1"):
        table = read_results(tmp_path / "out" / label / "sweeps" / "p")
        means.append(float(table[table["graft"] == "SFT"]["logprob"].astype(float).mean()))
        assert (tmp_path / "out" / label / "sweeps" / "p" / "report.html").is_file()
        assert label in page
    assert means[0] != means[1]


@pytest.mark.slow
def test_whole_experiments_run_as_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By submitit's rehearsal of Slurm on this machine."""
    needs("submitit")
    bases = [str(tiny_base(tmp_path / f"base{seed}", seed=seed)) for seed in (0, 1)]
    path = written(tmp_path, model=bases)
    monkeypatch.setattr(module, "submit", partial(submit, cluster="local"))
    said: list[str] = []
    ok = launch_variants(str(path), tmp_path / "out", store=tmp_path / "store", say=said.append)
    assert ok
    assert said[-1] == str(tmp_path / "out" / "compared.html")
    for label in ("base0", "base1"):
        assert (tmp_path / "out" / label / "slurm").is_dir()
        assert read_results(tmp_path / "out" / label / "sweeps" / "p")["reason"].isna().all()
