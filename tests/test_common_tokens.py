"""Measures over the tokens that all sources have say so: in tables, beside plots and on pages."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from families import model_of, save_checkpoint
from toytokenizers import TOKENIZERS
from transformers import LlamaConfig

from graftlens import (
    GraftedTransformer,
    Prompt,
    dashboard,
    evaluate,
    find,
    lens,
    outcomes,
    summarise,
    sweep_report,
    viz,
)
from graftlens.configfile import settings_from
from graftlens.experiment.analysis import PartTables
from graftlens.experiment.config import ExperimentConfig, PartConfig
from graftlens.experiment.show import show_part
from graftlens.references import common_tokens
from graftlens.sweep.config import SweepConfig, check
from graftlens.sweep.results import read_results
from graftlens.sweep.runner import run_sweep
from graftlens.viz.compare import compare_page
from graftlens.viz.report import write_report
from graftlens.viz.tables import write_table
from graftlens.viz.text import text_table

PROMPTS = [Prompt("{a} acted", {"a": name}, answer=" in") for name in ("Anders", "Chloë")]
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, and a chat model with two tokens more."""
    root = tmp_path_factory.mktemp("pair")
    base, chat = TOKENIZERS["gpt2"](), TOKENIZERS["gpt2"]()
    chat.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return {
        name: save_checkpoint(
            model_of(LlamaConfig(**SIZES, vocab_size=len(tokenizer)), seed),
            root / name,
            tokenizer,
        )
        for seed, (name, tokenizer) in enumerate((("base", base), ("chat", chat)), start=1)
    }


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> GraftedTransformer:
    return GraftedTransformer.from_pretrained(folders, verbose=False)


@pytest.fixture(scope="module")
def common(folders: dict[str, Path]) -> int:
    """The base's own count of rows."""
    return int(json.loads((folders["base"] / "config.json").read_text())["vocab_size"])


@pytest.fixture(scope="module")
def summary(model: GraftedTransformer) -> pd.DataFrame:
    grafts = {"PRE": "none", "CHAT": "chat @ all", "LT": "chat @ last"}
    measures = ["kl_full", "entropy"]
    table = evaluate(model, PROMPTS, grafts, measures=measures, progress=False)
    return summarise(table, metrics=measures, recovery="kl_full", resamples=50)


def _asked(folders: dict[str, Path], measures: list[str]) -> dict[str, Any]:
    """A sweep's config."""
    return {
        "sources": {name: str(folder) for name, folder in folders.items()},
        "prompts": [
            {"template": p.template, "fields": dict(p.fields), "answer": p.answer} for p in PROMPTS
        ],
        "grafts": {"PRE": "none", "CHAT": "chat @ all", "LT": "chat @ last"},
        "metrics": {"measures": measures},
    }


def words(figure: go.Figure) -> str:
    return json.dumps(json.loads(figure.to_json()), ensure_ascii=False)


def test_the_lens_has_the_count_and_its_plots_say_it(
    model: GraftedTransformer, common: int
) -> None:
    read = lens.logit_lens(model, PROMPTS[0], {"LT": "chat @ last"})
    far = lens.kl_divergence(model, PROMPTS[0], {"LT": "chat @ last"})
    assert common_tokens(read) == common_tokens(far) == common
    # What the column says is what was computed: the first token's own distribution.
    logits = model(PROMPTS[0], graft="chat @ all").detach()[0, -1]
    p = logits[:common].log_softmax(-1)
    last = read[(read["graft"] == "SFT") & (read["stream"] == "final_post")].iloc[-1]
    assert last["entropy"] == pytest.approx(float(-(p.exp() * p).sum()), abs=1e-4)
    said = f"over {common:,} common tokens"
    assert said in words(viz.lens_heatmap(read, "LT", value="kl_base"))
    assert said in words(viz.lens_heatmap(read, "LT", value="entropy"))
    assert "common" not in words(viz.lens_heatmap(read, "LT", value="logprob"))
    assert "common" in words(viz.kl_divergence_lines(far))
    assert f"{common:,}" in words(viz.kl_divergence_lines(far))
    assert said in words(viz.answer_by_layer(read, "kl_full")).replace("<br>", " ")


def test_attribution_against_the_mean_says_whose_mean_it_is(
    model: GraftedTransformer, common: int
) -> None:
    against = lens.direct_logit_attribution(model, PROMPTS[0], against="mean")
    alone = lens.direct_logit_attribution(model, PROMPTS[0])
    assert common_tokens(against) == common
    assert "common_tokens" not in alone
    said = f"minus the mean logit of the {common:,} tokens that all sources have"
    for figure in (
        viz.logit_attribution_heatmap(against, "PRE"),
        viz.logit_attribution_bars(against),
    ):
        assert said in words(figure).replace("<br>", " ")
    assert "mean logit" not in words(viz.logit_attribution_bars(alone))


def test_summaries_carry_it_to_axes_captions_and_tables(
    summary: pd.DataFrame, common: int, tmp_path: Path
) -> None:
    assert set(summary["common_tokens"]) == {common}
    said, note = (
        f"over {common:,} common tokens",
        f"KL, JS and entropy are over the {common:,} tokens that all sources have, renormalised.",
    )
    for metric in ("kl_full", "entropy", "recovery"):
        assert said in words(viz.grouped_bars(summary, metric)).replace("<br>", " ")
    assert "common" not in words(viz.grouped_bars(summary, "top1"))
    assert note in text_table(summary)
    written = write_table(summary, tmp_path / "table")
    assert note in written["md"].read_text()
    assert "common_tokens" in written["csv"].read_text().splitlines()[0]


def test_a_report_says_it(model: GraftedTransformer, common: int, tmp_path: Path) -> None:
    table = evaluate(model, PROMPTS, {"LT": "chat @ last"}, measures=["kl_full"], progress=False)
    summary = summarise(table, metrics=["kl_full"], recovery="kl_full", resamples=50)
    page = write_report(
        tmp_path / "report.html",
        title="t",
        summary=summary,
        table=table,
        metric="kl_full",
        provenance={},
    ).read_text()
    assert f"over the {common:,} tokens that all sources have, renormalised." in page
    assert f"over {common:,} common tokens" in page


def test_nothing_is_said_where_no_such_measure_is_asked_for(model: GraftedTransformer) -> None:
    table = evaluate(model, PROMPTS, {"LT": "chat @ last"}, progress=False)
    assert "common_tokens" not in table
    assert "common_tokens" not in summarise(table, resamples=50)


def test_a_sweeps_results_carry_it(folders: dict[str, Path], common: int, tmp_path: Path) -> None:
    run_sweep(_asked(folders, ["js_full"]), tmp_path / "asked", say=lambda text: None)
    table = read_results(tmp_path / "asked")
    assert isinstance(table, pd.DataFrame)
    assert table["common_tokens"].tolist() == [common] * len(table)
    summary = summarise(table, metrics=["js_full"], recovery=None, resamples=50)
    assert set(summary["common_tokens"]) == {common}
    chosen = read_results(tmp_path / "asked", columns=["prompt", "graft", "common_tokens"])
    assert isinstance(chosen, pd.DataFrame)
    assert chosen.columns.tolist() == ["prompt", "graft", "common_tokens"]
    run_sweep(_asked(folders, []), tmp_path / "plain", say=lambda text: None)
    assert "common_tokens" not in read_results(tmp_path / "plain")


def test_an_experiments_page_says_it(
    folders: dict[str, Path], summary: pd.DataFrame, common: int, tmp_path: Path
) -> None:
    asked = _asked(folders, ["kl_full"])
    part = settings_from(
        PartConfig,
        {
            "title": "Part",
            **{key: asked[key] for key in ("prompts", "grafts", "metrics")},
            "figures": {"kind": "bars", "metrics": ["kl_full"], "by": "pooled"},
        },
    )
    empty = summary.iloc[:0]
    pooled = summary.drop(columns="template")
    tables = PartTables(summary, pooled, empty, empty, cells=6, failed=0)

    config = ExperimentConfig.model_construct(parts={"one": part})
    checked = check(SweepConfig.model_validate(asked))
    page, _ = show_part("one", config, checked, tables, tmp_path, set())
    assert (
        f"KL, JS and entropy are over the {common:,} tokens that all sources have, renormalised."
        in page.findings
    )
    assert f"over {common:,} common tokens" in page.figures[0].caption


def test_a_sweeps_page_says_it(folders: dict[str, Path], common: int, tmp_path: Path) -> None:
    run_sweep(_asked(folders, ["kl_full"]), tmp_path / "out", progress=False, say=lambda text: None)
    page = sweep_report(tmp_path / "out").read_text(encoding="utf-8")
    assert f"are over the {common:,} tokens that all sources have, renormalised." in page
    assert f"nats, over {common:,} common tokens" in page


def test_runs_over_different_tokens_are_compared_and_say_it(
    summary: pd.DataFrame, common: int, tmp_path: Path
) -> None:
    """The numbers of tokens made two runs one table that is refused."""
    runs = {
        "one": {"part": summary},
        "two": {"part": summary.assign(common_tokens=7)},
        "three": {"part": summary.drop(columns="common_tokens")},
    }
    page = compare_page(tmp_path / "page.html", runs, provenance={}, metric="kl_full").read_text()
    what = "The number of tokens that KL, JS and entropy are over is not the same"
    assert f"{what}: one: {common}; two: 7; three: all." in page
    same = {"one": runs["one"], "two": runs["one"]}
    page = compare_page(tmp_path / "same.html", same, provenance={}, metric="kl_full").read_text()
    assert f"over {common:,} common tokens" in page
    assert what not in page


@pytest.mark.filterwarnings("ignore:the scores of")
def test_finding_says_it(model: GraftedTransformer, common: int) -> None:
    said = f"over {common:,} common tokens"
    spans = ["a", "last", "rest"]
    asked = [Prompt("{a} acted", {"a": name}, answer=" in") for name in ("Anders", "Chloë")]
    scores = find.attribute(model, asked, "chat", positions=spans, metric="kl_base", steps=1)
    assert set(scores["common_tokens"]) == {common}
    assert said in words(viz.effect_heatmap(scores, metric="kl_base"))
    assert "common" not in words(viz.effect_heatmap(scores, metric="logprob"))
    plain = find.attribute(model, asked, "chat", positions=spans, steps=1)
    assert "common_tokens" not in plain
    exact = find.exact_effects(
        model, asked[:1], "chat", positions=["last"], metric="entropy", within="chat @ last : mlp"
    )
    assert set(exact["common_tokens"]) == {common}
    players = {"a": "chat @ a", "last": "chat @ last"}
    found = find.interactions(model, asked, players, metrics=["kl_full", "logprob"], progress=False)
    for frame in (found.table, found.pairs):
        over = frame["metric"] == "kl_full"
        assert set(frame.loc[over, "common_tokens"]) == {common}
        assert frame.loc[~over, "common_tokens"].isna().all()
    assert said in words(viz.interaction_matrix(found.table, found.pairs)).replace("<br>", " ")


def test_scored_texts_say_it(model: GraftedTransformer, common: int) -> None:
    assert set(outcomes.score_texts(model, ["Anders acted"], "chat @ last")["common_tokens"]) == {
        common
    }


@pytest.mark.filterwarnings("ignore:the scores of")
def test_a_localisation_says_it(model: GraftedTransformer, common: int, tmp_path: Path) -> None:
    names = ("Anders", "Chloë", "Mia", "Ben")
    asked = [Prompt("{a} acted", {"a": name, "fact": name}, answer=" in") for name in names]
    found = find.localise(
        model,
        asked,
        "chat",
        positions=["last", "rest"],
        within="chat @ all : mlp",
        steps=1,
        rounds=0,
        random=0,
        resamples=0,
    )
    assert set(found.summary["common_tokens"]) == {common}
    page = viz.localisation_page(found, tmp_path / "found.html").read_text(encoding="utf-8")
    assert f"are over the {common:,} tokens that all sources have, renormalised." in page


def test_a_dashboard_says_it(model: GraftedTransformer, common: int) -> None:
    page = dashboard(model, PROMPTS[0], {"LT": "chat @ last"}).html
    note = f"KL, JS and entropy are over the {common:,} tokens that all sources have, renormalised."
    assert page.count(note) == 3, "at the lens, and with both KL measures of the tokens"


def test_tables_of_different_tokens_are_not_summarised_as_one(summary: pd.DataFrame) -> None:
    joined = pd.concat([summary, summary.assign(common_tokens=7)])
    with pytest.raises(
        ValueError, match=r"column 'common_tokens' has \d+ and 7: the rows are over"
    ):
        common_tokens(joined)


def test_equal_vocabularies_are_not_mentioned(folders: dict[str, Path]) -> None:
    twins = {"base": folders["chat"], "chat": folders["chat"]}
    model = GraftedTransformer.from_pretrained(twins, verbose=False)
    assert "common_tokens" not in lens.kl_divergence(model, PROMPTS[0])
    assert "renormalised" not in dashboard(model, PROMPTS[0]).html
    assert torch.isfinite(model(PROMPTS[0])).all()
