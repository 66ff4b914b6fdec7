"""graftlens.stats against brute force, closed forms and simulations with known answers."""

import itertools
import math
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlens import stats
from graftlens.metrics import averaged
from graftlens.stats import permutation, resampling
from graftlens.stats.intervals import _newcombe
from graftlens.viz import text


def make_table(columns, *, metric="logprob", template="headline", first=0):
    """A results table from one list of values per graft; None = could not be run."""
    rows = []
    for graft, values in columns.items():
        for prompt, value in enumerate(values, start=first):
            row = {"prompt": prompt, "graft": graft, "rule": graft, "template": template}
            row |= {"text": "t", "answer": " a", "rank": 1.0, "prob": 0.5, "logprob": -1.0}
            row |= {"answer_logprob": -2.0, "logit_diff": 0.5, "reason": None, metric: value}
            if value is None:
                row |= dict.fromkeys(averaged(), np.nan) | {"reason": "no such span"}
            rows.append(row)
    return pd.DataFrame(rows)


def apart(tables):
    """Tables in one, each a template of its own, so that one call makes the intervals of all."""
    return pd.concat(
        [
            table.assign(template=f"t{i}", prompt=table["prompt"] + 1000 * i)
            for i, table in enumerate(tables)
        ],
        ignore_index=True,
    )


def ranks(hits, n):
    """Ranks with `hits` of n in the top 1 and top 5, the others far below."""
    return [1.0] * hits + [100.0] * (n - hits)


def random_table(seed=0, n=12):
    rng = np.random.default_rng(seed)
    base = rng.normal(-8, 1, n)
    return make_table(
        {
            "PRE": list(base),
            "SFT": list(base + 7 + rng.normal(0, 0.5, n)),
            "FE": list(base + 2 + rng.normal(0, 0.5, n)),
        }
    )


def row_of(summary, graft):
    return summary[summary["graft"] == graft].iloc[0]


# --- bootstrap -------------------------------------------------------------------------------


def test_bootstrap_means_approach_the_exact_distribution_of_three_prompts():
    values = np.array([[0.0, 5.0], [1.0, 1.0], [4.0, -2.0]])
    draws = stats.bootstrap_means(values, resamples=40_000, seed=1)
    exact = np.array([values[list(pick)].mean(0) for pick in itertools.product(range(3), repeat=3)])
    for column in range(2):
        for point in np.unique(exact[:, column]):
            share = np.isclose(draws[:, column], point).mean()
            assert share == pytest.approx(np.isclose(exact[:, column], point).mean(), abs=0.01)
    # The columns share their resamples: only pairs that one pick of prompts gives occur.
    pairs = {tuple(np.round(pair, 9)) for pair in exact}
    assert {tuple(np.round(pair, 9)) for pair in draws} == pairs


def test_resamples_in_chunks_are_the_same_law(monkeypatch):
    values = np.arange(10.0)[:, None]
    monkeypatch.setattr(resampling, "CHUNK", 37)
    draws = stats.bootstrap_means(values, resamples=5000, seed=0)
    assert draws.mean() == pytest.approx(4.5, abs=0.05)
    assert draws.std() == pytest.approx(values.std() / math.sqrt(10), rel=0.05)


def test_summary_of_hand_made_numbers():
    table = make_table({"PRE": [-9.0, -7.0], "SFT": [-1.0, -1.0], "FE": [-5.0, -4.0]})
    summary = stats.summarise(table)
    assert list(summary["graft"]) == ["PRE", "SFT", "FE"]
    row = row_of(summary, "FE")
    assert (row["n"], row["not_run"], row["failed"]) == (2, 0, 0)
    assert row["logprob"] == -4.5
    assert (row["logprob_low"], row["logprob_high"]) == (-5.0, -4.0)
    assert row["answer_logprob"] == -2.0
    assert row["top1"] == row["top50"] == 1.0
    # (-4.5 + 8) / (-1 + 8); the resamples give 4/8, 3.5/7 and 3/6
    assert row["recovery"] == 0.5
    assert math.isnan(row["recovery_low"])
    assert "all resamples agree" in row["recovery_note"]


def test_recovery_interval_is_that_of_ratios_of_resampled_means():
    table = random_table()
    row = row_of(stats.summarise(table, resamples=4000, seed=3), "FE")
    wide = table.pivot(index="prompt", columns="graft", values="logprob")
    rng = np.random.default_rng(99)
    ratios = []
    for _ in range(4000):
        means = wide.iloc[rng.integers(0, len(wide), len(wide))].mean()
        ratios.append((means["FE"] - means["PRE"]) / (means["SFT"] - means["PRE"]))
    low, high = np.quantile(ratios, (0.025, 0.975))
    assert row["recovery_low"] == pytest.approx(low, abs=0.005)
    assert row["recovery_high"] == pytest.approx(high, abs=0.005)
    mean = wide.mean()
    assert row["recovery"] == pytest.approx(
        (mean["FE"] - mean["PRE"]) / (mean["SFT"] - mean["PRE"])
    )


def test_base_and_full_recover_0_and_1_by_definition():
    summary = stats.summarise(random_table())
    for graft, value in (("PRE", 0.0), ("SFT", 1.0)):
        row = row_of(summary, graft)
        assert (row["recovery"], row["recovery_low"], row["recovery_high"]) == (value,) * 3
        assert row["recovery_note"] is None


def test_no_recovery_where_finetuning_changed_nothing():
    same = stats.summarise(make_table({"PRE": [-3.0, -2.0], "SFT": [-3.0, -2.0]}))
    assert same["recovery"].isna().all()
    assert set(same["recovery_note"]) == {"full and base are equal: there is nothing to recover"}
    unsure = make_table({"PRE": [-3.0, -2.0, -4.0], "SFT": [-2.0, -3.5, -3.0], "FE": [-1.0] * 3})
    summary = stats.summarise(unsure)
    assert summary["recovery"].isna().all()
    assert summary["recovery_low"].isna().all()
    assert all("includes 0" in note for note in summary["recovery_note"])


def test_recovery_works_where_less_is_better():
    table = make_table(
        {"PRE": [90.0, 110.0, 100.0], "SFT": [1.0, 2.0, 3.0], "FE": [30.0, 70.0, 50.0]},
        metric="rank",
    )
    row = row_of(stats.summarise(table, recovery="rank"), "FE")
    assert row["recovery"] == pytest.approx(50 / 98)
    assert row["recovery_low"] < 50 / 98 < row["recovery_high"]


# --- degenerate proportions ------------------------------------------------------------------


def test_wilson_known_values():
    # 0 of 40: z²/(n + z²) with z = 1.959964
    assert stats.wilson(0, 40) == (0.0, pytest.approx(3.841459 / 43.841459, abs=1e-6))
    assert stats.wilson(40, 40) == (pytest.approx(40 / 43.841459, abs=1e-6), 1.0)
    # 81 of 263 (Newcombe 1998, Statistics in Medicine 17, 857, table I): 0.2553 to 0.3662
    assert stats.wilson(81, 263) == (
        pytest.approx(0.2553, abs=5e-5),
        pytest.approx(0.3662, abs=5e-5),
    )


@pytest.mark.parametrize("hits", [0, 1, 4, 36, 40])
def test_accuracies_near_0_and_1_never_have_a_zero_width_interval(hits):
    table = make_table({"PRE": ranks(hits, 40), "SFT": ranks(20, 40)}, metric="rank")
    row = row_of(stats.summarise(table, recovery=None), "PRE")
    assert (row["top5_low"], row["top5_high"]) == stats.wilson(hits, 40)
    assert row["top5_high"] - row["top5_low"] > 0.05


def test_accuracies_in_the_middle_have_bootstrap_intervals():
    table = make_table({"PRE": ranks(20, 40)}, metric="rank")
    row = row_of(stats.summarise(table, recovery=None), "PRE")
    # 20 of 40: binomial quantiles
    probabilities = np.cumsum([math.comb(40, k) / 2**40 for k in range(41)])
    low = int(np.searchsorted(probabilities, 0.025)) / 40
    assert row["top5_low"] == pytest.approx(low, abs=1 / 40 + 1e-9)
    assert row["top5_high"] == pytest.approx(1 - low, abs=1 / 40 + 1e-9)


def test_coverage_of_accuracy_intervals():
    """95% intervals hold the true accuracy about 95% of the time, also near 0 and 1."""
    rng = np.random.default_rng(0)
    for truth in (0.02, 0.1, 0.5, 0.97):
        table = apart(
            make_table({"PRE": ranks(int(rng.binomial(40, truth)), 40)}, metric="rank")
            for _ in range(150)
        )
        found = stats.summarise(table, ks=(5,), metrics=(), recovery=None, resamples=400)
        assert len(found) == 150
        held = ((found["top5_low"] <= truth) & (truth <= found["top5_high"])).sum()
        assert held / 150 >= 0.9, (truth, held)


def test_coverage_of_mean_and_recovery_intervals():
    rng = np.random.default_rng(5)
    tables = []
    for _ in range(200):
        base = rng.normal(-8, 1, 40)
        columns = {"PRE": base, "SFT": base + 6, "FE": base + 3 + rng.normal(0, 1, 40)}
        tables.append(make_table({graft: list(values) for graft, values in columns.items()}))
    found = stats.summarise(apart(tables), ks=(), resamples=500)
    found = found[found["graft"] == "FE"]
    assert len(found) == 200
    for metric, truth in {"logprob": -5, "recovery": 0.5}.items():
        held = ((found[f"{metric}_low"] <= truth) & (truth <= found[f"{metric}_high"])).sum()
        assert 180 <= held <= 199, (metric, held)


# --- which prompts count ---------------------------------------------------------------------


def test_a_prompt_counts_only_if_it_ran_under_every_graft():
    table = make_table(
        {"PRE": [-9.0, -8.0, -7.0, None], "SFT": [-1.0, -1.0, -1.0, -1.0], "FE": [-5.0, None, -3.0]}
    )
    summary = stats.summarise(table)
    assert (summary["n"] == 2).all()  # prompts 0 and 2
    assert (summary["not_run"] == 2).all()
    # prompt 3 has no row under FE at all: that is not run as well
    assert list(summary["failed"]) == [1, 0, 2]
    assert row_of(summary, "PRE")["logprob"] == -8.0
    assert row_of(summary, "FE")["logprob"] == -4.0
    fewer = stats.summarise(table, grafts=("PRE", "SFT"))
    assert (fewer["n"] == 3).all()


def test_a_group_in_which_nothing_ran_is_still_reported():
    good = make_table({"PRE": [-9.0, -8.0], "SFT": [-1.0, -2.0]})
    bad = make_table({"PRE": [None, None], "SFT": [-1.0, -2.0]}, template="award", first=2)
    summary = stats.summarise(pd.concat([good, bad], ignore_index=True))
    award = summary[summary["template"] == "award"]
    assert list(award["n"]) == [0, 0]
    assert list(award["not_run"]) == [2, 2]
    assert award[["top5", "top5_low", "logprob", "recovery"]].isna().all().all()
    assert set(award["recovery_note"]) == {"no prompt ran under every graft"}


def test_groups_and_pooling():
    one = make_table({"PRE": [-9.0, -8.0], "SFT": [-1.0, -2.0]})
    two = make_table({"PRE": [-7.0, -6.0], "SFT": [-3.0, -4.0]}, template="award", first=2)
    table = pd.concat([one, two], ignore_index=True)
    split = stats.summarise(table)
    assert list(split["template"]) == ["headline", "headline", "award", "award"]
    pd.testing.assert_frame_equal(stats.summarise(table, by="template"), split)
    pooled = stats.summarise(table, by=())
    assert "template" not in pooled
    assert list(pooled["logprob"]) == [-7.5, -2.5]
    alone = stats.summarise(two)
    pd.testing.assert_frame_equal(alone, split[2:].reset_index(drop=True))


def test_nullable_and_object_columns_are_read():
    table = make_table({"PRE": [1.0, 7.0, None], "SFT": [1.0, 1.0, 1.0]}, metric="rank")
    summary = stats.summarise(table.astype({"rank": "Int64", "reason": "string"}))
    pd.testing.assert_frame_equal(summary, stats.summarise(table))
    as_objects = stats.summarise(table.astype({"rank": object}))
    pd.testing.assert_frame_equal(as_objects, summary)


def test_an_optional_metric_that_nobody_measured_is_nan():
    table = make_table({"PRE": [-9.0, -8.0], "SFT": [-1.0, -2.0]})
    table["answer_logprob"] = np.nan
    summary = stats.summarise(table)
    assert summary[["answer_logprob", "answer_logprob_low"]].isna().all().all()
    assert summary["logprob"].notna().all()


def test_one_prompt_has_no_interval():
    summary = stats.summarise(make_table({"PRE": [-9.0], "SFT": [-1.0], "FE": [-5.0]}))
    row = row_of(summary, "FE")
    assert row["logprob"] == -5.0
    assert math.isnan(row["logprob_low"])
    assert math.isnan(row["recovery_low"])
    assert row["recovery"] == 0.5


# --- laws ------------------------------------------------------------------------------------

finite = st.floats(-30, 0, allow_nan=False, width=32)
samples = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*(st.lists(finite, min_size=n, max_size=n) for _ in range(3)))
)


@settings(deadline=None, max_examples=40)
@given(samples, st.integers(0, 5))
def test_intervals_hold_the_mean_and_order_does_not_matter(columns, seed):
    table = make_table(dict(zip(("PRE", "SFT", "FE"), columns, strict=True)))
    summary = stats.summarise(table, resamples=300, seed=seed)
    for metric in ("top1", "top5", "top50", "logprob"):
        assert (summary[f"{metric}_low"] <= summary[metric] + 1e-9).all()
        assert (summary[metric] <= summary[f"{metric}_high"] + 1e-9).all()
    shuffled = table.sample(frac=1, random_state=seed)
    again = stats.summarise(shuffled, resamples=300, seed=seed)
    order = list(summary["graft"])
    again = again.set_index("graft").loc[order].reset_index()[list(summary.columns)]
    pd.testing.assert_frame_equal(summary, again)


def test_the_seed_decides():
    table = random_table()
    pd.testing.assert_frame_equal(stats.summarise(table, seed=4), stats.summarise(table, seed=4))
    one, two = (row_of(stats.summarise(table, seed=s), "FE")["logprob_low"] for s in (4, 5))
    assert one != two


def test_the_table_is_left_unchanged():
    table = random_table()
    before = table.copy(deep=True)
    stats.summarise(table)
    stats.compare(table, "FE", "PRE", "logprob")
    pd.testing.assert_frame_equal(table, before)


# --- compare ---------------------------------------------------------------------------------


def brute_p(difference):
    sums = [abs(np.dot(s, difference)) for s in itertools.product((1, -1), repeat=len(difference))]
    return np.mean(np.array(sums) >= abs(sum(difference)) - 1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_small_permutation_tests_are_exact(difference):
    table = make_table({"A": [float(d) for d in difference], "B": [0.0] * len(difference)})
    found = stats.compare(table, "A", "B", "logprob", resamples=100)
    assert found.p_method == "exact"
    assert found.p_value == pytest.approx(brute_p(difference))


def test_accuracies_are_tested_exactly_at_any_size():
    """15 prompts only under a, 3 only under b: McNemar's test, 2 · P(X <= 3), X ~ B(18, ½)."""
    a = [1.0] * 15 + [100.0] * 3 + [1.0] * 60
    b = [100.0] * 15 + [1.0] * 3 + [1.0] * 60
    found = stats.compare(make_table({"A": a, "B": b}, metric="rank"), "A", "B", "top5")
    assert found.p_method == "exact"
    assert found.p_value == pytest.approx(2 * sum(math.comb(18, k) for k in range(4)) / 2**18)
    assert found.difference == pytest.approx(12 / 78)


def test_monte_carlo_agrees_with_enumeration_and_is_never_zero(monkeypatch):
    rng = np.random.default_rng(2)
    table = make_table({"A": list(rng.normal(0.5, 1, 14)), "B": [0.0] * 14})
    exact = stats.compare(table, "A", "B", "logprob")
    monkeypatch.setattr(permutation, "EXACT_LIMIT", 3)
    sampled = stats.compare(table, "A", "B", "logprob", seed=7)
    assert (exact.p_method, sampled.p_method) == ("exact", "monte carlo")
    assert sampled.p_value == pytest.approx(exact.p_value, abs=0.005)
    far = make_table({"A": [5.0 + i / 7 for i in range(30)], "B": [0.0] * 30})
    assert stats.compare(far, "A", "B", "logprob", permutations=999).p_value == 1 / 1000


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(11)
    ps = []
    for _ in range(300):
        pairs = rng.normal(0, 1, (10, 2))
        table = make_table({"A": list(pairs[:, 0]), "B": list(pairs[:, 1])})
        ps.append(stats.compare(table, "A", "B", "logprob", resamples=10).p_value)
    assert 0.02 <= np.mean(np.array(ps) <= 0.05) <= 0.085
    assert np.mean(ps) == pytest.approx(0.5, abs=0.05)


def test_compare_counts_the_prompts_of_the_pair_only():
    table = make_table({"A": [-1.0, -2.0, None], "B": [-2.0, -4.0, -3.0], "C": [None, None, None]})
    found = stats.compare(table, "A", "B", "logprob")
    assert (found.n, found.not_run) == (2, 1)
    assert (found.mean_a, found.mean_b, found.difference) == (-1.5, -3.0, 1.5)
    assert (found.low, found.high, found.interval) == (1.0, 2.0, "bootstrap")
    none = stats.compare(table, "A", "C", "logprob")
    assert (none.n, none.not_run, none.interval, none.p_method) == (0, 3, "none", "none")
    assert math.isnan(none.difference)


def test_compare_leaves_out_prompts_without_an_optional_metric():
    table = make_table({"A": [1.0, 2.0, np.nan], "B": [0.0, 0.5, 3.0]}, metric="logit_diff")
    found = stats.compare(table, "A", "B", "logit_diff")
    assert (found.n, found.not_run, found.difference) == (2, 1, 1.25)


def test_a_difference_of_all_or_nothing_has_an_honest_interval():
    table = make_table({"A": ranks(40, 40), "B": ranks(0, 40), "C": ranks(0, 40)}, metric="rank")
    sure = stats.compare(table, "A", "B", "top5")
    edge = stats.wilson(0, 40)[1]
    assert (sure.difference, sure.high, sure.interval) == (1.0, 1.0, "newcombe")
    assert sure.low == pytest.approx(1 - edge * math.sqrt(2))
    none = stats.compare(table, "B", "C", "top5")
    assert (none.difference, none.low, none.high) == (0.0, -edge, edge)
    assert none.p_value == 1.0


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # both, only a, only b, neither; Fagerland, Lydersen & Laake, Statistical Analysis of
        # Contingency Tables (2017), chapter 8: complete response before and after therapy
        ((59, 6, 16, 80), -0.1186, -0.0046),
        # No association to correct for, by hand: square and add of the two Wilson intervals
        ((0, 10, 0, 0), 1 - math.hypot(*[stats.wilson(0, 10)[1]] * 2), 1.0),
    ],
)
def test_newcombe_known_values(counts, low, high):
    kinds = [(True, True), (True, False), (False, True), (False, False)]
    pairs = np.array([kind for kind, n in zip(kinds, counts, strict=True) for _ in range(n)])
    assert _newcombe(pairs, 0.95) == (
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )


def test_holm():
    # By hand: 4·0.01, 3·0.02 = 0.06, then 2·0.03 = 0.06 (not below), 0.04 raised to 0.06
    assert stats.holm((0.04, 0.01, 0.03, 0.02)) == pytest.approx((0.06, 0.04, 0.06, 0.06))
    assert stats.holm((0.6, 0.9)) == (1.0, 1.0)
    assert stats.holm(()) == ()
    kept = stats.holm((0.02, math.nan, 0.01))
    assert kept[0] == pytest.approx(0.02)
    assert math.isnan(kept[1])
    assert kept[2] == pytest.approx(0.02)
    with pytest.raises(ValueError, match=r"p-value 1\.5 is outside \[0, 1\]"):
        stats.holm((0.1, 1.5))


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "PREE"}, r"base='PREE' is not one of the grafts 'PRE', 'SFT', 'FE': pass base="),
        ({"grafts": ("PRE", "FT")}, "no graft named 'FT' in the table; it has 'PRE', 'SFT', 'FE'"),
        ({"grafts": ("PRE", "PRE")}, "name at least one graft, and each once"),
        ({"grafts": ("PRE", "FE")}, "full='SFT' is not one of the grafts 'PRE', 'FE'"),
        ({"level": 95.0}, r"level=95.0 is not in \(0, 1\); for a 95% interval give level=0.95"),
        ({"level": 0.0}, r"level=0.0 is not in \(0, 1\)"),
        ({"resamples": 0}, "resamples=0 is not positive"),
        ({"metrics": ("accuracy",)}, "unknown metric 'accuracy'; choose 'top1', 'top5'"),
        ({"metrics": ("top5",)}, "metric 'top5' is requested twice"),
        ({"ks": (0,)}, "unknown metric 'top0'"),
        ({"recovery": "loss"}, "unknown metric 'loss'"),
        ({"by": ("relation",)}, "the table lacks column 'relation'; it has 'prompt', 'graft'"),
        ({"by": ("graft",)}, "by='graft' cannot group prompts"),
    ],
)
def test_errors_of_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        stats.summarise(random_table(), **options)


def test_errors_of_tables():
    table = random_table()
    with pytest.raises(ValueError, match="the table is empty"):
        stats.summarise(table[:0])
    with pytest.raises(
        ValueError, match=r"prompt 0 with graft 'PRE' has more than one row \(1 rows"
    ):
        stats.summarise(pd.concat([table, table[:1]]))
    with pytest.raises(ValueError, match="lacks column 'reason', 'rank'"):
        stats.summarise(table.drop(columns=["rank", "reason"]))
    with pytest.raises(ValueError, match="prompt 3 has more than one value in column 'template'"):
        stats.summarise(table.assign(template=table["template"].where(table.index != 3, "x")))
    with pytest.raises(
        ValueError, match=r"'logprob' has no value for 1 of 12 .*\(prompt 2\); a row"
    ):
        stats.summarise(table.assign(logprob=table["logprob"].where(table.index != 2)))
    with pytest.raises(ValueError, match=r"'answer_logprob' has no value .* leave the metric out"):
        stats.summarise(table.assign(answer_logprob=table["logprob"].where(table.index != 2)))
    with pytest.raises(ValueError, match="no graft named 'LT' in the table"):
        stats.compare(table, "LT", "PRE", "logprob")
    with pytest.raises(ValueError, match="41 successes of 40"):
        stats.wilson(41, 40)


def test_infinite_values_leave_all_else_as_it_is():
    """An answer that a graft's source has no row for has the log-probability -inf."""
    table = random_table()
    graft, prompt = "SFT", 2
    others = sorted(set(table["graft"]) - {graft, "PRE"})
    where = (table["graft"] == graft) & (table["prompt"] == prompt)
    odd = table.assign(logprob=table["logprob"].mask(where, -np.inf))
    said = f"logprob is infinite for prompt {prompt}, so that it has no mean"
    ways = {"by": (), "base": "PRE", "full": others[0], "metrics": ["logprob"]}
    plain, found = (stats.summarise(t, **ways).set_index("graft") for t in (table, odd))
    pd.testing.assert_frame_equal(plain.drop(graft), found.drop(graft))
    row = found.loc[graft]
    assert row["note"] == row["recovery_note"] == said
    assert row[["logprob", "logprob_low", "recovery", "recovery_high"]].isna().all()
    assert row["top5"] == plain.loc[graft, "top5"], "ranks are not infinite"
    ended = stats.summarise(odd, **ways | {"full": graft})
    assert ended["recovery"].isna().all()
    assert set(ended["recovery_note"]) == {said}
    assert ended.set_index("graft")["logprob"].drop(graft).notna().all()

    for metric in ("logprob", "recovery"):
        ends = {"base": "PRE", "full": others[0]} if metric == "recovery" else {}
        plain, found = (
            stats.compare_all(t, against="PRE", metric=metric, **ends).set_index("a")
            for t in (table, odd)
        )
        kept = [c for c in plain if c not in ("p_adjusted", "compared")]
        pd.testing.assert_frame_equal(plain[kept].drop(graft), found[kept].drop(graft))
        assert found.loc[graft, "note"] == said
        assert pd.isna(found.loc[graft, ["difference", "p_value", "p_adjusted"]]).all()
        assert (found["compared"] == len(found) - 1).all()
    levels = stats.stability(odd, metric="logprob")
    level = table.loc[where, "template"].iloc[0]
    assert all(note.endswith(f"template={level} is not counted: {said}") for note in levels["note"])


# --- units other than prompts ----------------------------------------------------------------


def cells(lists, **columns):
    """A table from {graft: values}; `columns`: further columns, one value a prompt."""
    table = make_table(lists)
    for name, values in columns.items():
        table[name] = table["prompt"].map(dict(enumerate(values)))
    return table


def clustered(rng, facts=30, templates=4, shared=1.0, own=0.3, shift=0.0):
    """Graft A minus graft B: `shift`, a part that a fact's prompts share, and one of their own."""
    of_fact = np.tile(rng.normal(0, shared, facts), templates)
    difference = shift + of_fact + rng.normal(0, own, facts * templates)
    return cells(
        {"A": list(difference), "B": [0.0] * len(difference)},
        fact=np.tile(np.arange(facts), templates),
        template=np.repeat(list("wxyz")[:templates], facts),
    )


def test_facts_of_several_prompts_are_drawn_whole():
    """By hand, over all draws: facts of 1, 2 and 3 prompts, the mean is over the prompts drawn."""
    values = np.array([[1.0], [2.0], [4.0], [6.0], [6.0], [9.0]])
    units = np.array([0, 1, 1, 2, 2, 2])
    draws = stats.bootstrap_means(values, resamples=40_000, seed=2, units=units)[:, 0]
    rows = [np.flatnonzero(units == unit) for unit in range(3)]
    exact = [
        values[np.concatenate([rows[unit] for unit in pick])].mean()
        for pick in itertools.product(range(3), repeat=3)
    ]
    assert set(np.round(draws, 9)) == set(np.round(exact, 9))
    for point in set(exact):
        share = np.isclose(exact, point).mean()
        assert np.isclose(draws, point).mean() == pytest.approx(share, abs=0.01)


@settings(deadline=None, max_examples=15)
@given(samples, st.integers(0, 5))
def test_facts_of_one_prompt_each_are_prompts(columns, seed):
    names = ("PRE", "SFT", "FE")
    table = make_table(dict(zip(names, columns, strict=True)))
    table["rank"] = np.where(table["logprob"] > -10, 1.0, 60.0)
    table["fact"] = table["prompt"].map("film {}".format)
    settled = {"resamples": 200, "seed": seed}
    plain, facts = (stats.summarise(table, unit=u, **settled) for u in ("prompt", "fact"))
    same = [name for name in plain if name != "unit"]
    notes = facts["recovery_note"].str.replace("one fact", "one prompt")
    pd.testing.assert_frame_equal(plain[same], facts.assign(recovery_note=notes)[same])
    for metric in ("logprob", "top5", "recovery"):
        plain, facts = (
            stats.compare_all(
                table, [("FE", "PRE"), ("FE", "SFT")], metric=metric, unit=u, **settled
            )
            for u in ("prompt", "fact")
        )
        same = [name for name in plain if name not in ("unit", "note")]
        pd.testing.assert_frame_equal(plain[same], facts[same])


def test_facts_that_recur_widen_the_intervals_as_theory_says():
    table = clustered(np.random.default_rng(3), facts=60, own=0.0)
    plain, whole = (stats.compare(table, "A", "B", "logprob", unit=u) for u in ("prompt", "fact"))
    assert plain.difference == whole.difference
    # Prompts that always agree are worth one: twice the width for four a fact
    assert (whole.high - whole.low) / (plain.high - plain.low) == pytest.approx(2, rel=0.1)
    alone = table[table["template"] == "w"]
    one = stats.compare(alone, "A", "B", "logprob")
    assert (whole.low, whole.high) == pytest.approx((one.low, one.high))
    assert whole.p_value == pytest.approx(one.p_value, abs=0.01)


def test_intervals_and_tests_over_facts_hold_what_they_promise():
    """30 facts in 4 templates: over facts 95% intervals hold 95%, over prompts far fewer."""
    rng = np.random.default_rng(4)
    held = {"prompt": 0, "fact": 0}
    rejected = {"prompt": 0, "fact": 0}
    for seed in range(150):
        table = clustered(rng, shift=0.0)
        for unit in held:
            found = stats.compare(
                table, "A", "B", "logprob", unit=unit, resamples=400, permutations=400, seed=seed
            )
            held[unit] += found.low <= 0 <= found.high
            rejected[unit] += found.p_value <= 0.05
    assert 135 <= held["fact"] <= 149
    assert 1 <= rejected["fact"] <= 15
    assert held["prompt"] < 120
    assert rejected["prompt"] > 30


def test_accuracies_over_facts_near_0_and_1_are_those_of_so_many_prompts():
    hits = {"A": [1.0] * 120, "B": [100.0] * 120}
    table = make_table(hits, metric="rank")
    table["fact"] = table["prompt"] % 40
    row = row_of(stats.summarise(table, recovery=None, unit="fact"), "B")
    assert (row["n"], row["units"], row["unit"]) == (120, 40, "fact")
    assert (row["top5_low"], row["top5_high"]) == stats.wilson(0, 40)
    found = stats.compare(table, "A", "B", "top5", unit="fact")
    single = stats.compare(table[table["prompt"] < 40], "A", "B", "top5")
    assert (found.interval, found.low, found.high) == ("newcombe", single.low, single.high)
    assert found.p_value == single.p_value == 2 / 2**40
    # Facts of unequal size are worth fewer: (3 + 1)² / (3² + 1²) = 1.6 prompts, by hand
    lopsided = cells({"PRE": [-1.0] * 4}, fact=["f", "f", "f", "g"])
    row = row_of(stats.summarise(lopsided, recovery=None, unit="fact"), "PRE")
    assert row["top5"] == 1.0
    z2 = 1.959963984540054**2
    assert row["top5_low"] == pytest.approx(1.6 / (1.6 + z2))


def test_tables_say_what_their_intervals_are_over():
    table = cells({"PRE": [-9.0, -8.0] * 3, "SFT": [-1.0, -2.0] * 3}, fact=[0, 0, 1, 1, 2, 2])
    plain, facts = (text.text_table(stats.summarise(table, unit=u)) for u in ("prompt", "fact"))
    assert "95% intervals over prompts." in plain
    assert "95% intervals over prompts grouped by fact." in facts


def test_sign_flips_over_facts_flip_whole_facts():
    rng = np.random.default_rng(8)
    difference = rng.normal(0.4, 1, 21)
    facts = np.repeat(np.arange(7), 3)
    table = cells({"A": list(difference), "B": [0.0] * 21}, fact=facts)
    found = stats.compare(table, "A", "B", "logprob", unit="fact")
    sums = [difference[facts == fact].sum() for fact in range(7)]
    assert found.p_method == "exact"
    assert found.p_value == pytest.approx(brute_p(sums))


# --- compare_all -----------------------------------------------------------------------------


def many(seed=0, n=30, grafts=6, missing=0):
    """PRE, SFT and grafts between them; the first `missing` prompts do not run under g0."""
    rng = np.random.default_rng(seed)
    base = rng.normal(-8, 1, n)
    lists = {"PRE": list(base), "SFT": list(base + 6 + rng.normal(0, 0.3, n))}
    for i in range(grafts):
        lists[f"g{i}"] = list(base + i + rng.normal(0, 1, n))
    lists["g0"][:missing] = [None] * missing
    table = make_table(lists)
    ranks_ = np.ceil(np.exp(np.clip(-table["logprob"] - 1, 0, 9)))
    return table.assign(rank=ranks_)


@pytest.mark.parametrize("metric", ["logprob", "top5", "rank"])
@pytest.mark.parametrize("missing", [0, 4])
def test_many_comparisons_are_each_as_alone(metric, missing):
    table = many(missing=missing)
    found = stats.compare_all(table, against="PRE", metric=metric)
    assert list(found["a"]) == ["SFT", *(f"g{i}" for i in range(6))]
    assert set(found["b"]) == {"PRE"}
    assert list(found["p_adjusted"]) == list(stats.holm(list(found["p_value"])))
    assert (found["p_adjusted"] >= found["p_value"]).all()
    assert (found["compared"] == 7).all()
    for _, row in found.iterrows():
        alone = stats.compare(table, row["a"], "PRE", metric)
        for field in ("n", "not_run", "mean_a", "mean_b", "difference", "interval", "p_method"):
            assert row[field] == getattr(alone, field), field
        assert (row["low"], row["high"]) == pytest.approx((alone.low, alone.high))
        close = 0.01 if alone.p_method == "monte carlo" else 1e-12
        assert row["p_value"] == pytest.approx(alone.p_value, abs=close)
    assert list(found["n"]) == [30, 30 - missing, 30, 30, 30, 30, 30]


def test_many_p_values_agree_with_scipy():
    table = many(n=25)
    found = stats.compare_all(table, [("g1", "g2"), ("g0", "PRE"), ("g3", "g4")])
    wide = table.pivot(index="prompt", columns="graft", values="logprob")
    for _, row in found.iterrows():
        difference = (wide[row["a"]] - wide[row["b"]]).to_numpy()
        theirs = scipy.stats.permutation_test(
            (difference,),
            np.mean,
            permutation_type="samples",
            n_resamples=20_000,
            rng=np.random.default_rng(1),
        )
        assert row["p_value"] == pytest.approx(theirs.pvalue, abs=0.02)
        ends = scipy.stats.bootstrap(
            (difference,),
            np.mean,
            method="percentile",
            n_resamples=20_000,
            rng=np.random.default_rng(1),
        ).confidence_interval
        assert (row["low"], row["high"]) == pytest.approx((ends.low, ends.high), abs=0.03)


def test_differences_of_recovery_are_those_of_ratios_of_resampled_means():
    table = many(seed=5)
    found = stats.compare_all(table, [("g4", "g2"), ("SFT", "g3")], metric="recovery")
    wide = table.pivot(index="prompt", columns="graft", values="logprob").to_numpy()
    names = sorted(set(table["graft"]))
    at = {graft: i for i, graft in enumerate(names)}
    rng = np.random.default_rng(77)
    draws = wide[rng.integers(0, 30, (6000, 30))].mean(axis=1)
    summary = stats.summarise(table).set_index("graft")
    for _, row in found.iterrows():
        a, b = row["a"], row["b"]
        gap = draws[:, at["SFT"]] - draws[:, at["PRE"]]
        ratios = (draws[:, at[a]] - draws[:, at[b]]) / gap
        low, high = np.quantile(ratios, (0.025, 0.975))
        assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.01)
        assert row["mean_a"] == pytest.approx(summary["recovery"][a])
        assert row["mean_b"] == pytest.approx(summary["recovery"][b])
        assert row["difference"] == pytest.approx(row["mean_a"] - row["mean_b"])
        alone = stats.compare(table, a, b, "logprob")
        assert row["p_value"] == pytest.approx(alone.p_value, abs=0.01)
    assert list(found["recovery_of"]) == ["logprob"] * 2


def test_differences_of_recovery_need_all_four_grafts_and_a_gap():
    table = make_table(
        {
            "PRE": [-9.0, -8.0, -7.0, None],
            "SFT": [-1.0, -2.0, -1.5, -1.0],
            "A": [-4.0, -4.0, -3.0, -3.0],
            "B": [-6.0, None, -6.5, -3.0],
        }
    )
    (row,) = stats.compare_all(table, [("A", "B")], metric="recovery").to_dict("records")
    assert (row["n"], row["not_run"]) == (2, 2)  # prompts 0 and 2
    # Gaps 8 and 5.5, so mean 6.75; A − B is 2 and 3.5, so 2.75
    assert row["difference"] == pytest.approx(2.75 / 6.75)
    (ends,) = stats.compare_all(table, [("SFT", "PRE")], metric="recovery").to_dict("records")
    assert (ends["difference"], ends["interval"]) == (1.0, "none")
    assert ends["note"] == "base and full recover 0 and 1 by definition"
    flat = make_table({"PRE": [-2.0, -3.0], "SFT": [-2.0, -3.0], "A": [-1.0, -1.0]})
    (row,) = stats.compare_all(flat, [("A", "PRE")], metric="recovery").to_dict("records")
    assert row["note"] == "full and base are equal: there is nothing to recover"
    assert math.isnan(row["difference"])
    assert math.isnan(row["p_value"])
    assert row["compared"] == 0


def test_groups_count_in_the_correction():
    table = pd.concat(
        [many(seed=1, n=8), many(seed=2, n=8).assign(prompt=lambda t: t["prompt"] + 8)],
        ignore_index=True,
    )
    table["template"] = np.where(table["prompt"] < 8, "headline", "award")
    found = stats.compare_all(table, [("g1", "PRE"), ("g2", "PRE")], by="template")
    assert list(found["template"]) == ["headline", "headline", "award", "award"]
    assert (found["compared"] == 4).all()
    for template, part in found.groupby("template"):
        alone = stats.compare(table[table["template"] == template], "g1", "PRE", "logprob")
        assert part["p_value"].iloc[0] == alone.p_value
        ends = part["low"].iloc[0], part["high"].iloc[0]
        assert ends == pytest.approx((alone.low, alone.high))


def test_a_comparison_without_prompts_is_not_counted():
    table = make_table({"A": [-1.0, -2.0], "B": [-2.0, -4.0], "C": [None, None]})
    found = stats.compare_all(table, [("A", "B"), ("A", "C")])
    assert list(found["n"]) == [2, 0]
    assert list(found["compared"]) == [1, 1]
    assert found["p_adjusted"][0] == found["p_value"][0]
    assert found["p_adjusted"].isna()[1]
    assert list(found["note"]) == [None, "no prompt ran under every graft"]
    one = stats.compare_all(table[table["prompt"] == 0], [("A", "B")])
    assert list(one["note"]) == ["one prompt has no interval"]
    assert list(one["p_value"]) == [1.0]


def test_the_family_is_held_to_its_rate_where_nothing_differs():
    """10 grafts that are base plus noise: any adjusted p <= 0.05 in about 5% of sweeps, or less."""
    rng = np.random.default_rng(21)
    false = raw = 0
    for seed in range(100):
        base = rng.normal(-5, 1, 12)
        lists = {f"g{i}": list(base + rng.normal(0, 1, 12)) for i in range(10)}
        found = stats.compare_all(
            make_table({"PRE": list(base), **lists}), against="PRE", resamples=10, seed=seed
        )
        false += bool((found["p_adjusted"] <= 0.05).any())
        raw += bool((found["p_value"] <= 0.05).any())
    assert false <= 11
    assert raw >= 25


# --- stability -------------------------------------------------------------------------------


def levels_table():
    """Three templates over the same four facts, twelve prompts; logprob by hand."""
    values = {
        "PRE": [-10.0, -10, -8, -8] * 3,
        "SFT": [-2.0, -2, 0, 0] * 3,
        # recovery 4/8, 6/8, 2/8
        "A": [-6.0, -6, -4, -4, -4, -4, -2, -2, -8, -8, -6, -6],
        # recovery 2/8, 4/8, 3/8
        "B": [-8.0, -8, -6, -6, -6, -6, -4, -4, -7, -7, -5, -5],
        "C": [-10.0, -10, -8, -8, -9, -9, -7, -7, -10, -10, -8, -8],
    }
    return cells(values, template=np.repeat(["x", "y", "z"], 4), fact=[0, 1, 2, 3] * 3)


def test_stability_of_hand_made_numbers():
    found = stats.stability(levels_table()).set_index("graft")
    a = found.loc["A"]
    assert list(a[["template=x", "template=y", "template=z"]]) == [0.5, 0.75, 0.25]
    assert (a["mean"], a["min"], a["max"], a["levels"]) == (0.5, 0.25, 0.75, 3)
    assert a["sd"] == 0.25
    assert (a["n"], a["not_run"], a["units"]) == (12, 0, 12)
    # Orders A > B > C, A > B > C, B > A > C: τ is 1, 1/3, 1/3
    assert a["tau"] == pytest.approx(5 / 9)
    assert (a["tau_min"], a["tau_pairs"]) == (pytest.approx(1 / 3), 3)
    assert list(found.loc["PRE"][["mean", "low", "high", "sd"]]) == [0, 0, 0, 0]
    assert list(found.loc["SFT"][["mean", "low", "high", "sd"]]) == [1, 1, 1, 0]


def test_one_level_is_a_summary():
    table = many(seed=3)
    for metric in ("recovery", "logprob", "top5"):
        found = stats.stability(table, metric=metric)
        summary = stats.summarise(table)
        for ours, theirs in (("mean", ""), ("low", "_low"), ("high", "_high")):
            np.testing.assert_allclose(found[ours], summary[f"{metric}{theirs}"], rtol=1e-12)
        assert found["sd"].isna().all()
        assert found["tau"].isna().all()
        assert (found["levels"] == 1).all()
        assert found["note"].isna().all()


def weak(seed, facts, shared=1.0):
    """A gap of about two standard errors over facts: some resamples have the other sign."""
    rng = np.random.default_rng(seed)
    gap = np.repeat(rng.normal(0, shared, facts), 4) + rng.normal(0, 0.1, facts * 4)
    gap += 2.2 * shared / math.sqrt(facts) - gap.mean()
    base = rng.normal(-8, 1, facts * 4)
    a = base + gap / 2 + rng.normal(0, 0.3, facts * 4)
    fact = np.repeat(np.arange(facts), 4)
    return cells({"PRE": list(base), "SFT": list(base + gap), "A": list(a)}, fact=fact)


@pytest.mark.parametrize("seed", range(6))
def test_one_level_is_a_summary_also_where_the_gap_is_weak(seed):
    table = weak(seed, facts=12)
    for unit in ("prompt", "fact"):
        found = stats.stability(table, unit=unit)
        summary = stats.summarise(table, unit=unit)
        for ours, theirs in (("mean", ""), ("low", "_low"), ("high", "_high")):
            np.testing.assert_allclose(found[ours], summary[f"recovery{theirs}"], rtol=1e-9)
        assert found["note"].isna().all() == summary["recovery_note"].isna().all()


def test_weak_gaps_count_against_both_ends():
    """By hand, from the resamples themselves, and some of the cases above are such."""
    table = weak(2, facts=12)
    row = row_of(stats.summarise(table, unit="fact"), "A")
    wide = table.pivot(index="prompt", columns="graft", values="logprob")
    whole = wide.to_numpy().reshape(12, 4, 3).sum(axis=1)  # columns A, PRE, SFT
    a, pre, sft = stats.bootstrap_means(whole, resamples=10_000, seed=0).T
    turned = sft <= pre
    assert 0 < turned.sum() < 250
    ratios = (a - pre) / (sft - pre)
    below, above = (np.sort(np.where(turned, end, ratios)) for end in (-np.inf, np.inf))
    assert row["recovery_low"] == pytest.approx(below[249])
    assert row["recovery_high"] == pytest.approx(above[9750])


def test_facts_that_only_some_templates_ask_for():
    """Facts 0 to 19 in one template, 10 to 29 in the other: drawn for both at once, by hand."""
    rng = np.random.default_rng(14)
    values = {"x": rng.normal(-4, 1, 20), "y": rng.normal(-2, 1, 20)}
    values["y"][:10] += 2 * (values["x"][10:] + 4)
    table = cells(
        {"A": [*values["x"], *values["y"]]},
        template=np.repeat(["x", "y"], 20),
        fact=[*range(20), *range(10, 30)],
    )
    found = stats.stability(table, unit="fact", metric="logprob").iloc[0]
    assert found["units"] == 30
    draws = []
    for _ in range(6000):
        pick = rng.integers(0, 30, 30)
        means = values["x"][pick[pick < 20]].mean(), values["y"][pick[pick >= 10] - 10].mean()
        draws.append(np.mean(means))
    ends = np.quantile(draws, (0.025, 0.975))
    assert (found["low"], found["high"]) == pytest.approx(tuple(ends), abs=0.025)
    # One fact that is missing in one template does not take the interval away
    most = levels_table().query("prompt != 3")
    found = stats.stability(most, unit="fact", metric="logprob").set_index("graft").loc["A"]
    assert found["low"] < found["mean"] < found["high"]


@pytest.mark.parametrize("unit", ["prompt", "fact"])
def test_intervals_over_prompts_or_facts_of_the_mean_over_templates(unit):
    """Against a bootstrap by hand: prompts drawn within templates, facts drawn for all at once."""
    rng = np.random.default_rng(6)
    of_fact = rng.normal(0, 1, 20)
    lists = {"PRE": [], "SFT": [], "A": []}
    for shift in (0.0, 1.0, 2.0):
        base = rng.normal(-9, 1, 20)
        lists["PRE"] += list(base)
        lists["SFT"] += list(base + 6)
        lists["A"] += list(base + 2 + shift + of_fact + rng.normal(0, 0.2, 20))
    columns = {"template": np.repeat(list("xyz"), 20), "fact": np.tile(np.arange(20), 3)}
    table = cells(lists, **columns)
    found = stats.stability(table, unit=unit).set_index("graft").loc["A"]
    assert found["units"] == (60 if unit == "prompt" else 20)
    cube = np.array([lists["PRE"], lists["SFT"], lists["A"]]).reshape(3, 3, 20)
    rng = np.random.default_rng(60)
    draws = []
    for _ in range(4000):
        if unit == "prompt":
            pick = rng.integers(0, 20, (3, 20))
        else:
            pick = np.broadcast_to(rng.integers(0, 20, 20), (3, 20))
        pre, sft, a = np.take_along_axis(cube, pick[None], axis=2).mean(axis=2)
        draws.append(((a - pre) / (sft - pre)).mean())
    ends = np.quantile(draws, (0.025, 0.975))
    assert (found["low"], found["high"]) == pytest.approx(tuple(ends), abs=0.006)


def test_templates_as_units_have_a_t_interval():
    found = stats.stability(levels_table(), unit="template").set_index("graft")
    ends = scipy.stats.ttest_1samp([0.5, 0.75, 0.25], 0).confidence_interval(0.95)
    row = found.loc["A"]
    assert (row["low"], row["high"]) == pytest.approx((ends.low, ends.high))
    assert (row["units"], row["unit"]) == (3, "template")
    assert list(found.loc["SFT"][["low", "high"]]) == [1, 1]
    share = stats.stability(levels_table(), unit="template", metric="prob")
    assert set(share["note"]) == {"all levels agree: they vary too little for an interval"}
    assert share["low"].isna().all()
    ranked = levels_table().assign(rank=lambda t: np.where(t["prompt"] == 4, 9.0, 1.0))
    share = stats.stability(ranked, unit="template", metric="top5")
    assert (share["high"] == 1.0).all()
    assert (share["mean"] == (1 + 0.75 + 1) / 3).all()
    one = stats.stability(many(), unit="template").set_index("graft")
    assert one.loc["g1", "note"] == "fewer than two levels have no interval"
    assert math.isnan(one.loc["g1", "low"])


def test_t_intervals_over_templates_cover_new_templates():
    """5 templates that differ: their unit must be the template for the mean of all to be held."""
    rng = np.random.default_rng(9)
    held = {"template": 0, "prompt": 0}
    for seed in range(120):
        values = (rng.normal(0, 1, 5)[:, None] + rng.normal(0, 1, (5, 10))).ravel()
        table = cells({"A": list(values)}, template=np.repeat(list("vwxyz"), 10))
        for unit in held:
            (row,) = stats.stability(
                table, unit=unit, metric="logprob", resamples=300, seed=seed
            ).to_dict("records")
            held[unit] += row["low"] <= 0 <= row["high"]
    assert 106 <= held["template"] <= 119
    assert held["prompt"] < 85


def test_levels_without_a_value_are_said_and_not_counted():
    table = levels_table()
    gone = (table["template"] == "y") & (table["graft"] == "B")
    table.loc[gone, [*averaged()]] = np.nan
    table.loc[gone, "reason"] = "no such span"
    found = stats.stability(table).set_index("graft").loc["A"]
    assert (found["levels"], found["mean"], found["n"], found["not_run"]) == (2, 0.375, 8, 4)
    assert math.isnan(found["template=y"])
    assert found["note"] == (
        "template=y is not counted: no prompt ran under every graft; "
        "all resamples agree: the prompts vary too little for an interval"
    )
    flat = levels_table()
    flat.loc[(flat["template"] == "z") & (flat["graft"] == "SFT"), "logprob"] = [-10, -10, -8, -8]
    found = stats.stability(flat).set_index("graft").loc["A"]
    why = "template=z is not counted: full and base are equal: there is nothing to recover"
    assert found["note"].startswith(why)
    none = stats.stability(table[table["template"] == "y"]).set_index("graft").loc["A"]
    assert (none["levels"], none["n"], none["units"]) == (0, 0, 0)
    assert math.isnan(none["mean"])


def test_prompts_that_recur_in_levels_are_one_unit():
    """The same prompts under two models: nothing is gained by a model that says the same."""
    table = many(seed=4)
    both = pd.concat([table.assign(seed=0), table.assign(seed=1)], ignore_index=True)
    twice = stats.stability(both, by="seed")
    once = stats.stability(table.assign(seed=0), by="seed")
    assert list(twice["units"]) == list(once["units"]) == [30] * 8
    for name in ("mean", "low", "high"):
        np.testing.assert_allclose(twice[name], once[name], rtol=1e-12)
    np.testing.assert_allclose(twice["tau"], 1, rtol=1e-12)
    assert (twice["sd"] == 0).all()


def test_levels_near_0_and_1_have_honest_intervals():
    table = levels_table().assign(rank=1.0)
    found = stats.stability(table, metric="top5").iloc[0]
    assert (found["low"], found["high"]) == stats.wilson(12, 12)
    found = stats.stability(table, metric="top5", unit="fact").iloc[0]
    assert (found["low"], found["high"]) == stats.wilson(4, 4)


def test_a_level_with_one_prompt_has_a_value_and_no_interval():
    table = levels_table()
    found = stats.stability(table[table["prompt"].isin([0, 1, 4])], metric="logprob")
    row = found.set_index("graft").loc["A"]
    assert (row["template=x"], row["template=y"], row["mean"]) == (-6, -4, -5)
    assert math.isnan(row["low"])
    assert row["note"] == "a level with one prompt has no interval"
    alone = stats.stability(table[table["prompt"] == 0], metric="logprob")
    assert set(alone["note"]) == {"one prompt has no interval"}


def test_orders_agree_as_scipy_says():
    rng = np.random.default_rng(12)
    lists = {f"g{i}": list(rng.integers(-4, 0, 12).astype(float)) for i in range(7)}
    table = cells(lists, template=np.repeat(list("xyz"), 4))
    found = stats.stability(table, metric="logprob", resamples=50)
    levels = found[[f"template={name}" for name in "xyz"]].to_numpy().T
    taus = [scipy.stats.kendalltau(p, q).statistic for p, q in itertools.combinations(levels, 2)]
    assert found["tau"][0] == pytest.approx(np.mean(taus))
    assert found["tau_min"][0] == pytest.approx(min(taus))
    # Grafts that only rounding tells apart are tied: else τ would be below 1 here
    noise = {"g0": [-1.0, -1.0], "g1": [-2.0, -2.0], "g2": [-2.0, -2.0 - 1e-15]}
    tied = stats.stability(cells(noise, template=["x", "y"]), metric="logprob", resamples=50)
    assert tied["tau"][0] == pytest.approx(1)
    same = stats.stability(table.assign(logprob=-1.0), metric="logprob", resamples=50)
    assert (same["tau_pairs"] == 0).all()
    assert same["tau"].isna().all()


# --- laws of all three -----------------------------------------------------------------------

CALLS = {
    "summarise": lambda table, **o: stats.summarise(table, resamples=200, **o),
    "compare_all": lambda table, **o: stats.compare_all(
        table, [("g2", "g1"), ("g3", "PRE")], resamples=200, permutations=500, **o
    ),
    "recoveries": lambda table, **o: stats.compare_all(
        table, [("g2", "g1"), ("g3", "PRE")], metric="recovery", resamples=200, **o
    ),
    "stability": lambda table, **o: stats.stability(table, resamples=200, **o),
}


def two_templates(n=20):
    table = many(seed=9, n=n)
    table["template"] = np.where(table["prompt"] % 2 == 0, "headline", "award")
    table["fact"] = table["prompt"] // 2
    return table


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("unit", ["prompt", "fact"])
def test_prompts_that_did_not_run_change_only_the_count(call, unit):
    table = two_templates()
    bad = table[table["prompt"] < 3].assign(
        prompt=lambda t: t["prompt"] + 1000,
        fact=lambda t: t["fact"] + 1000,
        reason="no such span",
        **dict.fromkeys(averaged(), np.nan),
    )
    before = call(table, unit=unit)
    after = call(pd.concat([table, bad], ignore_index=True), unit=unit)
    assert (after["not_run"] > before["not_run"]).all()
    counts = ["not_run", *(["failed"] if "failed" in before else [])]
    pd.testing.assert_frame_equal(before.drop(columns=counts), after.drop(columns=counts))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_order_of_rows_and_the_kind_of_columns_change_nothing(call):
    table = two_templates()
    before = call(table, unit="fact")
    shuffled = call(table.sample(frac=1, random_state=1), unit="fact")
    keys = [k for k in ("template", "graft", "a", "b") if k in before]
    columns = sorted(before.columns)
    pd.testing.assert_frame_equal(
        before.sort_values(keys, ignore_index=True)[columns],
        shuffled.sort_values(keys, ignore_index=True)[columns],
    )
    kinds = {"graft": "category", "template": "category", "fact": "category", "rank": "Int64"}
    # A category that no row has, and an order of its own
    odd = table.astype(kinds)
    odd["template"] = odd["template"].cat.set_categories(["none", "award", "headline"])
    odd["reason"] = odd["reason"].astype("category")
    pd.testing.assert_frame_equal(before, call(odd, unit="fact"))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_table_of_many_batches_is_as_one(call, monkeypatch):
    table = two_templates()
    before = call(table)
    # Batches of one graft or pair; the resamples, which CHUNK also cuts, must stay in one piece.
    monkeypatch.setattr(
        resampling.Draw,
        "batches",
        lambda self, columns, sheets=1: (slice(i, i + 1) for i in range(columns)),
    )
    pd.testing.assert_frame_equal(before, call(table), rtol=1e-9)


@pytest.mark.slow
def test_a_sweep_is_summarised_without_drawing_every_cell():
    """200 prompts × 1400 grafts; was minutes and gigabytes when every cell was drawn on its own."""
    prompts, grafts = 200, 1400
    rng = np.random.default_rng(0)
    logprob = rng.normal(-5, 1, (prompts, grafts)) + 4 * (np.arange(grafts) == 1)
    table = pd.DataFrame(
        {
            "prompt": np.repeat(np.arange(prompts), grafts),
            "graft": np.tile(["PRE", "SFT", *(f"g{i}" for i in range(grafts - 2))], prompts),
            "template": "t",
            "logprob": logprob.ravel(),
            "answer_logprob": logprob.ravel() - 1,
            "rank": rng.integers(1, 12, prompts * grafts),
            "reason": None,
        }
    ).astype({"graft": "category", "template": "category"})
    tracemalloc.start()
    try:
        summary = stats.summarise(table)
        compared = stats.compare_all(table, against="PRE")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Draws of every cell on its own would be 8 bytes × 2,000 or more × 280,000 cells.
    assert peak < 5e8
    assert len(summary) == grafts
    assert len(compared) == grafts - 1
    wide = np.quantile(
        logprob[np.random.default_rng(5).integers(0, prompts, (4000, prompts)), 7].mean(axis=1),
        (0.025, 0.975),
    )
    row = row_of(summary, "g5")
    assert (row["logprob_low"], row["logprob_high"]) == pytest.approx(tuple(wide), abs=0.02)
    assert compared["p_adjusted"][0] == pytest.approx(1399 / 100_001)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: stats.compare_all(t), "neither of pairs and against given; give pairs="),
        (
            lambda t: stats.compare_all(t, [("g1", "g2")], against="PRE"),
            "both of pairs and against given",
        ),
        (lambda t: stats.compare_all(t, []), "pairs is empty; give at least one pair"),
        (
            lambda t: stats.compare_all(t, [("g1", "g9")]),
            "no graft named 'g9' in the table; it has 'PRE', 'SFT', 'g0'",
        ),
        (lambda t: stats.compare_all(t, against="g9"), "no graft named 'g9' in the table"),
        (
            lambda t: stats.compare_all(t[t["graft"] == "PRE"], against="PRE"),
            "the table has no graft but 'PRE': there is nothing to compare it with",
        ),
        (
            lambda t: stats.compare_all(t, [("g1", "g1")]),
            r"pair \('g1', 'g1'\) compares a graft with itself",
        ),
        (
            lambda t: stats.compare_all(t, [("g1", "g2"), ("g2", "g1")]),
            r"pair \('g2', 'g1'\) is given twice \(either way round\)",
        ),
        (
            lambda t: stats.compare_all(t, against="PRE", metric="loss"),
            "unknown metric 'loss'; choose .* 'logit_diff', .*'margin', .*'recovery'",
        ),
        (
            lambda t: stats.compare_all(t, against="g1", metric="recovery", full="sft"),
            "full='sft' is not one of the grafts .* or another metric than 'recovery'",
        ),
        (
            lambda t: stats.compare_all(t, against="PRE", permutations=0),
            "permutations=0 is not positive",
        ),
        (
            lambda t: stats.summarise(t, unit="film"),
            "the table lacks column 'film'; it has 'prompt'",
        ),
        (
            lambda t: stats.summarise(t, unit="graft"),
            "unit='graft' does not say which prompts belong together; use 'prompt'",
        ),
        (
            lambda t: stats.compare(t, "g1", "g2", "top5", unit="reason"),
            "unit='reason' does not say which prompts belong together",
        ),
        (
            lambda t: stats.summarise(
                t.assign(fact=t["fact"].where(t["prompt"] != 4)), unit="fact"
            ),
            "column 'fact' has no value for prompt 4; give every prompt its unit",
        ),
        (
            lambda t: stats.summarise(t.assign(fact=t.index), unit="fact"),
            "prompt 0 has more than one value in column 'fact'; a prompt belongs to one unit",
        ),
        (
            lambda t: stats.stability(t, by="graft"),
            "by='graft' cannot group prompts; use such as 'template'",
        ),
        (lambda t: stats.stability(t, by="seed"), "the table lacks column 'seed'"),
        (
            lambda t: stats.stability(t.assign(template=t["template"].where(t["prompt"] != 4))),
            "column 'template' has no value in 8 rows; give every row its level",
        ),
        (
            lambda t: stats.stability(pd.concat([t, t])),
            r"prompt 0 with graft 'PRE' and template 'headline' has more than one row .*"
            r"drop_duplicates\(\['template', 'prompt', 'graft'\]\)",
        ),
        (
            lambda t: stats.stability(t, grafts=("g1", "SFT")),
            "base='PRE' is not one of the grafts 'g1', 'SFT'.*or another metric than 'recovery'",
        ),
        (lambda t: stats.stability(t, level=95.0), r"level=95.0 is not in \(0, 1\)"),
    ],
)
def test_errors_of_units_pairs_and_levels(call, message):
    with pytest.raises(ValueError, match=message):
        call(two_templates())


def test_many_prompts_are_named_as_one_reads_them():
    table = random_table()
    for hit, said in (
        ([0, 5], "prompts 0 and 5"),
        ([0, 1, 2, 3, 4, 5, 6], "prompts 0, 1, 2, 3, 4 and 2 more"),
    ):
        where = (table["graft"] == "SFT") & table["prompt"].isin(hit)
        odd = table.assign(logprob=table["logprob"].mask(where, -np.inf))
        found = stats.summarise(odd, by=(), base="PRE", full="SFT", metrics=["logprob"])
        assert f"logprob is infinite for {said}, so that it has no mean" in set(found["note"])
