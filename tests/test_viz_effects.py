"""Figures of scores by place: their numbers are means of the table's."""

import jaxtyping
import numpy as np
import pandas as pd
import pytest

from graftlens.viz import effect_bars, effect_head_map, effect_heatmap, theme

SITES = [("embed", None), ("q", 0), ("mlp_out", 0), ("q", 1), ("mlp_out", 1), ("unembed", None)]
POSITIONS = ("first_entity", "last", "~(first_entity + last)")


def sites(prompts: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": prompt, "component": component, "layer": layer, "position": position,
         "unit": None, "ig": rng.normal(), "alone": rng.normal()}
        for prompt in range(prompts)
        for component, layer in SITES
        for position in POSITIONS
        if (component, position) != ("unembed", "first_entity")
    ]  # fmt: skip
    made = pd.DataFrame(rows)
    return made.assign(layer=made["layer"].astype("Int64"), unit=made["unit"].astype(object))


def heads() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = [
        {"prompt": prompt, "component": component, "layer": layer, "position": position,
         "unit": unit, "ig": rng.normal()}
        for prompt in range(2)
        for component, units in (("q", [0, 1, 2, 3]), ("k", [0, 1]), ("o", [0, 1, 2, 3, "bias"]),
                                 ("mlp_out", [None]))
        for layer in range(2)
        for position in ("last", "bos")
        for unit in units
    ]  # fmt: skip
    return pd.DataFrame(rows)


def maps(figure):
    return [trace for trace in figure.data if trace.type == "heatmap"]


def test_a_cell_is_the_mean_over_prompts_at_its_site_and_position():
    table = sites()
    figure = effect_heatmap(table.drop(columns="ig"))  # the first score that the table has
    assert [note.text for note in figure.layout.annotations] == list(POSITIONS)
    for position, trace in zip(POSITIONS, maps(figure), strict=True):
        assert list(trace.x) == ["0", "1", "–"]
        there = [c for c in ("embed", "q", "mlp_out", "unembed")
                 if (c, position) != ("unembed", "first_entity")]  # fmt: skip
        assert list(trace.y) == there
        for i, component in enumerate(trace.y):
            for j, layer in enumerate(trace.x):
                rows = table[(table["component"] == component) & (table["position"] == position)]
                at = rows["layer"].isna() if layer == "–" else rows["layer"].eq(int(layer))
                rows = rows[at.fillna(False)]
                if rows.empty:
                    assert trace.z[i][j] is None
                else:
                    assert trace.z[i][j] == pytest.approx(rows["alone"].mean())
    held = [v for trace in maps(figure) for row in trace.z for v in row if v is not None]
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-max(map(abs, held)), max(map(abs, held)))
    assert [color for _, color in axis.colorscale] == list(theme.DIVERGING)
    assert "mean over 3 prompts" in figure.layout.xaxis3.title.text
    assert maps(figure)[1].customdata[1][0].startswith("q, layer 0, at last<br>")
    assert "nats" in axis.colorbar.title.text


@pytest.mark.parametrize(("size", "beyond"), [(2.9, False), (-40.0, True)])
def test_one_extreme_site_does_not_set_the_scale(size, beyond):
    """It made all other cells, in every panel, as good as white."""
    table = sites(1).assign(ig=lambda t: np.linspace(-1, 1, len(t)))
    table.loc[3, "ig"] = size
    figure = effect_heatmap(table)
    axis = figure.layout.coloraxis
    end = 1.0 if beyond else abs(size)
    assert (axis.cmin, axis.cmax) == (-end, end)
    assert ("1 beyond, up to 40" in axis.colorbar.title.text) == beyond
    held = [v for trace in maps(figure) for row in trace.z for v in row if v is not None]
    assert size in held, "the cell itself has its value"


def test_units_of_a_site_are_added_up():
    table = heads()
    last, _ = maps(effect_heatmap(table))
    rows = table[table["position"].eq("last") & table["component"].eq("o") & table["layer"].eq(1)]
    assert last.z[list(last.y).index("o")][1] == pytest.approx(rows["ig"].sum() / 2)


@pytest.mark.parametrize("by", ["position", "component"])
def test_bars_add_up_and_have_intervals_over_prompts(by):
    table = sites(40)
    (bar,) = effect_bars(table, by=by).data
    sums = table.groupby(["prompt", by])["ig"].sum().unstack()
    order = list(POSITIONS) if by == "position" else ["embed", "q", "mlp_out", "unembed"]
    assert list(bar.x) == order
    np.testing.assert_allclose(bar.y, sums[order].mean())
    half = 1.96 * sums[order].std() / np.sqrt(40)
    np.testing.assert_allclose(bar.error_y.array, half, rtol=0.2)
    np.testing.assert_allclose(bar.error_y.arrayminus, half, rtol=0.2)
    assert sum(bar.y) == pytest.approx(table["ig"].sum() / 40)


def test_one_prompt_has_no_interval():
    figure = effect_bars(sites(1))
    assert np.isnan(np.array(figure.data[0].error_y.array, dtype=float)).all()
    assert "intervals" not in figure.layout.xaxis.title.text


def test_heads_are_cells_of_their_component():
    table = heads()
    figure = effect_head_map(table)
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["q (heads)", "k (key-value heads)", "o (heads)"]
    for component, trace in zip("qko", maps(figure), strict=True):
        count = 2 if component == "k" else 4
        assert list(trace.x) == [str(head) for head in range(count)]
        assert list(trace.y) == ["0", "1"]
        for layer in range(2):
            for head in range(count):
                rows = table[table["component"].eq(component) & table["layer"].eq(layer)]
                rows = rows[[unit == head for unit in rows["unit"]]]
                assert trace.z[layer][head] == pytest.approx(rows["ig"].sum() / 2)
    assert maps(figure)[0].customdata[1][2].startswith("q, layer 1, head 2<br>")


def test_what_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    table = sites()
    with pytest.raises(ValueError, match=r"unknown value 'at'; choose from 'ig', 'at_base'"):
        effect_heatmap(table, "at")
    with pytest.raises(ValueError, match=r"no column 'missing'.* find.attribute or find.exact_eff"):
        effect_heatmap(table, "missing")
    with pytest.raises(
        ValueError, match=r"by='layer' is unknown; choose 'position' or 'component'"
    ):
        effect_bars(table, by="layer")
    with pytest.raises(ValueError, match=r'the table has no head: make it with by="head"'):
        effect_head_map(table)
    with pytest.raises(ValueError, match=r"no value in its column 'ig'"):
        effect_heatmap(table.assign(ig=np.nan))
