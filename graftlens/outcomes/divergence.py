"""Where a graft's texts part from those of the base and of the full run."""

from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd

from graftlens.model.grafted import GraftedTransformer
from graftlens.outcomes.facts import same_draws
from graftlens.references import named_in


def divergence(
    model: GraftedTransformer,
    texts: pd.DataFrame,
    *,
    base: str | None = None,
    full: str | None = None,
) -> pd.DataFrame:
    """The first generated token at which each text parts from the base's and from the full run's.

    Texts are compared with those of the same prompt and sample: greedy ones, or ones drawn with
    the same noise.

    Args:
        model: what the texts were generated with; it writes the tokens.
        texts: as `sample` gives them.
        base, full: the two runs; by default those that the table names.

    Returns:
        The same rows with, for each `run` of `base` and `full`: `parts_{run}` (1 where the text
        differs from the run's, else 0), `step_{run}` (the number of the first token that does, from
        0; NaN where none does), `here_{run}` and `there_{run}` (that token in this text and in the
        run's; None where a text has ended). `rate` summarises `parts_base` like any other measure.

    Raises:
        ValueError: a table that lacks the base run; a run without a text for some prompt and
            sample has NaN there.
    """
    base, full = named_in(texts, base, full)
    out = texts.copy()
    for run, name in (("base", base), ("full", full)):
        if name is None or name not in set(texts["graft"]):
            if run == "full":
                continue
            raise ValueError(
                f"base={name!r} is not one of the grafts of the table. Pass base=GRAFT, one of "
                f"{', '.join(map(repr, dict.fromkeys(texts['graft'])))}."
            )
        of = texts[texts["graft"] == name]
        theirs = dict(zip(same_draws(of), of["tokens"], strict=True))
        keys = same_draws(texts)
        rows = [
            _parted(model, mine, theirs.get(key))
            for key, mine in zip(keys, texts["tokens"], strict=True)
        ]
        for column, values in zip(
            ("parts", "step", "here", "there"), zip(*rows, strict=True), strict=True
        ):
            kind = float if column in ("parts", "step") else object
            out[f"{column}_{run}"] = pd.Series(values, out.index, dtype=kind)
    return out


def _parted(
    model: GraftedTransformer, mine: Any, theirs: Any
) -> tuple[float, float, str | None, str | None]:
    if not isinstance(mine, list | np.ndarray) or not isinstance(theirs, list | np.ndarray):
        return np.nan, np.nan, None, None
    for step, (here, there) in enumerate(zip_longest(mine, theirs)):
        if here != there:
            return 1.0, float(step), _token(model, here), _token(model, there)
    return 0.0, np.nan, None, None


def _token(model: GraftedTransformer, token: int | None) -> str | None:
    return None if token is None else model.to_single_str_token(int(token))
