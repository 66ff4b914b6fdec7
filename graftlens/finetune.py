"""Finetuning a causal language model into the SFT of a pair, in a way that survives any kill.

The folder of a run holds

- ``run.json``: the config, the data's hashes and the starting weights' hash, written after all
  checks and before the first step; a later call with anything else is refused (but the same
  weights and texts may be in other places);
- ``data/``: the dataset that `finetune_run` made, which a later call reads instead of making it
  again: a language model's rewrites, and what a hub holds, may differ the next time;
- ``log.jsonl``: loss of every step, held-out perplexity of every epoch;
- ``checkpoints/``: the newest complete state to resume from, removed when the run is finished;
- ``kept/``: with ``keep_checkpoints`` weights on the way, by their steps;
- ``epochs/``: with ``keep: best`` the best weights so far, removed when the run is finished;
- ``model/``: the finetuned checkpoint, or with LoRA the adapter (float32, with tokenizer and
  ``finetune.json``), which appears in one rename;
- ``config.yaml``: the settings of `finetune_run`.

Checkpoints, kept weights, epochs and model have a ``complete.json`` with the SHA-256 of every file:
damaged files are found, named, and not used. Other files in the folder are never replaced or
removed: if one has a name that the run needs, the run is refused before the model is loaded.
`graftlens.checkpoints` explains how, and how a half-written checkpoint, from which the Trainer
would resume with fresh optimizer state, is ruled out.

Started by ``accelerate launch`` or ``torchrun``, the processes share the batches; only the first
one touches the folder.
"""

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from graftlens.checkpoints import (
    ADVICE,
    MARKER,
    check_claim,
    claim,
    is_earlier,
    recorded,
    remove_all,
    saving,
    verify,
    write_folder,
)
from graftlens.data import DatasetSpec, load_dataset, make_dataset, save_dataset
from graftlens.engines import EngineError, SlurmResources, Task, submit
from graftlens.finetuned import FinetuneResult, earlier_result, read_result, repaired
from graftlens.folder import refuse_differences, write_whole
from graftlens.model.identity import config_settings, tokenizer_digest
from graftlens.model.quiet import quiet
from graftlens.model.smollm2 import located
from graftlens.model.start import (
    check_targets,
    check_tokens,
    check_weights,
    fixed_positions,
    frozen_modules,
    load_start,
    load_tokenizer,
    save_adapter,
    weight_hash,
    with_adapters,
)
from graftlens.perplexity import (
    has_accelerator,
    perplexity,
    pieces,
    resolve_precision,
)
from graftlens.processes import Processes, started_together
from graftlens.recipes import (
    FinetuneConfig,
    FinetuneRun,
    LoraSettings,
    TrainingData,
    demo_configs,
)
from graftlens.runfolder import InUseError, check_output, check_run, note, taken
from graftlens.training import best_epoch, train
from graftlens.trainingtexts import (
    Text,
    check_dataset,
    check_heldout_file,
    named,
    rows_of,
    supplemented,
    texts_in,
    training_texts_of,
    vocabulary_hash,
)
from graftlens.trainingtexts import split as _split
from graftlens.trainingtexts import text_hash as _text_hash
from graftlens.trainingtexts import tokenize as _tokenize

__all__ = [
    "FinetuneConfig",
    "FinetuneResult",
    "FinetuneRun",
    "InUseError",
    "LoraSettings",
    "TrainingData",
    "demo_configs",
    "finetune",
    "finetune_run",
    "launch_finetune",
    "perplexity",
    "training_texts_of",
]

# Say where something is; run.json has a hash of what is there.
LOCATIONS = ("config.model", "config.output", "config.heldout_file")

# In a dataset's folder: the run keeps it there; it may be replaced as long as no run has started.
KEPT = ".graftlens-kept"


def finetune(
    config: FinetuneConfig,
    train: Dataset,
    heldout: Dataset | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> FinetuneResult:
    """Finetune, or resume a killed run, or return a finished one.

    If it is interrupted at any instant, calling it again gives the same weights, bit for bit,
    as without the interruption (on one machine with one number of threads).

    Several processes that a launcher started train together: each takes ``batch_size`` texts per
    forward pass, and if the texts do not divide evenly, the last batch of an epoch is filled up
    with texts from its first. The result equals that of one process with their batches joined,
    except for dropout.

    Args:
        config: the recipe and the run's folder.
        train: column ``text``; the tokenizer's end token is appended to each. A row that has
            ``messages`` is a conversation instead: the chat template writes it, and what is learned
            is what the assistant says, with the token that ends it.
        heldout: likewise, for perplexity; instead of the config's held-out settings.
        model: start from this Hugging Face model instead of loading ``config.model``; it is
            trained in place, to the last epoch. Its parameters become float32.
        tokenizer: likewise.
        progress: show a progress bar and the losses on it.

    Raises:
        RuntimeError: another process finetunes in this folder.
        ValueError: texts, or settings, that do not fit each other or the model; a model that is
            not whole or not finite; a folder that holds another run; a damaged result that no
            checkpoint can repair.
        OSError: a folder that cannot be written, or that holds files of others under a name that
            is needed.
    """
    check_dataset("train", train)
    if heldout is not None:
        check_dataset("heldout", heldout)
    texts, heldout_texts = _split(config, train, heldout)
    processes = _processes(config)
    processes.from_first(partial(check_output, config, len(texts), processes.count))
    with contextlib.ExitStack() as held:  # by the first process only
        processes.from_first(lambda: held.enter_context(taken(config.output)))
        with _keep_random_state():
            result = _finetune(
                config,
                texts,
                heldout_texts,
                model,
                tokenizer,
                progress,
                processes,
                texts_in(train),
            )
        processes.leave_at_exit()
        return result


def _processes(config: FinetuneConfig) -> Processes:
    return started_together(cpu=config.device == "cpu" or not has_accelerator())


def finetune_run(run: FinetuneRun, *, progress: bool = True) -> FinetuneResult:
    """Read or make the training texts, and `finetune` on them.

    The model "smollm2-135m" is the demo's. The finished run's folder records its settings in
    ``config.yaml``. A dataset that is made is kept in the folder ``data``, from where a later call
    reads it.

    Raises:
        OSError: the data, held-out texts or the model's folder do not exist.
        ValueError: the data have no texts; the run's folder holds another dataset; anything that
            `finetune` refuses.
    """
    recipe = run.recipe
    check_heldout_file(recipe)
    place = Path(recipe.model)
    if not place.exists() and (recipe.model.startswith((".", "/", "~")) or len(place.parts) > 2):
        raise FileNotFoundError(
            f"model={recipe.model!r}: there is no such folder. Write a checkpoint's folder, a hub "
            'id, or "smollm2-135m".'
        )
    processes = _processes(recipe)
    processes.from_first(partial(check_run, run))
    found = processes.from_first(partial(located, recipe.model))
    recipe = recipe.model_copy(update={"model": found})
    train = processes.from_first(partial(_texts_of_run, run))
    result = finetune(recipe, train, progress=progress)
    if processes.is_first:
        note(run)
    return result


def launch_finetune(
    run: FinetuneRun,
    resources: SlurmResources | Mapping[str, Any] | None = None,
    *,
    wait: bool = True,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> FinetuneResult | None:
    """Run `finetune_run` as a job on Slurm, which is requeued when it is preempted or out of time.

    Its time must allow `save_epochs` epochs, after which there is something to resume from. If this
    folder's job is still waiting or running, it is joined. Ctrl-C ends the waiting only.

    Args:
        run: the recipe; its folders are on a file system that the nodes share.
        resources: what the job gets.
        wait: whether to wait for the result; otherwise the job is left running.
        progress: whether to show a bar while waiting.
        say: where messages go.

    Returns:
        The result; None without waiting.

    Raises:
        ConfigError: invalid resources.
        EngineError: submitit or Slurm is missing, Slurm refused the job, or it failed.
    """
    array = submit(
        partial(finetune_run, run, progress=False),
        tasks=1,
        folder=run.output / "slurm",
        resources=resources,
        name="graftlens-finetune",
        saved=partial(_saved, run.output.resolve()),
    )
    say(array.describe())
    if not wait:
        say("The same command, run again, waits for it or reports its result.")
        return None
    log = run.output / "log.jsonl"

    with tqdm(desc="finetune", unit="step", disable=not progress) as bar:

        def watch(tasks: Sequence[Task]) -> None:
            lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
            # A line may be half-written.
            with contextlib.suppress(IndexError, ValueError, KeyError, TypeError):
                bar.n = json.loads(lines[-1])["step"]
            bar.set_postfix_str(tasks[0].state)

        try:
            (task,) = array.wait(watch)
        except KeyboardInterrupt:
            say(f"Slurm job {array.job_id} continues. To stop it: scancel {array.job_id}")
            raise
    if task.state == "failed":
        raise EngineError(
            f"finetuning in {run.output} is not finished: Slurm job {task.name} {task.problem}\n"
            "Fix that and run the same command again; it resumes from its last checkpoint."
        )
    return read_result(run.output / "model")


def _saved(folder: Path) -> list[str]:
    """What a requeued job would resume from, or only has to return."""
    kept = [*folder.glob(f"checkpoints/*/{MARKER}"), *folder.glob("model")]
    return sorted(str(path) for path in kept)


def _texts_of_run(run: FinetuneRun) -> Dataset:
    if run.data.made is None:
        return training_texts_of(run.data, run.seed)
    with taken(run.output):
        texts = _made_once(run.data.made, run.output)
    return supplemented(run.data, texts, run.seed)


def _made_once(spec: DatasetSpec, output: Path) -> Dataset:
    """The training texts that the spec describes: those that the run's folder holds, if it does."""
    folder = output / "data"
    begun = recorded(output) is not None
    if folder.exists():
        dataset = load_dataset(folder)
        there, given = (s.model_dump(mode="json") for s in (dataset.config, spec))
        if there == given or begun or not (folder / KEPT).is_file():
            refuse_differences(f"{folder} was made from another config", there, given, ADVICE)
            # In memory: other processes get it, and need not see the folder.
            return Dataset.from_dict(dataset.train.to_dict(), features=dataset.train.features)
        shutil.rmtree(folder)  # of a run that was refused before its first step
    dataset = make_dataset(spec)
    # A claimed folder without data is an earlier release's, or another run's.
    if not begun:
        with saving(folder):
            save_dataset(dataset, folder)
            write_whole(folder / KEPT, "graftlens finetune keeps this dataset for its run.\n")
    return dataset.train


def _finetune(
    config: FinetuneConfig,
    texts: Sequence[Text],
    heldout_texts: Sequence[Text],
    model: Any,
    tokenizer: Any,
    progress: bool,
    processes: Processes,
    given: Sequence[Text],
) -> FinetuneResult:
    tokenizer = load_tokenizer(config.model) if tokenizer is None else tokenizer
    model = load_start(config.model) if model is None else model
    check_weights(model)
    targets = config.lora.target_modules if config.lora is not None else ()
    adapts = config.lora is not None and not config.lora.merge
    frozen = frozen_modules(model, config.freeze, targets)
    check_targets(model, targets, merge=not adapts)
    precision = resolve_precision(config)
    final, epochs = config.output / "model", config.output / "epochs"
    checkpoints = config.output / "checkpoints"
    identity: dict[str, Any] = {}

    def kept_epochs() -> Any:
        """`keep_epochs` of a run that an earlier release recorded; None in any other."""
        return ((recorded(config.output) or {}).get("config") or {}).get("keep_epochs")

    def clear() -> None:
        remove_all(checkpoints, "checkpoint")
        if not kept_epochs():
            remove_all(epochs, "epoch")

    def already() -> FinetuneResult | None:
        """The result if there is one already."""
        settings = config.model_dump(mode="json", exclude={"output"})
        earlier = kept_epochs()
        # What it kept changes no result; but a run that kept epochs cannot go on to keep them.
        if earlier is False or (earlier and final.exists()):
            settings["keep_epochs"] = earlier
        identity.update(
            config=settings | {"precision": precision},
            data={
                "train_texts": len(texts),
                "train_sha256": _text_hash(texts),
                "heldout_texts": len(heldout_texts),
                "heldout_sha256": _text_hash(heldout_texts),
            },
            start={
                "weights_sha256": weight_hash(model),
                "tokenizer_sha256": tokenizer_digest(tokenizer),
                "settings": config_settings(model.config),
            },
            processes=processes.count,
        )
        # A setting that an earlier release did not know had its present default.
        plain = FinetuneConfig(model="", output=Path()).model_dump(mode="json")
        plain["lora"] = {"merge": True} if config.lora is not None else None
        defaults = {"config": plain, "processes": 1}
        if is_earlier(config.output):
            start = {**identity["start"], "tokenizer_sha256": vocabulary_hash(tokenizer)}
            del start["settings"]
            known = {**identity, "start": start}
            check_claim(config.output, known, defaults=defaults, elsewhere=LOCATIONS)
            return earlier_result(final)
        check_claim(config.output, identity, defaults=defaults, elsewhere=LOCATIONS)
        if not final.exists():
            return None
        result = repaired(config, identity)
        if result is not None:
            claim(config.output, identity)  # where run.json was damaged
            clear()
        return result

    finished = processes.from_first(already)
    if finished is not None:
        return finished

    rows = _tokenize(tokenizer, texts, config.max_length, fixed_positions(model), given)
    check_tokens(model, [row["input_ids"] for row in rows], lambda i: named(texts[i], given))
    if heldout_texts:
        pieces(model, tokenizer, heldout_texts, config.max_length)
        numbers = given if config.heldout_share else heldout_texts
        ids = [row["input_ids"] for row in rows_of(tokenizer, heldout_texts, numbers)]
        check_tokens(model, ids, lambda i: f"held-out {named(heldout_texts[i], numbers)}")
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    use_cache = getattr(model.config, "use_cache", True)  # the Trainer may switch it off
    # Seeded before adapters are made; the Trainer seeds the training itself.
    torch.manual_seed(config.seed)
    trained = with_adapters(model, config.lora) if config.lora is not None else model
    # After all checks: a refused run leaves the folder free for another one.
    processes.from_first(partial(_claim, config.output, identity))

    def save(folder: Path, result: Any) -> None:
        """Weights and tokenizer, as a checkpoint or an adapter that anything can load."""
        if config.lora is not None and config.lora.merge:
            # Of a copy: merging and unmerging adapters leaves rounding errors.
            result = copy.deepcopy(result).merge_and_unload()
        now = getattr(result.config, "use_cache", use_cache)
        result.config.use_cache = use_cache
        with quiet():
            if adapts:
                save_adapter(result, folder, config.model)
            else:
                result.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        result.config.use_cache = now

    def save_epoch(number: int) -> None:
        write_folder(epochs / f"epoch-{number}", partial(save, result=trained), run=identity)

    def save_step(step: int) -> None:
        place = config.output / "kept" / f"checkpoint-{step}"
        write_folder(place, partial(save, result=trained), run=identity, step=step)

    trainer, seconds, losses, perplexities = train(
        config,
        trained,
        tokenizer,
        rows,
        heldout_texts,
        precision,
        progress,
        processes,
        save_epoch,
        save_step,
        identity,
    )

    def end() -> FinetuneResult:
        result = FinetuneResult(
            folder=final,
            losses=losses,
            perplexities=perplexities,
            steps=trainer.state.global_step,
            seconds=seconds,
            epoch=best_epoch(perplexities) if config.keep == "best" else config.epochs,
        )
        names = ("torch", "transformers", "graftlens")
        record = identity | {
            "result": {k: v for k, v in asdict(result).items() if k != "folder"},
            "versions": {name: version(name) for name in names},
        }

        def write(folder: Path) -> None:
            if config.keep == "best":
                best = epochs / f"epoch-{result.epoch}"
                verify(best)
                shutil.copytree(best, folder, dirs_exist_ok=True)
            else:
                save(folder, trained)
            write_whole(folder / "finetune.json", json.dumps(record, indent=2) + "\n")

        write_folder(final, write, run=identity)
        clear()
        return read_result(final)

    return processes.from_first(end)


def _claim(output: Path, identity: Mapping[str, Any]) -> None:
    with saving(output):
        claim(output, identity)


@contextlib.contextmanager
def _keep_random_state() -> Iterator[None]:
    """The Trainer seeds every global generator; this restores the caller's."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
