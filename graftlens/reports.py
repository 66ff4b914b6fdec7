"""The page of a sweep, made from its folder alone, and the examples that pages show."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from graftlens.folder import at_home
from graftlens.graft import Graft
from graftlens.model.load import preview
from graftlens.model.mask import select
from graftlens.model.smollm2 import rounded_sources
from graftlens.outcomes.drawing import Drawing
from graftlens.prompts import Prompt, PromptError, Tokenized
from graftlens.references import MEMBERS
from graftlens.stats import summarise
from graftlens.sweep.prepared import Extent, Prepared
from graftlens.sweep.results import Manifest, facts_of, read_end, read_manifest, read_results
from graftlens.sweep.runner import SweepResult, config_of, content_of, sweep_result
from graftlens.sweep.texttables import read_texts
from graftlens.textreports import GROUPS, texts_shown
from graftlens.viz.examples import Example, Glimpse, first_right, glimpse
from graftlens.viz.page import page_at
from graftlens.viz.spelling import short
from graftlens.viz.sweepcharts import effects
from graftlens.viz.sweeppage import TOKENS, Sweep, sweep_page
from graftlens.viz.textspage import Rates, texts_page

#: The page in a sweep's folder.
PAGE = "report.html"

#: Most cells (a prompt under a graft) whose prompts a page holds.
CELLS = 100_000
#: How many grafts a page has at least, however many prompts there are.
GRAFTS = 12
#: How many rows are read at a time of a sweep whose cells are too many for a page.
BATCH = 500_000
#: The graft that should be enough and its complement, where a sweep has them.
ENOUGH = ("FE+LT", "(FE+LT)^C")
#: Most examples, and grafts of each.
EXAMPLES, SHOWN = 4, 8
#: Most characters of a text that a page begins with.
SAID = 120


def sweep_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of a finished sweep and return it; no weights are read.

    It has charts by what the grafts vary, tables, the trust report and examples; a click on a graft
    shows its prompts with rank, probability, likeliest tokens and the command that opens their
    dashboard. It is one file that needs no network. Of a sweep of more than `CELLS` cells it shows
    the grafts whose mean log-probability differs most from the base's, and says so.

    Args:
        folder: the sweep's.
        path: the page; by default `report.html` in the folder.

    Raises:
        ValueError: a folder that holds no finished sweep, or a file at `path` that is not a page of
            graftlens.
        OSError: a page that cannot be written.
    """
    folder = at_home(folder)
    path = page_at(folder / PAGE if path is None else at_home(path))
    result = sweep_result(folder)
    manifest = read_manifest(folder)
    names = [str(graft["name"]) for graft in manifest.grafts]
    ends = tuple(manifest.recovery.values())
    prompts = sum(manifest.prompt_blocks)
    notes = rounded_sources(manifest.config["sources"])
    notes += [f"{count} cells could not be run: {why}" for why, count in result.not_run.items()]
    notes += [
        f"{count} texts could not be generated: {why}"
        for why, count in result.texts_not_run.items()
    ]
    texts, rates, left_out = None, Rates(pd.DataFrame()), list[str]()
    if manifest.texts:
        texts, rates, left_out = texts_shown(folder, manifest)
    if manifest.members:
        notes.append(_about_members(manifest, compared=manifest.scored or len(rates.together) > 0))
    notes += left_out
    if texts is not None and not manifest.scored:
        return texts_page(
            path,
            title=f"Sweep {folder.resolve().name}",
            lead=_lead(manifest, result),
            texts=texts,
            rates=rates,
            notes=notes,
            trust=str(result.trust["text"]),
            trusted=result.ok,
            provenance=_provenance(folder, manifest),
        )
    chosen: Collection[str] = names
    if manifest.cells > CELLS:
        most = max(GRAFTS, CELLS // prompts)
        chosen = _largest(folder, manifest, most)
        notes.append(
            f"The sweep has {manifest.cells:,} cells, more than a page holds ({CELLS:,}): of "
            f"{len(names):,} grafts, it shows the {len(chosen):,} whose mean log-probability "
            "differs most from the base's, and the ends of recovery."
        )
    shown = range(min(prompts, max(1, CELLS // len(chosen))))
    table = _cells(folder, manifest, chosen, shown)
    rare = _rare(table, ends)
    notes += [
        f"{name} ran on {ran} of {prompts} prompts. It is left out of charts and tables, in "
        "which a prompt counts only if it ran under every graft."
        for name, ran in rare.items()
    ]
    summary, pooled = _summary(folder, manifest, table[~table["graft"].isin(rare)])
    notes += pooled
    few = list(effects(summary).drop(list(ends)).sort_values(ascending=False).index)
    grafts = content_of(folder, manifest)[1]
    marked = {name: grafts[name] for name in (*ends, *few[: SHOWN - len(ends)])}
    members = None
    if manifest.members:
        every = _cells(folder, manifest, set(summary["graft"]), range(0), every=True)
        members, _ = _summary(folder, manifest, every)
    examples, unshown = _examples(folder, manifest, marked, table)
    notes += unshown
    behind = f"All {prompts:,} prompts are here."
    if len(shown) < prompts:
        behind = f"The first {len(shown):,} of {prompts:,} prompts are here."
    return sweep_page(
        path,
        Sweep(
            title=f"Sweep {folder.resolve().name}",
            lead=_lead(manifest, result),
            summary=summary,
            table=table,
            shown=shown,
            notes=notes,
            said=behind,
            examples=examples,
            glimpse=sweep_glimpse(folder, summary, ENOUGH),
            trust=str(result.trust["text"]),
            trusted=result.ok,
            command=("graftlens", "dashboard", "--sweep", str(folder)),
            provenance=_provenance(folder, manifest),
            texts=texts,
            members=members,
        ),
    )


def ensure_report(folder: str | Path) -> Path:
    """The page of a finished sweep, written unless it is there and newer than the sweep's end.

    Raises:
        ValueError, OSError: as `sweep_report`.
    """
    page, done = at_home(folder) / PAGE, at_home(folder) / "done.json"
    if page.is_file() and page.stat().st_mtime_ns >= done.stat().st_mtime_ns:
        return page_at(page)
    return sweep_report(folder)


def measured_in(table: pd.DataFrame, asked: Sequence[str], answers: Extent) -> list[str]:
    """The measures that a summary of a sweep's table has besides accuracies, those `asked` last."""
    metrics = ["logprob"]
    if answers == "whole":
        metrics.append("answer_logprob")
    # A prompt without distractors has none; a cell that could not be run is not such a prompt.
    if table.loc[table["reason"].isna(), "logit_diff"].notna().all():
        metrics.append("logit_diff")
    return metrics + [m for m in dict.fromkeys(asked) if m not in metrics]


def sweep_summary(folder: str | Path) -> pd.DataFrame:
    """The summary of a finished sweep by template (and dataset, where there are several).

    Raises:
        ValueError: a folder that holds no finished sweep, or one of texts alone.
    """
    folder = at_home(folder)
    sweep_result(folder)
    manifest = read_manifest(folder)
    if not manifest.scored:
        raise ValueError(
            f"{folder} has texts and no cells, as none of its prompts has an answer. Compare its "
            "texts: graftlens.read_texts and outcomes.rate."
        )
    names = [str(graft["name"]) for graft in manifest.grafts]
    table = _cells(folder, manifest, names, range(0))
    table = table[~table["graft"].isin(_rare(table, tuple(manifest.recovery.values())))]
    return _summarised(table, manifest, _groups(table))


def example(
    title: str,
    prompt: Prompt,
    tokens: Tokenized,
    texts: Sequence[str],
    grafts: Mapping[str, Graft],
    rows: pd.DataFrame,
) -> Example:
    """One prompt with the tokens that each graft touches and the likeliest next tokens.

    Args:
        title: its heading.
        prompt, tokens, texts: the prompt, its tokens, and each token's text.
        grafts: name -> graft, each of which can run on the prompt.
        rows: the prompt's rows of a results table.
    """
    rows = rows[rows["reason"].isna()].assign(graft=rows["graft"].astype(str)).set_index("graft")
    marks = {
        name: tuple(
            any(marked)
            for marked in zip(*(select(r, tokens).tolist() for r in graft.rules), strict=True)
        )
        or (False,) * len(tokens)
        for name, graft in grafts.items()
    }
    return Example(
        title=title,
        tokens=tuple(texts),
        grafted=marks,
        answer=str(prompt.answer),
        target=str(rows["target"].iloc[0]),
        predictions={
            name: tuple(
                zip(
                    list(rows.at[name, "top_tokens"])[:TOKENS],
                    map(float, list(rows.at[name, "top_probs"])[:TOKENS]),
                    strict=True,
                )
            )
            for name in grafts
            if name in rows.index
        },
    )


def _about_members(manifest: Manifest, compared: bool) -> str:
    """Which of several models the page is about."""
    ran = f"The sweep ran {len(manifest.members)} models one after another"
    if not compared:
        return f"{ran}. The texts are those of the model that you choose."
    about = "All else on this page" + (" but the texts" if manifest.texts else "")
    last = manifest.members[-1]["name"]
    return f"{ran}, which are compared below. {about} is about the last, {last}."


def _lead(manifest: Manifest, result: SweepResult) -> str:
    base, full = manifest.recovery["base"], manifest.recovery["full"]
    recovery = f"; recovery runs from {base} (0) to {full} (1)" if manifest.scored else ""
    sources = ", ".join(manifest.config["sources"])
    trust = "passed" if result.ok else "FAILED: do not rely on these numbers before reading it"
    return (
        f"{len(manifest.grafts):,} grafts of {sources} on {sum(manifest.prompt_blocks):,} prompts"
        f"{recovery}. The trust report {trust}."
    )


def _largest(folder: Path, manifest: Manifest, most: int) -> list[str]:
    """The grafts whose mean log-probability is furthest from the base's, and the ends of recovery,
    in the sweep's order."""
    names = [str(graft["name"]) for graft in manifest.grafts]
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    of = MEMBERS if manifest.members else ()
    for batch in read_results(folder, columns=[*of, "graft", "logprob"], batch_rows=BATCH):
        assert isinstance(batch, pd.DataFrame)
        batch = _of_last(batch, manifest)
        batch = batch[batch["logprob"].notna()]
        codes = batch["graft"].cat.codes.to_numpy()
        values = batch["logprob"].to_numpy(dtype=float)
        sums += np.bincount(codes, weights=values, minlength=len(names))
        counts += np.bincount(codes, minlength=len(names))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
        far = np.abs(means - means[names.index(manifest.recovery["base"])])
    far[counts == 0] = -1.0  # it ran on no prompt
    far = np.nan_to_num(far, nan=np.inf)
    ends = {names.index(name) for name in manifest.recovery.values()}
    order = [int(i) for i in np.argsort(-far, kind="stable") if int(i) not in ends]
    kept = ends | set(order[: most - len(ends)])
    return [name for i, name in enumerate(names) if i in kept]


def _of_last(table: pd.DataFrame, manifest: Manifest) -> pd.DataFrame:
    """The rows of the last model, where several ran one after another."""
    if not manifest.members:
        return table
    last = table["member"].astype(str) == manifest.members[-1]["name"]
    return table[last].drop(columns=list(MEMBERS), errors="ignore").reset_index(drop=True)


def _cells(
    folder: Path,
    manifest: Manifest,
    grafts: Collection[str],
    shown: Collection[int],
    *,
    every: bool = False,
) -> pd.DataFrame:
    """The rows of some grafts, with the likeliest tokens of the prompts that are shown; those of
    `every` model where several ran one after another, or of the last."""
    kept = set(grafts)

    def own(table: pd.DataFrame) -> pd.DataFrame:
        return table if every else _of_last(table, manifest)

    lists = ["top_tokens", "top_probs"]
    dropped = ("distractor_logprobs", "model")
    columns = [column for column in manifest.columns if column not in dropped]
    if len(kept) == len(manifest.grafts):
        table = read_results(folder, columns=columns if shown else _without(columns, lists))
        assert isinstance(table, pd.DataFrame)
        return own(table)
    parts = []
    for batch in read_results(folder, columns=columns, batch_rows=BATCH):
        assert isinstance(batch, pd.DataFrame)
        part = own(batch[batch["graft"].isin(kept)]).copy()
        part.loc[~part["prompt"].isin(shown), lists] = None
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    place = table["graft"].cat.codes
    return table.assign(_place=place).sort_values(["prompt", "_place"]).drop(columns="_place")


def _rare(table: pd.DataFrame, ends: Collection[str]) -> dict[str, int]:
    """Grafts that ran on fewer than half of the prompts of the ends of recovery, and on how many:
    with them, few prompts would count."""
    ran = table["reason"].isna().groupby(table["graft"].astype(str), sort=False).sum()
    least = min(int(ran[end]) for end in ends) / 2
    return {name: int(n) for name, n in ran.items() if n < least and name not in ends}


def _without(columns: Sequence[str], others: Collection[str]) -> list[str]:
    return [column for column in columns if column not in others]


def _groups(table: pd.DataFrame) -> list[str]:
    apart = ["dataset"] if table["dataset"].nunique() > 1 else []
    return [*apart, "template"]


def _summary(
    folder: Path, manifest: Manifest, table: pd.DataFrame
) -> tuple[pd.DataFrame, list[str]]:
    """The summary by group of prompts, or of all together where the groups are many."""
    by = _groups(table)
    lead = [name for name in MEMBERS if name in table]
    count = len(table[by].drop_duplicates())
    if count <= GROUPS:
        return _summarised(table, manifest, [*lead, *by]), []
    table = table.assign(fact=facts_of(folder).reindex(table["prompt"]).to_numpy())
    note = (
        f"The {count} groups of prompts (by {' and '.join(by)}) are shown together, with facts as "
        "resampling units. `graftlens.summarise` gives them one by one."
    )
    return _summarised(table, manifest, lead, unit="fact"), [note]


def _summarised(
    table: pd.DataFrame, manifest: Manifest, by: Sequence[str], unit: str = "prompt"
) -> pd.DataFrame:
    settings = manifest.config["metrics"]
    return summarise(
        table,
        by=by,
        metrics=measured_in(table, manifest.asked, settings["answers"]),
        unit=unit,
        seed=manifest.config["seed"],
    )


#: Makes an example of a prompt: its title, its number, the grafts to mark and its rows.
_Maker = Callable[[str, int, Mapping[str, Graft], pd.DataFrame], Example]


def _maker(folder: Path, manifest: Manifest) -> _Maker:
    """What makes examples of a sweep's prompts.

    Raises:
        ValueError, OSError, RuntimeError: its models' configs and tokenizer cannot be read here.
    """
    config = config_of(folder, manifest)
    arch, tokenizer = preview(config.locations(), config.tokenizer, config.chat_template)
    prepared = Prepared(
        tokenizer, arch, config.prepend_bos, config.metrics.answers, config.metrics.distractors
    )
    prompts = content_of(folder, manifest)[0]
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)

    def make(title: str, number: int, grafts: Mapping[str, Graft], rows: pd.DataFrame) -> Example:
        tokens = prepared(number, prompts[number]).tokens
        able = {name: graft for name, graft in grafts.items() if _reads(graft, tokens)}
        texts = [decode([token]) for token in tokens.ids]
        return example(title, prompts[number], tokens, texts, able, rows)

    return make


def _examples(
    folder: Path, manifest: Manifest, grafts: Mapping[str, Graft], table: pd.DataFrame
) -> tuple[list[Example], list[str]]:
    """The first prompt of each template that ran, and why there is none."""
    try:
        make = _maker(folder, manifest)
    except (ValueError, OSError, RuntimeError) as error:
        return [], [
            f"Example prompts are left out, because the models cannot be read here: {error}"
        ]
    ran = table[table["reason"].isna() & table["top_tokens"].notna()]
    made = []
    groups = ran.drop_duplicates("template")["template"].astype(str).tolist()
    for template in islice(groups, EXAMPLES):
        rows = ran[ran["template"].astype(str) == template]
        number = int(rows["prompt"].iloc[0])
        made.append(make(template, number, grafts, rows[rows["prompt"] == number]))
    return made, []


def sweep_glimpse(
    folder: Path,
    summary: pd.DataFrame,
    grafts: Sequence[str],
    *,
    metric: str = "top5",
) -> Glimpse | None:
    """What the page of a sweep begins with; None where the grafts did not run or the models cannot
    be read here. A prompt is followed by what the sweep generated, if that is the likeliest token
    at each step, or else by the whole answer under a graft that says it for sure.

    Args:
        folder: of a finished sweep.
        summary: of its results, by template.
        grafts: the graft that should be enough, and its complement.
        metric: as in `graftlens.viz.examples.glimpse`.
    """
    manifest = read_manifest(folder)
    known = content_of(folder, manifest)[1]
    full = manifest.recovery.get("full")
    if full is None or not set(grafts) <= set(known):
        return None
    prompts = range(sum(manifest.prompt_blocks))
    table = _cells(folder, manifest, [*grafts, full], prompts)
    number = first_right(table, full)
    if number is None:
        return None
    rows = table[(table["prompt"] == number) & table["reason"].isna()]
    try:
        made = _maker(folder, manifest)(
            str(rows["template"].iloc[0]), number, {name: known[name] for name in grafts}, rows
        )
        says = _generated(folder, manifest, number, grafts) or _surely_said(made, rows)
    except (ValueError, OSError, RuntimeError):
        return None
    return glimpse(made, summary, grafts, metric=metric, says=says)


def _generated(
    folder: Path, manifest: Manifest, number: int, grafts: Sequence[str]
) -> dict[str, str]:
    """Graft -> the text after a prompt, of the likeliest token at each step; nothing if a graft has
    none."""
    if not len(manifest.text_shards):
        return {}
    sampling = Drawing(**manifest.config["outcomes"]["sampling"]).sampling
    if sampling.draws or sampling.repetition_penalty != 1:
        return {}
    texts = _of_last(read_texts(folder), manifest)
    found = texts[(texts["prompt"] == number) & texts["text"].notna()].set_index("graft")["text"]
    said = {graft: short(str(found[graft]), SAID) for graft in grafts if graft in found}
    return said if all(map(said.get, grafts)) else {}


def _surely_said(made: Example, rows: pd.DataFrame) -> dict[str, str]:
    """Graft -> the whole answer, where that has a probability above one half: then so has each of
    its tokens given those before it, which makes it the likeliest one."""
    if "answer_logprob" not in rows:
        return {}
    sure = rows[rows["answer_logprob"] > math.log(0.5)]
    return dict.fromkeys(sure["graft"].astype(str), made.answer)


def _reads(graft: Graft, tokens: Tokenized) -> bool:
    try:
        for rule in graft.rules:
            select(rule, tokens)
    except PromptError:
        return False
    return True


def _fingerprint(models: Mapping[str, Any], source: str) -> object:
    """A source's fingerprint; where models ran one after another, those that differ by member."""
    by_member = {
        member: (record.get("fingerprints") or {}).get(source)
        for member, record in (models.get("members") or {}).items()
    }
    if not by_member:
        return (models.get("fingerprints") or {}).get(source)
    return by_member if len({*by_member.values()}) > 1 else next(iter(by_member.values()))


def named_sources(sources: Mapping[str, Any], prints: Mapping[str, object]) -> dict[str, object]:
    """Source -> what it was read from (a hub id, or of a folder only the name, whose location does
    not concern readers of a page) or is made of, and its fingerprint."""
    return {
        name: {
            "from": Path(place).name if isinstance(place, str) and Path(place).exists() else place,
            "SHA-256": prints.get(name),
        }
        for name, place in sources.items()
    }


def sweep_sources(manifest: Manifest) -> dict[str, object]:
    """`named_sources` of a finished sweep."""
    sources = manifest.config["sources"]
    models = manifest.models or {}
    return named_sources(sources, {name: _fingerprint(models, name) for name in sources})


def _provenance(folder: Path, manifest: Manifest) -> dict[str, object]:
    """What was run and how; of a source's folder only the name, as in other pages."""
    done, _ = read_end(folder)
    models = manifest.models or {}
    config = {
        key: value
        for key, value in manifest.config.items()
        if key not in ("sources", "prompts", "grafts", "outcomes")
        and value not in (None, [], {}, ())
    }
    config |= _said_of_texts(manifest.config.get("outcomes"))
    ended = ("finished", "machine", "device")
    found: dict[str, object] = {
        "sources": sweep_sources(manifest),
        "dtype": models.get("dtype"),
        "cells": manifest.cells,
        "config": config,
        "on the command line": list(manifest.overrides),
        "versions": dict(manifest.versions),
    }
    return found | {key: done[key] for key in ended if key in done}


def _said_of_texts(outcomes: Mapping[str, Any] | None) -> dict[str, object]:
    """What a config says of texts, a line for each measure."""

    def line(given: Mapping[str, Any]) -> str:
        there = {key: value for key, value in given.items() if value not in (None, [], {}, ())}
        return json.dumps(there, ensure_ascii=False)

    if not outcomes:
        return {}
    measures = {name: line(given) for name, given in outcomes["measures"].items()}
    found: dict[str, object] = {"sampling of texts": line(outcomes["sampling"])}
    return found | ({"measures of texts": measures} if measures else {})
