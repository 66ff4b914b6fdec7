"""What can be measured about a next-token distribution: one row per measure. Logarithms are
natural.

Everything about a measure (its column, label, unit, bounds, direction) is in its row of
`METRICS`. Functions use the tensors' own methods, so that statistics and plots, which read
the table too, do not wait for torch.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

#: What a measure may need besides the logits [row, d_vocab]:
#:
#: - `answer` [row]: the token of each row that is measured;
#: - `distractors` [row, distractor]: first tokens of the distractors, without the answer's own;
#: - `answers` [row, answer]: first tokens of the texts in `Prompt(answers=[…])`;
#: - `base`, `full` [row, d_vocab]: logits of the base and of the full run at the same place;
#: - `logprobs`, `base_logprobs`, `full_logprobs` [row, d_vocab]: what the logits come to, in nats;
#: - `common`, `base_common`, `full_common` [row, token]: the same over the tokens that all sources
#:   have, renormalised; `logprobs` where the sources have one vocabulary;
#: - `logprobs32`: the same in float32;
#: - `standing` ([row], [row]): rank of the answer, and how many other tokens have its logit;
#: - `top` [row, k]: the likeliest tokens, best first.
#:
#: A measure of generated texts gets them in place of logits, a text per row, and may need `prompt`
#: [row], what the model read before the text; `right` [row], all texts that are right after that
#: prompt; `guess` [row], the base run's text on the same draws, None if there is none; `trained`
#: [answer], what is right after the prompts of all facts that were trained, as far as is known.
NEEDS = (
    *("answer", "distractors", "answers", "base", "full", "logprobs", "base_logprobs"),
    *("full_logprobs", "common", "base_common", "full_common", "logprobs32", "standing", "top"),
    *("prompt", "right", "guess", "trained"),
)

#: Which runs a measure compares with.
REFERENCES = {name: name[:4] for name in NEEDS if name[:4] in ("base", "full")}


_Holds = Literal["number", "count", "numbers", "tokens", "label"]
_Over = Literal["next", "answer", "distractors", "text"]
_Better = Literal["higher", "lower"]
_Summary = Literal["mean", "share", "recovery"]

#: Attribute of a measure -> its values.
_ALLOWED = {
    "holds": get_args(_Holds),
    "over": get_args(_Over),
    "better": (*get_args(_Better), None),
    "summary": (*get_args(_Summary), None),
}


@dataclass(frozen=True)
class Measure:
    """One measure: how it is computed, and how tables, statistics and plots show it.

    Attributes:
        name: its column.
        needs: what the function gets after the logits, in this order (`NEEDS`).
        function: (logits [row, d_vocab] in float32 or float64, what is needed…) -> [row]; None for
            what statistics alone compute.
        holds: a `number`, a `count` or a `label` in each row; `numbers` or `tokens`, a list of
            them.
        over: which distribution is measured: that of the `next` token after the prompt, or those
            along the whole `answer` (or each of the `distractors`), whose values are summed; or a
            generated `text`.
        log: the function gives the measure's logarithm. The exponential is taken in float64.
        always: measured in every run; others are measured on request.
        column: the column that it is read from, if that is a different one.
        at_most: of a `share`, what the column's values that count do not exceed.
        label, short, unit: what axes say; a short label is for running text.
        bounds: the least and the largest value; None if there is none.
        better: which direction is better; None if neither is.
        signed: zero is meaningful, so that signs are distinguished by hue.
        differentiable: gradients pass through the function.
        summary: how it is summarised: by its `mean`, as a `share` of prompts, as a `recovery`; None
            if it is not.

    Raises:
        ValueError: a name that cannot be a column, an unknown need, or another value that is not
            among the allowed ones.
    """

    name: str
    needs: Sequence[str] = ()
    function: Callable[..., Any] | None = None
    holds: _Holds = "number"
    over: _Over = "next"
    log: bool = False
    always: bool = False
    column: str = ""
    at_most: int | None = None
    label: str = ""
    short: str = ""
    unit: str = "mean"
    bounds: tuple[float | None, float | None] = (None, None)
    better: _Better | None = "higher"
    signed: bool = False
    differentiable: bool = True
    summary: _Summary | None = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(
                f"name={self.name!r}: a measure's name is a column. Write letters, digits and _, "
                "such as 'my_measure'."
            )
        given: Any = self.needs
        if not isinstance(given, Sequence):
            raise ValueError(
                f"measure {self.name!r}: needs={given!r}. Write a list of {' '.join(NEEDS)}."
            )
        needs = (given,) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "needs", needs)
        for need in needs:
            if need not in NEEDS:
                raise ValueError(
                    f"measure {self.name!r} needs {need!r}. Allowed: {' '.join(NEEDS)}."
                )
        function: Any = self.function
        if function is not None and not callable(function):
            raise ValueError(
                f"measure {self.name!r}: function={function!r} cannot be called. Give a function "
                "of the logits and of what it needs."
            )
        for attribute, allowed in _ALLOWED.items():
            value = getattr(self, attribute)
            if value not in allowed:
                raise ValueError(
                    f"measure {self.name!r}: {attribute}={value!r}. Allowed: "
                    f"{' '.join(map(repr, allowed))}."
                )
        if not _are_bounds(self.bounds):
            raise ValueError(
                f"measure {self.name!r}: bounds={self.bounds!r}. Write (least, largest), None "
                "where there is no bound."
            )
        plain = self.name.replace("_", " ")
        object.__setattr__(self, "column", self.column or self.name)
        object.__setattr__(self, "label", self.label or plain)
        object.__setattr__(self, "short", self.short or plain)

    @property
    def references(self) -> tuple[str, ...]:
        """The runs that it compares with: `base`, `full`."""
        return tuple(dict.fromkeys(REFERENCES[need] for need in self.needs if need in REFERENCES))

    @property
    def optional(self) -> bool:
        """Whether a prompt that ran may have no value."""
        lists = {"distractors", "answers"} & {*self.needs}
        return self.over != "next" or bool(lists) or bool(self.references)

    @property
    def over_common(self) -> bool:
        """Whether it is over the tokens that all sources have."""
        return any(need.endswith("common") for need in self.needs)

    @property
    def share(self) -> bool:
        """Whether it lies in [0, 1] and is written in percent."""
        return self.bounds == (0.0, 1.0)


def _are_bounds(given: Any) -> bool:
    if not isinstance(given, tuple) or len(given) != 2:
        return False
    ends = [end for end in given if end is not None]
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
    return numbers and (len(ends) < 2 or ends[0] < ends[1])


class Predictions:
    """A chunk of next-token distributions, with what measures may need of it.

    What several measures need is computed once.

    Example:
        >>> Predictions(logits, answer=ids).of(METRICS["rank"])
    """

    def __init__(
        self,
        logits: Float[Any, "row d_vocab"],
        *,
        answer: Int[Any, " row"] | None = None,
        distractors: Int[Any, "row distractor"] | None = None,
        answers: Int[Any, "row answer"] | None = None,
        base: "Predictions | None" = None,
        full: "Predictions | None" = None,
        top_k: int = 1,
        n_common: int | None = None,
    ) -> None:
        """`base` and `full` are the same rows of these runs; `top_k` is how long `top` is;
        `n_common` is how many tokens all sources have, where these are not all."""
        # float32 keeps every half-precision logit apart that was apart; of float64 it would make
        # ties.
        self.logits = logits if logits.element_size() == 8 else logits.float()
        self.answer, self.distractors, self.answers = answer, distractors, answers
        self._runs = {"base": base, "full": full}
        self.top_k, self.n_common = top_k, n_common
        # Of the logits alone, and so the same for all that have the same rows.
        self._computed: dict[str, Float[Any, "row token"]] = {}

    def of(self, measure: Measure) -> Any:
        """A measure's value in each row, as its function gives it.

        A user's own function gets copies, so that it may change them in place.

        Raises:
            ValueError: something that it needs is missing.
        """
        assert measure.function is not None, f"{measure.name} is not computed from logits"
        given = [self.logits, *(self._needed(measure, need) for need in measure.needs)]
        return measure.function(*(map(_copied, given) if is_own(measure) else given))

    def column(self, measure: Measure, dtype: type[np.number] | None = None) -> np.ndarray:
        """The same on the host, with logarithms undone; in `dtype`, if it is given."""
        values = self.of(measure)
        if not hasattr(values, "shape"):
            raise ValueError(
                f"measure {measure.name!r} gave a {type(values).__name__}. Its function must give "
                "a tensor of one number per row."
            )
        if not isinstance(values, np.ndarray):
            values = values.detach().cpu()
            # numpy has no bfloat16
            short = values.is_floating_point() and values.element_size() < 4
            values = (values.float() if short else values).numpy()
        if np.iscomplexobj(values):
            raise ValueError(
                f"measure {measure.name!r} gave complex numbers. Its function must give real ones."
            )
        values = values if dtype is None else values.astype(dtype)
        return np.exp(values) if measure.log else values

    def has(self, measure: Measure) -> bool:
        """Whether all that a measure needs is there."""
        given = {"answer", "distractors", "answers"} & {*measure.needs}
        there = all(getattr(self, name) is not None for name in given)
        return there and all(self._runs[run] is not None for run in measure.references)

    def rows(self, index: Int[Any, " chosen"] | None, **given: Any) -> "Predictions":
        """Some rows (None: all), with what is known of them.

        What was computed is taken along; with all rows, what will be computed as well.
        """

        def chosen(whole: Float[Any, "row d_vocab"]) -> Float[Any, "chosen d_vocab"]:
            return whole if index is None else whole.index_select(0, index)

        options: dict[str, Any] = {"top_k": self.top_k, "n_common": self.n_common}
        made = Predictions(chosen(self.logits), **options, **given)
        if index is None:
            made._computed = self._computed
        else:
            made._computed = {name: chosen(whole) for name, whole in self._computed.items()}
        return made

    def _needed(self, measure: Measure, need: str) -> Any:
        name = REFERENCES.get(need)
        run = self if name is None else self._runs[name]
        found = run and getattr(run, "logits" if need == name else need.removeprefix(f"{name}_"))
        if found is None:
            raise ValueError(f"measure {measure.name!r} needs {need!r}, which is not given here.")
        return found

    @property
    def logprobs(self) -> Float[Any, "row d_vocab"]:
        """Log-probabilities of all tokens, in nats."""
        if "logprobs" not in self._computed:
            self._computed["logprobs"] = self.logits.log_softmax(-1)
        return self._computed["logprobs"]

    @property
    def common(self) -> Float[Any, "row token"]:
        """Log-probabilities of the tokens that all sources have, in nats, renormalised."""
        if self.n_common is None or self.n_common >= self.logits.shape[1]:
            return self.logprobs
        if "common" not in self._computed:
            self._computed["common"] = self.logits[:, : self.n_common].log_softmax(-1)
        return self._computed["common"]

    @property
    def logprobs32(self) -> Float[Any, "row d_vocab"]:
        """The same in float32."""
        if self.logits.element_size() != 8:
            return self.logprobs
        if "logprobs32" not in self._computed:
            # Five times as fast on a CPU as logsumexp, which would do.
            self._computed["logprobs32"] = self.logits.float().log_softmax(-1)
        return self._computed["logprobs32"]

    @cached_property
    def standing(self) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
        """The rank of each row's answer, and how many other tokens have its logit."""
        assert self.answer is not None
        return _standing(self.logits, self.answer)

    @cached_property
    def top(self) -> Int[Any, "row k"]:
        """The likeliest tokens."""
        return likeliest(self.logits, self.top_k)


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value.copy() if isinstance(value, np.ndarray) else value.clone()


def likeliest(logits: Float[Any, "row d_vocab"], k: int) -> Int[Any, "row k"]:
    """The ids of the k largest logits of each row, best first, of equal ones the smaller id first.

    `topk` leaves the order of equal ones, and which of them it takes, undefined.
    """
    d_vocab = logits.shape[1]
    k = min(k, d_vocab)
    top = logits.topk(min(k + 1, d_vocab), dim=-1)
    ids = top.indices[:, :k]
    if d_vocab > k:
        # Where the next one is equal to the last that is in, the equal ones are chosen by id.
        torn = (top.values[:, k - 1] == top.values[:, k]).nonzero()[:, 0]
        if len(torn):
            edge = top.values[torn, k - 1 : k]
            other = logits[torn] != edge
            equal = _numbers(ids, d_vocab).expand_as(other).masked_fill(other, d_vocab)
            equal = equal.topk(k, dim=-1, largest=False).values
            place = _numbers(ids, k) - (top.values[torn] > edge).sum(1, True)
            chosen = ids[torn].where(place < 0, equal.gather(1, place.clamp_min(0)))
            ids = ids.index_copy(0, torn, chosen)
    ids = ids.sort(dim=-1).values
    values = logits.gather(1, ids) + 0.0  # -0.0 is 0.0, also for a sort by bits
    return ids.gather(1, values.sort(dim=-1, descending=True, stable=True).indices)


def _standing(
    logits: Float[Any, "row d_vocab"], target: Int[Any, " row"]
) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    own = logits.gather(1, target[:, None])
    rank = 1 + _counts(logits > own)
    ties = np.maximum(_counts(logits == own) - 1, 0)  # NaN is not even equal to itself
    if tied := np.flatnonzero(ties).tolist():
        # Of equal logits the one with the smaller id comes first, so that no two have one rank.
        before = (logits[tied] == own[tied]) & (
            _numbers(target, logits.shape[1]) < target[tied][:, None]
        )
        rank[tied] += _counts(before)
    return rank, ties


def _numbers(like: Int[Any, "..."], count: int) -> Int[Any, " count"]:
    """0, 1, …, on the device of `like`."""
    return like.new_ones(count).cumsum(0) - 1


def _counts(true: Bool[Any, "row d_vocab"]) -> Int[np.ndarray, " row"]:
    """How many entries of each row are true; numpy counts a row six times as fast as torch."""
    if true.device.type != "cpu":
        return np.asarray(true.sum(1).cpu().numpy())
    return np.array([np.count_nonzero(row) for row in true.numpy()], dtype=np.int64)


def kl(p: Float[Any, "row d_vocab"], q: Float[Any, "row d_vocab"]) -> Float[Any, " row"]:
    """KL(p ‖ q) of log-probabilities, in nats; clamped at 0, below which rounding could put it.

    In float32 it is exact to about 1e-6. Between sources with different vocabularies it is that of
    the tokens that all have, renormalised, as are `js` and the entropy.
    """
    if p is q and p.isfinite().all():
        return p.new_zeros(p.shape[:-1])
    share = p.exp().clamp_min(1e-37)  # what is not 0, rounded to it, times inf is still inf
    return (share * (p - q).masked_fill_(p.isneginf(), 0.0)).sum(-1).clamp_min(0.0)


def js(p: Float[Any, "row d_vocab"], q: Float[Any, "row d_vocab"]) -> Float[Any, " row"]:
    """The Jensen-Shannon divergence of log-probabilities, in nats: from 0 to log 2 (Lin 1991).

    As exact as `kl`, and 0 between equal ones.
    """
    apart = (p - q).abs().masked_fill(p == q, 0.0)  # also where both are -inf
    middle = p.maximum(q) + ((-apart).expm1() / 2).log1p()
    return (kl(p, middle) + kl(q, middle)) / 2


def _logprob(
    logits: Float[Any, "row d_vocab"],
    logprobs: Float[Any, "row d_vocab"],
    answer: Int[Any, " row"],
) -> Float[Any, " row"]:
    return logprobs.gather(1, answer[:, None])[:, 0]


def _logit_diff(
    logits: Float[Any, "row d_vocab"],
    answer: Int[Any, " row"],
    distractors: Int[Any, "row distractor"],
) -> Float[Any, " row"]:
    logits = logits.float()
    return logits.gather(1, answer[:, None])[:, 0] - logits.gather(1, distractors).amax(1)


def _margin(logits: Float[Any, "row d_vocab"], answer: Int[Any, " row"]) -> Float[Any, " row"]:
    own = logits.gather(1, answer[:, None])[:, 0]
    first, second = logits.topk(2, dim=-1).values.unbind(1)
    return own - second.where(own == first, first)


def _answer_set_prob(
    logits: Float[Any, "row d_vocab"],
    logprobs: Float[Any, "row d_vocab"],
    answers: Int[Any, "row answer"],
) -> Float[Any, " row"]:
    return logprobs.gather(1, answers).exp().sum(1)


def _entropy(
    logits: Float[Any, "row d_vocab"], common: Float[Any, "row token"]
) -> Float[Any, " row"]:
    return -(common.exp() * common.masked_fill(common.isneginf(), 0.0)).sum(-1)


@dataclass(frozen=True)
class Factory:
    """A row that makes measures: `top5` is what ``top{k}`` makes from 5.

    Attributes:
        name: how the names of what it makes are written.
        pattern: a regular expression of them, whose group is the argument.
        make: the argument, as text -> the measure.
    """

    name: str
    pattern: str
    make: Callable[[str], Measure]


def _top(k: str) -> Measure:
    return Measure(
        f"top{k}",
        column="rank",
        at_most=int(k),
        label=f"top-{k} accuracy",
        short=f"top-{k} accuracy",
        unit="% of prompts",
        bounds=(0.0, 1.0),
        differentiable=False,
        summary="share",
    )


def _of_answer(name: str, function: Callable[..., Any], *needs: str, **facts: Any) -> Measure:
    return Measure(name, needs, function, always=True, **facts)


def _divergences(run: Literal["base", "full"]) -> tuple[Measure, ...]:
    """How far a graft's distribution is from that of a reference run."""
    needs = ("common", f"{run}_common")
    ways: dict[str, tuple[Callable[..., Any], str]] = {
        f"kl_{run}": (lambda _, p, q: kl(p, q), f"KL(graft ‖ {run})"),
        f"kl_from_{run}": (lambda _, p, q: kl(q, p), f"KL({run} ‖ graft)"),
        f"js_{run}": (lambda _, p, q: js(p, q), f"Jensen-Shannon divergence from {run}"),
    }
    return tuple(
        Measure(
            name,
            needs,
            function,
            label=label,
            short=label,
            unit="nats",
            bounds=(0.0, float(np.log(2.0)) if name.startswith("js") else None),
            better="higher" if run == "base" else "lower",
        )
        for name, (function, label) in ways.items()
    )


_ROWS: Sequence[Measure | Factory] = (
    Factory("top{k}", r"top([1-9]\d*)", _top),
    _of_answer(
        "rank",
        lambda _, standing: standing[0],
        "standing",
        holds="count",
        label="rank of the answer's first token",
        unit="1 = most likely",
        bounds=(1.0, None),
        better="lower",
        differentiable=False,
    ),
    _of_answer(
        "ties",
        lambda _, standing: standing[1],
        "standing",
        holds="count",
        label="other tokens with the logit of the answer's first",
        unit="tokens",
        bounds=(0.0, None),
        better=None,
        differentiable=False,
        summary=None,
    ),
    _of_answer(
        "prob",
        _logprob,
        "logprobs32",
        "answer",
        log=True,
        label="probability of the answer's first token",
        short="probability",
        unit="%",
        bounds=(0.0, 1.0),
    ),
    _of_answer(
        "logprob",
        _logprob,
        "logprobs32",
        "answer",
        label="log-probability of the answer's first token",
        short="log-probability",
        unit="nats",
        bounds=(None, 0.0),
    ),
    _of_answer(
        "top_tokens",
        lambda _, top: top,
        "top",
        holds="tokens",
        label="likeliest tokens",
        unit="",
        better=None,
        differentiable=False,
        summary=None,
    ),
    _of_answer(
        "top_probs",
        lambda _, logprobs, top: logprobs.gather(1, top),
        "logprobs32",
        "top",
        holds="numbers",
        log=True,
        label="probabilities of the likeliest tokens",
        unit="%",
        bounds=(0.0, 1.0),
        better=None,
        summary=None,
    ),
    _of_answer(
        "answer_logprob",
        _logprob,
        "logprobs32",
        "answer",
        over="answer",
        label="log-probability of the whole answer",
        short="the answer's log-probability",
        unit="nats",
        bounds=(None, 0.0),
    ),
    _of_answer(
        "distractor_logprobs",
        _logprob,
        "logprobs32",
        "answer",
        holds="numbers",
        over="distractors",
        label="log-probabilities of whole distractors",
        unit="nats",
        bounds=(None, 0.0),
        better=None,
        summary=None,
    ),
    _of_answer(
        "logit_diff",
        _logit_diff,
        "answer",
        "distractors",
        label="logit difference to the best distractor",
        unit="logits",
        signed=True,
    ),
    *_divergences("base"),
    *_divergences("full"),
    Measure(
        "entropy",
        ("common",),
        _entropy,
        label="entropy of the next token",
        unit="nats",
        bounds=(0.0, None),
        better=None,
    ),
    Measure(
        "margin",
        ("answer",),
        _margin,
        label="logit of the answer's first token minus the best other token's",
        unit="logits",
        signed=True,
    ),
    Measure(
        "answer_set_prob",
        ("logprobs", "answers"),
        _answer_set_prob,
        label="probability of the first tokens of all right answers",
        short="probability of the right answers",
        unit="%",
        bounds=(0.0, 1.0),
    ),
    Measure(
        "recovery",
        label="recovery",
        unit="0 = base, 1 = full",
        signed=True,
        summary="recovery",
        differentiable=False,
    ),
)

#: The measures by name, in the order of the tables' columns. A new one is a row here.
METRICS: dict[str, Measure | Factory] = {row.name: row for row in _ROWS}


def measures() -> tuple[Measure, ...]:
    """The rows of the table that are measures, in its order."""
    return tuple(row for row in METRICS.values() if isinstance(row, Measure))


def always_measured() -> tuple[Measure, ...]:
    """What every table of results has."""
    return tuple(m for m in measures() if m.always)


def averaged() -> tuple[str, ...]:
    """The names of the measures whose means statistics give."""
    return tuple(m.name for m in measures() if m.summary == "mean")


def some_over_common(names: Iterable[str]) -> bool:
    """Whether one of these measures is over the tokens that all sources have."""
    return any(row is not None and row.over_common for row in map(known, names))


def known(name: str) -> Measure | None:
    """A measure by its name, including those made by factories; None for an unknown name."""
    row = METRICS.get(name)
    if isinstance(row, Measure):
        return row
    for made_by in METRICS.values():
        if isinstance(made_by, Factory) and (found := re.fullmatch(made_by.pattern, name)):
            return made_by.make(found[1])
    return None


def is_own(measure: Measure) -> bool:
    """Whether it is a user's own measure: not a row of the table."""
    return METRICS.get(measure.name) is not measure


def measure(name: str) -> Measure:
    """A measure by its name; a bare row for a user's own measure."""
    return known(name) or Measure(name)


def imported(where: str) -> Any:
    """What a user has at ``module:name``, in the working directory too; ValueError if it cannot be
    imported. Only what a user types is imported: configs and results folders only name measures.
    """
    module, _, name = where.partition(":")
    if not module or not name:
        raise ValueError(f"{where!r}: write MODULE:NAME, such as mymodule:my_measure.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(
            f"{where!r} cannot be imported ({type(error).__name__}: {error}). Write MODULE:NAME of "
            "a module in this folder or an installed one that imports without an error."
        ) from error


def load(where: str) -> Measure:
    """A measure of the user's own, `imported`; ValueError if it is not one."""
    found = imported(where)
    if not isinstance(found, Measure):
        raise ValueError(
            f"{where!r} is a {type(found).__name__}, not a measure. Make it one: "
            "graftlens.metrics.Measure(name, needs, function)."
        )
    return found
