"""Parts of an experiment whose exact judge is what grafts make a model say."""

import html
import re
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from test_find_texts import PLAYERS
from test_localise import prompts_of
from tinybase import tiny_base

from graftlens import GraftedTransformer, Prompt, outcomes
from graftlens.configfile import ConfigError
from graftlens.experiment.analysis import PartTables
from graftlens.experiment.config import ExperimentConfig
from graftlens.experiment.localising import run_localise
from graftlens.experiment.run import ExperimentResult, describe_experiment, run_experiment
from graftlens.experiment.show import leading
from graftlens.find.coalitions import Coalitions
from graftlens.find.interactions import facts_of, measured_interactions
from graftlens.find.rating import beside, rated_cells
from graftlens.stats.resampling import Draw
from graftlens.sweep.texttables import read_texts
from graftlens.viz.export import write_figure
from graftlens.viz.tables import read_table

SAMPLING: dict[str, Any] = {"n": 2, "max_new_tokens": 3, "temperature": 0.8, "seed": 3}
SAID = "^ (with|to)"
WITH_E = {"with_e": {"contains": "e"}, "long": {"regex": "....."}}
SEARCH = {
    "positions": ["generated", "rest"],
    "metric": "said",
    "target": 0.5,
    "steps": 2,
    "rounds": 0,
    "random": 2,
    "resamples": 1,
}
GREEDY = {
    "sampling": {"max_new_tokens": 3, "temperature": 0},
    "measures": {"said": {"regex": SAID}, "shouted": "shouting:capitals"},
}
FUNCTION = "shouting:capitals"


def unanswered() -> list[Prompt]:
    return [Prompt(p.template, p.fields) for p in prompts_of()]


def sections(prompts: list[Prompt]) -> list[dict[str, Any]]:
    return [{"template": p.template, "fields": dict(p.fields)} for p in prompts]


def asked(pre: object = "pre", sft: object = "sft") -> dict[str, Any]:
    """An experiment of three parts: a search, players compared by texts alone, and players compared
    by cells and texts."""
    return {
        "title": "T",
        "question": "Q?",
        "model": str(pre),
        "models": {"sft": {"path": str(sft)}},
        "datasets": {"films": {"n_facts": 5}},
        "parts": {
            "where": {
                "title": "Where",
                "prompts": sections(unanswered()),
                "grafts": {"new": "sft @ generated"},
                "outcomes": GREEDY,
                "localise": SEARCH,
            },
            "played": {
                "title": "Together",
                "prompts": sections(unanswered()[:4]),
                "outcomes": {"sampling": SAMPLING, "measures": WITH_E},
                "interactions": {"players": PLAYERS, "metrics": ["with_e", "long"]},
            },
            "both": {
                "title": "Both",
                "prompts": {"dataset": "films"},
                "limit": 1,
                "outcomes": {"sampling": SAMPLING, "measures": WITH_E},
                "interactions": {
                    "players": {"attention": "sft @ all : attn", "MLP": "sft @ all : mlp"},
                    "metrics": ["logprob", "long"],
                },
            },
        },
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pair")
    return {n: str(tiny_base(root / n, seed=i)) for i, n in enumerate(("pre", "sft"))}


@pytest.fixture(scope="module")
def ran(
    pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExperimentResult, Path]:
    root = tmp_path_factory.mktemp("run")
    file = root / "said.yaml"
    file.write_text(yaml.safe_dump(asked(**pair)))
    (root / "shouting.py").write_text("def capitals(text):\n    return text.isupper()\n")
    options: dict[str, Any] = {"store": root / "store", "measures": [FUNCTION]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("graftlens.experiment.show.write_figure", partial(write_figure, formats=()))
        plan = describe_experiment(str(file), **options)
        (root / "plan.txt").write_text(plan)
        result = run_experiment(file, root / "out", progress=False, say=lambda _: None, **options)
    return result, root


@pytest.mark.slow
def test_a_search_is_judged_by_texts_as_localise_is(
    ran: tuple[ExperimentResult, Path], pair: dict[str, str], tmp_path: Path
) -> None:
    result, root = ran
    assert result.ok
    config = {
        "sources": pair,
        "prompts": sections(unanswered()),
        "grafts": {"new": "sft @ generated"},
        "outcomes": {**GREEDY, "measures": {"said": GREEDY["measures"]["said"]}},
        "search": SEARCH,
    }
    alone = run_localise(config, tmp_path / "out", progress=False, say=lambda _: None)
    place = result.folder / "sweeps" / "where"
    for name in ("found.yaml", "tables/summary.csv", "tables/table.csv", "tables/search.csv"):
        assert (place / name).read_text() == (alone.folder / name).read_text(), name
    page = html.unescape(result.page.read_text(encoding="utf-8"))
    assert f"Sets are judged by said in generated texts ({'n=1, max_new_tokens=3'}" in page
    assert "the rate of said" in page
    assert alone.found.judged in (root / "plan.txt").read_text()


@pytest.mark.slow
def test_players_are_compared_by_the_rates_of_their_texts(
    ran: tuple[ExperimentResult, Path], pair: dict[str, str]
) -> None:
    """Also those of generated tokens, which have no cells."""
    result, _ = ran
    model = GraftedTransformer.from_pretrained(pair, verbose=False)
    everybody = " | ".join(PLAYERS.values())
    grafts = {"nobody": "none", **PLAYERS, "all": everybody}
    texts = outcomes.sample(model, unanswered()[:4], grafts, progress=False, **SAMPLING)
    said = texts["text"].str
    values = {"with_e": said.contains("e"), "long": said.len() >= 5}
    means = texts.assign(**values).groupby("graft")[["with_e", "long"]].mean()
    stem = result.folder / "tables/played-interactions-table.csv"
    table = read_table(stem).set_index(["metric", "player"])
    for metric in values:
        for player in PLAYERS:
            added = means.at[player, metric] - means.at["nobody", metric]
            assert table.loc[(metric, player), "alone"] == pytest.approx(added)
        whole = means.at["all", metric] - means.at["nobody", metric]
        assert table.loc[metric]["shapley"].sum() == pytest.approx(whole)
    assert means["with_e"].nunique() > 1, "so that something was compared"
    rates = read_table(result.folder / "tables/played-rates.csv")
    assert set(rates["graft"]) == {"none", "sft @ all"}, "coalitions have tables of their own"
    assert result.sweeps["played"].cells == 0


@pytest.mark.slow
def test_players_are_compared_by_cells_and_texts(
    ran: tuple[ExperimentResult, Path], pair: dict[str, str]
) -> None:
    result, _ = ran
    table = read_table(result.folder / "tables/both-interactions-table.csv")
    assert set(table["metric"]) == {"logprob", "long"}
    texts = read_texts(result.folder / "sweeps/both")
    means = texts.assign(long=texts["text"].str.len() >= 5).groupby("graft")["long"].mean()
    rows = table[table["metric"] == "long"].set_index("player")
    for player in ("attention", "MLP"):
        assert rows.at[player, "alone"] == pytest.approx(means[player] - means["none"])
    page = result.page.read_text(encoding="utf-8")
    assert "in log-probability" in page
    assert "long" in page


def put(part: str, **changes: Any) -> dict[str, Any]:
    found = asked()
    found["parts"][part] |= changes
    return found


LABELS = {"measures": {"first": {"choice": ["a", "b"]}}}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such measure": (
        put("where", localise=SEARCH | {"metric": "sad"}),
        "parts.where.localise.metric: 'sad' is not one of outcomes.measures (said shouted)",
    ),
    "a measure of tokens": (
        put("where", localise={"positions": ["last"]}),
        "parts.where.localise.metric: 'logprob' is not one of outcomes.measures",
    ),
    "labels": (
        put("where", outcomes=LABELS, localise=SEARCH | {"metric": "first"}),
        "parts.where.localise.metric: 'first' gives labels, which have no mean. Name a measure",
    ),
    "effects": (
        put("where", localise=SEARCH | {"effects": True}),
        "parts.where.localise.effects: every site by itself would take too long",
    ),
    "continuations": (
        put(
            "where",
            outcomes=None,
            prompts=[{**one, "answer": " Mara"} for one in sections(unanswered())],
            localise={"positions": ["last"], "continuations": "answers"},
        ),
        "parts.where.localise.continuations: these are for texts as the judge",
    ),
    "several models": (
        put("where", sources={"pre": "base", "sft": {"each": "runs/checkpoint-*"}}),
        "parts.where.localise: of one model, but sft stands for several",
    ),
    "figures": (
        put("where", figures={"kind": "bars"}),
        "parts.where.figures: a part that localises has none",
    ),
    "column": (
        put("played", outcomes={"measures": {"prob": {"contains": "a"}}}, interactions={
            "players": PLAYERS, "metrics": ["prob"]}),
        "parts.played.interactions.metrics: measure 'prob': tables have another column of this",
    ),
    "game of labels": (
        put("played", outcomes=LABELS, interactions={"players": PLAYERS, "metrics": ["first"]}),
        "parts.played.interactions.metrics: 'first' gives labels, which have no mean",
    ),
    "unknown": (
        put("played", interactions={"players": PLAYERS, "metrics": ["with_x"]}),
        "parts.played.interactions.metrics: unknown metric 'with_x'. Allowed: with_e long top1",
    ),
    "twice": (
        put("both", metrics={"measures": ["long"]}),
        "parts.both.interactions.metrics: long is one of metrics.measures and of outcomes.measures",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "said"), BAD.values(), ids=BAD)
def test_a_part_that_texts_cannot_judge(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        ExperimentConfig.model_validate(given)


LATER: dict[str, tuple[dict[str, Any], str]] = {
    "no answers": (
        {"interactions": {"players": PLAYERS, "metrics": ["with_e", "logprob"]}},
        "parts.played.interactions.metrics: logprob: it needs prompts with answers, and none has",
    ),
    "overlap": (
        {"interactions": {"players": {"a": "sft @ generated", "b": "sft @ generated : mlp"},
                          "metrics": ["with_e"]}},
        "parts.played.interactions.players: players 'a' and 'b' overlap in prompt 0",
    ),
    "a function of labels": (
        {"outcomes": {"measures": {"case": "casing:case"}},
         "interactions": {"players": PLAYERS, "metrics": ["case"]}},
        "parts.played.interactions.metrics: 'case' gives labels, which have no mean",
    ),
    "a function of labels that searches": (
        {"grafts": {}, "interactions": None, "localise": SEARCH | {"metric": "case"},
         "outcomes": {"measures": {"case": "casing:case"}}},
        "parts.played.search.metric: 'case' gives labels, which have no mean",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), LATER.values(), ids=LATER)
def test_what_cannot_be_played_is_said_before_anything_runs(
    change: dict[str, Any],
    said: str,
    pair: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "def case(text):\n    return 'upper' if text.isupper() else 'lower'\n"
    (tmp_path / "casing.py").write_text(code)
    named = ["casing:case"] if "casing:case" in str(change) else []
    given = put("played", **change) | {"model": pair["pre"]}
    given["models"] = {"sft": {"path": pair["sft"]}}
    del given["parts"]["where"]
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(ConfigError, match=re.escape(said)):
        describe_experiment(str(file), store=tmp_path / "store", measures=named)


def test_cells_without_generated_tokens_cannot_compare_players_of_them(
    pair: dict[str, str], tmp_path: Path
) -> None:
    given = put("both", interactions={"players": PLAYERS, "metrics": ["logprob", "long"]})
    given |= {"model": pair["pre"], "models": {"sft": {"path": pair["sft"]}}}
    del given["parts"]["where"]
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(ConfigError, match=r"interactions\.players: none of \d+ prompts can run"):
        describe_experiment(str(file), store=tmp_path / "store")


def test_a_part_of_texts_says_where_its_rates_differ() -> None:
    """Numbers template by template, labels of all templates together."""

    def rates(keys: dict[str, str], measure: str, label: str | None, full: float) -> list[Any]:
        common = {"level": 0.95, "resamples": 9, "seed": 0, "unit": "prompt", "share": True}
        ends = {"base_run": "PRE", "full_run": "SFT", "low": 0.0, "high": 1.0, "n": 4}
        named = {**keys, "measure": measure, "label": label, **common, **ends}
        return [{**named, "graft": g, "rate": r} for g, r in (("PRE", 0.0), ("SFT", full))]

    def part(number: float, of_label: float) -> PartTables:
        together = [*rates({}, "ends", None, number), *rates({}, "says", "yes", of_label)]
        apart = [
            row
            for template, share in (("due", 1), ("near", 0))
            for row in (
                *rates({"template": template}, "ends", None, number * share),
                *rates({"template": template}, "says", "yes", of_label),
            )
        ]
        frames = [pd.DataFrame(rows) for rows in (together, apart)]
        lead = ["graft", "measure", "label"]
        order = [*lead, *(column for column in frames[0] if column not in lead)]
        none = pd.DataFrame()
        return PartTables(
            none, none, none, none, cells=0, failed=0,
            rates=frames[0][order], rates_by_template=frames[1][["template", *order]],
        )  # fmt: skip

    assert leading(part(1.0, 0.5)).startswith("ends (due): PRE 0.0% [0.0, 100.0], SFT 100.0%")
    assert leading(part(0.0, 0.5)).startswith("says: yes: PRE 0.0% [0.0, 100.0], SFT 50.0%")
    assert leading(part(0.0, 0.0)).startswith("SFT and PRE have the same rates")


def test_a_text_without_a_value_leaves_its_prompt_out_of_a_game() -> None:
    """As a judge's reply that cannot be read; of two texts, the other one's value counts."""
    players = Coalitions.of({"a": "sft @ last : attn", "b": "sft @ last : mlp"})
    rows = [
        {"prompt": p, "graft": g, "rule": "none", "template": "t", "prompt_text": f"{p}?",
         "answer": None, "sample": s, "text": "x", "reason": None, "kind": float(p + len(g))}
        for p in range(6) for g in players.grafts for s in range(2)
    ]  # fmt: skip
    texts = pd.DataFrame(rows)
    texts.loc[(texts["prompt"] == 1) & (texts["graft"] == "a"), "kind"] = None
    texts.loc[(texts["prompt"] == 2) & (texts["sample"] == 1), "kind"] = None
    table = rated_cells(texts, ["kind"])
    assert table.loc[table["reason"].notna(), ["prompt", "graft"]].to_numpy().tolist() == [[1, "a"]]
    facts = facts_of([Prompt(f"{p}?") for p in range(6)])
    draw = Draw("fact", 0.95, 50, 0)
    game = measured_interactions(
        players, table.assign(fact=table["prompt"].map(facts)), ["kind"], draw
    )
    assert dict(game.not_run) == {1: "kind has no value of what it says."}
    assert set(game.values["n"]) == {5}
    cells = table.drop(columns=["says", "kind"]).assign(reason=None, logprob=-1.0)
    joined = beside(cells, table, ["kind"])
    assert joined.loc[joined["reason"].notna(), "prompt"].tolist() == [1]
