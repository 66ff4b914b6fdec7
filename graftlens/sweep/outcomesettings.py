"""What a config says about texts: how they are generated, and what is measured of them."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from graftlens import outcomes
from graftlens.components import brief, suggest
from graftlens.configfile import ConfigError
from graftlens.metrics import Measure
from graftlens.outcomes.drawing import Drawing
from graftlens.outcomes.judging import Judge, judging
from graftlens.outcomes.measures import named
from graftlens.outcomes.texts import COLUMNS
from graftlens.sweep.promptsets import Section

#: Makers of measures of texts, by the key that a config calls them by.
MAKERS: Mapping[str, Callable[..., Measure]] = {
    "contains": outcomes.contains,
    "regex": outcomes.regex,
    "exact": outcomes.exact,
    "choice": outcomes.choice,
    "answer_kind": outcomes.answer_kind,
    "classifier": outcomes.classifier,
}

_ALLOWED = (*MAKERS, "judge")

#: Columns of a table of texts, whose names no measure can have.
_TAKEN = {*COLUMNS, "base_run", "full_run", "dataset", "member", "step", "fact"}


class SamplingSettings(Section):
    """How texts are generated: the arguments of `graftlens.outcomes.sample`, whose defaults these
    are."""

    n: int = 1
    """Texts of each prompt and graft."""

    max_new_tokens: int = 60
    """Most tokens of a text."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token at each step."""

    top_p: float | None = None
    """Draw from the likeliest tokens whose probabilities add up to this or more."""

    top_k: int | None = None
    """Draw from so many of the likeliest tokens only."""

    repetition_penalty: float = 1.0
    """Of tokens that appeared, positive logits are divided and negative ones multiplied by it."""

    stop_strings: tuple[str, ...] = ()
    """Texts that end a text once a new token completes one of them; the key may be `stop`."""

    seed: int = 0
    """Seed of the random numbers, which depend on (seed, the prompt's tokens, sample, step)."""

    @model_validator(mode="before")
    @classmethod
    def _other_spellings(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        found = dict(values)
        if found.get("repetition_penalty", 1.0) is None:
            del found["repetition_penalty"]
        if "stop" in found:
            if "stop_strings" in found:
                raise ConfigError(("stop", "stop and stop_strings are one key. Give one of them."))
            found["stop_strings"] = found.pop("stop")
        if isinstance(found.get("stop_strings"), str):
            found["stop_strings"] = [found["stop_strings"]]
        return found

    @model_validator(mode="after")
    def _in_range(self) -> "SamplingSettings":
        _ = self.drawing
        return self

    @property
    def drawing(self) -> Drawing:
        """The same, as texts are drawn."""
        return Drawing(**{name: getattr(self, name) for name in type(self).model_fields})


class MeasureSettings(Section):
    """A measure of texts: one of these keys, with the arguments of the function of that name in
    `graftlens.outcomes`, or its first argument alone."""

    contains: Any = None
    """Texts to look for."""

    regex: Any = None
    """A regular expression."""

    exact: Any = None
    """The right answers; true takes those of each prompt."""

    choice: Any = None
    """Texts, or label -> texts, of which the first named one counts."""

    answer_kind: Any = None
    """What kind of answer a text gives; the answers of all facts that were trained, or true for
    those that the sweep knows of."""

    classifier: Any = None
    """A text-classification model: hub id or folder."""

    judge: Judge | None = None
    """A language model with a rubric and a scale."""

    function: str | None = None
    """``module:name`` of a function of your own, which is imported only where the command line
    names it, too (``--measure module:name``)."""

    @model_validator(mode="after")
    def _one(self) -> "MeasureSettings":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'no measure'} given. Give one of {' '.join(_ALLOWED)}, "
                "or module:name of a function."
            )
        if self.function is None:
            self.made()
        elif ":" not in self.function.strip(":"):
            raise ValueError(
                f"{self.function!r} is not a measure. Write module:name of a function, or one of "
                f"{' '.join(_ALLOWED)} with its arguments."
            )
        return self

    def made(self, functions: "Mapping[str, TextFunction] | None" = None) -> Measure:
        """The measure; `functions` are those that may be imported, by their places.

        Raises:
            ValueError: arguments that its maker refuses, or a function that is not among these.
        """
        if self.function is not None:
            if self.function not in (functions or {}):
                raise ValueError(
                    f"{self.function!r} is code, which a config alone does not run. If you trust "
                    f"it, name it on the command line too: --measure {self.function} (in Python: "
                    f"measures=[{self.function!r}])."
                )
            return (functions or {})[self.function]
        if self.judge is not None:
            return judging(self.judge)
        ((name, maker),) = ((n, m) for n, m in MAKERS.items() if getattr(self, n) is not None)
        return _made(name, maker, getattr(self, name))


def _made(name: str, maker: Callable[..., Measure], given: Any) -> Measure:
    """What a maker gives for all its arguments, or for its first one alone."""
    known = inspect.signature(maker).parameters
    first = next(iter(known))
    optional = known[first].default is not inspect.Parameter.empty
    if optional and given is True:
        return maker()
    if optional and isinstance(given, Mapping) and first not in given:
        given = {first: None, **given}
    if not isinstance(given, Mapping) or (name == "choice" and first not in given):
        given = {first: given}
    for key in given:
        if key not in known:
            raise ValueError(
                f"{name}: unknown key {brief(key)}. Allowed: {' '.join(known)}."
                f"{suggest(str(key), [*known])}"
            )
    if first not in given:
        raise ValueError(f"{name}: the key {first} is missing.")
    try:
        return maker(**given)
    except (TypeError, AttributeError) as error:  # such as a number where a text belongs
        raise ValueError(f"{name}: {brief(given)} cannot be used ({error}).") from None


def _as_measure(value: Any) -> Any:
    return {"function": value} if isinstance(value, str) else value


class OutcomeSettings(Section):
    """Texts that are generated of each prompt under each graft, and what is measured of them."""

    sampling: SamplingSettings = SamplingSettings()
    """How they are generated."""

    measures: Mapping[str, Annotated[MeasureSettings, BeforeValidator(_as_measure)]] = {}
    """Name -> what is measured: `{contains: [...]}`, `{regex: ...}`, `{exact: true}`,
    `{choice: [...]}`, `{answer_kind: true}`, `{classifier: ...}`, `{judge: {...}}`, or
    `module:name`."""

    shards: Annotated[int, Field(ge=1)] = 256
    """Texts per shard, about: what a worker takes, what a kill costs."""

    token_budget: Annotated[int, Field(ge=1)] | None = None
    """Most tokens whose keys and values are kept at a time; by default what memory allows."""

    @field_validator("measures")
    @classmethod
    def _columns(cls, measures: Mapping[str, Any]) -> Mapping[str, Any]:
        taken = _TAKEN | {f"{name}_unread" for name in measures}
        for name in measures:
            if not name.isidentifier() or name in taken:
                why = "the table of texts has another column of this name"
                raise ValueError(
                    f"{name!r}: {why if name in taken else 'a name of a measure is a column'}. "
                    "Write another name, of letters, digits and _."
                )
        return measures

    @property
    def functions(self) -> tuple[str, ...]:
        """The places of the functions that measures name."""
        return tuple(m.function for m in self.measures.values() if m.function is not None)

    def measured_by(self, own: Sequence[Measure] = ()) -> dict[str, Measure]:
        """Name -> measure; `own` are the user's own, as `own_measures` gives them.

        Raises:
            ConfigError: a function that is not among these.
        """
        functions = {one.place: one for one in own if isinstance(one, TextFunction)}
        found, problems = {}, []
        for name, settings in self.measures.items():
            try:
                found[name] = named(name, settings.made(functions))
            except ValueError as error:
                problems.append((f"outcomes.measures.{name}", str(error)))
        if problems:
            raise ConfigError(*problems)
        return found


@dataclass(frozen=True)
class TextFunction(Measure):
    """A measure of texts that was imported.

    Attributes:
        place: from where (``module:name``).
        given: what is there: a function, or a measure of texts.
    """

    place: str = ""
    given: Any = None

    @classmethod
    def at(cls, place: str, given: Any) -> "TextFunction":
        """What is at a place, which must be a function or a measure of texts."""
        made = vars(named("own", given))
        if not isinstance(given, Measure):
            made |= {"label": place.rpartition(":")[2].replace("_", " ")}
        return cls(**{**made, "column": ""}, place=place, given=given)

    @property
    def plain(self) -> Measure:
        """The measure whose function is the user's own."""
        own = self.given
        return own if isinstance(own, Measure) else Measure("own", function=own, over="text")


def refuse_unnamed(own: Sequence[Measure], places: Collection[str]) -> None:
    """Refuse functions of texts that the outcomes of a sweep do not name.

    Raises:
        ValueError: there is one.
    """
    for one in own:
        if isinstance(one, TextFunction) and one.place not in places:
            raise ValueError(
                f"{one.place!r} is a function, not a measure. Make it one: "
                "graftlens.metrics.Measure(name, needs, function). Or, if it measures texts, name "
                f"it in outcomes.measures: {{mine: {one.place}}}."
            )
