"""Every shipped config of sweeps and of finetuning, run on a tiny pair. (Experiments are run in
`test_experiments.py`, and datasets are made in `test_datasets.py`.)"""

from pathlib import Path

import pytest
from chattemplates import CHATML
from tinybase import tiny_base, tiny_finetuned

from graftlens import FinetuneRun, finetune_run, read_results, run_sweep, sweep_report
from graftlens.configfile import read_settings

CONFIGS = Path(__file__).parent.parent / "experiments"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pair")
    base = tiny_base(root / "pre")
    (base / "chat_template.jinja").write_text(CHATML)
    return {"pre": base, "sft": tiny_finetuned(base, root / "sft")}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweeps/*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_sweep_runs(path: Path, pair: dict[str, Path], tmp_path: Path) -> None:
    overrides = [f"sources.{name}={place}" for name, place in pair.items()]
    overrides += ["dataset.movies.n_facts=6", "limit=1"]
    result = run_sweep(path, tmp_path / "out", overrides=overrides, progress=False, say=_quiet)
    assert result.ok, result.trust["text"]
    table = read_results(tmp_path / "out")
    assert table["reason"].isna().all()
    assert len(table) == result.cells
    assert sweep_report(tmp_path / "out").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("finetune/*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_recipe_trains(path: Path, pair: dict[str, Path], tmp_path: Path) -> None:
    where = "movies" if "  movies:" in path.read_text() else "make"
    overrides = [f"model={pair['pre']}", f"output={tmp_path / 'run'}", "epochs=1", "batch_size=4"]
    overrides += [f"data.{where}.n_facts=6", f"data.{where}.texts_per_fact=2", "max_length=512"]
    result = finetune_run(read_settings(FinetuneRun, path, overrides), progress=False)
    assert result.steps > 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def _quiet(_: str) -> None:
    """Messages of a sweep."""
