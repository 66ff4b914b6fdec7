"""Plots of lens tables: the numbers, labels and hover texts are those of the table."""

import html
import itertools
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from summaries import summary

from graftlens import viz
from graftlens.viz import lens, quantities, spelling, text, theme

RULES = {"PRE": "none", "SFT": "sft @ all", "FE": "sft @ first_entity"}
TOKENS = ("<b>", " a\n", "$x$")
HOSTILE = "&lt;b&gt;"
#: Grafts without names go by their rules. The first two differ in the middle alone.
ATTENTION = "sft @ first_entity + last : q + k + v : {} : heads 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14"
LONG = [ATTENTION.format("15-29"), ATTENTION.format("10-14"), "sft @ $x$ : " + "mlp_in + " * 9]


def traces(figure, kind):
    return [trace for trace in figure.data if trace.type == kind]


def heading(figure):
    return figure.layout.annotations[0].text


def streams(prompts=(0,), runs=RULES, layers=3, tokens=TOKENS, answer=" Ann"):
    """A logit_lens table; each number is told by its place, so that a wrong cell is seen."""
    rows = []
    for prompt, (number, run), layer in itertools.product(prompts, enumerate(runs), range(layers)):
        for position, token in enumerate(tokens):
            rank = 10 ** (layers - 1 - layer) * (number + 1) + prompt
            row = {"prompt": prompt, "graft": run, "rule": RULES[run], "layer": layer}
            row |= {"stream": "final_post" if layer == layers - 1 else f"{layer}_pre"}
            row |= {"position": position, "token": token, "target": answer, "target_id": 7}
            row |= {"rank": rank, "prob": 1 / rank, "logprob": -math.log(rank) - position}
            row |= {"entropy": 1.0 + layer, "kl_base": 0.5 * number, "kl_full": 0.25 * layer}
            row |= {"top_tokens": [f"<{layer}>", "\n"], "top_probs": [0.5, 0.0123]}
            rows.append(row)
    table = pd.DataFrame(rows)
    if answer is None:
        table = table.assign(target=None, rank=pd.NA, prob=np.nan, logprob=np.nan)
    return table.astype({"rank": "Int64"})


def value_of(table, column, **where):
    chosen = np.logical_and.reduce([table[name] == value for name, value in where.items()])
    (found,) = table.loc[chosen, column]
    return found


# --- the logit lens --------------------------------------------------------------------------


def test_cells_go_up_by_layer_and_across_by_token():
    table = streams().sample(frac=1, random_state=0)  # the order of rows means nothing
    (trace,) = traces(viz.lens_heatmap(table, "FE"), "heatmap")
    for layer, position in itertools.product(range(3), range(3)):
        expected = value_of(table, "logprob", graft="FE", layer=layer, position=position)
        assert trace.z[layer][position] == expected


def test_axes_name_layers_and_tokens_as_they_are():
    figure = viz.lens_heatmap(streams(), "FE")
    assert list(figure.layout.yaxis.ticktext) == ["embeddings", "1", "output"]
    assert list(figure.layout.yaxis.range) == [-0.5, 2.5]
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;", "␣a↵", "&#36;x&#36;"]
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2]
    assert heading(figure) == "FE: answer ␣Ann"
    assert figure.data[0].colorbar.title.text == "log-probability (nats)"


def test_repeated_tokens_keep_their_own_columns():
    table = streams(tokens=("a", "a", "a"))
    (trace,) = traces(viz.lens_heatmap(table, "PRE"), "heatmap")
    assert [round(z - trace.z[0][0], 9) for z in trace.z[0]] == [0, -1, -2]


def labels(figure):
    """(x, y) -> what is written there, and in which colour."""
    return {
        (x, y): (said, trace.textfont.color)
        for trace in traces(figure, "scatter")
        for x, y, said in zip(trace.x, trace.y, trace.text, strict=True)
    }


def test_cells_are_labelled_with_the_likeliest_token_while_there_is_room():
    figure = viz.lens_heatmap(streams(), "FE")
    found = labels(figure)
    assert {at: said for at, (said, _) in found.items()} == {
        (x, layer): f"&lt;{layer}&gt;" for layer in range(3) for x in range(3)
    }
    crowded = streams(tokens=[f"t{i}" for i in range(40)])
    assert labels(viz.lens_heatmap(crowded, "FE")) == {}


@pytest.mark.parametrize(("value", "minus"), [("logprob", None), ("rank", None), ("prob", "PRE")])
def test_labels_can_be_read_on_every_colour(value, minus):
    """A contrast of 4.5, which WCAG 2.2 asks of text (success criterion 1.4.3)."""

    def light(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return float(np.dot((0.2126, 0.7152, 0.0722), [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
        ]))  # fmt: skip

    figure = viz.lens_heatmap(streams(), "FE", value=value, minus=minus)
    (cells,) = traces(figure, "heatmap")
    stops = [color for _, color in cells.colorscale]
    for (x, y), (_, ink) in labels(figure).items():
        at = (cells.z[y][x] - cells.zmin) / (cells.zmax - cells.zmin) * (len(stops) - 1)
        at = min(max(at, 0), len(stops) - 1)
        low = min(int(at), len(stops) - 2)
        pairs = [(int(stops[low][i : i + 2], 16), int(stops[low + 1][i : i + 2], 16))
                 for i in (1, 3, 5)]  # fmt: skip
        cell = "#" + "".join(f"{round(a + (b - a) * (at - low)):02x}" for a, b in pairs)
        high, dark = max(light(ink), light(cell)), min(light(ink), light(cell))
        assert (high + 0.05) / (dark + 0.05) >= 4.5


def test_a_complement_differs_from_its_graft_by_dash_and_marker():
    found = theme.graft_lines(["FE", "not-FE", "FE+LT", "(FE+LT)^C", "mine"])
    for graft, rest in (("FE", "not-FE"), ("FE+LT", "(FE+LT)^C")):
        assert found[graft].color == found[rest].color
        assert found[graft].dash != found[rest].dash
        assert found[rest].marker == f"{found[graft].marker}-open"


def test_hover_has_the_place_the_value_the_answer_and_the_likeliest_tokens():
    (trace,) = traces(viz.lens_heatmap(streams(), "FE"), "heatmap")
    assert trace.customdata[1][0] == (
        "after 1 layer, &lt;b&gt; at 0<br>log-probability of the answer's first token: -3.40<br>"
        "answer ␣Ann: rank 30, 3.33%<br>1. &lt;1&gt; 50%<br>2. ↵ 1.23%"
    )
    (trace,) = traces(viz.lens_heatmap(streams(), "FE", value="rank"), "heatmap")
    assert trace.customdata[2][1].startswith(
        "after 2 layers, ␣a↵ at 1<br>rank of the answer's first token: 3<br>"
    )


def test_ranks_are_on_a_log_scale_darkest_at_one_and_shared_by_the_runs():
    table = streams()
    figures = [viz.lens_heatmap(table, run, value="rank").data[0] for run in RULES]
    assert [row[0] for row in figures[0].z] == [2, 1, 0]
    assert figures[2].z[0][0] == pytest.approx(math.log10(300))
    assert {(f.zmin, f.zmax) for f in figures} == {(0, math.log10(300))}
    assert [color for _, color in figures[0].colorscale] == list(theme.SEQUENTIAL[::-1])
    assert list(figures[0].colorbar.ticktext) == ["1", "10", "100"]


def test_the_difference_of_two_runs_is_signed():
    table = streams()
    (trace,) = traces(viz.lens_heatmap(table, "FE", minus="PRE"), "heatmap")
    assert trace.z[1][2] == pytest.approx(-math.log(3))
    assert -trace.zmin == trace.zmax == pytest.approx(math.log(3))
    assert [color for _, color in trace.colorscale] == list(theme.DIVERGING)
    assert (
        "log-probability of the answer's first token: -5.40 (PRE: -4.30)" in trace.customdata[1][2]
    )
    figure = viz.lens_heatmap(table, "FE", minus="PRE")
    assert heading(figure) == "FE − PRE: answer ␣Ann"


def test_the_ratio_of_ranks_is_red_where_the_answer_is_higher_up():
    (trace,) = traces(viz.lens_heatmap(streams(), "PRE", value="rank", minus="FE"), "heatmap")
    assert trace.z[0][0] == pytest.approx(-math.log10(3))
    assert trace.colorscale[0][1] == theme.DIVERGING[-1]
    figure = viz.lens_heatmap(streams(), "PRE", value="rank", minus="FE")
    assert heading(figure) == "PRE / FE: answer ␣Ann"
    assert figure.data[0].colorbar.title.text.startswith("ratio of the ranks")


def test_scales_of_the_other_values():
    table = streams()
    share = viz.lens_heatmap(table, "FE", value="prob").data[0]
    assert (share.zmin, share.zmax, share.colorbar.tickformat) == (0, 1, ".0%")
    nats = viz.lens_heatmap(table, "PRE", value="kl_base").data[0]
    assert (nats.zmin, nats.zmax) == (0, 1)  # PRE's own are 0, FE's 1
    # The embeddings' -ln 300 - 2 is outside of the scale of the layers.
    fall = viz.lens_heatmap(table, "PRE").data[0]
    assert (fall.zmin, fall.zmax) == (-math.log(30) - 2, 0)


def test_streams_between_attention_and_mlp_have_their_rows():
    table = streams(layers=4)
    table["layer"] = table["layer"] / 2
    table["stream"] = table["layer"].map({0: "0_pre", 0.5: "0_mid", 1: "1_pre", 1.5: "final_post"})
    figure = viz.lens_heatmap(table, "PRE", value="entropy")
    assert list(figure.layout.yaxis.ticktext) == ["embeddings", "0.5", "1", "output"]
    assert [row[0] for row in figure.data[0].z] == [1, 2, 3, 4]
    assert figure.data[0].customdata[1][0].startswith("after the first attention, &lt;b&gt;")
    assert figure.data[0].customdata[3][0].startswith("after 1 layer and the next attention")


def test_without_an_answer_what_needs_none_is_shown():
    table = streams(answer=None)
    figure = viz.lens_heatmap(table, "FE", value="kl_full")
    assert [row[0] for row in figure.data[0].z] == [0, 0.25, 0.5]
    assert "answer" not in figure.data[0].customdata[0][0]
    assert heading(figure) == "FE"
    with pytest.raises(
        ValueError, match=r"prompt 0 has no answer, so it has no 'rank'. Show 'entr"
    ):
        viz.lens_heatmap(table, "FE", value="rank")


def test_what_a_heat_map_of_the_lens_refuses():
    table = streams(prompts=(0, 4))
    with pytest.raises(ValueError, match=r"has the prompts 0, 4; say which with prompt="):
        viz.lens_heatmap(table, "FE")
    with pytest.raises(ValueError, match=r"no prompt 1; it has 0, 4"):
        viz.lens_heatmap(table, "FE", prompt=1)
    with pytest.raises(ValueError, match=r"no graft 'LT'; it has 'PRE', 'SFT', 'FE'"):
        viz.lens_heatmap(table, "LT", prompt=0)
    with pytest.raises(ValueError, match=r"no graft 'pre'; it has 'PRE'"):
        viz.lens_heatmap(table, "FE", minus="pre", prompt=0)
    with pytest.raises(ValueError, match=r"unknown value 'kl'; choose from 'logprob', 'prob'"):
        viz.lens_heatmap(table, "FE", value="kl", prompt=0)
    with pytest.raises(ValueError, match=r"no column 'layer'; .* table of lens.logit_lens"):
        viz.lens_heatmap(table.drop(columns="layer"), "FE", prompt=0)
    with pytest.raises(ValueError, match=r"several rows for graft FE, layer 0, position 0"):
        viz.lens_heatmap(pd.concat([table, table]), "FE", prompt=0)
    (trace,) = traces(viz.lens_heatmap(table, "FE", value="rank", prompt=4), "heatmap")
    assert trace.z[2][0] == pytest.approx(math.log10(7))


# --- the answer by layer -----------------------------------------------------------------------


def test_a_line_for_each_run_has_the_rank_of_the_last_position():
    table = streams()
    figure = viz.answer_by_layer(table, "logprob")
    assert [trace.name for trace in figure.data] == ["PRE", "SFT", "FE"]
    for trace in figure.data:
        expected = table[(table["graft"] == trace.name) & (table["position"] == 2)]
        assert list(trace.x) == [0, 1, 2]
        assert list(trace.y) == list(expected["logprob"])
        assert trace.line.color == theme.graft_fill(trace.name).color
    first = viz.answer_by_layer(table, "logprob", at=0)
    assert first.data[0].y[2] == 0
    assert first.data[0].y[2] - figure.data[0].y[2] == 2


def test_ranks_have_one_at_the_top_of_a_log_axis():
    axis = viz.answer_by_layer(streams()).layout.yaxis
    assert axis.type == "log"
    assert axis.range[0] > math.log10(300) > 0 > axis.range[1]
    assert axis.title.text == "rank of the answer's first token<br>(1 = most likely)"
    # Ranks up to 3 have a decade all the same: an axis with one number has no scale.
    low = viz.answer_by_layer(streams(layers=1)).layout.yaxis.range
    assert low[0] > 1 > 0 > low[1]


def test_several_prompts_are_a_median_and_its_quartiles():
    table = streams(prompts=(0, 1, 2, 7))
    figure = viz.answer_by_layer(table)
    lines = {t.name: t for t in figure.data if t.fill is None}
    bands = {t.name: t for t in figure.data if t.fill is not None}
    # Ranks of FE after all layers: 3, 4, 5 and 10.
    assert lines["FE"].y[2] == 4.5
    band = bands["FE: quartiles"]
    assert dict(zip(band.x[:3], band.y[:3], strict=True))[2] == 6.25
    assert dict(zip(band.x[3:], band.y[3:], strict=True))[2] == 3.75
    assert lines["FE"].customdata[2] == (
        "FE<br>after 2 layers<br>rank of the answer's first token: median 4.5 [3.75, 6.25]"
    )
    assert "median of 4 prompts, band: quartiles" in figure.layout.yaxis.title.text
    one = viz.answer_by_layer(table, prompts=[7])
    assert one.data[2].y[2] == 10
    assert "median" not in one.layout.yaxis.title.text


def test_each_prompt_is_read_at_its_own_last_position():
    short, long = streams(prompts=(0,), tokens=("a",)), streams(prompts=(1,))
    figure = viz.answer_by_layer(pd.concat([short, long]), "logprob")
    line = next(t for t in figure.data if t.name == "PRE")
    assert line.y[2] == pytest.approx((0 + (-math.log(2) - 2)) / 2)
    with pytest.raises(ValueError, match=r"at=2: prompt 0 has the positions 0 in the table"):
        viz.answer_by_layer(pd.concat([short, long]), at=2)


def test_prompts_without_an_answer_are_left_out_and_counted():
    table = pd.concat([streams(prompts=(0,)), streams(prompts=(1,), answer=None)])
    figure = viz.answer_by_layer(table)
    assert figure.data[0].y[2] == 1
    assert figure.layout.yaxis.title.text.endswith("1 without an answer left out")
    with pytest.raises(ValueError, match=r"none of the prompts 1 has an answer, .* no 'rank'"):
        viz.answer_by_layer(table, prompts=[1])
    with pytest.raises(ValueError, match=r"no prompt 5; it has 0, 1"):
        viz.answer_by_layer(table, prompts=[5])


def called(table, *columns):
    """The table with the three runs under `LONG` names."""
    return table.replace({column: dict(zip(RULES, LONG, strict=True)) for column in columns})


def unescaped(said):
    return html.unescape(said.replace("<br>", " "))


def test_long_names_are_short_in_a_legend_and_whole_on_hover():
    short, long = (viz.answer_by_layer(t) for t in (streams(), called(streams(), "graft")))
    entries = [unescaped(trace.name) for trace in long.data]
    assert all(len(said) <= 44 for said in entries)
    assert len(set(entries)) == 3
    assert entries[2].startswith("sft @ $x$ : mlp_in")
    for name, trace in zip(LONG, long.data, strict=True):
        assert unescaped(trace.customdata[0]).startswith(f"{name.strip()} embeddings")
        assert max(map(len, trace.customdata[0].split("<br>"))) < 60
    # Two rows more than the one of short names.
    assert long.layout.height - short.layout.height == 40
    apart, before = (
        viz.kl_divergence_lines(t) for t in (called(divergences(), "graft"), divergences())
    )
    assert {unescaped(trace.name) for trace in apart.data} == set(entries)
    assert apart.layout.height - before.layout.height == 40
    assert len({axis.title.text for axis in (apart.layout.yaxis, apart.layout.yaxis2)}) == 2
    assert max(map(len, apart.layout.yaxis.title.text.split("<br>"))) <= 24
    for piece in (f"{LONG[1]}, ", f"KL(graft ‖ {LONG[0]})"):
        assert piece in unescaped(apart.data[0].customdata[0])
    bars = viz.logit_attribution_bars(called(attributions("head"), "graft"))
    assert [unescaped(trace.name) for trace in bars.data] == entries
    assert LONG[0] in unescaped(bars.data[0].hovertemplate)


def test_names_that_fit_are_left_as_they_are():
    assert spelling.shortened(["FE", "x" * 40]) == {"FE": "FE", "x" * 40: "x" * 40}
    assert spelling.shortened(["a" * 50 + "z"]) == {"a" * 50 + "z": "a" * 20 + "…" + "a" * 18 + "z"}


def test_a_long_heading_is_in_lines_and_makes_room_for_them():
    table = attributions("head")
    plain = viz.logit_attribution_heatmap(table, "SFT", minus="PRE")
    figure = viz.logit_attribution_heatmap(called(table, "graft"), LONG[1], minus=LONG[0])
    said = heading(figure)
    assert unescaped(said) == (f"{LONG[1]} − {LONG[0]}: direct contribution to the logit of ␣Ann")
    assert max(map(len, said.split("<br>"))) <= 80
    more = 18 * said.count("<br>")
    assert more > 0
    assert figure.layout.margin.t - plain.layout.margin.t == more
    assert figure.layout.height - plain.layout.height == more


def test_a_token_from_right_to_left_leaves_what_follows_it_in_its_place():
    table = streams(tokens=(" של", "a"), answer="مر")
    for row in table["top_tokens"]:
        row[1] = "ום"
    (trace,) = traces(viz.lens_heatmap(table, "FE", value="entropy"), "heatmap")
    assert trace.customdata[1][0] == (
        "after 1 layer, \u2066␣של\u2069 at 0<br>entropy of the next token: 2.00<br>"
        "answer \u2066مر\u2069: rank 30, 3.33%<br>"
        "1. &lt;1&gt; 50%<br>2. \u2066ום\u2069 1.23%"
    )


def test_lines_of_grafts_keep_their_colour_and_differ():
    names = ["FE+LT", "(FE+LT)^C", *(f"graft {i}" for i in range(40))]
    lines = theme.graft_lines(names)
    assert lines["FE+LT"].color == lines["(FE+LT)^C"].color
    assert (lines["FE+LT"].dash, lines["(FE+LT)^C"].dash) == ("solid", "dash")
    fills = theme.graft_fills(names)
    assert all(lines[name].color == fills[name].color for name in names)
    few = ["PRE", "SFT", "heads", "LT: o + mlp upper", "FE+LT", "one more"]
    assert len({fill.color for fill in theme.graft_fills(few).values()}) == 6, "none twice"
    assert all(theme.graft_fills(few)[name] == theme.graft_fill(name) for name in few[:2])
    assert len(set(lines.values())) == len(names)


def test_sources_of_one_view_differ_and_the_base_is_grey():
    colors = theme.source_colors(["pre", "rel", "task", "a"])
    assert len(set(colors.values())) == 4
    assert (colors["pre"], colors["task"]) == (theme.GREY, theme.source_color("task"))
    assert theme.source_colors(["b", "foo"])["b"] == theme.GREY
    assert theme.source_colors(["b", "foo"])["foo"] != theme.GREY


# --- attribution -------------------------------------------------------------------------------


def attributions(by, prompts=(0,), runs=("PRE", "SFT", "FE"), target=" Ann"):
    """Two layers of two heads; run r of prompt p has r + p more in every term."""
    rows = []
    for prompt, (number, run) in itertools.product(prompts, enumerate(runs)):
        terms = [("embed", None, None, None)]
        for layer in range(2):
            if by == "head":
                terms += [("head", layer, 0, None), ("head", layer, 1, None)]
            if by == "component":
                terms += [("attn", layer, None, None)]
            if by == "src_pos":
                terms += [("src_pos", layer, None, p) for p in range(2)]
            terms += [("layer" if by == "layer" else "mlp", layer, None, None)]
        for index, (term, layer, head, source) in enumerate(terms):
            row = {"prompt": prompt, "graft": run, "rule": run, "position": 5, "token": "x"}
            row |= {"target": target, "against": None, "term": term, "layer": layer, "head": head}
            row |= {"src_pos": source}
            row |= {"src_token": None if source is None else TOKENS[source]}
            row |= {"contribution": (-1) ** index * index + number + prompt, "logit": 0.0}
            rows.append(row)
    whole = dict.fromkeys(("layer", "head", "src_pos"), "Int64")
    return pd.DataFrame(rows).astype(whole)


def test_heads_are_cells_with_a_scale_that_all_runs_share():
    # PRE's terms are embed 0; layer 0: heads -1, 2, mlp -3; layer 1: heads 4, -5, mlp 6.
    table = attributions("head")
    figures = {run: viz.logit_attribution_heatmap(table, run) for run in ("PRE", "FE")}
    assert [list(row) for row in figures["PRE"].data[0].z] == [[-1, 2], [4, -5]]
    assert [list(row) for row in figures["FE"].data[0].z] == [[1, 4], [6, -3]]
    for figure in figures.values():
        assert (figure.data[0].zmin, figure.data[0].zmax) == (-6, 6)
    assert figures["PRE"].data[0].customdata[1][0] == (
        "layer 1, head 0<br>contribution to the answer's logit: 4.00"
    )
    assert heading(figures["PRE"]) == "PRE: direct contribution to the logit of ␣Ann"


def test_components_stand_side_by_side_and_runs_are_subtracted():
    table = attributions("component")
    (trace,) = viz.logit_attribution_heatmap(table, "FE", minus="PRE").data
    assert [list(row) for row in trace.z] == [[2, 2], [2, 2]]
    assert trace.customdata[0][1].endswith("2.00<br>FE 4.00, PRE 2.00")
    figure = viz.logit_attribution_heatmap(table, "PRE")
    assert list(figure.layout.xaxis.ticktext) == ["attn", "mlp"]
    assert [list(row) for row in figure.data[0].z] == [[-1, 2], [-3, 4]]


def test_sources_are_named_by_their_tokens():
    figure = viz.logit_attribution_heatmap(attributions("src_pos"), "PRE")
    assert list(figure.layout.xaxis.ticktext) == [HOSTILE, "␣a↵"]
    assert [list(row) for row in figure.data[0].z] == [[-1, 2], [4, -5]]
    assert figure.data[0].customdata[0][0].startswith("layer 0, from &lt;b&gt; at 0<br>")
    with pytest.raises(ValueError, match=r"attended positions of the prompts 0, 1"):
        viz.logit_attribution_heatmap(attributions("src_pos", prompts=(0, 1)), "PRE")


def test_contributions_of_several_prompts_are_their_mean_and_say_so():
    table = attributions("head", prompts=(0, 1, 5))
    table.loc[table["prompt"] == 1, "target"] = "Bob"
    figure = viz.logit_attribution_heatmap(table, "PRE")
    assert [list(row) for row in figure.data[0].z] == [[1, 4], [6, -3]]
    assert heading(figure) == (
        "PRE: direct contribution to the logit of the answer, mean of 3 prompts"
    )
    assert figure.data[0].customdata[0][0].endswith("mean of 3 prompts")
    bars = viz.logit_attribution_bars(table)
    assert bars.layout.xaxis.title.text == (
        "direct contribution to the logit of the answer, mean of 3 prompts (logits)"
    )


def test_bars_are_the_largest_terms_and_add_up():
    table = attributions("head")
    figure = viz.logit_attribution_bars(table, top=3)
    # The largest of any run: L1 mlp 8, L1H0 6, L1H1 -5.
    assert list(figure.layout.yaxis.categoryarray) == [
        *("L1 mlp", "L1H0", "L1H1", "the other 4 terms")
    ]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    by_run = {trace.name: trace for trace in figure.data}
    assert list(by_run["PRE"].x) == [6, 4, -5, -2]
    assert list(by_run["FE"].x) == [8, 6, -3, 6]
    assert by_run["FE"].marker.color == theme.graft_fill("FE").color
    for run, trace in by_run.items():
        assert sum(trace.x) == table.loc[table["graft"] == run, "contribution"].sum()
    assert [t.name for t in viz.logit_attribution_bars(table, grafts=["FE"]).data] == ["FE"]


def test_bars_by_source_take_the_layers_together():
    figure = viz.logit_attribution_bars(attributions("src_pos"), grafts=["PRE"])
    assert dict(zip(figure.data[0].y, figure.data[0].x, strict=True)) == {
        "attention to &lt;b&gt; at 0": 3,
        "attention to ␣a↵ at 1": -3,
        "mlp, all layers": 3,
        "embed": 0,
    }
    layers = viz.logit_attribution_bars(attributions("layer"), grafts=["PRE"])
    assert list(layers.data[0].y) == ["L1", "L0", "embed"]


def test_what_the_logit_is_held_against_is_said():
    table = attributions("layer").assign(against="mean")
    title = viz.logit_attribution_bars(table).layout.xaxis.title.text
    assert title == "direct contribution to the logit of ␣Ann minus the mean logit (logits)"


def test_what_attribution_plots_refuse():
    with pytest.raises(
        ValueError, match=r"terms 'embed', 'layer': .*logit_attribution_bars shows every"
    ):
        viz.logit_attribution_heatmap(attributions("layer"), "PRE")
    table = attributions("head")
    with pytest.raises(ValueError, match=r"positions 5, 6 of prompt 0: pass the rows of one"):
        viz.logit_attribution_heatmap(pd.concat([table, table.assign(position=6)]), "PRE")
    with pytest.raises(ValueError, match=r"no graft 'LT'; it has 'PRE', 'SFT', 'FE'"):
        viz.logit_attribution_bars(table, grafts=["LT"])
    with pytest.raises(ValueError, match=r"top=0 shows no term"):
        viz.logit_attribution_bars(table, top=0)
    with pytest.raises(ValueError, match=r"no contribution is known for the prompts 0: give them"):
        viz.logit_attribution_heatmap(table.assign(contribution=np.nan), "PRE")


# --- weights -----------------------------------------------------------------------------------


def weights(source="sft"):
    rows = []
    for component in ("embed", "q", "mlp_in", "unembed"):
        for layer in [None] if "embed" in component else [0, 1]:
            for parameter in ("weight", "bias") if component == "mlp_in" else ("weight",):
                size = 0.1 * len(component) + (layer or 0) + (5 if parameter == "bias" else 0)
                row = {"source": source, "base": "pre", "component": component, "layer": layer}
                row |= {"parameter": parameter, "entries": 1000, "relative_frobenius": size}
                rows.append(row | {"frobenius": 2 * size, "share_changed": 0.25})
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def test_weights_by_component_and_layer_with_a_column_for_those_outside():
    figure = viz.weight_heatmap(weights())
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "–"]
    # The first component is at the top, which is the last row.
    assert list(figure.layout.yaxis.ticktext) == ["unembed", "mlp_in", "q", "embed"]
    z = [list(row) for row in figure.data[0].z]
    assert z[3] == [None, None, 0.5]
    assert z[2] == pytest.approx([0.1, 1.1, None], nan_ok=True)
    assert z[1][:2] == pytest.approx([0.6, 1.6])
    assert (figure.data[0].zmin, figure.data[0].zmax) == pytest.approx((0, 1.6))
    assert (
        figure.data[0]
        .customdata[1][0]
        .startswith("mlp_in in layer 0: 1,000 entries<br>relative frobenius: 0.60")
    )
    assert heading(figure) == "sft − pre"


def test_biases_are_asked_for():
    figure = viz.weight_heatmap(weights(), "frobenius", parameter="bias")
    assert [list(row) for row in figure.data[0].z] == [pytest.approx([11.2, 13.2])]
    assert heading(figure) == "sft − pre, biases"
    share = viz.weight_heatmap(weights(), "share_changed").data[0]
    assert (share.zmax, share.z[2][0]) == (1, 0.25)


def test_what_a_heat_map_of_weights_refuses():
    with pytest.raises(ValueError, match=r"several pairs .*\(sft against pre, task against pre\)"):
        viz.weight_heatmap(pd.concat([weights(), weights("task")]))
    with pytest.raises(ValueError, match=r"unknown value 'norm'; choose from 'relative_frobenius'"):
        viz.weight_heatmap(weights(), "norm")
    with pytest.raises(ValueError, match=r"no column 'spectral'; it has 'source'"):
        viz.weight_heatmap(weights(), "spectral")
    plain = weights()
    with pytest.raises(ValueError, match=r"no parameter 'bias'; it has 'weight'"):
        viz.weight_heatmap(plain[plain["parameter"] == "weight"], parameter="bias")


# --- differences -------------------------------------------------------------------------------


def differences(prompts=(0,), heads=None, hook="hook_resid_post"):
    rows = []
    places = itertools.product(prompts, enumerate(RULES), range(2), range(heads or 1), range(3))
    for prompt, (number, run), layer, head, position in places:
        size = number * (1 + layer + 10 * head + position) / 100 + prompt
        row = {"prompt": prompt, "graft": run, "rule": RULES[run], "layer": layer}
        row |= {"head": None if heads is None else head, "position": position}
        row |= {"token": TOKENS[position], "distance_base": size, "distance_full": 2 * size}
        if hook is not None:
            row |= {"hook": f"blocks.{layer}.{hook}", "relative_base": 3 * size}
            row |= {"cosine_base": 1 - size}
        rows.append(row)
    return pd.DataFrame(rows).astype({"head": "Int64"})


def test_activations_are_shown_by_layer_and_token():
    figure = viz.difference_heatmap(differences(), "FE")
    assert list(figure.layout.xaxis.ticktext) == [HOSTILE, "␣a↵", "&#36;x&#36;"]
    z = np.array(figure.data[0].z, dtype=float)
    assert z == pytest.approx(np.array([[6, 12, 18], [12, 18, 24]]) / 100)
    assert (figure.data[0].zmin, figure.data[0].zmax) == pytest.approx((0, 0.24))
    assert heading(figure) == "FE: hook_resid_post"
    same = viz.difference_heatmap(differences(), "SFT").data[0]
    assert (same.zmax, same.z[1][2]) == pytest.approx((0.24, 0.12))
    cosine = viz.difference_heatmap(differences(), "FE", "cosine_base").data[0]
    assert (cosine.zmin, cosine.zmax) == pytest.approx((0.92, 1))
    assert cosine.colorscale[0][1] == theme.SEQUENTIAL[-1]


def test_patterns_are_shown_by_head_as_a_mean_over_positions():
    table = differences(heads=2, hook=None)
    figure = viz.difference_heatmap(table, "FE")
    z = np.array(figure.data[0].z, dtype=float)
    assert z == pytest.approx(np.array([[4, 24], [6, 26]]) / 100)
    assert heading(figure) == "FE: attention pattern, mean of 3 positions"
    last = viz.difference_heatmap(table, "FE", "distance_full", at=-1)
    assert np.array(last.data[0].z, dtype=float) == pytest.approx(
        np.array([[12, 52], [16, 56]]) / 100
    )
    assert heading(last) == "FE: attention pattern, &#36;x&#36; at 2"
    two = viz.difference_heatmap(differences(prompts=(0, 1), heads=2, hook=None), "FE")
    assert two.data[0].z[0][0] == pytest.approx(0.54)
    assert heading(two).endswith("mean of 6 positions of 2 prompts")
    one = viz.difference_heatmap(differences((0, 1), heads=2, hook=None), "FE", prompt=1)
    assert one.data[0].z[0][0] == pytest.approx(1.04)


def test_activations_of_heads_are_shown_by_head():
    figure = viz.difference_heatmap(differences(heads=2, hook="attn.hook_z"), "FE")
    assert list(figure.layout.xaxis.ticktext) == ["0", "1"]
    assert figure.data[0].z[1][1] == pytest.approx(0.78)
    assert heading(figure) == "FE: hook_z, mean of 3 positions"


def test_what_a_heat_map_of_differences_refuses():
    both = pd.concat([differences(), differences(hook="hook_mlp_out")])
    with pytest.raises(ValueError, match=r"hooks 'hook_resid_post', 'hook_mlp_out'; pass the rows"):
        viz.difference_heatmap(both, "FE")
    with pytest.raises(ValueError, match=r"unknown value 'norm'; choose from 'distance_base'"):
        viz.difference_heatmap(differences(heads=2, hook=None), "FE", "norm")
    with pytest.raises(ValueError, match=r"prompts 0, 1; say which"):
        viz.difference_heatmap(differences(prompts=(0, 1)), "FE")
    outside = differences().assign(layer=pd.NA, hook="hook_embed")
    with pytest.raises(ValueError, match=r"'hook_embed' is outside the layers"):
        viz.difference_heatmap(outside, "FE")
    with pytest.raises(ValueError, match=r"at=-4: prompt 0 has the positions 0, 1, 2"):
        viz.difference_heatmap(differences(), "FE", at=-4)


# --- patching and KL divergence -------------------------------------------------------------------


def patches(**more):
    strength = {"PRE": 0.0, "SFT": 1.0, "FE": 0.2, "FE (patched)": 0.3, "LT": 0.4}
    strength |= {"LT (patched)": 0.9} | more
    return summary({name: {} for name in strength}, strength)


def test_a_point_for_each_graft_has_both_values_and_both_intervals():
    table = patches(alone=0.5)
    rows = table.set_index("graft")
    diagonal, *points = viz.patching_scatter(table).data
    assert list(diagonal.x) == list(diagonal.y)
    assert [point.text[0] for point in points] == ["FE", "LT"]
    for point in points:
        name = point.text[0]
        for axis, row in (("x", rows.loc[name]), ("y", rows.loc[f"{name} (patched)"])):
            (value,) = point[axis]
            error = point[f"error_{axis}"]
            assert value == row["recovery"]
            assert value + error.array[0] == pytest.approx(row["recovery_high"])
            assert value - error.arrayminus[0] == pytest.approx(row["recovery_low"])
        assert point.marker.color == theme.graft_fill(name).color
    facts = quantities.of_summary(table, "recovery")
    said = [text.written(facts, rows.loc[name]) for name in ("LT", "LT (patched)")]
    assert points[1].customdata[0] == f"LT<br>grafting {said[0]}<br>patching {said[1]}"


def test_axes_of_patching_are_equal_and_hold_all():
    figure = viz.patching_scatter(patches(**{"X": 1.4, "X (patched)": -0.5}))
    assert list(figure.layout.xaxis.range) == list(figure.layout.yaxis.range)
    low, high = figure.layout.xaxis.range
    assert low < -0.4
    assert high > 1.3
    assert "by grafting" in figure.layout.xaxis.title.text
    assert "by patching" in figure.layout.yaxis.title.text


def test_grafts_without_a_value_are_named_under_the_axis():
    table = patches()
    table.loc[table["graft"] == "FE (patched)", "recovery"] = np.nan
    figure = viz.patching_scatter(table)
    assert [point.text[0] for point in figure.data[1:]] == ["LT"]
    assert figure.layout.xaxis.title.text.endswith("no value: FE")
    with pytest.raises(ValueError, match=r"none of 'FE', 'LT' has a value of 'recovery' both"):
        viz.patching_scatter(table.assign(recovery=np.nan))


def test_labels_of_close_points_go_to_different_sides():
    table = patches(**{"FE 2": 0.2, "FE 2 (patched)": 0.3})
    points = {point.text[0]: point for point in viz.patching_scatter(table).data[1:]}
    assert points["FE"].textposition != points["FE 2"].textposition


def test_names_without_room_are_left_to_the_hover_text():
    # In one place, one name has room on each side of the point, as it lies far from the edges.
    close = [f"sft @ last : mlp : {i}" for i in range(8)]
    names = [*close, "sft @ last : mlp : far"]
    strength = {"PRE": 0.0, "SFT": 1.0}
    strength |= {name: 0.5 for graft in names for name in (graft, f"{graft} (patched)")}
    table = summary({name: {} for name in strength}, strength)
    ends = ["recovery", "recovery_low", "recovery_high"]
    table[ends] = 0.5
    table.loc[table["graft"].str.contains("far"), ends] = -0.5
    figure = viz.patching_scatter(table)
    written = [point.text[0] for point in figure.data[1:]]
    assert written[8] == "far"
    assert sorted(written[:8]) == ["", "", "", "", "0", "1", "2", "3"]
    assert all("sft @ last : mlp : " in point.customdata[0] for point in figure.data[1:])
    title = figure.layout.xaxis.title.text
    assert "all names begin with “sft @ last : mlp :”" in title
    assert "4 of 9 names where there is no room: hover" in title


def test_what_patching_scatter_refuses():
    with pytest.raises(ValueError, match=r"no graft with its patch .*the table of lens.patching"):
        viz.patching_scatter(summary({"PRE": {}, "SFT": {}}, {"PRE": 0.0, "SFT": 1.0}))
    with pytest.raises(ValueError, match=r"several rows for graft PRE: .*rows of one group"):
        viz.patching_scatter(pd.concat([patches(), patches()]))


def divergences(prompts=(0,), runs=("PRE", "SFT", "FE")):
    rows = [
        {"prompt": prompt, "graft": run, "position": i, "token": TOKENS[i]}
        | {"kl_base": 10 * number + 0.1 * i + prompt, "js_full": 0.1 * number + 0.01 * prompt}
        | {"kl_full": 10 * number + 1 + 0.1 * i + prompt}
        for prompt in prompts
        for number, run in enumerate(runs)
        for i in range(3)
    ]
    return pd.DataFrame(rows)


def test_kl_divergence_has_a_panel_for_pre_and_sft_and_a_line_for_each_other_run():
    figure = viz.kl_divergence_lines(divergences())
    found = {(trace.yaxis, trace.name): trace for trace in figure.data}
    assert set(found) == {("y", "SFT"), ("y", "FE"), ("y2", "PRE"), ("y2", "FE")}
    assert list(found["y", "FE"].y) == pytest.approx([20.0, 20.1, 20.2])
    assert list(found["y2", "PRE"].y) == pytest.approx([1.0, 1.1, 1.2])
    assert [trace.name for trace in figure.data if trace.showlegend] == ["SFT", "FE", "PRE"]
    assert figure.layout.yaxis.title.text == "KL(graft ‖ PRE)<br>(nats)"
    assert list(figure.layout.xaxis2.ticktext) == [HOSTILE, "␣a↵", "&#36;x&#36;"]
    assert found["y", "FE"].customdata[0] == "FE, &lt;b&gt; at 0<br>KL(graft ‖ PRE): 20 nats"
    assert found["y", "FE"].line.color == found["y2", "FE"].line.color


def test_kl_divergence_of_other_values():
    table = divergences(prompts=(0, 3))
    figure = viz.kl_divergence_lines(table, values=["js_full"], prompt=3)
    assert {trace.name: trace.y[0] for trace in figure.data} == pytest.approx(
        {"PRE": 0.03, "FE": 0.23}
    )
    assert figure.layout.yaxis.title.text == "Jensen-Shannon<br>divergence from SFT<br>(nats)"
    with pytest.raises(ValueError, match=r"unknown value 'LT'; choose from 'kl_base', 'kl_fr"):
        viz.kl_divergence_lines(table, values=["LT"], prompt=0)
    with pytest.raises(ValueError, match=r"no column 'kl_from_base'.* lens\.kl_divergence"):
        viz.kl_divergence_lines(table, values=["kl_from_base"], prompt=0)
    with pytest.raises(ValueError, match=r"values is empty; name one or more of 'kl_base'"):
        viz.kl_divergence_lines(table, values=[], prompt=0)
    with pytest.raises(ValueError, match=r"prompts 0, 3; say which"):
        viz.kl_divergence_lines(table)


# --- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" a", "␣a"),
        ("\r\n\t", "␍↵→"),
        ("\u00a0x", "⍽x"),
        ("", "∅"),
        ("\x00é", "\\u0000é"),
        ("<s>", "<s>"),
        (7, "7"),
    ],
)
def test_tokens_are_seen(token, shown):
    assert spelling.visible(token) == shown


def test_every_name_of_the_package_is_there_and_text_needs_no_plotly():
    assert viz.lens_heatmap is lens.lens_heatmap
    for name in viz.__all__:
        assert getattr(viz, name).__name__ == name
        assert name in dir(viz)
    with pytest.raises(AttributeError, match=r"No graftlens\.viz attribute pie"):
        _ = viz.pie
    program = "import sys, graftlens.viz.text; print('plotly' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout == "False\n"
