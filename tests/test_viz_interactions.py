"""The figure of players and pairs: its numbers are those of the tables."""

import numpy as np
import pandas as pd
import pytest

from graftlens.viz import interaction_matrix
from graftlens.viz.figures import interaction_chart
from graftlens.viz.interactions import sentences

PLAYERS = ["FE <attn>", "LT MLP", "rest"]
PAIRS = [("FE <attn>", "LT MLP"), ("FE <attn>", "rest"), ("LT MLP", "rest")]
CALLS = {"logprob": ["AND", "additive", "OR"], "top1": ["AND", "undecided", "undecided"]}


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    players, pairs = [], []
    for number, metric in enumerate(CALLS):
        for i, player in enumerate(PLAYERS):
            value = {"shapley": 0.1 * i + number, "banzhaf": 0.2 * i + number}
            ends = {f"{k}{end}": v + d for k, v in value.items() for end, d in
                    (("_low", -0.1), ("_high", 0.3))}  # fmt: skip
            players.append({"metric": metric, "player": player, "level": 0.95, **value, **ends})
        for i, (a, b) in enumerate(PAIRS):
            value = {"interaction": 0.5 - 0.4 * i - 0.01 * number}
            value |= {"interaction_low": value["interaction"] - 0.05,
                      "interaction_high": value["interaction"] + 0.05}  # fmt: skip
            pairs.append({"metric": metric, "a": a, "b": b, **value, "call": CALLS[metric][i]})
    return pd.DataFrame(players), pd.DataFrame(pairs)


def test_cells_and_bars_are_the_tables():
    players, pairs = tables()
    figure = interaction_matrix(players, pairs)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    bars = [trace for trace in figure.data if trace.type == "bar"]
    assert len(maps) == 2
    written = {
        (trace.xaxis, x, y): said
        for trace in figure.data
        if trace.type == "scatter" and trace.mode == "text"
        for x, y, said in zip(trace.x, trace.y, trace.text, strict=True)
    }
    assert len(bars) == 4
    for metric, trace in zip(CALLS, maps, strict=True):
        assert list(trace.x) == list(trace.y) == ["FE &lt;attn&gt;", "LT MLP", "rest"]
        own = pairs[pairs["metric"] == metric].set_index(["a", "b"])
        for (a, b), row in own.iterrows():
            i, j = PLAYERS.index(a), PLAYERS.index(b)
            assert trace.z[i][j] == trace.z[j][i] == row["interaction"]
            word = {"undecided": "?", "additive": "+"}.get(row["call"], row["call"])
            names = (trace.x[i], trace.x[j])
            assert written[trace.xaxis, *names] == written[trace.xaxis, *names[::-1]] == word
        assert [trace.z[i][i] for i in range(3)] == [None] * 3
        axis = figure.layout[trace.coloraxis]
        most = own["interaction"].abs().max()
        assert (axis.cmin, axis.cmax) == (-most, most)
    for number, (metric, name) in enumerate((m, n) for m in CALLS for n in ("shapley", "banzhaf")):
        own = players[players["metric"] == metric]
        assert list(bars[number].x) == own[name].tolist()
        np.testing.assert_allclose(bars[number].error_x.array, 0.3)
        np.testing.assert_allclose(bars[number].error_x.arrayminus, 0.1)
    assert {bar.name for bar in bars} == {"Shapley", "Banzhaf"}
    assert maps[0].coloraxis != maps[1].coloraxis


def test_hover_says_the_call_in_each_measure():
    players, pairs = tables()
    (one, _) = [t for t in interaction_matrix(players, pairs).data if t.type == "heatmap"]
    said = one.customdata[0][1]
    assert said == (
        "FE &lt;attn&gt; and LT MLP: AND<br>interaction 0.50 [0.45, 0.55]<br>top-1 accuracy: AND"
    )
    top = interaction_matrix(players, pairs, metrics=["top1"])
    (only,) = [t for t in top.data if t.type == "heatmap"]
    assert "interaction 49.0% [44.0%, 54.0%]<br>log-probability: AND" in only.customdata[0][1]


def test_sentences_name_what_is_an_and_or_an_or():
    assert sentences(tables()[1]) == [
        "FE <attn> and LT MLP: AND in log-probability (0.50 [0.45, 0.55]), AND in top-1 accuracy "
        "(49.0% [44.0%, 54.0%]).",
        "LT MLP and rest: OR in log-probability (-0.30 [-0.35, -0.25]), undecided in top-1 "
        "accuracy (-31.0% [-36.0%, -26.0%]).",
    ]
    pairs = tables()[1]
    pairs.loc[pairs["call"] == "OR", "interaction"] = -0.6
    assert [said.split(":")[0] for said in sentences(pairs)] == [
        "LT MLP and rest", "FE <attn> and LT MLP"
    ], "the largest first"  # fmt: skip


def test_the_chart_of_a_page_has_both_measures_and_a_description():
    chart = interaction_chart(*tables())
    assert chart.caption.startswith("Interactions of players in log-probability and in top-1 acc")
    assert "95% intervals over facts" in chart.caption
    assert "LT MLP and rest: OR in log-probability" in chart.alt


def test_what_is_refused():
    players, pairs = tables()
    with pytest.raises(
        ValueError, match=r"no column 'call'.* Give the tables of find.interactions"
    ):
        interaction_matrix(players, pairs.drop(columns="call"))
    with pytest.raises(ValueError, match=r"no column 'player'"):
        interaction_matrix(pairs, pairs)
    with pytest.raises(ValueError, match=r"no metric 'top5'; it has 'logprob', 'top1'"):
        interaction_matrix(players, pairs, metrics=["top5"])
