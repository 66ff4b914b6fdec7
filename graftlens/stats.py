"""How sure the numbers are: intervals, differences and p-values over prompts.

Every function takes the results table (one row per prompt and graft) and compares grafts *on the
same prompts*: a prompt counts only if it ran under every graft that is compared, and the prompts
left out are counted, not hidden. The prompt is the unit that is resampled, and one set of resamples
serves all grafts, so that what makes a prompt easy or hard cancels in differences and ratios
(Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993, chapters 8 and 13).

Prompts are taken as independent. Where several prompts ask for one fact in different words, pool
them with `by=()` only if you accept intervals that are too narrow.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

VALUE_METRICS = ("rank", "prob", "logprob", "answer_logprob", "logit_diff")
# These may be missing for a prompt that ran (no distractors given, whole answer not scored).
OPTIONAL_METRICS = ("answer_logprob", "logit_diff")

# With fewer than this many successes or failures the bootstrap of a proportion is too narrow.
FEW = 5
EXACT_LIMIT = 16
CHUNK = 1 << 22


@dataclass(frozen=True)
class Comparison:
    """Graft `a` against graft `b` on the prompts that ran under both."""

    a: str
    b: str
    metric: str
    n: int
    not_run: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    level: float
    interval: Literal["bootstrap", "newcombe", "none"]
    p_value: float
    p_method: Literal["exact", "monte carlo", "none"]
    seed: int


def summarise(
    table: pd.DataFrame,
    *,
    by: str | Sequence[str] = ("template",),
    ks: Sequence[int] = (1, 5, 50),
    metrics: Sequence[str] = ("logprob", "answer_logprob"),
    recovery: str | None = "logprob",
    base: str = "PRE",
    full: str = "SFT",
    grafts: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean accuracies, log-probabilities and recovery of every graft, each with its interval.

    One row per group of `by` and graft, in the order in which they first appear:

    - `n`: prompts used, the same for every graft of the group; `not_run`: prompts of the group left
      out because they did not run under every graft; `failed`: how many of those had no result
      under this very graft;
    - for each metric `m` (`top{k}` for k in `ks`, then `metrics`): its mean `m`, `m_low`, `m_high`;
    - `recovery` = (mean(graft) − mean(base)) / (mean(full) − mean(base)) of the metric named by the
      argument, with `recovery_low`, `recovery_high`, and `recovery_note`: None, or why a value or
      its interval is NaN;
    - `recovery_of`, `base`, `full`, `level`, `resamples`, `seed`: how the row was computed.

    Intervals are percentile intervals of a paired bootstrap over prompts (Efron & Tibshirani 1993,
    chapter 13). Two cases where that would claim more than the data hold:

    - An accuracy with fewer than 5 successes or fewer than 5 failures gets a Wilson score interval
      (Wilson 1927; Brown, Cai & DasGupta 2001). The bootstrap of 0 of 40 is [0, 0], as if more
      prompts could never change it; Wilson's is [0, 0.088].
    - A mean of other metrics over one prompt has no interval (NaN).

    Recovery is computed within each resample. It is NaN where full − base is 0 or its interval
    includes 0: there is nothing to recover. The few resamples in which full − base has the other
    sign count against both ends. Recovery is 0 for `base` and 1 for `full` by definition; for
    another graft an interval without width (all resamples equal) is given as NaN with a note.

    An optional metric (`answer_logprob`, `logit_diff`) that no prompt of a group has is NaN; one
    that only some have is an error, because its mean would be over other prompts.
    """
    by = (by,) if isinstance(by, str) else tuple(by)
    names = (*(f"top{k}" for k in ks), *metrics)
    _check_metrics(names if recovery is None else (*names, recovery))
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"metric {name!r} is asked for twice; name each metric once")
    _check_level(level)
    _check_count("resamples", resamples)
    wanted = names if recovery is None else (*names, recovery)
    _check_table(table, columns=(*by, *dict.fromkeys(_column(name) for name in wanted)))
    _check_groups(table, by)
    chosen = _choose_grafts(table, grafts)
    if recovery is not None:
        for role, name in (("base", base), ("full", full)):
            if name not in chosen:
                raise ValueError(
                    f"{role}={name!r} is not one of the grafts {_listed(chosen)}: "
                    f"give {role}= the name of a graft in the table, or recovery=None"
                )
    table = table[table["graft"].isin(chosen)]
    groups = table.groupby(list(by), sort=False, dropna=False) if by else [((), table)]
    rows: list[dict[str, object]] = []
    for key, group in groups:
        prompts, ran = _runs(group, chosen)
        used = prompts[ran.all(axis=1)]
        values = {name: _values(group, used, chosen, name) for name in dict.fromkeys(wanted)}
        draws = _bootstrap_all(values, resamples=resamples, seed=seed)
        for column, graft in enumerate(chosen):
            row: dict[str, object] = dict(zip(by, key, strict=True))
            row |= {"graft": graft, "n": len(used), "not_run": len(prompts) - len(used)}
            row["failed"] = int((~ran[:, column]).sum())
            for name in names:
                sample = values[name][:, column]
                low, high = _mean_interval(name, sample, draws[name][:, column], level)
                row |= {name: _mean(sample), f"{name}_low": low, f"{name}_high": high}
            if recovery is not None:
                here = (column, chosen.index(base), chosen.index(full))
                value, low, high, note = _recover(values[recovery], draws[recovery], here, level)
                row |= {"recovery": value, "recovery_low": low, "recovery_high": high}
                row |= {"recovery_note": note, "recovery_of": recovery, "base": base, "full": full}
            row |= {"level": level, "resamples": resamples, "seed": seed}
            rows.append(row)
    summary = pd.DataFrame(rows)
    if recovery is not None:
        summary["recovery_note"] = summary["recovery_note"].astype(object)
        summary.loc[summary["recovery_note"].isna(), "recovery_note"] = None
    return summary


def compare(
    table: pd.DataFrame,
    a: str,
    b: str,
    metric: str,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    permutations: int = 100_000,
    seed: int = 0,
) -> Comparison:
    """The mean of `metric` under graft `a` minus that under graft `b`, over the same prompts.

    The interval is a percentile interval of the paired bootstrap. Where fewer than 5 prompts depart
    from the most common difference of a `top{k}` metric, it is Newcombe's score interval for paired
    proportions instead (Newcombe 1998, *Statistics in Medicine* 17, method 10), for the reason that
    `summarise` gives.

    The p-value is that of a two-sided sign-flip permutation test: under the null hypothesis a
    prompt's two values could be exchanged. It is exact for up to 16 prompts that differ, and for
    any number if they all differ by the same amount (top-k accuracies; this is McNemar's exact
    test). Otherwise it is estimated from `permutations` random sign vectors as (hits + 1) /
    (permutations + 1), which is never 0 (Phipson & Smyth 2010).

    For the optional metrics, a prompt without a value counts as not run.
    """
    _check_metrics((metric,))
    _check_level(level)
    _check_count("resamples", resamples)
    _check_count("permutations", permutations)
    _check_table(table, columns=(_column(metric),))
    pair = _choose_grafts(table, (a, b))
    table = table[table["graft"].isin(pair)]
    prompts, ran = _runs(table, pair)
    used = prompts[ran.all(axis=1)]
    values = _values(table, used, pair, metric, partial=True)
    values = values[~np.isnan(values).any(axis=1)]
    difference = values[:, 0] - values[:, 1]
    low, high, interval = _difference_interval(metric, values, level, resamples, seed)
    p_value, p_method = _sign_flip(difference, permutations, seed)
    return Comparison(
        a=a,
        b=b,
        metric=metric,
        n=len(values),
        not_run=len(prompts) - len(values),
        mean_a=_mean(values[:, 0]),
        mean_b=_mean(values[:, 1]),
        difference=_mean(difference),
        low=low,
        high=high,
        level=level,
        interval=interval,
        p_value=p_value,
        p_method=p_method,
        seed=seed,
    )


def holm(pvalues: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979).

    Rejecting where the adjusted value is at most α keeps the chance of any false rejection in the
    family at most α, whatever the dependence. A NaN (no test) stays NaN and is not counted.
    """
    for p in pvalues:
        if not (math.isnan(p) or 0.0 <= p <= 1.0):
            raise ValueError(f"p-value {p!r} is outside [0, 1]; give probabilities (or NaN)")
    tested = sorted((p, i) for i, p in enumerate(pvalues) if not math.isnan(p))
    adjusted = [math.nan] * len(pvalues)
    running = 0.0
    for step, (p, i) in enumerate(tested):
        running = max(running, min(1.0, p * (len(tested) - step)))
        adjusted[i] = running
    return tuple(adjusted)


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927): honest at 0 and at n of n."""
    _check_level(level)
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n >= 1")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Rounding must not leave 1e-18 where the formula gives exactly 0 or 1.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def bootstrap_means(
    values: Float[np.ndarray, "prompt graft"], *, resamples: int, seed: int
) -> Float[np.ndarray, "resample graft"]:
    """Means of all columns over prompts drawn with replacement, the same draws for every column."""
    n = len(values)
    if n == 0:
        return np.full((resamples, values.shape[1]), np.nan)
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, CHUNK // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        means[start : start + size] = _draw_counts(rng, size, n) @ values / n
    return means


def _draw_counts(
    rng: np.random.Generator, size: int, n: int
) -> Float[np.ndarray, "resample prompt"]:
    """How often each of n prompts occurs in each of `size` resamples."""
    picks = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(picks.ravel(), minlength=size * n).reshape(size, n).astype(float)


def _bootstrap_all(
    values: dict[str, Float[np.ndarray, "prompt graft"]], *, resamples: int, seed: int
) -> dict[str, Float[np.ndarray, "resample graft"]]:
    """Bootstrap several metrics at once, so that they too share their resamples."""
    together = np.concatenate(list(values.values()), axis=1)
    means = bootstrap_means(together, resamples=resamples, seed=seed)
    return dict(zip(values, np.split(means, len(values), axis=1), strict=True))


def _percentiles(draws: Float[np.ndarray, " resample"], level: float) -> tuple[float, float]:
    # Order statistics, not interpolation: "below the low end" is then at most the nominal share of
    # resamples, which `_recover` relies on, and an accuracy's ends are accuracies.
    tail = (1 - level) / 2
    low = np.quantile(draws, tail, method="lower")
    high = np.quantile(draws, 1 - tail, method="higher")
    return float(low), float(high)


def _mean_interval(
    metric: str,
    sample: Float[np.ndarray, " prompt"],
    draws: Float[np.ndarray, " resample"],
    level: float,
) -> tuple[float, float]:
    n = len(sample)
    if n == 0 or np.isnan(sample).any():
        return math.nan, math.nan
    if _depth(metric) is not None:
        successes = int(sample.sum())
        if min(successes, n - successes) < FEW:
            return wilson(successes, n, level)
    return _percentiles(draws, level) if n > 1 else (math.nan, math.nan)


def _recover(
    values: Float[np.ndarray, "prompt graft"],
    draws: Float[np.ndarray, "resample graft"],
    here: tuple[int, int, int],
    level: float,
) -> tuple[float, float, float, str | None]:
    """Recovery of one graft with its interval and a note; `here` = columns (graft, base, full)."""
    nan = math.nan
    column, base, full = here
    if len(values) == 0:
        return nan, nan, nan, "no prompt ran under every graft"
    if np.isnan(values).any():
        return nan, nan, nan, "the metric was not measured"
    # Means of per-prompt differences, so that equal columns cancel exactly.
    gap = _mean(values[:, full] - values[:, base])
    gaps = draws[:, full] - draws[:, base]
    if gap == 0:
        return nan, nan, nan, "full and base are equal: there is nothing to recover"
    low, high = _percentiles(gaps, level)
    if low <= 0 <= high:
        return nan, nan, nan, "the interval of full − base includes 0: nothing sure to recover"
    value = _mean(values[:, column] - values[:, base]) / gap
    if column == base:
        return 0.0, 0.0, 0.0, None
    if column == full:
        return 1.0, 1.0, 1.0, None
    if len(values) < 2:
        return value, nan, nan, "one prompt has no interval"
    usable = gaps * np.sign(gap) > 0
    ratios = (draws[:, column] - draws[:, base]) / np.where(usable, gaps, 1.0)
    low = _percentiles(np.where(usable, ratios, -np.inf), level)[0]
    high = _percentiles(np.where(usable, ratios, np.inf), level)[1]
    if high - low <= 1e-12 * max(1.0, abs(value)):
        return value, nan, nan, "all resamples agree: the prompts vary too little for an interval"
    return value, low, high, None


def _difference_interval(
    metric: str, values: Float[np.ndarray, "prompt 2"], level: float, resamples: int, seed: int
) -> tuple[float, float, Literal["bootstrap", "newcombe", "none"]]:
    n = len(values)
    if n == 0:
        return math.nan, math.nan, "none"
    difference = values[:, 0] - values[:, 1]
    if _depth(metric) is not None:
        _, counts = np.unique(difference, return_counts=True)
        if n - counts.max() < FEW:
            return (*_newcombe(values.astype(bool), level), "newcombe")
    if n == 1:
        return math.nan, math.nan, "none"
    draws = bootstrap_means(difference[:, None], resamples=resamples, seed=seed)
    return (*_percentiles(draws[:, 0], level), "bootstrap")


def _newcombe(pairs: Bool[np.ndarray, "prompt 2"], level: float) -> tuple[float, float]:
    n = len(pairs)
    a, b = (int(column.sum()) for column in pairs.T)
    both = int(pairs.all(axis=1).sum())
    share_a, share_b = a / n, b / n
    (low_a, high_a), (low_b, high_b) = wilson(a, n, level), wilson(b, n, level)
    neither = n - a - b + both
    spread = both * neither - (a - both) * (b - both)
    # Newcombe's continuity correction, for a positive association only.
    corrected = max(spread - n / 2, 0.0) if spread > 0 else float(spread)
    margins = a * (n - a) * b * (n - b)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def reach(first: float, second: float) -> float:
        return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))

    difference = share_a - share_b
    low = difference - reach(share_a - low_a, high_b - share_b)
    high = difference + reach(high_a - share_a, share_b - low_b)
    return max(low, -1.0), min(high, 1.0)


def _sign_flip(
    difference: Float[np.ndarray, " prompt"], permutations: int, seed: int
) -> tuple[float, Literal["exact", "monte carlo", "none"]]:
    if len(difference) == 0:
        return math.nan, "none"
    moved = difference[difference != 0]  # flipping a zero changes nothing
    m = len(moved)
    if m == 0:
        return 1.0, "exact"
    size = np.abs(moved)
    slack = 1e-12 * float(size.sum())  # sums that are equal on paper count as equal
    observed = abs(float(moved.sum())) - slack
    if size.max() - size.min() <= 1e-12 * size.max():
        ways = sum(math.comb(m, k) for k in range(m + 1) if abs(2 * k - m) * size[0] >= observed)
        return ways / 2**m, "exact"
    if m <= EXACT_LIMIT:
        signs = 1 - 2 * ((np.arange(2**m)[:, None] >> np.arange(m)) & 1)
        return float((np.abs(signs @ moved) >= observed).mean()), "exact"
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // m)
    hits = 0
    for start in range(0, permutations, step):
        rows = min(step, permutations - start)
        signs = 1 - 2 * rng.integers(0, 2, size=(rows, m), dtype=np.int8)
        hits += int((np.abs(signs @ moved) >= observed).sum())
    return (hits + 1) / (permutations + 1), "monte carlo"


def _depth(metric: str) -> int | None:
    """k of a `top{k}` metric, None of another."""
    match = re.fullmatch(r"top([1-9]\d*)", metric)
    return int(match[1]) if match else None


def _column(metric: str) -> str:
    return "rank" if _depth(metric) is not None else metric


def _mean(sample: Float[np.ndarray, " prompt"]) -> float:
    return float(sample.mean()) if len(sample) else math.nan


def _runs(
    table: pd.DataFrame, grafts: Sequence[str]
) -> tuple[Int[np.ndarray, " prompt"], Bool[np.ndarray, "prompt graft"]]:
    """The prompts in ascending order, and under which grafts each of them ran."""
    done = table["reason"].isna().rename("done")
    wide = pd.concat([table[["prompt", "graft"]], done], axis=1)
    wide = wide.pivot(index="prompt", columns="graft", values="done").reindex(columns=list(grafts))
    wide = wide.sort_index()
    # A row that is not there at all did not run either.
    return wide.index.to_numpy(dtype=np.int64), (wide == True).to_numpy(dtype=bool)  # noqa: E712


def _values(
    table: pd.DataFrame,
    prompts: Int[np.ndarray, " prompt"],
    grafts: Sequence[str],
    metric: str,
    *,
    partial: bool = False,
) -> Float[np.ndarray, "prompt graft"]:
    """One metric over the prompts used; all NaN where an optional one was not measured."""
    column = _column(metric)
    wide = table.pivot(index="prompt", columns="graft", values=column)
    wide = wide.reindex(index=prompts, columns=list(grafts))
    values = wide.apply(pd.to_numeric).to_numpy(dtype=float, na_value=np.nan)
    missing = np.isnan(values)
    optional = column in OPTIONAL_METRICS
    if missing.any() and not (optional and (partial or missing.all())):
        where = prompts[missing.any(axis=1)]
        fix = (
            "leave the metric out, or summarise the prompts that have it apart"
            if optional
            else "a row without numbers must give its reason in column 'reason'"
        )
        raise ValueError(
            f"column {column!r} has no value for {len(where)} of {len(prompts)} prompts that ran "
            f"(prompt {_listed(where[:5].tolist())}); {fix}"
        )
    if np.isinf(values).any():
        where = prompts[np.isinf(values).any(axis=1)]
        raise ValueError(
            f"column {column!r} is infinite for prompt {_listed(where[:5].tolist())}; "
            "its mean would be too: leave the metric out, or mend the run"
        )
    depth = _depth(metric)
    return values if depth is None else (values <= depth).astype(float)


def _choose_grafts(table: pd.DataFrame, grafts: Sequence[str] | None) -> list[str]:
    known = list(dict.fromkeys(table["graft"]))
    if grafts is None:
        return known
    for name in grafts:
        if name not in known:
            raise ValueError(f"no graft named {name!r} in the table; it has {_listed(known)}")
    if len(set(grafts)) < len(grafts) or not grafts:
        raise ValueError(f"grafts {_listed(list(grafts))}: name at least one graft, and each once")
    return list(grafts)


def _check_table(table: pd.DataFrame, columns: Sequence[str]) -> None:
    needed = dict.fromkeys(("prompt", "graft", "reason", *columns))
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ValueError(
            f"the table lacks column {_listed(missing)}; it has {_listed(list(table.columns))}: "
            "pass the results table with one row per prompt and graft"
        )
    if len(table) == 0:
        raise ValueError("the table is empty; pass results with at least one prompt and graft")
    twice = table[table.duplicated(["prompt", "graft"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            f"prompt {first['prompt']} with graft {first['graft']!r} has more than one row "
            f"({len(twice)} rows too many); keep one: table.drop_duplicates(['prompt', 'graft'])"
        )


def _check_groups(table: pd.DataFrame, by: Sequence[str]) -> None:
    for name in by:
        if name in ("prompt", "graft", "reason", *VALUE_METRICS):
            raise ValueError(f"by={name!r} cannot group prompts; use such as 'template', or by=()")
        groups = table.groupby("prompt")[name].nunique(dropna=False)
        if (groups > 1).any():
            raise ValueError(
                f"prompt {groups.index[groups > 1][0]} has more than one value in column {name!r}; "
                "a prompt belongs to one group: give each prompt its own number"
            )


def _check_metrics(names: Sequence[str]) -> None:
    for name in names:
        if name not in VALUE_METRICS and _depth(name) is None:
            raise ValueError(
                f"unknown metric {name!r}; choose 'top1', 'top5' or another top-k (k >= 1), "
                f"or one of {_listed(VALUE_METRICS)}"
            )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not in (0, 1); for a 95% interval give level=0.95")


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name}={count} is not positive; 10000 is usual")


def _listed(names: Sequence[object]) -> str:
    return ", ".join(repr(name) for name in names)
