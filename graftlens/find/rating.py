"""What places make a model say: measures of generated texts, as the exact judge of grafts.

No gradient passes through a generated text. Where one orders places, it is that of the
log-probability of reference continuations: texts that the full source writes itself, or given ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from graftlens.components import brief
from graftlens.graft import Graft
from graftlens.metrics import Measure
from graftlens.model.grafted import GraftedTransformer
from graftlens.outcomes.drawing import Drawing
from graftlens.outcomes.measures import gives_labels, named
from graftlens.outcomes.rates import measured
from graftlens.outcomes.texts import Sampler
from graftlens.prompts import Prompt
from graftlens.sweep.cells import refuse_taken

#: The measure that gradients are of where a text judges: the log-probability of a continuation.
GRADIENT = "answer_logprob"

#: Where reference continuations come from, other than being given.
FULL, ANSWERS = "full", "answers"
#: The usual one.
CONTINUED = FULL


@dataclass(frozen=True, eq=False)
class Rating:
    """Measures of generated texts, and how the texts are drawn.

    Attributes:
        measures: the measures, of a number each; their names are columns.
        drawing: how many texts of each prompt, and how.
    """

    measures: tuple[Measure, ...]
    drawing: Drawing

    @classmethod
    def of(cls, measures: Sequence[Measure], sampling: Any) -> "Rating":
        """What the arguments `metric` (or `metrics`) and `sampling` ask for.

        Raises:
            ValueError: a measure of labels, or one with another column's name; options that
                `outcomes.sample` does not have, or outside their range.
        """
        for one in measures:
            refuse_taken(one)
            if one.holds != "number":
                raise of_labels(one.name)
        if not isinstance(sampling, Mapping | None):
            raise ValueError(
                f"sampling={brief(sampling)}: write the arguments of outcomes.sample, such as "
                '{"n": 4, "max_new_tokens": 48}.'
            )
        try:
            drawing = Drawing(**(sampling or {}))
        except TypeError:
            known = " ".join(Drawing.__dataclass_fields__)
            raise ValueError(f"sampling={brief(sampling)}. Allowed: {known}.") from None
        return cls(tuple(measures), drawing)

    def table(
        self,
        model: GraftedTransformer,
        prompts: Mapping[int, Prompt],
        grafts: Mapping[str, Graft],
        *,
        prepend_bos: bool | None = None,
    ) -> pd.DataFrame:
        """A row for each of these prompts under each graft.

        Returns:
            Columns `prompt`, `graft`, `rule`, `template`, `text` (the prompt), `answer`, `says`
            (its first text), a column for each measure (the mean over its texts, without those that
            a judge's reply could not be read of; NaN where there is none), and `reason`.
        """
        return self.cells(
            Sampler(model, grafts, self.drawing, prepend_bos=prepend_bos).table(prompts)
        )

    def cells(self, texts: pd.DataFrame) -> pd.DataFrame:
        """A table of texts as `table` gives it."""
        rows = {one.name: one for one in self.measures}
        return rated_cells(measured(texts, rows), [*rows])

    def continuations(
        self, model: GraftedTransformer, prompts: Sequence[Prompt], source: str, given: Any
    ) -> tuple[str, ...]:
        """The reference continuation of each prompt.

        Args:
            model: the model.
            prompts: the prompts.
            source: the full source, whose own greedy texts `full` asks for.
            given: `full`, `answers` (each prompt's own answer), or a text for each prompt.

        Raises:
            ValueError: something else, prompts without an answer, or a text that says nothing.
        """
        if given == ANSWERS:
            found: list[Any] = [prompt.answer for prompt in prompts]
            what = "has no answer"
        elif given == FULL:
            greedy = replace(self.drawing, n=1, temperature=0, top_p=None, top_k=None)
            table = Sampler(model, {source: Graft.rule(source)}, greedy).table(
                dict(enumerate(prompts))
            )
            failed = table[table["reason"].notna()]
            if len(failed):
                row = failed.iloc[0]
                raise ValueError(f"prompt {row['prompt']} could not be run: {row['reason']}")
            found, what = table["text"].tolist(), f"is one to which {source} says nothing"
        else:
            listed = None if isinstance(given, str) or not isinstance(given, Sequence) else [*given]
            if listed is None or len(listed) != len(prompts):
                count = "" if listed is None else f" ({len(listed)} for {len(prompts)} prompts)"
                raise ValueError(
                    f"continuations={brief(given)}{count}. Write {FULL!r} (the greedy texts of "
                    f"{source}), {ANSWERS!r} (each prompt's answer), or a text for each prompt."
                )
            found, what = listed, "has no continuation"
        for number, text in enumerate(found):
            if not isinstance(text, str) or not text:
                raise ValueError(
                    f"prompt {number} {what}, so there is nothing for gradients to follow. Give "
                    "continuations, a text for each prompt, or leave the prompt out."
                )
        return tuple(found)

    def said(self, source: str, given: Any) -> str:
        """What a report says of the judge, and of what gradients are."""
        (one,) = self.measures
        options = ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}"
            for name, value in self._options().items()
        )
        origin = {FULL: f"greedy texts of {source} itself", ANSWERS: "the prompts' answers"}
        whose = origin[given] if isinstance(given, str) else "given texts"
        return (
            f"Sets are judged by {one.name} in generated texts ({options}). No gradient passes "
            "through it: the order is that of the log-probability of reference continuations "
            f"({whose}), in nats."
        )

    def _options(self) -> dict[str, Any]:
        always = {"n": self.drawing.n, "max_new_tokens": self.drawing.max_new_tokens}
        return always | self.drawing.as_given()


def rated_cells(texts: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """A table of texts that are measured as `Rating.table` gives it.

    Raises:
        ValueError: a measure of labels.
    """
    for name in names:
        if texts[name].dtype == object and texts[name].notna().any():
            raise of_labels(name)
    cells = texts.groupby(["prompt", "graft"], sort=False)
    kept = ["prompt", "graft", "rule", "template", "prompt_text", "answer", "text", "reason"]
    table = texts.loc[texts["sample"] == 0, kept]
    table = table.rename(columns={"text": "says", "prompt_text": "text"})
    means = cells[[*names]].mean()
    keys = pd.MultiIndex.from_frame(table[["prompt", "graft"]])
    for name in names:
        table[name] = means[name].reindex(keys).to_numpy(dtype=float)
        missing = table["reason"].isna() & table[name].isna()
        table.loc[missing, "reason"] = f"{name} has no value of what it says."
    return table.reset_index(drop=True)


def beside(cells: pd.DataFrame, rated: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """A table of cells with these measures of texts; rows that have either only give the reason.

    Args:
        cells: as `graftlens.evaluate` gives it.
        rated: as `Rating.table` gives it.
        names: the measures.
    """
    said = rated[["prompt", "graft", "says", *names]].assign(why=rated["reason"])
    table = cells.astype({"graft": str}).merge(
        said.astype({"graft": str}), on=["prompt", "graft"], validate="1:1"
    )
    why = table.pop("why")
    return table.assign(reason=table["reason"].where(table["reason"].notna(), why))


def of_labels(name: str) -> ValueError:
    """That a measure of labels judges nothing."""
    return ValueError(
        f"metric={name!r} gives labels, which have no mean. Say which one counts: "
        f'{{"{name}": lambda text: …}} with a number or a truth value.'
    )


def of_texts(given: Any) -> tuple[Measure, ...]:
    """The measures of texts among what was given as a measure or measures: rows of this kind, and
    those of a mapping from names, as `outcomes.rate` takes it.

    Raises:
        ValueError: a mapping that holds something else, or a function that gives labels.
    """
    if isinstance(given, Mapping):
        for name, one in given.items():
            if gives_labels(one):
                raise of_labels(str(name))
        return tuple(named(str(name), one) for name, one in given.items())
    listed = given if isinstance(given, list | tuple) else [given]
    return tuple(m for m in listed if isinstance(m, Measure) and m.over == "text")
