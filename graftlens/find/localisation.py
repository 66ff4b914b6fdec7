"""`localise`: where is it? The smallest set of places that does it, judged on unseen facts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd

from graftlens.components import brief
from graftlens.evaluation import position_grafts
from graftlens.find.asked import EACH, Asked, refuse_other_models
from graftlens.find.attribution import attribute
from graftlens.find.evidence import FOUND, REST, TOP
from graftlens.find.exact import exact_effects
from graftlens.find.finding import Question, Say, found_in
from graftlens.find.found import Found
from graftlens.find.judging import BASE, FULL, Goal
from graftlens.find.places import places_of
from graftlens.find.rating import CONTINUED, GRADIENT, Rating, of_texts
from graftlens.find.sets import without
from graftlens.find.splitting import Split, check_held_out, split, unsplit
from graftlens.graft import Graft, Grafts, named_grafts
from graftlens.metrics import Measure
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt
from graftlens.stats.resampling import check_seed
from graftlens.sweep.scoring import Scorer

#: What sites can be cut into; directions are a score only.
BY = ("site", "head", "neuron")


def localise(
    model: GraftedTransformer,
    prompts: Sequence[Prompt] | Prompt,
    source: str,
    *,
    positions: Sequence[str] | str,
    target: float | int = 0.95,
    metric: str | Measure | Mapping[str, Any] = "logprob",
    sampling: Mapping[str, Any] | None = None,
    continuations: str | Sequence[str] | None = None,
    goal: Goal | str = "sufficient",
    by: str = "site",
    steps: int | str = "auto",
    within: Graft | str | None = None,
    outside: str = "base",
    split_by: str | None = None,
    held_out: float | int = 0.5,
    rounds: int = 2,
    compare: Grafts | None = None,
    random: int = 100,
    resamples: int = 20,
    effects: bool = False,
    seed: int = 0,
    say: Say | None = None,
) -> Found:
    """Find the smallest set of places whose weights do what a source does.

    Prompts are cut by what they ask about. On one side, places are ordered by `attribute`, nested
    sets of the order are run exactly at sizes in a geometric series, by bisection and between (20
    sizes at most), and rounds of leaving out and adding single places change the set where an inner
    third of that side agrees. On the other side, of which the search saw nothing, the found set is
    reported on. Gradients propose, exact grafts judge.

    A measure of generated texts (`graftlens.outcomes`) can be the judge. Every set is then run by
    generating from all prompts, and its value is the measure's mean, as `outcomes.rate` gives it.
    Gradients are of the log-probability of reference continuations, which the report says. As in
    `outcomes`, positions may name `generated`, and `last` is each position that is generated from.

    Args:
        model: the model.
        prompts: prompts with answers.
        source: whose weights are searched.
        positions: spans that do not overlap, with `"rest"` for all other tokens; or `"each"`, every
            token by itself, for a single prompt, of which nothing can be held out.
        target: the recovery to reach, from 0 (the base) to 1 (the source everywhere).
        metric: the measure that recovery is of: any that gradients pass through, or one of texts,
            as `outcomes.contains` makes it, or `{name: measure or function of a text}`.
        sampling: how texts are drawn, with the options of `outcomes.sample` (`n`,
            `max_new_tokens`, `temperature`, …); only with a measure of texts.
        continuations: the texts that gradients are of, where texts judge: `"full"` (by default),
            what the source writes itself after each prompt at temperature 0; `"answers"`, each
            prompt's answer; or a text for each prompt.
        goal: `"sufficient"`, the smallest set that is enough in the base; `"necessary"`, the
            smallest set whose removal from the full source leaves a recovery of at most 1 −
            `target`; `"both"`, a set that is enough and whose complement is not.
        by: `"site"`, or `"head"` or `"neuron"` to go on inside the found sites down to these.
        steps: of each attribution, a number or `"auto"`.
        within: a graft whose places the search keeps to.
        outside: what runs at places that are not searched, `"base"` or `"full"`.
        split_by: what tells facts apart: a field's name, `"answer"` or `"prompt"`; by default the
            field `fact` where all prompts have one, else the answer.
        held_out: the share of the facts that is reported on.
        rounds: most rounds of refinement.
        compare: grafts to report beside the found set; by default the position grafts.
        random: how many random sets to compare with, matched by component and position.
        resamples: resamples of the facts for stability, which run no model.
        effects: also measure each site alone in the base and missing from the full source, on the
            search side (`exact_effects`); this takes longer than all the rest, and is not done
            where texts judge.
        seed: of the split, the random sets, the resamples and the bootstrap.
        say: called with a line about each step; None says nothing.

    Raises:
        PromptError: prompts that cannot be run, positions that overlap or select nothing.
        ValueError: any other argument that is not one of those allowed; too few facts; nothing to
            recover.
    """
    refuse_other_models(model)
    given = [prompts] if isinstance(prompts, Prompt) else prompts
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"prompts={brief(prompts)}: give a list of Prompts with answers.")
    checked_numbers(
        target=target, rounds=rounds, random=random, resamples=resamples, goal=goal, by=by
    )
    check_held_out(held_out)
    check_seed(seed)
    rating = rating_of(metric, sampling, continuations, effects)
    followed, whence = None, continuations or CONTINUED
    if rating is not None:
        metric, followed = GRADIENT, rating.continuations(model, given, source, whence)
    options: dict[str, Any] = {
        "positions": positions,
        "metric": metric,
        "within": within,
        "outside": outside,
    }
    asked = Asked.of(model, given, source, by=by, continuations=followed, **options)
    refuse_equal(asked)
    listed = tuple(given)
    parts = parted(listed, positions, split_by, held_out, seed)
    some = [listed[number] for number in parts.search]
    options_of_units: dict[str, Any] = {**options, "by": by, "steps": steps}
    after = None if followed is None else [followed[number] for number in parts.search]
    attributed = attribute(model, some, source, continuations=after, **options_of_units)
    attributed = numbered(attributed, parts.search)
    single = None
    if effects:
        single = numbered(exact_effects(model, some, source, **options), parts.search)
    question = question_of(
        model,
        asked,
        attributed,
        parts,
        goal=goal,
        target=target,
        compare=compared(listed, source, compare),
        rounds=rounds,
        random=random,
        resamples=resamples,
        seed=seed,
        rating=rating,
        continuations=whence,
    )
    runs = InMemory(model, listed, question, asked.measure, rating)
    return found_in(question, attributed, runs, effects=single, say=say or (lambda line: None))


def rating_of(metric: Any, sampling: Any, continuations: Any, effects: bool) -> Rating | None:
    """The measure of texts that judges; None where the measure is not one.

    Raises:
        ValueError: several measures, or options that do not go with the measure.
    """
    if measures := of_texts(metric):
        if len(measures) > 1:
            raise ValueError(
                f"metric={brief(metric)}: recovery is of one measure. Give one of these."
            )
        if effects:
            raise ValueError(
                "effects=True measures every site by itself, which texts would take too long to "
                "judge. Leave it out, or call find.exact_effects with a measure of one token."
            )
        return Rating.of(measures, sampling)
    for name, value in (("sampling", sampling), ("continuations", continuations)):
        if value is not None:
            raise ValueError(
                f"{name}={brief(value)} is for measures of generated texts, and metric="
                f"{brief(metric)} is not one. Leave it out, or give one such as "
                "outcomes.contains([…])."
            )
    return None


def checked_numbers(
    *, target: Any, rounds: Any, random: Any, resamples: Any, goal: Any, by: Any
) -> None:
    """Check what does not depend on a model.

    Raises:
        ValueError: a value that is not allowed; the message says which are.
    """
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target <= 1:
        raise ValueError(
            f"target={brief(target)} is not a share of the way from the base to the source. Write "
            "a number above 0, up to 1, such as 0.95."
        )
    for name, value in (("rounds", rounds), ("random", random), ("resamples", resamples)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}={brief(value)}: write a whole number from 0.")
    for name, value, allowed in (("goal", goal, get_args(Goal)), ("by", by, BY)):
        if value not in allowed:
            why = ""
            if value == "direction":
                why = " A singular direction is a score only: no graft can choose it."
            raise ValueError(
                f"{name}={brief(value)}. Allowed: {' '.join(map(repr, allowed))}.{why}"
            )


def refuse_equal(asked: Asked) -> None:
    """That the sources differ somewhere that is searched.

    Raises:
        ValueError: they do not.
    """
    if asked.equal >= set(asked.sites):
        raise ValueError(
            f"{asked.source!r} and {asked.base!r} have equal tensors at every site that is "
            "searched, so there is nothing to recover. Search elsewhere, or give another source."
        )


def parted(
    prompts: Sequence[Prompt], positions: Any, by: str | None, held_out: float | int, seed: int
) -> Split:
    """The prompts cut into parts; a single one whose tokens are searched one by one is not cut."""
    if isinstance(positions, str) and positions == EACH:
        return unsplit(prompts)
    return split(prompts, by, held_out, seed)


def numbered(table: pd.DataFrame, numbers: Sequence[int]) -> pd.DataFrame:
    """A table of some prompts with their own numbers among all."""
    found = table.assign(prompt=[numbers[n] for n in table["prompt"].tolist()])
    found.attrs = dict(table.attrs)
    return found


def compared(prompts: Sequence[Prompt], source: str, given: Grafts | None) -> dict[str, Graft]:
    """The grafts that a found set is reported beside.

    Raises:
        ValueError: a name that the report itself gives.
    """
    own = (BASE, FULL, FOUND, REST)
    if given is not None:
        named = named_grafts(given)
        for name in named:
            if name in own:
                raise ValueError(
                    f"compare: a graft is called {name!r}, as one of the report's own rows is "
                    f"({' '.join(own)}). Give it another name."
                )
        return named
    if all(prompt.conversation is not None for prompt in prompts):
        usual = position_grafts(source, kind="chat", prompts=prompts)
    elif all("first_entity" in prompt.fields for prompt in prompts):
        usual = position_grafts(source)
    else:
        usual = {"LT": Graft.rule(source, at="last"), "not-LT": Graft.rule(source, at="~last")}
    return {name: graft for name, graft in usual.items() if name not in own}


def question_of(
    model: GraftedTransformer,
    asked: Asked,
    attributed: pd.DataFrame,
    parts: Split,
    rating: Rating | None = None,
    continuations: Any = CONTINUED,
    **settings: Any,
) -> Question:
    """The question that a search answers.

    Args:
        model: the model.
        asked: what is searched.
        attributed: its attributions.
        parts: which prompts are for what.
        rating: the measure of texts that judges, if one does.
        continuations: the texts that gradients are of then.
        settings: those of `Question` that it is given.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so prompts cannot be run. Load one with it.")
    full = Graft.rule(asked.source)
    sites = attributed.assign(unit=pd.Series(pd.NA, attributed.index, dtype=object))
    searched = places_of(sites)
    base = Graft() if asked.outside == "base" else without(searched, full, asked.base, model.arch)
    return Question(
        tokens=tuple(one.scored.tokens for one in asked.prompts),
        token_text=model.to_single_str_token,
        arch=model.arch,
        biases=frozenset(
            str(c)
            for c in model.arch.components
            if model.weights_of(c, model.arch.layers_of(c)[0])[1] is not None
        ),
        source=asked.source,
        base_source=asked.base,
        base=base,
        full=full,
        metric=asked.measure.name if rating is None else rating.measures[0].name,
        split=parts,
        tails=tuple(() if rating is None else one.tail for one in asked.prompts),
        judged="" if rating is None else rating.said(asked.source, continuations),
        **settings,
    )


@dataclass(frozen=True, eq=False)
class InMemory:
    """Runs grafts in this process and keeps nothing."""

    model: GraftedTransformer
    prompts: Sequence[Prompt]
    question: Question
    measure: Measure
    rating: Rating | None = None

    def __call__(
        self, step: str, numbers: Sequence[int], grafts: Mapping[str, Graft]
    ) -> pd.DataFrame:
        chosen = {number: self.prompts[number] for number in numbers}
        if self.rating is not None:
            return self.rating.table(self.model, chosen, grafts)
        whole = self.measure.over == "answer"
        asked = {m if isinstance(m, str) else m.name: m for m in (self.measure, "kl_full")}
        scorer = Scorer(
            self.model,
            grafts,
            top_k=min(TOP, self.model.arch.d_vocab),
            answers="whole" if whole else "first",
            measures=list(asked.values()),
            references={"base": self.question.base, "full": self.question.full},
        )
        # kl_full is among the columns, which says what it is over.
        return self.model.vocabularies.marked(scorer.table(chosen))
