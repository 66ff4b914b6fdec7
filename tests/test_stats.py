"""graftlens.stats against brute force, closed forms and simulations with known answers."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlens import stats


def make_table(columns, *, metric="logprob", template="headline", first=0):
    """A results table from one list of values per graft; None = could not be run."""
    rows = []
    for graft, values in columns.items():
        for prompt, value in enumerate(values, start=first):
            row = {"prompt": prompt, "graft": graft, "rule": graft, "template": template}
            row |= {"text": "t", "answer": " a", "rank": 1.0, "prob": 0.5, "logprob": -1.0}
            row |= {"answer_logprob": -2.0, "logit_diff": 0.5, "reason": None, metric: value}
            if value is None:
                row |= dict.fromkeys(stats.VALUE_METRICS, np.nan) | {"reason": "no such span"}
            rows.append(row)
    return pd.DataFrame(rows)


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
    monkeypatch.setattr(stats, "CHUNK", 37)
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
        held = 0
        for seed in range(150):
            hits = int(rng.binomial(40, truth))
            table = make_table({"PRE": ranks(hits, 40)}, metric="rank")
            summary = stats.summarise(
                table, ks=(5,), metrics=(), recovery=None, resamples=400, seed=seed
            )
            held += summary["top5_low"][0] <= truth <= summary["top5_high"][0]
        assert held / 150 >= 0.9, (truth, held)


def test_coverage_of_mean_and_recovery_intervals():
    rng = np.random.default_rng(5)
    held = {"logprob": 0, "recovery": 0}
    for seed in range(200):
        base = rng.normal(-8, 1, 40)
        columns = {"PRE": base, "SFT": base + 6, "FE": base + 3 + rng.normal(0, 1, 40)}
        table = make_table({graft: list(values) for graft, values in columns.items()})
        row = row_of(stats.summarise(table, ks=(), resamples=500, seed=seed), "FE")
        held["logprob"] += row["logprob_low"] <= -5 <= row["logprob_high"]
        held["recovery"] += row["recovery_low"] <= 0.5 <= row["recovery_high"]
    assert all(180 <= count <= 199 for count in held.values()), held


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
    monkeypatch.setattr(stats, "EXACT_LIMIT", 3)
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
    assert stats._newcombe(pairs, 0.95) == (
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
        ({"base": "PREE"}, r"base='PREE' is not one of the grafts 'PRE', 'SFT', 'FE': give base="),
        ({"grafts": ("PRE", "FT")}, "no graft named 'FT' in the table; it has 'PRE', 'SFT', 'FE'"),
        ({"grafts": ("PRE", "PRE")}, "name at least one graft, and each once"),
        ({"grafts": ("PRE", "FE")}, "full='SFT' is not one of the grafts 'PRE', 'FE'"),
        ({"level": 95.0}, r"level=95.0 is not in \(0, 1\); for a 95% interval give level=0.95"),
        ({"level": 0.0}, r"level=0.0 is not in \(0, 1\)"),
        ({"resamples": 0}, "resamples=0 is not positive"),
        ({"metrics": ("accuracy",)}, "unknown metric 'accuracy'; choose 'top1', 'top5'"),
        ({"metrics": ("top5",)}, "metric 'top5' is asked for twice"),
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
    with pytest.raises(ValueError, match="'logprob' is infinite for prompt 2"):
        stats.summarise(table.assign(logprob=table["logprob"].where(table.index != 2, -np.inf)))
    with pytest.raises(ValueError, match="no graft named 'LT' in the table"):
        stats.compare(table, "LT", "PRE", "logprob")
    with pytest.raises(ValueError, match="41 successes of 40"):
        stats.wilson(41, 40)
