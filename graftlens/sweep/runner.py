"""Running a sweep in a folder, in one process or several, so that no kill loses or duplicates a
row.

The folder (see `results.py`) is claimed first: a description of the sweep is stored, and another
sweep is refused. Workers then take shards of cells and of texts (see `claim.py`). The worker that
finds all shards finished measures the texts, and writes the trust report and the marker that the
sweep is done.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from graftlens.folder import differences, json_digest, probe, refusal
from graftlens.graft import Graft
from graftlens.metrics import Measure
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt, PromptError
from graftlens.references import MEMBERS
from graftlens.sweep.cells import Measures, asked_for, fingerprints, own_measures
from graftlens.sweep.claim import Job
from graftlens.sweep.claim import fill as fill_jobs
from graftlens.sweep.config import Checked, SweepConfig, as_yaml, checked_as_given
from graftlens.sweep.counts import blocks_of
from graftlens.sweep.devices import check_devices
from graftlens.sweep.disk import (
    SHARDS,
    FolderError,
    clear_halves,
    lock,
    make_folders,
    refuse_foreign,
    sealed_json,
    write,
    writing,
)
from graftlens.sweep.models import FINGERPRINTS, Models, Say, unchanged
from graftlens.sweep.outcomesettings import OutcomeSettings
from graftlens.sweep.prepared import day_of, refuse_another_day
from graftlens.sweep.results import (
    GRAFT_COLUMNS,
    Manifest,
    as_given,
    damaged,
    prompt_table,
    read_end,
    read_manifest,
    read_prompts,
    read_results,
    revived,
    to_bytes,
    to_mend,
)
from graftlens.sweep.scoring import Scorer
from graftlens.sweep.texttables import TextShards, are_measured, counted, measure_texts
from graftlens.sweep.texttrust import check_texts
from graftlens.sweep.trust import trust_content, trust_report

#: Most cells for which the trust report also reads the likeliest tokens.
LISTED = 200_000

#: Prompts per second and the time left; rates below one stay rates.
BAR = (
    "{{desc}}: {{percentage:3.0f}}%|{{bar}}| {{n:.0f}} of {{total:.0f}} {unit}s "
    "[{{elapsed}}<{{remaining}}, {{rate_noinv_fmt}}]"
)

#: Number of graft blocks whose plans a worker keeps.
PLANNERS = 4

#: The identity's key for the functions of the user's own measures.
OWN = "own measures"


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    Attributes:
        folder: where it is; `read_results(folder)` gives the table.
        cells: number of (prompt, graft), each a row.
        not_run: reason -> number of cells that could not be run for that reason.
        trust: the trust report, as in ``trust.json``.
        texts: number of texts, each a row of another table (`read_texts`).
        texts_not_run: reason -> number of texts that could not be generated for that reason.
    """

    folder: Path
    cells: int
    not_run: Mapping[str, int]
    trust: Mapping[str, Any] = field(repr=False)
    texts: int = 0
    texts_not_run: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the trust report found nothing wrong."""
        return bool(self.trust["ok"])

    def line(self) -> str:
        """The result in one line."""
        verdict = "passed" if self.ok else f"FAILED (see {self.folder / 'trust.txt'})"
        counts = {"cells": self.cells, "texts": self.texts}
        made = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n or what == "cells")
        if self.texts and not self.cells:
            made = f"{self.texts:,} texts"
        line = f"{self.folder}: {made}; trust report {verdict}"
        for what, not_run in (
            ("cells could not be run", self.not_run),
            ("texts could not be generated", self.texts_not_run),
        ):
            if not_run:
                reasons = sorted(not_run.items(), key=lambda item: (-item[1], item[0]))
                shown = "; ".join(f"{count} × {reason}" for reason, count in reasons[:3])
                more = f"; and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
                line += f"; {sum(not_run.values()):,} {what}: {shown}{more}"
        return line


def run_sweep(
    config: SweepConfig | str | Path | Mapping[str, Any] | Checked,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    measures: Measures = (),
    device: str | None = None,
    progress: bool = True,
    say: Say = print,
) -> SweepResult:
    """Run a sweep, resume a killed one, or find it finished.

    If it is interrupted at any instant, calling it again computes what is missing and gives the
    same rows, bit for bit, as without the interruption (on one machine, and unless memory ran out:
    then batches are made smaller, and the last bits may differ). Several simultaneous calls share
    the work.

    Args:
        config: the config, or the path of its file, or its content.
        out: the sweep's folder.
        overrides: `key=value` settings that replace those of the file.
        measures: of your own, or where to import them from (``module:name``); those that the config
            does not name are added to its `metrics.measures`. Functions that its
            `outcomes.measures` name are imported only if they are named here, too.
        device: where to run; by default the GPU if there is one, else the CPU.
        progress: whether to show a progress bar.
        say: called with each message.

    Raises:
        ValueError: a config that cannot be run, or a folder that holds another sweep.
        FolderError: a folder that cannot be written, or a full disk.
    """
    out = Path(out).expanduser()
    if device is not None:
        check_devices([device])
    claimed = (out / "sweep.json").is_file()
    own = own_measures(measures)
    checked, text = checked_as_given(config, overrides, own)
    _prepare(checked, text, out, overrides, say)
    try:
        told = checked.config.outcomes  # whose judge may know that the command line named it
        work(out, device=device, measures=own, outcomes=told, progress=progress, say=say)
    except ValueError:
        # The models were refused: the corrected config should find the folder free.
        if not claimed:
            _give_up(out, say)
        raise
    result = sweep_result(out)
    say(result.line())
    return result


def sweep_result(out: str | Path) -> SweepResult:
    """The result of a finished sweep.

    Raises:
        ValueError: the sweep is not finished, or the record of its end is damaged.
    """
    out = Path(out).expanduser()
    if not (out / "done.json").is_file():
        raise ValueError(f"{out} is not finished. Run the sweep's command again to continue.")
    try:
        done, trust = read_end(out)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{out}: the record of its end is damaged ({error}). Run the sweep's command again: "
            "it recreates the record from the shards."
        ) from None
    texts = done.get("texts", 0), done.get("texts_not_run", {})
    return SweepResult(out, done["cells"], done["not_run"], trust, *texts)


def is_done(out: Path) -> bool:
    """Whether the sweep's marker says that it is finished, and its trust report exists."""
    try:
        read_end(out)
    except (OSError, ValueError):
        return False
    return True


def is_finished(out: Path) -> bool:
    """Whether nothing is left to do: the marker and all shards exist, and no file of the models has
    been written since (so that weights retrained in the same place are not mistaken for these).
    """
    manifest = read_manifest(out)
    if manifest.models is None or not is_done(out):
        return False
    if any(table.missing(out) for table in manifest.tables) or not are_measured(out, manifest):
        return False
    config = config_of(out, manifest)
    return all(unchanged(config, manifest, number) for number in range(manifest.rounds))


def _refuse_unfinished_earlier(out: Path) -> None:
    """That a sweep which an earlier version started is finished: it recorded too little, or its
    models by other fingerprints, to go on.

    Raises:
        ValueError: it is not.
    """
    manifest = read_manifest(out)
    models = manifest.models
    known = manifest.sealed and (models is None or models.get("scheme") == FINGERPRINTS)
    if not known and not is_finished(out):
        raise ValueError(
            f"{out} was started by version 0.1.0, whose results can be read but not added to: "
            "start the sweep in another folder."
        )


# -- claiming the folder -----------------------------------------------------------------------


def prepare_sweep(
    config: SweepConfig | str | Path | Mapping[str, Any] | Checked,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    measures: Measures = (),
    say: Say = print,
) -> Manifest:
    """Claim the folder for a sweep, or find it claimed for the same one; no weights are read.

    Damaged files of a claimed sweep are rewritten. A refusal leaves nothing behind.

    Raises:
        ValueError: a config that cannot be run, or a folder that holds another sweep, or files that
            are not a sweep's in the places of its files.
        FolderError: a folder that cannot be written, or a full disk.
    """
    checked, text = checked_as_given(config, overrides, own_measures(measures))
    return _prepare(checked, text, Path(out).expanduser(), overrides, say)


def _prepare(
    checked: Checked, text: str, out: Path, overrides: Sequence[str], say: Say
) -> Manifest:
    """Claim the folder for a checked sweep, whose config was given as `text`."""
    manifest, blocks = _plan(checked, overrides)
    manifest = replace(manifest, config_sha256=hashlib.sha256(text.encode()).hexdigest())
    table = prompt_table(checked.prompts, checked.dataset, blocks)
    files = {
        "config.yaml": text.encode(),
        "grafts.yaml": as_yaml({str(g["name"]): g["rule"] for g in manifest.grafts}).encode(),
        "prompts.parquet": to_bytes(table),
    }
    new = manifest.to_json().encode()

    # A folder that needs nothing may be read-only.
    if (out / "sweep.json").is_file():
        _refuse_unfinished_earlier(out)
        agreed = _agree(out, manifest, checked.prompts)
        if not to_mend(out, agreed, files, table):
            return agreed
    folders = SHARDS if checked.config.outcomes is not None else SHARDS[:1]
    refuse_foreign(out, folders)
    with writing(out):
        probe(out / "sweep.json")
        make_folders(out, folders)
    with lock(out, "claim", say=say):
        if (out / "sweep.json").is_file():
            needed = to_mend(out, _agree(out, manifest, checked.prompts), files, table)
        else:
            needed = files | {"sweep.json": new}
        for name, content in needed.items():
            write(out, out / name, content)
        return read_manifest(out)


def _give_up(out: Path, say: Say) -> None:
    """Withdraw a claim under which nothing was computed."""
    with lock(out, "claim", say=say), writing(out):
        if read_manifest(out).models is None:
            for name in ("sweep.json", "config.yaml", "grafts.yaml", "prompts.parquet"):
                (out / name).unlink(missing_ok=True)


def _plan(checked: Checked, overrides: Sequence[str]) -> tuple[Manifest, list[int]]:
    """The manifest, and each prompt's block: prompts of equal shape together, so that a shard's
    prompts share their plans and have little padding."""
    config = checked.config
    shapes: list[Any] = []
    for number, prompt in enumerate(checked.prompts):
        try:
            ready = checked.prepared(number, prompt)
        except PromptError:
            shapes.append(_shape(checked, prompt))
        else:
            rest = [len(ready.answer), *map(len, ready.distractors)]
            shape = [len(ready.tokens) + max(rest), rest, sorted(ready.tokens.spans.items())]
            right = [ready.answers] if ready.answers else []
            shapes.append([shape, ready.tokens.ids, ready.answer, ready.distractors, *right])
    n_prompts = len(checked.prompts)
    prompts, grafts = blocks_of(n_prompts, len(checked.grafts), config.shards)
    order = sorted(
        range(n_prompts),
        key=lambda i: (shapes[i] is None, [] if shapes[i] is None else shapes[i][0], i),
    )
    blocks = [0] * n_prompts
    for block, (low, high) in enumerate(prompts):
        for number in order[low:high]:
            blocks[number] = block
    dumped = config.model_dump(mode="json")
    rules = {named.name: str(named.graft) for named in checked.grafts}
    tidy = [column for column in GRAFT_COLUMNS if column != "rule"]
    # What counts is what grafts and prompts resolve to, however they are written.
    resolved = ("grafts", "grids", "prompts", *(("outcomes",) if config.outcomes is None else ()))
    identity = {name: value for name, value in dumped.items() if name not in resolved} | {
        # Folders of sweeps without further measures stay what they are.
        "metrics": {k: v for k, v in dumped["metrics"].items() if k != "measures" or v},
        "base source": next(iter(config.sources)),
        "grafts": rules,
        "order of grafts": ", ".join(rules),
        "prompts": {
            "number": n_prompts,
            "sha256": json_digest(
                [[as_given(p), d] for p, d in zip(checked.prompts, checked.dataset, strict=True)]
            ),
            "sha256 of tokens": json_digest(shapes),
            **day_of(checked.prompts, checked.tokenizer),
        },
    }
    if checked.members:
        identity["members"] = [[member.name, member.step] for member in checked.members]
    if checked.trained:
        identity["trained answers"] = json_digest(checked.trained)
    if own := fingerprints([*checked.asked, *checked.functions]):
        identity[OWN] = own
    manifest = Manifest(
        identity=json.loads(json.dumps(identity)),
        config=dumped,
        overrides=tuple(overrides),
        grafts=[
            {"name": named.name, "rule": rules[named.name]}
            | {column: getattr(named, column) for column in tidy}
            | ({} if named.rank is None else {"source_rank": named.rank})
            for named in checked.grafts
        ],
        duplicates=dict(checked.duplicates),
        recovery={"base": checked.base, "full": checked.full},
        prompt_blocks=[high - low for low, high in prompts],
        graft_blocks=[list(bounds) for bounds in grafts],
        versions=_versions(),
        members=[asdict(member) for member in checked.members],
        scored=checked.scored,
        trained=checked.trained,
    )
    if config.outcomes is not None:
        some = max(1, config.outcomes.shards // config.outcomes.sampling.n)
        prompts, grafts = blocks_of(n_prompts, len(checked.grafts), some)
        manifest = replace(
            manifest,
            text_blocks=[high - low for low, high in prompts],
            text_graft_blocks=[list(bounds) for bounds in grafts],
        )
    return manifest, blocks


def _shape(checked: Checked, prompt: Prompt) -> Any:
    """What tells a prompt without an answer apart; None where nothing is generated from it."""
    if checked.config.outcomes is None:
        return None
    try:
        tokens = checked.prepared.tokens(prompt)
    except PromptError:
        return None
    return [[len(tokens), [], sorted(tokens.spans.items())], tokens.ids]


def _versions() -> dict[str, str]:
    names = ("graftlens", "torch", "transformers", "transformer-lens")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def _agree(out: Path, given: Manifest, prompts: Sequence[Prompt]) -> Manifest:
    """The folder's manifest, if it belongs to the given sweep."""
    there = read_manifest(out)
    _refuse_other_functions(out, there, given.identity.get(OWN, {}))
    # A setting that the folder's version did not know has no value there.
    lines = differences(there.identity, given.identity, besides=(OWN,))
    if not lines:
        return there
    with contextlib.suppress(ValueError):
        known = read_prompts(out, ["as_given"])["as_given"].to_pylist()
        for number, (old, new) in enumerate(zip(known, map(as_given, prompts), strict=False)):
            if old != new:
                lines += differences(json.loads(old), json.loads(new), f"prompts.{number}")
                break
    config = " ".join([str(out / "config.yaml"), *there.overrides])
    advice = (
        f"Choose another folder, use the config that is there ({config}), or remove the folder."
    )
    raise ValueError(refusal(f"{out} holds another sweep", lines, advice))


def _refuse_other_functions(out: Path, there: Manifest, given: Mapping[str, str]) -> None:
    known = there.identity.get(OWN, {})
    for name, function in given.items():
        if known.get(name, function) != function:
            raise ValueError(
                f"{out} has numbers from a different function of measure {name!r}: restore that "
                "function, or choose another folder."
            )


# -- the work ----------------------------------------------------------------------------------


def work(
    out: str | Path,
    *,
    device: str | None = None,
    measures: Measures = (),
    outcomes: OutcomeSettings | None = None,
    progress: bool = True,
    say: Say = print,
) -> None:
    """Work on a prepared sweep to its end, as one of its workers.

    Loads the models once (members one after another), takes shards until none is left, waits for
    those that other workers hold (and takes over those of dead ones), and finishes the sweep if no
    other worker does.
    `measures` are the user's own that the sweep names, or where to import them from; `outcomes`
    the sweep's, with what the command line said of their judges.

    Raises:
        ValueError: a folder that holds no sweep, or other weights than it was started with.
        FolderError: a folder that cannot be written, or a full disk.
    """
    out = Path(out).expanduser()
    manifest = read_manifest(out)
    config = config_of(out, manifest)
    if is_finished(out):
        say(f"{out} is finished: nothing to run.")
        return
    _refuse_unfinished_earlier(out)
    refuse_another_day(out, manifest.identity.get("prompts", {}))
    own = own_measures(measures)
    asked = asked_for(config.metrics.measures, own)
    settings = outcomes or config.outcomes or OutcomeSettings()
    measured = settings.measured_by(own)
    named = [one for one in own if getattr(one, "place", None) in settings.functions]
    _refuse_other_functions(out, manifest, fingerprints([*asked, *named]))
    with writing(out):
        probe(out / "sweep.json")
    if (lines := differences(manifest.versions, _versions())) and (manifest.models is not None):
        say("\n".join(["this sweep was started with other versions:", *lines]))
        say("New results may differ from the existing ones in the last digits.")
    models = Models(out, config, device, say)
    fill(out, models, asked, progress=progress, say=say)
    finish(out, models, say, asked, measured)


def fill(
    out: Path,
    models: Models,
    asked: Sequence[Measure] = (),
    *,
    progress: bool = True,
    say: Say = print,
) -> None:
    """Compute what is missing of a prepared sweep, or wait for those that do.

    Raises:
        ValueError: other weights than the sweep was started with.
        FolderError: a folder that cannot be written, or a full disk.
    """
    if not models.is_recorded(0) or not models.manifest.members:
        models(0)
    manifest = models.manifest
    config = config_of(out, manifest)
    prompts, grafts, blocks = content_of(out, manifest)
    places = {name: place for place, name in enumerate(grafts)}
    # Shards of the same grafts share their plans.
    scorers: dict[tuple[int, range], Scorer] = {}

    def cells(shard: int) -> bytes:
        number = manifest.cell_shards.round_of(shard)
        block, own = manifest.cell_shards.place(shard)
        key = (number, own)
        if key not in scorers:
            if len(scorers) == PLANNERS or any(other != number for other, _ in scorers):
                scorers.clear()  # also those of another model, which is to be forgotten
            model = models(number)
            scorers[key] = Scorer(
                model,
                {name: graft for name, graft in grafts.items() if places[name] in own},
                **(config.metrics.model_dump() | {"measures": asked}),
                references={run: grafts[name] for run, name in manifest.recovery.items()},
                prepend_bos=config.prepend_bos,
                row_budget=manifest.row_budget,
                prepared=models.prepared,
                say=say,
            )
        table = scorers[key].table(blocks[block], jobs[0].advance)
        # The texts are those of the prompts and grafts; the shard says which.
        stored = table[manifest.schema.names].assign(graft=table["graft"].map(places))
        rows = pa.Table.from_pandas(stored, schema=manifest.schema, preserve_index=False)
        return manifest.cell_shards.to_bytes(rows, shard)

    drawing = (config.outcomes or OutcomeSettings()).sampling.drawing
    writer = TextShards(manifest, prompts, blocks, grafts, drawing, say)

    def texts(shard: int) -> bytes:
        scorers.clear()
        options = {"prepend_bos": config.prepend_bos, "token_budget": manifest.token_budget}
        return writer.compute(shard, models, jobs[-1].advance, **options)

    def begin(number: int) -> None:
        nonlocal manifest
        if not unchanged(config, manifest, number):  # nor is what was never recorded
            scorers.clear()
            writer.forget()
            models(number)
            manifest = models.manifest
            writer.shards = manifest.text_shards  # whose keys say which models are run
            for job, table in zip(jobs, manifest.tables, strict=True):
                job.shards = table

    # Progress counts a prompt in fractions, one for each of its grafts.
    each = len(grafts)
    kinds = {"shards": (cells, "sweep", "prompt", each), "texts": (texts, "texts", "text", 1)}
    jobs: list[Job] = []
    with contextlib.ExitStack() as stack:
        for table in manifest.tables:
            compute, name, unit, rows = kinds[table.folder]
            missing = table.missing(out)
            bar = tqdm(
                total=table.total / rows,
                initial=(table.total - sum(map(table.rows, missing))) / rows,
                desc=name,
                unit=unit,
                disable=not progress,
                bar_format=BAR.format(unit=unit),
            )
            jobs.append(Job(out, table, compute, stack.enter_context(bar), rows, missing))
        fill_jobs(jobs, manifest.rounds, begin, say)
    scorers.clear()
    writer.forget()


def finish(
    out: Path,
    models: Models,
    say: Say = print,
    asked: Sequence[Measure] = (),
    measured: Mapping[str, Measure] | None = None,
) -> None:
    """Measure the texts, and write the trust report and the marker, of a sweep whose shards all
    exist, once.

    Raises:
        FolderError: a folder that cannot be written, or a full disk.
    """
    with lock(out, "finish", say=say):
        with lock(out, "claim", say=say), writing(out):  # nobody else writes now
            clear_halves(out)
        manifest = read_manifest(out)
        if is_done(out) and are_measured(out, manifest):
            return
        config = config_of(out, manifest)
        texts = measure_texts(out, manifest, measured or {})
        say("all shards are done; recomputing some of them for the trust report")
        prompts, grafts, _ = content_of(out, manifest)
        # The lists are most of a table's memory.
        lists = [f.name for f in manifest.schema if pa.types.is_list(f.type)]
        lists = [] if manifest.cells <= LISTED else lists
        lead = MEMBERS[:1] if manifest.members else ()
        wanted = [*lead, *(n for n in manifest.schema.names if n not in lists)]
        results = read_results(out, columns=wanted)
        assert isinstance(results, pd.DataFrame)
        if len(results) < manifest.cells or (texts is not None and len(texts) < manifest.texts):
            raise FolderError(
                f"shards went missing from {out} while the sweep ran. Run the same command again "
                "to recompute them."
            )
        found = {}
        for number in reversed(range(manifest.rounds)):  # the last model is still there
            model = models(number)
            report = trust_report(
                model,
                prompts if manifest.scored else {},
                grafts,
                _of_member(results, manifest, number),
                seed=config.seed,
                row_budget=manifest.row_budget,
                prepend_bos=config.prepend_bos,
                answers=config.metrics.answers,
                prepared=models.prepared,
                references={run: grafts[name] for run, name in manifest.recovery.items()},
                asked=asked,
            )
            written = None
            if texts is not None and config.outcomes is not None:
                written = check_texts(
                    model,
                    prompts,
                    grafts,
                    _of_member(texts, manifest, number),
                    config.outcomes.sampling.drawing,
                    seed=config.seed,
                    prepend_bos=config.prepend_bos,
                )
            found[number] = (report if manifest.scored or written is None else None, written)
            del model  # before the next one is loaded
        reports = [found[number] for number in sorted(found)]
        names = [str(member["name"]) for member in manifest.members]
        trust, text = trust_content(reports, names)
        reasons = results["reason"].value_counts()
        done: dict[str, Any] = {
            "cells": len(results),
            "not_run": {str(reason): int(count) for reason, count in reasons.items()},
            **counted(texts),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "device": _device_name(models(models.number)),
        }
        write(out, out / "trust.txt", f"{text}\n".encode())
        for name, content in (("trust.json", trust), ("done.json", sealed_json(done))):
            text = json.dumps(content, indent=1, ensure_ascii=False)
            write(out, out / name, text.encode())


def _of_member(table: pd.DataFrame, manifest: Manifest, number: int) -> pd.DataFrame:
    """The rows of a member; all where there are none."""
    if not manifest.members:
        return table
    return table[table["member"] == manifest.members[number]["name"]]


def _device_name(model: GraftedTransformer) -> str:
    device = torch.device(model.cfg.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def config_of(out: Path, manifest: Manifest) -> SweepConfig:
    """The config of a sweep's folder.

    Raises:
        ValueError: a manifest whose config is not one.
    """
    try:
        return SweepConfig.model_validate(manifest.config)
    except ValueError as error:
        said = str(error).splitlines()
        raise damaged(out / "sweep.json", "config: " + " ".join(said[1:3])) from None


def content_of(
    out: Path, manifest: Manifest
) -> tuple[dict[int, Prompt], dict[str, Graft], list[Any]]:
    """The prompts and grafts of a prepared sweep, and each block's prompts."""
    table = read_prompts(out)
    prompts = dict(enumerate(revived(t) for t in table["as_given"].to_pylist()))
    blocks: list[dict[int, Prompt]] = [{} for _ in manifest.prompt_blocks]
    for number, block in enumerate(table["block"].to_pylist()):
        blocks[block][number] = prompts[number]
    grafts = {str(g["name"]): Graft.parse(str(g["rule"])) for g in manifest.grafts}
    return prompts, grafts, blocks
