"""Plots of sweeps over windows and groups of layers: cells, sizes, and what they refuse."""

import inspect

import numpy as np
import pandas as pd
import pytest
from summaries import ENDS, results, site, summary
from sweeps import NoReport, checkpoints, config

from graftlens import stats
from graftlens.sweep import runner
from graftlens.sweep.results import read_results
from graftlens.viz import quantities, sweeps, text, theme

WINDOWS = ("0", "1", "2", "10", "0-1", "1-2", "0-2", "2-10")


def windows(layers=WINDOWS, spans=("last",), *, components=("all",), **options):
    """Each window recovers about its number in the list / 10, at spans after the first less."""
    grafts, strength = dict(ENDS), {"PRE": 0.0, "SFT": 1.0}
    for part, span in enumerate(spans):
        for component in components:
            for number, layer in enumerate(layers):
                made = site(component, layer, span)
                grafts |= made
                strength |= dict.fromkeys(made, (number + 1) / 10 - 0.05 * part)
    return summary(grafts, strength, **options)


def cells(trace):
    """(first, last) -> value."""
    return {
        (first, last): value
        for last, row in zip(trace.y, trace.z, strict=True)
        for first, value in zip(trace.x, row, strict=True)
        if value is not None
    }


def traces(figure, kind):
    return [trace for trace in figure.data if trace.type == kind]


# --- triangles -------------------------------------------------------------------------------


def test_a_window_is_a_cell_at_its_first_and_last_layer():
    table = windows((*WINDOWS, "upper_half", "0 + 2"))
    figure = sweeps.window_triangle(table)
    (trace,) = traces(figure, "heatmap")
    value = table.set_index("layer")["recovery"]
    assert cells(trace) == {
        ("0", "0"): value["0"],
        ("1", "1"): value["1"],
        ("2", "2"): value["2"],
        ("10", "10"): value["10"],
        ("0", "1"): value["0-1"],
        ("1", "2"): value["1-2"],
        ("0", "2"): value["0-2"],
        ("2", "10"): value["2-10"],
    }


def test_layers_go_right_and_up():
    figure = sweeps.window_triangle(windows())
    (trace,) = traces(figure, "heatmap")
    assert list(trace.x) == ["0", "1", "2", "10"]
    assert list(trace.y) == ["10", "2", "1", "0"]
    # A category axis whose range runs backwards: the first is at the top.
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    assert figure.layout.xaxis.title.text.startswith("first layer")
    assert figure.layout.yaxis.title.text == "last layer"
    assert trace.customdata[0][2].startswith("first layer 2, last layer 10<br>")


def test_windows_that_cannot_be_or_were_not_run_are_blank():
    table = windows()
    table.loc[table["layer"] == "0-1", ["recovery", "recovery_low", "recovery_high"]] = np.nan
    (gaps,) = [t for t in sweeps.window_triangle(table).data if t.name == "no value"]
    assert (list(gaps.x), list(gaps.y)) == (["0"], ["1"])
    names = [trace.name for trace in sweeps.window_triangle(windows()).data]
    assert "no value" not in names


def test_panels_by_span_share_a_scale_and_keep_their_order():
    # Of the first span there is no long window: order must not come from sorting by layer.
    table = windows(spans=("last", "first_entity"))
    table = table[~((table["span"] == "last") & (table["layer"] == "2-10"))]
    figure = sweeps.window_triangle(table, "top5", panel="span")
    one, two = traces(figure, "heatmap")
    assert [note.text for note in figure.layout.annotations] == ["last", "first_entity"]
    assert one.coloraxis == two.coloraxis
    assert list(one.y) == list(two.y) == ["10", "2", "1", "0"]
    by = table.set_index(["span", "layer"])["top5"]
    assert cells(one)["0", "2"] == by["last", "0-2"]
    assert cells(two)["0", "2"] == by["first_entity", "0-2"]
    assert {axis.title.text for axis in (figure.layout.yaxis, figure.layout.yaxis2)} == {
        "last layer"
    }


def test_what_a_triangle_refuses():
    both = windows(spans=("last", "first_entity"))
    with pytest.raises(ValueError, match=r"2 rows for one cell .*'span': give panel='span'"):
        sweeps.window_triangle(both)
    with pytest.raises(ValueError, match=r"no graft has a window .*5 or 4-7 .*'upper_half'"):
        sweeps.window_triangle(windows(("upper_half",)))
    with pytest.raises(ValueError, match=r"no metric 'gain'; it has 'top1'"):
        sweeps.window_triangle(both, "gain")
    with pytest.raises(ValueError, match=r"no column 'place'; it has 'template'"):
        sweeps.window_triangle(both, panel="place")


# --- sizes -------------------------------------------------------------------------------------


def series(figure):
    return {trace.name: trace for trace in figure.data}


def test_points_are_the_grafts_by_how_many_layers_they_have():
    table = windows()
    points = series(sweeps.size_curve(table))["grafts"]
    inner = table[table["layer"].isin(WINDOWS)]
    sizes = [1, 1, 1, 1, 2, 2, 3, 9]
    assert sorted(zip(points.x, points.y, strict=True)) == sorted(
        zip(map(float, sizes), inner["recovery"], strict=True)
    )
    facts = quantities.of_summary(table, "recovery")
    assert points.customdata[7] == (
        f"sft @ last : all : 2-10<br>{text.written(facts, inner.iloc[7])}"
    )


def test_lines_are_the_best_and_the_mean_of_each_size():
    table = windows()
    lines = series(sweeps.size_curve(table))
    value = table.set_index("layer")["recovery"]
    assert list(lines["highest"].x) == list(lines["mean"].x) == [1, 2, 3, 9]
    best = [value["10"], value["1-2"], value["0-2"], value["2-10"]]
    assert list(lines["highest"].y) == best
    mean = np.mean([value["0"], value["1"], value["2"], value["10"]])
    assert lines["mean"].y[0] == pytest.approx(mean)
    assert lines["mean"].y[1] == pytest.approx((value["0-1"] + value["1-2"]) / 2)
    assert lines["highest"].customdata[0].startswith("highest of 4: sft @ last : all : 10<br>")
    assert lines["mean"].customdata[1] == f"mean of 2: {lines['mean'].y[1]:.3g}"


def test_of_ranks_the_lowest_is_the_best():
    grafts = ENDS | site("all", "0") | site("all", "1")
    strength = dict(zip(grafts, (0.0, 1.0, 0.25, 0.75), strict=True))
    table = results(grafts, strength)
    rows = stats.summarise(table, metrics=("rank", "logprob"), resamples=50)
    lines = series(sweeps.size_curve(rows, "rank"))
    value = rows.set_index("layer")["rank"]
    assert value["1"] < value["0"]
    assert list(lines["lowest"].y) == [value["1"]]


def test_groups_and_shares_need_the_number_of_layers():
    table = windows(("0", "upper_half", "first_quarter", "all", "0 + 6-7"))
    points = series(sweeps.size_curve(table, n_layers=8))["grafts"]
    assert list(points.x) == [1, 4, 2, 8, 3]
    shares = sweeps.size_curve(table, size="share", n_layers=8)
    assert list(series(shares)["grafts"].x) == [0.125, 0.5, 0.25, 1, 0.375]
    assert "share of the model's layers (%)" in shares.layout.xaxis.title.text
    with pytest.raises(ValueError, match=r"layer 'upper_half' is a group: give n_layers"):
        sweeps.size_curve(table)
    with pytest.raises(ValueError, match=r"size='share' needs n_layers"):
        sweeps.size_curve(windows(), size="share")
    with pytest.raises(ValueError, match=r"'2-10' goes beyond n_layers=8: layers are 0 to 7"):
        sweeps.size_curve(windows(("2-10",)), n_layers=8)


def test_series_have_lines_of_their_own_in_the_colours_of_their_positions():
    table = windows(spans=("first_entity", "last"))
    found = series(sweeps.size_curve(table, series="span"))
    by = table.set_index(["span", "layer"])["recovery"]
    for span, graft in (("first_entity", "FE"), ("last", "LT")):
        line = found[f"{span}: highest"]
        assert line.y[3] == by[span, "2-10"]
        assert line.line.color == theme.graft_fill(graft).color
        assert (line.line.dash, found[f"{span}: mean"].line.dash) == ("solid", "dash")
        assert len(found[f"{span}: grafts"].x) == len(WINDOWS)
    sources = series(sweeps.size_curve(windows(), series="source"))
    assert sources["sft: highest"].line.color == theme.source_color("sft")


def test_markup_in_the_name_of_a_series_stays_text():
    figure = sweeps.size_curve(windows(spans=("<b>",)), series="span")
    assert [trace.name for trace in figure.data][1:] == ["&lt;b&gt;: highest", "&lt;b&gt;: mean"]


def test_what_a_curve_refuses():
    with pytest.raises(ValueError, match=r"unknown size 'heads'; choose from 'layers', 'share'"):
        inspect.unwrap(sweeps.size_curve)(windows(), size="heads")
    with pytest.raises(ValueError, match=r"no column 'place'; it has 'template'"):
        sweeps.size_curve(windows(), series="place")
    groups = windows(templates=("headline", "award"))
    with pytest.raises(ValueError, match=r"several rows for graft sft @ last : all : 0: pass the"):
        sweeps.size_curve(groups)
    assert "award: mean" in series(sweeps.size_curve(groups, series="template"))
    with pytest.raises(ValueError, match=r"no graft has a value of 'recovery' .* in 'layer'"):
        sweeps.size_curve(windows(()))


# --- a real sweep ------------------------------------------------------------------------------


def test_a_sweep_over_windows_can_be_drawn(tmp_path, monkeypatch):
    """The columns that a grid gives its grafts are those that the plots read."""
    monkeypatch.setattr(runner, "trust_report", lambda *args, **options: NoReport())
    given = config(checkpoints(tmp_path))
    given["prompts"] = [given["prompts"][0], given["prompts"][4]]
    given["grafts"] = {"PRE": "none", "SFT": "sft @ all"}
    layers = [{"windows": {"size": "1..n"}}, "upper_half"]
    given["grids"] = [{"positions": ["last"], "layers": layers}]
    runner.run_sweep(given, tmp_path / "out", progress=False, say=lambda said: None)
    table = stats.summarise(read_results(tmp_path / "out"), by=[], resamples=50)
    assert isinstance(table, pd.DataFrame)
    value = table.set_index("layer")["logprob"]
    (trace,) = traces(sweeps.window_triangle(table, "logprob"), "heatmap")
    found = cells(trace)
    last = max(int(place) for place in trace.x)
    assert len(found) == (last + 1) * (last + 2) // 2
    assert found["0", "0"] == value["0"]
    assert found["0", str(last)] == value[f"0-{last}"]
    points = series(sweeps.size_curve(table, "logprob", n_layers=last + 1))["grafts"]
    assert len(points.x) == len(found) + 1


# --- strengths -----------------------------------------------------------------------------------

DOSES = (2.0, -0.5, 0.0, 0.5, 1.0)


def doses(components=("o", "mlp"), **options):
    """At strength s a component recovers about s/2 (the first) or s/4."""
    grafts, strength = dict(ENDS), {"PRE": 0.0, "SFT": 1.0}
    for number, component in enumerate(components, start=1):
        for dose in DOSES:
            ((name, about),) = site(component, "all").items()
            name = name if dose == 1 else f"{dose:g}*{name}"
            grafts[name] = about | {"strength": dose}
            strength[name] = dose / (2 * number)
    return summary(grafts, strength, **options)


def test_a_line_goes_along_the_strengths_of_a_graft():
    table = doses()
    figure = sweeps.dose_response(table)
    assert list(series(figure)) == ["sft @ last : o : all", "sft @ last : mlp : all"]
    for name, line in series(figure).items():
        rows = table[table["graft"].str.endswith(name)].sort_values("strength")
        assert list(line.x) == sorted(DOSES)
        assert list(line.y) == list(rows["recovery"])
        assert np.allclose(np.add(line.y, line.error_y.array), rows["recovery_high"])
        assert np.allclose(np.subtract(line.y, line.error_y.arrayminus), rows["recovery_low"])
        facts = quantities.of_summary(table, "recovery")
        said = text.written(facts, rows.iloc[0])
        assert line.customdata[0] == f"{name}<br>strength -0.5<br>{said}"
    one, two = figure.data
    assert (one.line.dash, one.marker.symbol) != (two.line.dash, two.marker.symbol)
    assert figure.layout.yaxis.title.text == "recovery (0 = PRE, 1 = SFT)"
    # The ends of recovery are where strengths are measured from, and no points.
    assert [(shape.y0, shape.line.dash) for shape in figure.layout.shapes] == [
        (0.0, "dot"),
        (1.0, "dot"),
    ]
    assert [note.text for note in figure.layout.annotations] == ["PRE", "SFT"]


def test_lines_of_strengths_by_a_column_and_of_another_measure():
    table = doses()
    figure = sweeps.dose_response(table, "top5", series="component")
    assert list(series(figure)) == ["o", "mlp"]
    assert figure.layout.yaxis.tickformat == ".0%"
    value = table.set_index("graft")["top5"]
    (last,) = {y for x, y in zip(figure.data[0].x, figure.data[0].y, strict=True) if x == 2}
    assert last == value["2*sft @ last : o : all"]


def test_strengths_of_evaluates_tables_are_in_their_rules():
    """Their summaries have what a sweep's have, so they are drawn alike."""
    names = {"PRE": "none", "SFT": "sft @ all"}
    names |= {f"{s}*sft @ last : mlp": f"{s}*sft @ last : mlp" for s in (0.5, 2)}
    names |= {"sft @ last : mlp": "sft @ last : mlp", "both": "sft @ last | sft @ [0] : o : 1 : 2"}
    rows = [
        {"prompt": n, "graft": name, "rule": rule, "template": "t", "reason": None}
        | {"logprob": -3.0 + value + n / 10, "rank": 1 + n}
        for n in range(4)
        for value, (name, rule) in enumerate(names.items())
    ]
    table = stats.summarise(pd.DataFrame(rows), ks=(1,), metrics=("logprob",), resamples=50)
    about = table.set_index("graft")
    assert about.loc["0.5*sft @ last : mlp", list(stats.GRAFT_COLUMNS)].tolist() == [
        *("sft", "last", "mlp", "all", "all", "all", 0.5)
    ]
    assert about.loc[["PRE", "both"], "strength"].isna().all()
    (line,) = sweeps.dose_response(table).data
    assert (line.name, list(line.x)) == ("sft @ last : mlp", [0.5, 1, 2])
    assert (
        list(line.y)
        == about.loc[
            ["0.5*sft @ last : mlp", "sft @ last : mlp", "2*sft @ last : mlp"], "recovery"
        ].tolist()
    )
    # What the table says itself comes before what the rule says.
    given = pd.DataFrame(rows).assign(strength=7.0)
    other = stats.summarise(given, ks=(1,), metrics=("logprob",), resamples=50)
    assert set(other["strength"]) == {7.0}
    assert set(other["span"].dropna()) == {"all", "last"}


def test_a_dose_response_needs_several_strengths_each_once():
    table = doses()
    assert sweeps.has_doses(table, "recovery")
    assert not sweeps.has_doses(table[table["strength"] == 1], "recovery")
    assert not sweeps.has_doses(table.drop(columns="strength"), "recovery")
    assert not sweeps.has_doses(pd.concat([table, table]), "recovery")


def test_what_a_plot_of_strengths_refuses():
    table = doses()
    with pytest.raises(ValueError, match=r"no column 'strength'; it has 'template', 'graft'"):
        sweeps.dose_response(table.drop(columns="strength"))
    with pytest.raises(ValueError, match=r"2 rows for strength 2 of 'sft': pass the rows of one"):
        sweeps.dose_response(table, series="source")
    with pytest.raises(ValueError, match="no graft but the references has a value in 'strength'"):
        sweeps.dose_response(table.assign(strength=None))


def test_the_full_run_is_a_point_of_its_own_graft_at_other_strengths():
    """Regression: lines over a grid at all positions had no point at strength 1."""
    names = {"none": "none", "SFT": "sft @ all", "0.5*sft @ last": "0.5*sft @ last"}
    names |= {f"doses: {s}*sft @ all": f"{s}*sft @ all" for s in (0, 2)}
    rows = [
        {"prompt": n, "graft": name, "rule": rule, "base_run": "none", "full_run": "SFT"}
        | {"logprob": -3.0 + value + n / 10, "reason": None}
        for n in range(4)
        for value, (name, rule) in enumerate(names.items())
    ]
    table = stats.summarise(pd.DataFrame(rows), by=(), ks=(), metrics=("logprob",), resamples=50)
    for options in ({}, {"series": "span"}):
        found = series(sweeps.dose_response(table, **options))
        assert [list(line.x) for line in found.values()] == [[0.5], [0, 1, 2]]
        assert list(found)[1] == ("all" if options else "doses: sft @ all")
        assert found[list(found)[1]].y[1] == 1
    # Beside its own strength 1 it is a reference, as everywhere.
    twin = table[table["graft"] == "SFT"].assign(graft="doses: sft @ all")
    (line,) = sweeps.dose_response(pd.concat([table[table["span"] != "last"], twin])).data
    assert list(line.x) == [0, 1, 2]
    assert sweeps.has_doses(table[table["graft"] != "doses: 0*sft @ all"], "recovery")


def test_a_dose_response_of_prompts_that_did_not_run_is_empty():
    """Regression: an experiment with a template that no graft could run failed while drawing."""
    values = ["recovery", "recovery_low", "recovery_high"]
    (one, two) = sweeps.dose_response(doses().assign(**dict.fromkeys(values, np.nan))).data
    assert len(one.x) == len(two.x) == len(DOSES)
    assert all(value is None or np.isnan(value) for value in one.y)
