"""A training's checkpoints: kept by `graftlens finetune`, run one after another by experiments."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_experiments import own
from tinybase import tiny_base

from graftlens.configfile import ConfigError, settings_from
from graftlens.experiment.run import ExperimentResult, describe_experiment, run_experiment
from graftlens.recipes import Every, FinetuneConfig
from graftlens.sweep.results import read_manifest, read_results
from graftlens.viz.export import write_figure

STEPS = [{"kind": "lines", "x": "step", "metrics": ["recovery", "logprob"], "by": "pooled"}]
SOURCES = {"pre": "base", "time": {"each": "sft"}}
GRAFTS = {"PRE": "none", "SFT": "time @ all", "LT": "time @ last"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def result(base: Path, tmp_path_factory: pytest.TempPathFactory) -> ExperimentResult:
    """A part over the checkpoints that one training keeps, every nine steps."""
    place = tmp_path_factory.mktemp("experiment")
    named = own(base, change=keeping({"every": 9}), sources=SOURCES, grafts=GRAFTS, figures=STEPS)
    with pytest.MonkeyPatch.context() as patch:
        only_html = partial(write_figure, formats=("html",))
        patch.setattr("graftlens.experiment.show.write_figure", only_html)
        assert "members   1, one after another" in describe_experiment(named, store=place / "store")
        return run_experiment(
            named, place / "run", store=place / "store", progress=False, say=lambda _: None
        )


def keeping(what: Any) -> dict[str, Any]:
    return {"models": {"sft": {"data": "films", "recipe": {"keep_checkpoints": what}}}}


@pytest.mark.slow
def test_every_n_th_step_and_the_last_are_kept(result: ExperimentResult) -> None:
    (output,) = (result.folder.parent / "store" / "models").iterdir()
    record = json.loads((output / "model" / "finetune.json").read_text())["result"]
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in output.glob("kept/*"))
    assert steps == [*range(9, record["steps"], 9), record["steps"]]
    last, model = (
        load_file(folder / "model.safetensors")
        for folder in (output / "kept" / f"checkpoint-{steps[-1]}", output / "model")
    )
    assert last.keys() == model.keys()
    assert all(torch.equal(last[name], model[name]) for name in model)
    first = load_file(output / "kept" / "checkpoint-9" / "model.safetensors")
    assert not all(torch.equal(first[name], model[name]) for name in model)


@pytest.mark.slow
def test_an_experiment_runs_them_and_draws_them_over_steps(result: ExperimentResult) -> None:
    assert result.ok
    folder = result.folder / "sweeps" / "one"
    steps = [int(member["step"] or 0) for member in read_manifest(folder).members]
    assert steps == sorted(steps)
    assert len(steps) > 2
    table = read_results(folder)
    assert isinstance(table, pd.DataFrame)
    assert list(dict.fromkeys(table["step"])) == steps
    # The base is the same at each step, and training moves what is grafted.
    means = table.groupby(["graft", "step"], observed=True)["logprob"].mean()
    assert means["PRE"].nunique() == 1
    assert means["SFT"].nunique() == len(steps)
    assert means["SFT"].iloc[-1] > means["SFT"].iloc[0]
    pooled = pd.read_csv(result.folder / "tables" / "one-pooled.csv")
    assert len(pooled) == 3 * len(steps)
    assert {"member", "step", "recovery"} <= set(pooled)
    names = {path.name for path in (result.folder / "figures").glob("*.html")}
    assert names == {"one-recovery.html", "one-logprob.html"}


@pytest.mark.parametrize(
    ("change", "part", "what"),
    [
        (
            {},
            {},
            r"sources\.time: the training of 'sft' keeps no checkpoints\. Write in its recipe",
        ),
        (
            keeping("all"),
            {"finding": {"enough": "SFT", "rest": "LT"}},
            "finding: of one model, but time stands for several",
        ),
        (
            keeping("all"),
            {"figures": [{"kind": "bars"}]},
            r"figures\.0: time stands for several models: a figure shows lines of named grafts",
        ),
        (
            {"models": {"sft": {"path": "my/model"}}},
            {},
            "'sft' is not trained here, so it has no checkpoints",
        ),
        (
            {},
            {"sources": {"pre": "base", "sft": "sft", "low": {"of": "stf", "rank": 2}}},
            r"sources\.low: it is of 'stf', which is not a source",
        ),
        (
            {},
            {"sources": {"pre": "base", "time": "sft"}, "figures": STEPS},
            "step is the training step of models of one source, and none has each",
        ),
        (
            {},
            {
                "sources": {"pre": "base", "time": "sft"},
                "grids": [{"name": "g"}],
                "figures": [{"kind": "lines", "x": "source_rank", "grids": ["g"]}],
            },
            "source_rank applies to grids with ranks",
        ),
    ],
)
def test_what_cannot_be_run_over_steps_is_refused(
    change: dict[str, Any], part: dict[str, Any], what: str, base: Path
) -> None:
    with pytest.raises(ConfigError, match=what):
        own(base, change=change, **{"sources": SOURCES, "grafts": GRAFTS, **part})


def test_which_checkpoints_are_kept_is_said_in_one_of_two_ways(tmp_path: Path) -> None:
    made = partial(settings_from, FinetuneConfig)
    given = {"model": "m", "output": tmp_path}
    assert made({**given, "keep_checkpoints": {"every": 5}}).keep_checkpoints == Every(every=5)
    assert made({**given, "keep_checkpoints": "all"}).keep_checkpoints == "all"
    for wrong in ("some", 5, {"each": 5}, True):
        with pytest.raises(ConfigError, match="does not say which checkpoints are kept"):
            made({**given, "keep_checkpoints": wrong})
    with pytest.raises(
        ConfigError, match=r"keep_checkpoints.*every: .* greater than or equal to 1"
    ):
        made({**given, "keep_checkpoints": {"every": 0}})
    with pytest.raises(ConfigError, match="unknown key 'keep_epochs'"):
        made({**given, "keep_epochs": True})
