"""Heat maps, lines and bars: the numbers in a figure are those of its table."""

import base64
import dataclasses
import itertools
import json
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from summaries import ENDS, NO_RULE, positions, site, site_map, summary

from graftlens import metrics
from graftlens.viz import bars, figures, heatmaps, linecharts, quantities, text, theme

# --- heat maps -------------------------------------------------------------------------------


def traces(figure, kind):
    return [trace for trace in figure.data if trace.type == kind]


def test_cells_are_the_summary_and_a_missing_one_is_none():
    table = site_map(skip={("q", 2)})
    figure = heatmaps.heatmap(table, "recovery")
    (trace,) = traces(figure, "heatmap")
    assert list(trace.x) == ["0", "1", "2", "10"]
    assert list(trace.y) == ["q", "o"]
    value = table.set_index(["component", "layer"])["recovery"]
    for row, component in enumerate(trace.y):
        for column, layer in enumerate(trace.x):
            if (component, layer) == ("q", "2"):
                assert trace.z[row][column] is None
            else:
                assert trace.z[row][column] == value[component, layer]
    assert trace.hoverongaps is False
    (gap,) = [t for t in traces(figure, "scatter") if t.name == "no value"]
    assert (list(gap.x), list(gap.y)) == (["2"], ["q"])
    assert gap.customdata[0] == "layer 2, component q<br>not run"
    assert "×: no value" in figure.layout.xaxis.title.text


def test_hover_says_value_interval_prompts_and_graft():
    table = site_map()
    (trace,) = traces(heatmaps.heatmap(table, "recovery"), "heatmap")
    row = table[table["graft"] == "sft @ last : o : 10"].iloc[0]
    said = text.written(quantities.of_summary(table, "recovery"), row)
    assert trace.customdata[1][3] == (
        f"layer 10, component o<br>{said}<br>24 prompts<br>sft @ last : o : 10"
    )


def test_the_scale_of_recovery_is_symmetric_and_holds_every_value():
    grafts = ENDS | site("o", "0") | site("o", "1")
    strong = dict(zip(grafts, (0.0, 1.0, 1.6, -0.4), strict=True))
    table = summary(grafts, strong)
    axis = heatmaps.heatmap(table).layout.coloraxis
    most = table.loc[table["component"] == "o", "recovery"].abs().max()
    assert most > 1.3
    assert (axis.cmin, axis.cmax) == (-most, most)
    assert [color for _, color in axis.colorscale] == list(theme.DIVERGING)


def test_scales_of_other_metrics():
    table = site_map()
    shares = heatmaps.heatmap(table, "top5").layout.coloraxis
    assert (shares.cmin, shares.cmax) == (0, 1)
    assert [color for _, color in shares.colorscale] == list(theme.SEQUENTIAL)
    nats = heatmaps.heatmap(table, "logprob").layout.coloraxis
    inner = table.loc[table["layer"].notna() & table["layer"].ne("all"), "logprob"]
    assert (nats.cmin, nats.cmax) == (inner.min(), inner.max())
    logits = heatmaps.heatmap(table, "logit_diff").layout.coloraxis
    assert logits.cmin == -logits.cmax


def test_a_new_measure_is_drawn_by_its_row(monkeypatch):
    """Labels, units, bounds and signs are the table's; plots keep none of their own."""
    row = metrics.Measure("toy", label="toyness of KL", short="toyness", unit="toys", signed=True)
    monkeypatch.setitem(metrics.METRICS, "toy", row)
    table = site_map().rename(columns=lambda name: re.sub("^logit_diff", "toy", name))
    axis = heatmaps.heatmap(table, "toy").layout.coloraxis
    assert axis.colorbar.title.text == "toyness (toys)"
    assert axis.cmin == -axis.cmax
    assert bars.grouped_bars(table, "toy").layout.yaxis.title.text == "toyness (toys)"
    assert figures.heat_map(table, "toy").caption.startswith("Toyness of KL (toys) by component")
    share = dataclasses.replace(row, bounds=(0.0, 1.0), signed=False, unit="%")
    monkeypatch.setitem(metrics.METRICS, "toy", share)
    assert bars.grouped_bars(table, "toy").layout.yaxis.tickformat == ".0%"
    assert quantities.of_summary(table, "toy").number(0.125) == "12.5"


def test_a_measure_that_compares_with_a_run_names_it():
    table = site_map().rename(columns=lambda name: re.sub("^logprob", "kl_full", name))
    assert quantities.of_summary(table, "kl_full").title == "KL(graft ‖ SFT) (nats)"
    assert quantities.Quantity.of("kl_full").title == "KL(graft ‖ full) (nats)"


def test_dots_mark_intervals_that_exclude_zero():
    table = site_map()
    figure = heatmaps.heatmap(table)
    (dots,) = [t for t in traces(figure, "scatter") if t.name == "interval excludes 0"]
    inner = table[table["layer"].notna() & table["layer"].ne("all")]
    sure = inner[(inner["recovery_low"] > 0) | (inner["recovery_high"] < 0)]
    assert set(zip(dots.x, dots.y, strict=True)) == set(
        zip(sure["layer"], sure["component"], strict=True)
    )
    assert 0 < len(sure) < len(inner)
    assert "dot: the interval excludes 0" in figure.layout.xaxis.title.text
    assert traces(heatmaps.heatmap(table, "top5"), "scatter") == []


def test_panels_share_one_scale():
    table = site_map(spans=("first_entity", "last"), templates=("headline",))
    figure = heatmaps.heatmap(table, "recovery", panel="span")
    one, two = traces(figure, "heatmap")
    assert one.coloraxis == two.coloraxis == "coloraxis"
    assert [note.text for note in figure.layout.annotations] == ["first_entity", "last"]
    assert one.z[1][3] != two.z[1][3]
    assert {one.yaxis, two.yaxis} == {"y", "y2"}


def test_ranges_are_sorted_by_where_they_start():
    names = ["8-11", "0-3", "all", "4-7", "4-15", "2"]
    grafts = ENDS | {k: v for name in names for k, v in site("o", name).items()}
    table = summary(grafts, dict.fromkeys(grafts, 0.5) | {"PRE": 0.0, "SFT": 1.0})
    (trace,) = traces(heatmaps.heatmap(table, "top5"), "heatmap")
    assert list(trace.x) == ["0-3", "2", "4-7", "4-15", "8-11", "all"]


def test_two_grafts_for_one_cell_name_the_column_that_tells_them_apart():
    with pytest.raises(ValueError, match=r"2 rows for one cell .*'span': give panel='span'"):
        heatmaps.heatmap(site_map(spans=("first_entity", "last")))
    with pytest.raises(ValueError, match=r"they differ in 'template': give panel='template'"):
        heatmaps.heatmap(site_map(templates=("headline", "award")))
    table = site_map()
    with pytest.raises(ValueError, match="no column distinguishes them"):
        heatmaps.heatmap(pd.concat([table, table.tail(1)]))
    with pytest.raises(ValueError, match="no column 'spam'; it has 'template', 'graft'"):
        heatmaps.heatmap(table, x="spam")
    with pytest.raises(ValueError, match="no graft has a value in every one of the columns"):
        heatmaps.heatmap(positions())


def test_a_recovery_that_cannot_be_computed_says_why():
    flat = dict.fromkeys(ENDS | site(), 0.5)
    table = summary(ENDS | site(), flat)
    figure = heatmaps.heatmap(table)
    (gap,) = [t for t in traces(figure, "scatter") if t.name == "no value"]
    assert "no value: " in gap.customdata[0]
    assert table["recovery_note"].iloc[0] in gap.customdata[0]
    assert traces(figure, "heatmap")[0].z[0][0] is None


def test_markup_in_names_stays_text():
    grafts = ENDS | {"<b>x</b>": dict(NO_RULE, component="<i>", layer="0")}
    table = summary(grafts, dict.fromkeys(grafts, 0.5) | {"PRE": 0.0, "SFT": 1.0})
    (trace,) = traces(heatmaps.heatmap(table, "top5"), "heatmap")
    assert list(trace.y) == ["&lt;i&gt;"]
    assert "&lt;b&gt;x&lt;/b&gt;" in trace.customdata[0][0]


# --- lines -----------------------------------------------------------------------------------


def along(shares, seeds=(0,), mode="count"):
    parts = []
    for share in shares:
        for seed in seeds:
            strength = {"PRE": 0.0, "SFT": 1.0, "kept": 1 - share + 0.1 * seed}
            made = summary(
                dict.fromkeys(strength, NO_RULE), strength, seed=round(100 * share) + seed
            )
            parts.append(made[made["graft"] == "kept"].assign(share=share, seed=seed, mode=mode))
    return pd.concat(parts, ignore_index=True)


def test_one_row_a_point_has_whiskers():
    table = along((1.0, 0.0, 0.5))
    figure = linecharts.lines(table, "share", "top5")
    (trace,) = figure.data
    rows = table.sort_values("share")
    assert list(trace.x) == [0.0, 0.5, 1.0]
    assert list(trace.y) == list(rows["top5"])
    assert np.allclose(np.add(trace.y, trace.error_y.array), rows["top5_high"])
    assert np.allclose(np.subtract(trace.y, trace.error_y.arrayminus), rows["top5_low"])
    assert figure.layout.xaxis.title.text == "share (whiskers: 95% interval)"
    assert figure.layout.xaxis.tickformat == ".0%"


def test_several_draws_have_a_mean_a_band_and_dots():
    table = pd.concat([along((0.0, 0.5), (0, 1, 2)), along((0.0, 0.5), (0,), "chance")])
    figure = linecharts.lines(table, "share", "recovery", series="mode")
    by_name = {trace.name: trace for trace in figure.data}
    assert list(by_name) == ["count: band", "count: draws", "count", "chance"]
    drawn = table[table["mode"] == "count"].groupby("share")["recovery"]
    assert np.allclose(by_name["count"].y, drawn.mean())
    band = by_name["count: band"]
    assert list(band.x) == [0.0, 0.5, 0.5, 0.0]
    assert np.allclose(band.y, [*drawn.max(), *drawn.min()[::-1]])
    assert sorted(by_name["count: draws"].y) == sorted(
        table.loc[table["mode"] == "count", "recovery"]
    )
    assert "mean of the draws" in figure.layout.xaxis.title.text
    assert by_name["count"].line.dash != by_name["chance"].line.dash
    assert by_name["count"].marker.symbol != by_name["chance"].marker.symbol
    assert "mean of 3: " in by_name["count"].customdata[0][0]


def test_layers_are_counted_and_not_percent():
    table = along((0.0, 1.0)).assign(layers=[0, 1])
    assert linecharts.lines(table, "layers", "top5").layout.xaxis.tickformat is None


def test_lines_refuse_what_is_not_a_number():
    with pytest.raises(ValueError, match="column 'mode' has 'count', which is not a number"):
        linecharts.lines(along((0.0,)), "mode", "top5")
    with pytest.raises(ValueError, match="no column 'seeds'; it has"):
        linecharts.lines(along((0.0,)), "share", "top5", series="seeds")


# --- bars ------------------------------------------------------------------------------------


def test_baselines_are_dotted_lines_with_names():
    table = positions(templates=("a", "b"))
    figure = bars.grouped_bars(
        table, "top5", baselines={"SFT": 1.0, "PRE": 0.0, "task": 0.02}, legend_title="template"
    )
    assert [(s.y0, s.y1, s.line.dash) for s in figure.layout.shapes] == [
        (0.0, 0.0, "dot"),
        (0.02, 0.02, "dot"),
        (1.0, 1.0, "dot"),
    ]
    # The names of lines that lie close stand together, so that they can be read.
    assert [(a.text, a.y) for a in figure.layout.annotations] == [("PRE, task", 0.0), ("SFT", 1.0)]
    assert figure.layout.legend.title.text == "template"


def test_order_of_groups():
    table = positions(templates=("a", "b", "c"))
    figure = bars.grouped_bars(table, "top5", order=["c", "a"])
    assert [trace.name for trace in figure.data] == ["c", "a", "b"]
    with pytest.raises(ValueError, match="order names the group 'd'; the summary has 'a', 'b'"):
        bars.grouped_bars(table, order=["d"])


def test_a_graft_that_some_groups_lack_keeps_its_place():
    table = positions(templates=("a", "b"))
    table = table[~((table["template"] == "a") & (table["graft"] == "SFT"))]
    figure = bars.grouped_bars(table)
    assert list(figure.layout.xaxis.categoryarray) == ["PRE", "FE+LT", "(FE+LT)^C", "SFT"]


def test_without_an_interval_no_whiskers_are_drawn():
    one = positions(n=1)
    assert list(one["recovery_low"].isna()) == [False, False, True, True]
    figure = bars.grouped_bars(one, "recovery")
    error = json.loads(figure.to_json())["data"][0]["error_y"]
    # Of null, plotly would draw an interval of no width; typed arrays have NaN.
    assert {error["array"]["dtype"], error["arrayminus"]["dtype"]} == {"f8"}
    ends = np.frombuffer(base64.b64decode(error["array"]["bdata"]))
    assert list(np.isnan(ends)) == [False, False, True, True]
    assert figure.layout.xaxis.title.text == "graft; no interval: one prompt"
    assert figures.bar_chart(one, "recovery").caption.endswith("; no interval: one prompt.")
    many = positions()
    assert bars.grouped_bars(many).layout.xaxis.title.text == "graft; whiskers: 95% interval"
    assert "; whiskers: 95% intervals over prompts." in figures.bar_chart(many, "top5").caption


def test_names_are_no_markup_and_no_mathematics():
    name = "<b>&$x$ %"
    table = positions({"PRE": 0.0, "SFT": 1.0, name: 0.5})
    spelled = "&lt;b&gt;&amp;&#36;x&#36; %"
    assert bars.grouped_bars(table).data[0].x[2] == spelled
    marked = table.assign(component=["q", "q", name], layer=["0", "1", "1"])
    marked["base_run"], marked["full_run"] = "none", "none"
    (cells,) = traces(heatmaps.heatmap(marked), "heatmap")
    assert list(cells.y) == ["q", spelled]


def test_many_bars_say_that_not_all_are_named():
    table = positions({"PRE": 0.0, "SFT": 1.0} | {f"graft {i}": 0.5 for i in range(70)})
    assert "not every graft is labelled" in bars.grouped_bars(table).layout.xaxis.title.text


def test_fills_of_many_series_differ():
    fills = [theme.series_fill(i) for i in range(18)]
    assert len(set(fills)) == 18
    styles = [theme.series_line(i) for i in range(18)]
    assert len(set(styles)) == 18


def test_lines_of_grafts_look_as_grafts_do_elsewhere():
    names = ("PRE", "SFT", "LT", "FE+LT", "(FE+LT)^C")
    table = pd.concat([positions(dict.fromkeys(names, 0.5)).assign(step=step) for step in (1, 2)])
    drawn = linecharts.lines(table, "step", "top5", series="graft").data
    looks = theme.graft_lines(names)
    for trace, name in zip(drawn, names, strict=True):
        look = looks[name]
        assert trace.name == name
        assert (trace.line.color, trace.line.dash) == (look.color, look.dash)
        assert trace.marker.symbol == look.marker
        assert look.color == theme.graft_fill(name).color


# --- captions and colours --------------------------------------------------------------------


def test_charts_carry_descriptions():
    table = site_map(skip={("q", 2)})
    chart = figures.heat_map(table)
    best = table.loc[table["layer"].ne("all") & table["layer"].notna()].nlargest(1, "recovery")
    assert f"{best['recovery'].iloc[0]:.2f} (o at layer 10)" in chart.alt
    assert "1 cells have no value" in chart.alt
    assert "with many cells some do by chance" in chart.caption
    assert isinstance(chart.figure, go.Figure)
    bar = figures.bar_chart(positions(), "top5")
    assert "SFT 100.0% [86.2, 100.0]" in bar.alt
    line = figures.line_chart(along((0.0, 1.0)), "share", "top5", series="mode")
    assert line.alt == (
        "Line chart of top-5 accuracy along share. count: from 100.0% at 0.0 to 0.0% at 1.0."
    )


def lightness(color):
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return 116 * float(np.cbrt(linear @ (0.2126, 0.7152, 0.0722))) - 16


def test_colour_scales_are_ordered_by_lightness():
    falling = [lightness(color) for color in theme.SEQUENTIAL]
    assert all(a - b > 8 for a, b in itertools.pairwise(falling))
    sides = [lightness(color) for color in theme.DIVERGING]
    middle = len(sides) // 2
    assert all(b - a > 8 for a, b in itertools.pairwise(sides[: middle + 1]))
    assert all(a - b > 8 for a, b in itertools.pairwise(sides[middle:]))
    # Zero is no empty cell: both ends and the middle differ from the page.
    for surface in (theme.LIGHT.surface, theme.DARK.surface):
        assert abs(lightness(theme.DIVERGING[middle]) - lightness(surface)) > 5
        assert abs(lightness(theme.SEQUENTIAL[0]) - lightness(surface)) > 5


def test_written_all_is_written_row_by_row():
    table = positions(templates=("a", "b"))
    for name in quantities.measured(table):
        facts = quantities.of_summary(table, name)
        rows = [text.written(facts, row) for _, row in table.iterrows()]
        assert text.written_all(facts, table) == rows
