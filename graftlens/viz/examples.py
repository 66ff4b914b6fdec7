"""Prompts that a page shows: the tokens that grafts touch, and what the model then says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from graftlens.references import named_in
from graftlens.viz import text
from graftlens.viz.quantities import of_summary
from graftlens.viz.spelling import spanned


@dataclass(frozen=True)
class Example:
    """One prompt to show. `grafted` says for each graft which tokens were touched by it."""

    title: str
    tokens: tuple[str, ...]
    grafted: dict[str, tuple[bool, ...]]
    answer: str
    target: str
    """The answer's first token, which is what ranks and accuracies are about."""
    predictions: dict[str, tuple[tuple[str, float], ...]]

    def __post_init__(self) -> None:
        for graft, marks in self.grafted.items():
            if len(marks) != len(self.tokens):
                raise ValueError(
                    f"example {self.title!r}: graft {graft!r} marks {len(marks)} tokens, the "
                    f"prompt has {len(self.tokens)}; give one True or False per token"
                )
        unknown = [graft for graft in self.predictions if graft not in self.grafted]
        if unknown:
            raise ValueError(
                f"example {self.title!r}: predictions for {', '.join(map(repr, unknown))}, but "
                f"grafted has {', '.join(map(repr, self.grafted))}; give the marks of each graft"
            )

    def where(self, graft: str) -> str:
        """The marked token numbers in words, so that nothing depends on seeing the marks."""
        marked = [number for number, on in enumerate(self.grafted[graft], start=1) if on]
        if not marked:
            return "base weights everywhere"
        if len(marked) == len(self.tokens):
            return "finetuned weights at every token"
        plural = "s" if len(marked) > 1 else ""
        return f"finetuned weights at token{plural} {spanned(marked)} of {len(self.tokens)}"


@dataclass(frozen=True)
class Pane:
    """The prompt of a glimpse under one of its grafts."""

    graft: str
    said: str
    """What follows the prompt; empty where nothing is known of it."""
    right: bool
    """Whether that begins with the answer's first token."""
    value: str
    interval: str
    """One number of the graft, as `92.5%` and `[80.0, 97.5]`."""


@dataclass(frozen=True)
class Glimpse:
    """One prompt under a graft that should be enough and under its complement: a page's first
    sight."""

    example: Example
    panes: tuple[Pane, ...]
    measured: str
    """What the panes' numbers are, and over which prompts."""
    note: str
    """Which prompt this is, and what follows it."""


def first_right(table: pd.DataFrame, full: str, template: str | None = None) -> int | None:
    """The number of the first prompt that the full run answers right, or else of the first one that
    ran; None where none did. Chosen without a look at any graft's result.

    Args:
        table: rows of results: prompt, graft, rank, reason, and template.
        full: the name of the full run.
        template: only prompts of this template, if there are any.
    """
    ran = table[(table["graft"].astype(str) == full) & table["reason"].isna()]
    if template is not None and "template" in ran:
        own = ran[ran["template"].astype(str) == template]
        ran = own if len(own) else ran
    right = ran[ran["rank"] == 1]
    chosen = right if len(right) else ran
    return int(chosen["prompt"].iloc[0]) if len(chosen) else None


def glimpse(
    example: Example,
    summary: pd.DataFrame,
    grafts: Sequence[str],
    *,
    metric: str = "top5",
    says: Mapping[str, str] | None = None,
) -> Glimpse | None:
    """The first sight of a page; None where the example or the summary lacks one of the grafts.

    Args:
        example: a prompt; its title is that of its group of the summary, or else the first group is
            measured.
        summary: of `graftlens.stats.summarise`.
        grafts: the graft that should be enough, and its complement.
        metric: what the numbers are.
        says: graft -> a continuation of the prompt; where it has none, the likeliest next token.
    """
    names = set(summary["graft"].astype(str))
    if not set(grafts) <= names & set(example.grafted) or metric not in summary:
        return None
    parts = text.groups(summary)
    group = next((g for g in parts if example.title in g.split(" · ")), next(iter(parts)))
    rows = parts[group].assign(graft=parts[group]["graft"].astype(str)).set_index("graft")
    facts = of_summary(summary, metric)
    says = says or {}
    panes = []
    for graft in grafts:
        guess = example.predictions.get(graft, (("", 0.0),))[0][0]
        said = says.get(graft, guess)
        value, _, interval = text.written(facts, rows.loc[graft]).partition(" ")
        # Its first token is that of the greedy continuation as well.
        panes.append(Pane(graft, said, bool(guess) and guess == example.target, value, interval))
    count = text.prompts(int(rows["n"].iloc[0]))
    _, full = named_in(summary)
    followed = "what the model says"
    if not set(grafts) <= set(says):
        followed = "the likeliest next token"
        followed += ", or by the whole answer where its probability is above one half" * bool(says)
    return Glimpse(
        example,
        tuple(panes),
        f"{facts.short or facts.label}, {text.level(summary)} interval over "
        f"{text.resampled(summary)}: {count} of {group}",
        f"The first of these prompts that {full} answers right (or the first, if it answers none)"
        f", followed by {followed}.",
    )
