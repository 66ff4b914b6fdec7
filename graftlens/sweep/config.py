"""The config of a sweep, and everything that can be known about it before any weight is read."""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from jaxtyping import Bool
from pydantic import BeforeValidator, Field, field_validator, model_validator

from graftlens.components import suggest
from graftlens.configfile import (
    ConfigError,
    noted,
    read_settings,
    refuse_overrides,
    settings_from,
    text_with,
)
from graftlens.data import template_names
from graftlens.data.languagemodels import told_on_command_line
from graftlens.graft import Graft, Rule, parts_of
from graftlens.metrics import Measure
from graftlens.model.arch import Architecture
from graftlens.model.identity import tokenizer_digest
from graftlens.model.inputs import collate
from graftlens.model.load import preview
from graftlens.model.made import Each, Made, SourceField
from graftlens.model.mask import multiplies_far, resolve, select, silenced, sites_of
from graftlens.model.members import Member, members_of
from graftlens.model.smollm2 import located
from graftlens.model.source import ties_embeddings
from graftlens.outcomes.texts import right_of
from graftlens.positions import At
from graftlens.prompts import Prompt, PromptError, Tokenized, dated, doubled_bos
from graftlens.references import References
from graftlens.shipped import Kind, config_file
from graftlens.sweep.cells import asked_for
from graftlens.sweep.graftsettings import GraftSettings
from graftlens.sweep.outcomesettings import OutcomeSettings, TextFunction, refuse_unnamed
from graftlens.sweep.prepared import Extent, Prepared, joined_answers
from graftlens.sweep.promptsets import (
    DatasetSection,
    PromptColumn,
    PromptFile,
    PromptSection,
    Section,
    listed,
    prompt_sections,
)

__all__ = [
    "Checked",
    "ConfigError",
    "NamedGraft",
    "SweepConfig",
    "check",
    "checked_as_given",
    "load_config",
]

_TEMPLATES = template_names()

#: (where, what), as in ConfigError.
_Problems = list[tuple[str, str]]


class Metrics(Section):
    """What is measured in addition to the answer's rank and probabilities."""

    top_k: Annotated[int, Field(ge=1)] = 10
    """Likeliest tokens to keep in each row."""

    answers: Extent = "whole"
    """Log-probability of the whole answer, or (cheaper) only that of its first token."""

    distractors: Extent = "first"
    """Likewise; `whole` fills the column distractor_logprobs."""

    measures: tuple[str, ...] = ()
    """Further measures, by name, a column each: kl_base, kl_full, kl_from_base, kl_from_full,
    js_base, js_full, entropy, margin, answer_set_prob, or one of your own (`--measure`)."""


class RunSettings(Section):
    """How a sweep is run: its own settings, or those of all sweeps of an experiment."""

    tokenizer: str | None = None
    """Where to load the tokenizer from; by default the sources' own."""

    chat_template: str | None = None
    """What writes conversations: Jinja's text, or a file that holds it; left out: the base's, else
    that of the first source that has one."""

    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    """Dtype to run in; left out: float32 on a CPU, the checkpoints' own on a GPU."""

    prepend_bos: bool | None = None
    """Whether a BOS token comes first; left out, the tokenizer decides. Conversations have what
    their chat template writes, unless this is true."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Prompts to take of each template of a set of prompts, from its beginning; by default all."""

    metrics: Metrics = Metrics()
    """What is kept of each cell."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of what is drawn at random: distractors, and the cells of the trust report."""

    shards: Annotated[int, Field(ge=1)] = 4096
    """Cells (a prompt under a graft) per shard, about: what a worker takes, what a kill costs."""

    row_budget: Annotated[int, Field(ge=1)] | None = None
    """Most token rows per forward pass; by default chosen by the free memory."""

    def loading(self) -> dict[str, Any]:
        """What `GraftedTransformer.from_pretrained` is asked for."""
        return {
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "dtype": self.dtype,
        }


class SweepConfig(RunSettings, GraftSettings):
    """Which grafts of which sources to run over which prompts. One YAML file holds it all.

    Paths are relative to the working directory.
    """

    sources: Mapping[str, SourceField]
    """Name -> checkpoint folder, adapter folder or hub id, the base first, two or more.
    `smollm2-135m` stands for SmolLM2-135M-Instruct from graftlens' own cache. Or of what the source
    is made: {of: sft, strength: 0.5}, {of: sft, rank: 8}; or {each: runs/checkpoint-*}, for models
    that are run one after another."""

    dataset: Annotated[tuple[DatasetSection, ...], BeforeValidator(listed)] = ()
    """One or more sets of prompts about the facts of a dataset."""

    templates: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Evaluation templates of the datasets, by name; by default all."""

    outcomes: OutcomeSettings | None = None
    """Texts that are generated of each prompt under each graft, and what is measured of them. Where
    no prompt has an answer, these are all that the sweep makes."""

    prompts: Annotated[
        tuple[PromptSection | PromptFile | PromptColumn, ...], BeforeValidator(prompt_sections)
    ] = ()
    """Prompts of your own: a list of prompts, `file:` with a file of them, or `dataset:` with the
    column of a dataset that holds them."""

    @field_validator("sources")
    @classmethod
    def _names(cls, sources: Mapping[str, Any]) -> Mapping[str, Any]:
        if len(sources) < 2:
            raise ValueError(
                f"{len(sources)} given. Give two or more, the base first, such as "
                '{pre: "org/model", sft: "path/to/checkpoint"}.'
            )
        for name, place in sources.items():
            Rule(name, At.parse("all"))
            if isinstance(place, str) and not place.strip():
                raise ValueError(f"{name} is empty. Write a folder or a hub id.")
        return sources

    @field_validator("templates")
    @classmethod
    def _known(cls, templates: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if templates and len(set(templates)) < len(templates):
            raise ValueError(f"{list(templates)}: name each template once.")
        return templates

    @model_validator(mode="after")
    def _something_to_do(self) -> "SweepConfig":
        problems = []
        if not self.dataset and not self.prompts:
            problems.append(("", "no prompts: give dataset or prompts."))
        if self.templates and not self.dataset:
            problems.append(
                ("templates", "these are templates of a dataset, but no dataset is given.")
            )
        if not any(section.may_name_templates() for section in self.dataset):
            problems += [
                (
                    "templates",
                    f"unknown evaluation template {name!r}. Allowed: {' '.join(_TEMPLATES)}."
                    f"{suggest(name, _TEMPLATES)}",
                )
                for name in self.templates or ()
                if name not in _TEMPLATES
            ]
        problems += self.graft_problems(self.sources)
        if problems:
            raise ConfigError(*problems)
        return self

    @property
    def all_sources(self) -> dict[str, Any]:
        """Name -> source, also those that grids' ranks add."""
        return self.with_ranks(self.sources)[0]

    @property
    def each(self) -> tuple[str, Each] | None:
        """The source that stands for several models, if there is one."""
        found = [(name, one) for name, one in self.sources.items() if isinstance(one, Each)]
        return found[0] if found else None

    def members(self) -> tuple[Member, ...]:
        """The models that are run one after another; none without `each`.

        Raises:
            PairError: `each` matches nothing.
        """
        return () if self.each is None else members_of(*self.each)

    def locations(self, place: str | None = None) -> dict[str, Any]:
        """Name -> what `GraftedTransformer.from_pretrained` takes; downloads SmolLM2 if needed.

        Args:
            place: that of the member to run, where a source stands for several; by default the
                first one's.
        """
        if self.each is not None and place is None:
            place = self.members()[0].place
        return {
            name: place if isinstance(one, Each) else located(one) if isinstance(one, str) else one
            for name, one in self.all_sources.items()
        }


def load_config(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep's YAML file, with `key=value` overrides (`grids.0.layers=each`).

    Raises:
        ConfigError: everything that is wrong with the file itself, at once.
    """
    return told_on_command_line(read_settings(SweepConfig, path, overrides), overrides)


def with_measures(config: SweepConfig, measures: Sequence[Measure]) -> SweepConfig:
    """The config with the names of all these measures among those that it asks for."""
    named = config.metrics.measures
    cells = (m.name for m in measures if not isinstance(m, TextFunction))
    return _asking_for(config, [*named, *(name for name in cells if name not in named)])


def _asking_for(config: SweepConfig, names: Sequence[str]) -> SweepConfig:
    if tuple(names) == config.metrics.measures:
        return config
    metrics = config.metrics.model_copy(update={"measures": tuple(names)})
    return config.model_copy(update={"metrics": metrics})


@dataclass(frozen=True)
class NamedGraft:
    """One column of a sweep.

    Attributes:
        name: its name in tables.
        graft: what is run.
        source, span, component, layer, head, neuron: the parts of its only rule as text; None where
            the graft has no rule or several.
        strength: that of its only rule.
        rank: that of its only rule's source, where that is the best part of a rank.
    """

    name: str
    graft: Graft
    source: str | None = None
    span: str | None = None
    component: str | None = None
    layer: str | None = None
    head: str | None = None
    neuron: str | None = None
    strength: float | None = None
    rank: int | None = None

    @classmethod
    def of(cls, name: str, graft: Graft, sources: Mapping[str, Any] | None = None) -> "NamedGraft":
        """The graft with the parts of its rule; `sources` say which are made by rank."""
        parts = parts_of(graft)
        made = (sources or {}).get(str(parts["source"]))
        rank = made.rank if isinstance(made, Made) and isinstance(made.rank, int) else None
        return cls(name, graft, **parts, rank=rank)


@dataclass(frozen=True)
class Checked:
    """What can be known about a sweep before any weight is read.

    Attributes:
        config: the sweep's config.
        arch: the architecture that all sources share.
        tokenizer: the tokenizer that they share.
        prompts: datasets' prompts first, in the config's order.
        dataset: per prompt, the name of its dataset.
        grafts: the sweep's columns; equal grafts are one, under the first name.
        duplicates: dropped name -> the name that was kept for the same graft.
        base, full: names of the grafts that recovery is measured between.
        prepared: the prompts' tokens.
        asked: the measures besides those of every table, which the config names.
        functions: the user's own measures of texts.
        scored: whether any prompt has an answer, so that there are cells.
        members: the models that are run one after another, if a source stands for several.
        trained: where a measure of texts asks for them, the answers of all facts that datasets
            tell, however few of them are asked for, and of all other prompts.
    """

    config: SweepConfig
    arch: Architecture
    tokenizer: Any
    prompts: tuple[Prompt, ...]
    dataset: tuple[str, ...]
    grafts: tuple[NamedGraft, ...]
    duplicates: Mapping[str, str]
    base: str
    full: str
    prepared: Prepared
    asked: tuple[Measure, ...] = ()
    functions: tuple[Measure, ...] = ()
    scored: bool = True
    members: tuple[Member, ...] = ()
    trained: tuple[str, ...] = ()


def check(config: SweepConfig, measures: Sequence[Measure] = ()) -> Checked:
    """Everything that can be known without a model: prompts, grafts, and whether they fit.

    Reads the sources' configs and tokenizer, never their weights. The graft without rules and the
    second source everywhere are added where they are missing: recovery is measured between them.
    A graft that fails on some prompts only is kept; its cells there get a reason. So is one of a
    role that speaks in none of the conversations, with a warning, and where texts are generated,
    one of `generated` tokens, which cells cannot run. `measures` are the user's own, which the
    config may name.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    problems: _Problems = []
    measured: tuple[Measure, ...] = ()
    functions = tuple(m for m in measures if isinstance(m, TextFunction))
    try:
        refuse_unnamed(functions, config.outcomes.functions if config.outcomes else ())
        measured = asked_for(config.metrics.measures, measures)
    except ValueError as error:
        problems.append(("metrics.measures", str(error)))
    else:
        config = _asking_for(config, [m.name for m in measured])  # the others are there anyway
    rows: dict[str, Measure] = {}
    if config.outcomes is not None:
        try:
            rows = config.outcomes.measured_by(functions)
        except ConfigError as error:
            problems += error.problems
    try:
        members = config.members()
        arch, tokenizer = _previewed(config, members)
        if tokenizer is None:
            raise ValueError("no source has a tokenizer. Name one with the key tokenizer.")
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(("sources", str(error)), *_prompts(config)[1]) from None
    if config.metrics.top_k > arch.d_vocab:
        what = f"{config.metrics.top_k} is more than the vocabulary's {arch.d_vocab}."
        problems.append(("metrics.top_k", what))
    if config.paper is not None:
        tied = ties_embeddings(next(iter(config.locations().values())))
        given = config.named_grafts(tuple(config.sources), arch, tied)
        config = config.model_copy(update={"grafts": given, "paper": None})
    every, failed = _prompts(config)
    problems += failed
    sets = {title: _first(made, config.limit) for title, made in every.items()}
    prompts = tuple(prompt for made in sets.values() for prompt in made)
    wanted = any("trained" in row.needs for row in rows.values())
    trained = _trained(config, every) if wanted and not failed else ()
    without = next((n for n, prompt in enumerate(prompts) if not right_of(prompt)), None)
    for name, row in rows.items() if without is not None else ():
        if "right" in row.needs:
            what = (
                f"prompt {without} has no answer. Give it one, or leave the measure out. (exact "
                "may have answers of its own.)"
            )
            problems.append((f"outcomes.measures.{name}", what))

    sources = tuple(config.all_sources)
    named, failed = _named(config, arch)
    problems += failed
    everywhere = Graft.rule(list(config.sources)[1])
    texts = {str(graft): graft for _, _, graft in named}
    ends = References.of(texts, sources, everywhere, ("none", str(everywhere)))
    named = [("", name, graft) for name, graft in ends.grafts.items() if name not in texts] + named
    grafts, duplicates, failed = _collapsed(named)
    problems += failed
    chosen = {}
    for role, name in (("base", ends.base), ("full", str(ends.full))):
        asked = getattr(config, role)
        usual = next((n for n, g in grafts.items() if g == ends.grafts[name]), name)
        known = {name: usual} | {n: n for n in grafts} | duplicates
        if asked is not None and asked not in known:
            what = f"no graft is called {asked!r}. Write the name of one of the sweep's grafts."
            problems.append((role, what + suggest(asked, known)))
        chosen[role] = usual if asked is None else known.get(asked, asked)
    if chosen["base"] == chosen["full"]:
        what = f"{chosen['full']!r} is also the base, and recovery is measured between two grafts."
        problems.append(("full", what))
    where_given: dict[Graft, str] = {}
    for where, _, graft in named:
        where_given.setdefault(graft, where)
    bos = doubled_bos(prompts, tokenizer, config.prepend_bos)
    for note in filter(None, (joined_answers(prompts), bos, dated(prompts, tokenizer))):
        warnings.warn(note, stacklevel=2)
    prepared = Prepared(
        tokenizer, arch, config.prepend_bos, config.metrics.answers, config.metrics.distractors
    )
    scored = config.outcomes is None or any(prompt.answer is not None for prompt in prompts)
    needed = [grafts[name] for name in chosen.values() if name in grafts]
    if config.outcomes is not None:
        generating, unread = prepared.generating(prompts)
        problems += _none(prompts, generating, unread)
        problems += _unfit(where_given, sources, arch, generating, needed)
        where_given = {graft: where for graft, where in where_given.items() if graft in needed}
    if scored:
        ready, unready = prepared.all(dict(enumerate(prompts)))
        problems += _none(prompts, ready, unready)
        tokens = [one.tokens for one in ready]
        problems += _unfit(where_given, sources, arch, tokens, needed)
    if problems:
        raise ConfigError(*problems)
    return Checked(
        config,
        arch,
        tokenizer,
        prompts,
        tuple(title for title, made in sets.items() for _ in made),
        tuple(NamedGraft.of(name, graft, config.all_sources) for name, graft in grafts.items()),
        duplicates,
        **chosen,
        prepared=prepared,
        asked=measured,
        functions=functions,
        scored=scored,
        members=members,
        trained=trained,
    )


def _none(prompts: Sequence[Prompt], ready: Sequence[Any], unready: Mapping[int, str]) -> _Problems:
    """That no prompt can be run, if so."""
    if ready or not unready:
        return []
    first = next(iter(unready.values()))
    return [("", f"none of the {len(prompts)} prompts can be run. The first: {first}")]


def _previewed(config: SweepConfig, members: Sequence[Member]) -> tuple[Architecture, Any]:
    """The architecture and the tokenizer of the sources, which all members must have in common."""
    places: list[str | None] = [member.place for member in members]
    found = [
        preview(config.locations(place), config.tokenizer, config.chat_template)
        for place in places or [None]
    ]
    arch, tokenizer = found[0]
    for member, (own, reader) in zip(members[1:], found[1:], strict=True):
        if own != arch or tokenizer_digest(reader) != tokenizer_digest(tokenizer):
            odd = [key for key, value in vars(own).items() if value != getattr(arch, key)]
            what = ", ".join(odd) or "the tokenizer"
            raise ValueError(
                f"{members[0].name} and {member.name} differ in {what}, but members of one source "
                "have one shape. Run them in sweeps of their own."
            )
    return arch, tokenizer


def _prompts(config: SweepConfig) -> tuple[dict[str, tuple[Prompt, ...]], _Problems]:
    """Name of a dataset -> all its prompts."""
    own = [section.prompt for section in config.prompts if isinstance(section, PromptSection)]
    origins: list[tuple[str, str, Callable[[], Sequence[Prompt]]]] = [
        (f"dataset.{i}", section.title, partial(section.prompts, config.templates, config.seed))
        for i, section in enumerate(config.dataset)
    ]
    if own:
        origins.append(("prompts", "prompts", lambda: own))
    answered = config.outcomes is None
    for i, section in enumerate(config.prompts):
        if isinstance(section, PromptFile):
            name = Path(section.file).name
            origins.append((f"prompts.{i}", name, partial(section.prompts, answered)))
        elif isinstance(section, PromptColumn):
            made = partial(section.prompts, config.seed, answered)
            origins.append((f"prompts.{i}", section.title, made))
    sets: dict[str, tuple[Prompt, ...]] = {}
    problems: _Problems = []
    for where, title, read in origins:
        if title in sets:
            problems.append((where, f"two sets of prompts are called {title!r}. Rename one."))
        with noted(problems, where):
            sets[title] = tuple(read())
    return sets, problems


def _trained(config: SweepConfig, sets: Mapping[str, Sequence[Prompt]]) -> tuple[str, ...]:
    """The answers of all facts that were trained, as far as the config says."""
    told = dict(sets)
    for section in config.dataset:
        if section.facts != "told":
            told[section.title] = section.trained(config.templates, config.seed)
    return tuple(dict.fromkeys(a for made in told.values() for p in made for a in right_of(p)))


def _first(prompts: Sequence[Prompt], limit: int | None) -> tuple[Prompt, ...]:
    """The first `limit` prompts of each template."""
    taken: Counter[str] = Counter()
    kept = []
    for prompt in prompts:
        name = prompt.name or prompt.template
        taken[name] += 1
        if limit is None or taken[name] <= limit:
            kept.append(prompt)
    return tuple(kept)


def _named(
    config: SweepConfig, arch: Architecture
) -> tuple[list[tuple[str, str, Graft]], _Problems]:
    """(where, name, graft) of all that the config gives."""
    named = [(f"grafts.{name}", name, graft) for name, graft in config.grafts.items()]
    problems: _Problems = []
    for i, grid in enumerate(config.grids):
        try:
            made = list(grid.grafts(arch, tuple(config.sources)))
        except ValueError as error:
            problems.append((f"grids.{i}", str(error)))
        else:
            named.extend((f"grids.{i}", entry.name, entry.graft) for entry in made)
    return named, problems


def _collapsed(
    named: Sequence[tuple[str, str, Graft]],
) -> tuple[dict[str, Graft], dict[str, str], _Problems]:
    """The distinct grafts by name, and the dropped names with the names that were kept."""
    names: dict[Graft, str] = {}
    grafts: dict[str, Graft] = {}
    problems: _Problems = []
    for where, name, graft in named:
        if grafts.setdefault(name, graft) != graft:
            what = f"two grafts are called {name!r}: '{grafts[name]}' and '{graft}'. Rename one."
            problems.append((where, what))
        else:
            names.setdefault(graft, name)
    duplicates = {n: names[graft] for n, graft in grafts.items() if names[graft] != n}
    return {name: graft for graft, name in names.items()}, duplicates, problems


def _unfit(
    where_given: Mapping[Graft, str],
    sources: Sequence[str],
    arch: Architecture,
    prompts: Sequence[Tokenized],
    needed: Collection[Graft],
) -> _Problems:
    """Grafts that this architecture cannot run, or that no prompt can; the first of each place.

    A graft of a role that speaks in none of the conversations is told only, unless it is `needed`.
    """
    able: dict[At, Bool[np.ndarray, " prompts"]] = {}
    fit: set[Rule] = set()
    found: dict[str, list[str]] = {}
    silent: list[str] = []
    for graft, where in where_given.items():
        try:
            for rule in graft.rules:
                if rule not in fit:
                    sites_of(rule, arch, sources)
                    fit.add(rule)
            runs = np.ones(len(prompts), dtype=bool)
            for rule in graft.rules:
                if rule.at not in able:
                    able[rule.at] = np.array([_selects(rule, p) for p in prompts], dtype=bool)
                runs &= able[rule.at]
            if multiplies_far(graft):
                for prompt in itertools.compress(prompts, runs):
                    resolve(graft, collate([prompt], continuations=[[0]]), arch, sources)
            if prompts and not runs.any():
                for rule in graft.rules:
                    select(rule, prompts[0])  # one of them says what the first prompt lacks
        except PromptError as error:
            what = f"none of {len(prompts)} prompts can run it. The first: {error}"
            if graft not in needed and all(silenced(graft, prompt) for prompt in prompts):
                silent.append(f"{where}: {what}")
            else:
                found.setdefault(where, []).append(what)
        except ValueError as error:
            found.setdefault(where, []).append(str(error))
    if silent:
        more = f" (And {len(silent) - 1} more grafts like it.)" if silent[1:] else ""
        warnings.warn(silent[0] + more, stacklevel=3)
    return [
        (where, first + (f" (And {len(rest)} more grafts like it.)" if rest else ""))
        for where, (first, *rest) in found.items()
    ]


def _selects(rule: Rule, prompt: Tokenized) -> bool:
    try:
        select(rule, prompt)
    except PromptError:
        return False
    return True


def checked_as_given(
    config: SweepConfig | str | Path | Mapping[str, Any] | Checked,
    overrides: Sequence[str],
    measures: Sequence[Measure],
) -> tuple[Checked, str]:
    """The checked config, and its text as given."""
    if isinstance(config, str | Path):
        path = config_file(Kind.SWEEP, config)
        checked = check(with_measures(load_config(path, overrides), measures), measures)
        typed = [*overrides, *(f"the measure {m.name}" for m in measures)]
        return checked, text_with(path, typed)
    refuse_overrides(overrides)
    if isinstance(config, Checked):
        checked = config
    else:
        given = with_measures(settings_from(SweepConfig, config), measures)
        checked = check(given, measures)
    return checked, as_yaml(checked.config.model_dump(mode="json", exclude_unset=True))


def as_yaml(value: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True))
