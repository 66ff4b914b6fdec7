"""A localisation in a folder, from its config to its tables and its page.

The folder has what `graftlens.find.stored` keeps, and::

    OUT/config.yaml            the config as it was given
    OUT/index.html             the page
    OUT/found.yaml             the found graft, and the full source without it
    OUT/tables/                every table, as CSV and Markdown
    OUT/trust.txt              the trust report on the found set
    OUT/.graftlens             marks the folder as ours: without it, no file there is touched
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from graftlens.configfile import ConfigError, refuse_overrides, settings_from, text_with
from graftlens.find.asked import EACH, Asked
from graftlens.find.config import LocaliseConfig, Search, load_localise, no_judge
from graftlens.find.finding import found_in
from graftlens.find.found import Found
from graftlens.find.judging import BASE, FULL
from graftlens.find.localisation import compared, parted, question_of, refuse_equal
from graftlens.find.rating import GRADIENT, Rating
from graftlens.find.searching import EVALUATIONS
from graftlens.find.stored import (
    TRUSTED,
    Attributions,
    InFolder,
    continuations,
    key_of,
    record,
)
from graftlens.folder import at_home, claim, inside, json_digest, read_json, write_whole
from graftlens.graft import Graft
from graftlens.metrics import Measure
from graftlens.model.smollm2 import rounded_sources
from graftlens.reports import named_sources
from graftlens.sweep.cells import Measures, fingerprints, own_measures
from graftlens.sweep.config import Checked, as_yaml, check
from graftlens.sweep.description import describe
from graftlens.sweep.devices import check_devices
from graftlens.sweep.disk import lock, writing
from graftlens.sweep.models import Loaded
from graftlens.sweep.prepared import day_of
from graftlens.sweep.results import as_given, read_end
from graftlens.viz.localisation import localisation_page
from graftlens.viz.tables import write_table

#: What is written into a localisation's folder.
WRITTEN = (
    *("config.yaml", "index.html", "found.yaml", "trust.txt", "tables"),
    *("localise.json", "attribution", "continuations.json", "steps", "locks"),
)

#: Table -> its caption.
TABLES = {
    "summary": "On the held-out prompts, with intervals over facts",
    "differences": "The found set minus others, on the same held-out facts",
    "curve": "Recovery over size, on the held-out prompts",
    "table": "Every searched site",
    "search": "What was judged on the search side",
    "rounds": "Rounds of refinement",
    "random": "Random sets, matched by component and position",
    "failures": "Held-out prompts whose answer the found set does not put first",
    "example": "The found set on one prompt",
    "split": "Which prompts were for what",
    "costs": "How many runs it took",
}


@dataclass(frozen=True)
class LocaliseResult:
    """A finished localisation.

    Attributes:
        folder: where it is.
        page: the page that shows it.
        found: what was found.
        trust: the trust report on the found set, as in its ``trust.json``.
    """

    folder: Path
    page: Path
    found: Found
    trust: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the trust report found nothing wrong."""
        return bool(self.trust["ok"])

    def line(self) -> str:
        """The result in a few lines."""
        verdict = "passed" if self.ok else f"FAILED (see {self.folder / 'trust.txt'})"
        return f"{self.found}\n{self.page.resolve()}: trust report {verdict}"


def run_localise(
    config: LocaliseConfig | str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    measures: Measures = (),
    device: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> LocaliseResult:
    """Run a localisation in a folder, or resume a killed one, or show a finished one again.

    If it is interrupted at any instant, calling it again computes what is missing and ends with the
    same numbers, bit for bit, as without the interruption (on one machine, and unless memory ran
    out). Several simultaneous calls share the work.

    Args:
        config: the config, or the path of its file, or its content.
        out: the localisation's folder.
        overrides: `key=value` settings that replace those of the file.
        measures: of your own, or where to import them from (``module:name``).
        device: where to run; by default the GPU if there is one, else the CPU.
        progress: whether to show progress bars.
        say: called with each message.

    Raises:
        ValueError: a config that cannot be run, or a folder that holds another localisation.
        FolderError: a folder that cannot be written, or a full disk.
    """
    out = at_home(out)
    if device is not None:
        check_devices([device])
    settings, text = _given(config, overrides)
    own = own_measures(measures)
    checked = check(settings.sweep(), own)
    return localise_checked(
        checked,
        settings.search,
        settings.source,
        settings.grafts or None,
        out,
        text=text,
        own=own,
        device=device,
        progress=progress,
        say=say,
    )


def _given(
    config: LocaliseConfig | str | Path | Mapping[str, Any], overrides: Sequence[str]
) -> tuple[LocaliseConfig, str]:
    """The config, and its text as given."""
    if isinstance(config, str | Path):
        path = at_home(config)
        settings = load_localise(path, overrides)
        return settings, text_with(path, overrides)
    refuse_overrides(overrides)
    settings = settings_from(LocaliseConfig, config)
    return settings, as_yaml(settings.model_dump(mode="json", exclude_unset=True))


def describe_localise(
    config: LocaliseConfig | str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    measures: Measures = (),
) -> str:
    """What a localisation would do, as text; no weights are read, and nothing is written.

    Arguments are those of `run_localise`.

    Raises:
        ValueError: a config that cannot be run.
    """
    settings, _ = _given(config, overrides)
    checked = check(settings.sweep(), own_measures(measures))
    return "\n\n".join([describe(checked), searched(checked, settings.search, settings.source)])


def searched(checked: Checked, search: Search, source: str) -> str:
    """What a search would do, as text.

    Raises:
        ConfigError: prompts that cannot be cut into parts, or a measure that cannot judge.
    """
    parts, rating = _parts(checked, search), rating_of(checked, search)
    each = search.positions == EACH
    where = "each token" if each else ", ".join(search.positions)
    count = len(checked.arch.sites) * (1 if each else len(search.positions))
    steps = "as many as each prompt needs, up to 64" if search.steps == "auto" else search.steps
    lines = [
        f"search    {source} at {where}, {search.goal}, recovery of {search.metric} to "
        f"{search.target:g}",
        f"          {'up to ' if search.within else ''}{count} sites{' of each token' * each} "
        f"(components of layers at positions); steps of the gradients: {steps}",
        f"          at most {EVALUATIONS} sets judged, then up to {search.rounds} rounds of "
        "refinement",
        f"          {len(parts.search)} prompts ({parts.count(parts.search)} facts) to search on, "
        f"{len(parts.inner)} of them the inner part; {len(parts.held_out)} "
        f"({parts.count(parts.held_out)} facts) to report on",
        f"          then {search.random} random sets, {search.resamples} resamples of the facts",
    ]
    if rating is not None:
        lines.append(f"          {rating.said(source, search.continuations)}")
    return "\n".join(lines)


def _parts(checked: Checked, search: Search) -> Any:
    try:
        return parted(
            checked.prompts,
            search.positions,
            search.split_by,
            search.held_out,
            checked.config.seed,
        )
    except ValueError as error:
        raise ConfigError(("search", str(error))) from None


def localise_checked(
    checked: Checked,
    search: Search,
    source: str,
    grafts: Mapping[str, Graft] | None,
    out: Path,
    *,
    text: str,
    own: Sequence[Measure] = (),
    device: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> LocaliseResult:
    """As `run_localise`, of a sweep that was checked.

    Args:
        checked: the sweep of all prompts.
        search, source, grafts: what is searched, and what is reported beside it.
        out: the folder.
        text: the config as it was given, for ``config.yaml``.
        own, device, progress, say: as in `run_localise`.
    """
    if checked.config.each is not None:
        raise ValueError(
            f"sources.{checked.config.each[0]}: each stands for several models, and a search is "
            "about one. Name one of them."
        )
    parts, rating = _parts(checked, search), rating_of(checked, search)
    claim(out, "localisation", taken=WRITTEN)
    loaded = Loaded.of(checked.config, device)
    say(loaded.said)
    model = loaded.model
    if checked.config.prepend_bos is not None:
        model.cfg.default_prepend_bos = checked.config.prepend_bos
    measure = next((m for m in own if m.name == search.metric), search.metric)
    identity = _identity(checked, search, source, grafts, own)

    def ask(**more: Any) -> Asked:
        asked = Asked.of(model, list(checked.prompts), source, by=search.by, **options, **more)
        refuse_equal(asked)
        return asked

    options = {**search.options(), "metric": measure if rating is None else GRADIENT}
    if rating is None:  # what cannot be asked is refused before the folder is about it
        asked = ask()
    rows = record(out, identity, loaded, checked.config.row_budget, say)
    key = key_of(identity["search"] | identity["prompts"], loaded)
    followed = None
    if rating is not None:
        prompts = list(checked.prompts)
        key = key_of(identity["search"] | identity["prompts"] | identity["outcomes"], loaded)
        followed = continuations(
            out, loaded, rating, prompts, source, search.continuations, key, say
        )
        asked = ask(continuations=list(followed))
    attributions = Attributions(out, loaded, asked, options, key, say, followed)
    attributed = attributions(parts.search, steps=search.steps)
    effects = attributions.effects(parts.search) if search.effects else None
    question = question_of(
        model,
        asked,
        attributed,
        parts,
        goal=search.goal,
        target=float(search.target),
        compare=compared(checked.prompts, source, grafts),
        rounds=search.rounds,
        random=search.random,
        resamples=search.resamples,
        seed=checked.config.seed,
        rating=rating,
        continuations=search.continuations,
    )
    exact = InFolder(out, checked, loaded, BASE, FULL, rows, progress, say, rating)
    found = found_in(question, attributed, exact, effects=effects, say=say)
    _, trust = read_end(inside(out, "steps", TRUSTED))
    with lock(out, "finish", say=say), writing(out):
        page = _write(out, found, trust, text, identity)
    result = LocaliseResult(out, page, found, trust)
    say(result.line())
    return result


def rating_of(checked: Checked, search: Search) -> Rating | None:
    """The measure of texts that judges, if one does.

    Raises:
        ConfigError: one that cannot judge.
    """
    outcomes = checked.config.outcomes
    if outcomes is None:
        return None
    if what := no_judge(search.metric, outcomes, checked.functions):
        raise ConfigError(("search.metric", what))
    measure = outcomes.measured_by(checked.functions)[search.metric]
    try:
        return Rating.of([measure], outcomes.sampling.model_dump())
    except ValueError as error:
        raise ConfigError(("search.metric", str(error))) from None


def _identity(
    checked: Checked,
    search: Search,
    source: str,
    grafts: Mapping[str, Graft] | None,
    own: Sequence[Measure],
) -> dict[str, Any]:
    """What another call on the same folder must agree with."""
    config = checked.config
    given: list[Any]
    if config.outcomes is None:
        given = [
            [as_given(prompt), list(scored.tokens.ids), list(scored.answer)]
            for number, prompt in enumerate(checked.prompts)
            for scored in [checked.prepared(number, prompt)]
        ]
    else:
        given = [[as_given(p), list(checked.prepared.tokens(p).ids)] for p in checked.prompts]
    run = ("tokenizer", "chat_template", "dtype", "prepend_bos", "seed", "shards", "row_budget")
    return {
        "search": search.model_dump(mode="json") | {"source": source},
        "grafts": {name: str(graft) for name, graft in (grafts or {}).items()},
        "sources": config.model_dump(mode="json", include={"sources"})["sources"],
        "run": {name: getattr(config, name) for name in run},
        "measures": list(config.metrics.measures),
        **(
            {} if config.outcomes is None else {"outcomes": config.outcomes.model_dump(mode="json")}
        ),
        "own measures": fingerprints(own),
        "prompts": {
            "number": len(given),
            "sha256": json_digest(given),
            **day_of(checked.prompts, checked.tokenizer),
        },
    }


def _write(
    out: Path, found: Found, trust: Mapping[str, Any], text: str, identity: Mapping[str, Any]
) -> Path:
    """The tables, the found graft, the trust report and the page."""
    write_whole(out / "config.yaml", text)
    write_whole(out / "trust.txt", f"{trust['text']}\n")
    about = {"found": found.graft.to_list(), "complement": found.rest.to_list()}
    note = f"# {found.sentence}\n"
    write_whole(out / "found.yaml", note + as_yaml(about))
    files = {}
    folder = inside(out, "tables")
    for name, caption in TABLES.items():
        frame: pd.DataFrame = getattr(found, name)
        if len(frame):
            files[name] = write_table(frame, folder / name, caption=caption)
    asked = read_json(out / "localise.json", "Run the search again.")["asked"]
    provenance = {
        "asked": {k: v for k, v in identity["search"].items() if v is not None},
        "sources": named_sources(identity["sources"], asked["models"]["fingerprints"]),
        "prompts": identity["prompts"],
        "versions": {name: version(name) for name in ("graftlens", "torch", "transformers")},
        "trust report": "passed" if trust["ok"] else "FAILED",
    }
    links = {
        "the config": out / "config.yaml",
        "the found graft": out / "found.yaml",
        "trust report": out / "trust.txt",
    }
    return localisation_page(
        found,
        out / "index.html",
        provenance=provenance,
        files=files,
        links=links,
        notes=rounded_sources(identity["sources"]),
    )
