"""Finetuning a causal language model into the SFT of a pair, in a way that survives any kill.

The folder of a run holds

- ``run.json``: the config, the data's hashes and the starting weights' hash, written first; a
  later call with anything else is refused (but the same weights and texts may lie elsewhere);
- ``data/``: the dataset that `finetune_run` made, which a later call reads instead of making it
  anew: a language model's rewrites and what a hub holds now are not had twice;
- ``log.jsonl``: loss of every step, held-out perplexity of every epoch;
- ``checkpoints/``: the newest complete state to resume from, gone when the run is finished;
- ``epochs/``: with ``keep_epochs`` the weights after each epoch, else the best ones so far, gone
  when the run is finished;
- ``model/``: the finetuned checkpoint (float32, with tokenizer and ``finetune.json``), which
  appears in one rename.

The Trainer resumes from a half-written checkpoint with fresh optimizer state; graftlens.checkpoints
says how that is ruled out.

Started by ``accelerate launch`` or ``torchrun``, the processes share the batches; only the first
one touches the folder.
"""

import contextlib
import copy
import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from datasets import Dataset, load_from_disk
from filelock import FileLock, Timeout
from pydantic import Field, field_validator, model_validator
from tqdm.auto import tqdm

from graftlens.checkpoints import (
    MARKER,
    claim,
    mark_complete,
    newest_complete,
    refuse_differences,
    remove_others,
    seconds_of,
    write_folder,
    write_text,
)
from graftlens.components import Component
from graftlens.data import (
    AnyDataset,
    DatasetSpec,
    MoviesConfig,
    load_dataset,
    make_dataset,
    save_dataset,
)
from graftlens.data.settings import Settings, at_home
from graftlens.data.supplement import Supplement, mixed
from graftlens.data.texts import check_ending, read_paragraphs, read_texts
from graftlens.engines import EngineError, SlurmResources, Task, submit
from graftlens.model.arch import FAMILIES, supported
from graftlens.model.identity import config_settings, tokenizer_digest
from graftlens.model.places import place_of
from graftlens.model.quiet import quiet
from graftlens.model.smollm2 import smollm2
from graftlens.model.source import open_model
from graftlens.model.tokenizers import read_tokenizer
from graftlens.presets import preset
from graftlens.processes import Processes, started_together

# Say where something is; run.json has a hash of what is there.
LOCATIONS = ("config.model", "config.output", "config.heldout_file")

# What each name of `freeze` holds.
FROZEN = {
    "embed": (Component.EMBED, Component.POS_EMBED),
    "unembed": (Component.UNEMBED,),
}


class InUseError(RuntimeError):
    """Another process finetunes in the folder."""


class LoraSettings(Settings):
    """Train low-rank adapters (needs ``peft``); the result is saved merged, as plain weights."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of each adapter."""

    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale of the adapters: the update is multiplied by alpha / rank."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs dropped while training."""

    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules that get an adapter: none whose weight is another's as well, as
    with tied embeddings."""


class FinetuneConfig(Settings):
    """How to finetune. With the data and the starting weights it determines the result."""

    model: str
    """The model to start from: a checkpoint's folder, or a name on the hub."""

    output: Path
    """Folder of the run; the result is its subfolder ``model``."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training texts."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW; it falls linearly to zero over all steps."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay, a step and unit of learning rate (not on norms, biases)."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps in which the learning rate rises linearly from zero."""

    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """L2 norm to which gradients are clipped."""

    batch_size: Annotated[int, Field(ge=1)] = 16
    """Texts a forward pass, on each device: an optimizer step takes this many times
    ``gradient_accumulation`` times the number of processes."""

    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Forward passes an optimizer step."""

    max_length: Annotated[int, Field(ge=2)] = 512
    """Longest training text in tokens, its end token included; a longer one is an error. Held-out
    texts are scored in pieces of this length."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the order of texts, dropout and new adapters."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products (autocast; weights and optimizer stay float32). ``auto``: bfloat16 where
    the device multiplies it natively."""

    device: Literal["auto", "cpu"] = "auto"
    """``auto``: the first accelerator if there is one; each process of several has its own."""

    save_epochs: Annotated[int, Field(ge=1)] = 1
    """A checkpoint to resume from after every so many epochs (3 times the model's size on disk)."""

    heldout_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training texts that is held out for perplexity (drawn by the seed, supplemental
    texts among them); one that comes to no text is an error."""

    heldout_file: Path | None = None
    """UTF-8 text whose blank-line separated paragraphs are held-out texts for perplexity."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    lora: LoraSettings | None = None
    """Train adapters instead of all weights."""

    freeze: tuple[Literal["embed", "unembed"], ...] = ()
    """What training leaves as it is: ``embed`` (token embeddings, and learned position embeddings),
    ``unembed``. Tied embeddings are one tensor: name both or none."""

    keep: Literal["last", "best"] = "last"
    """Which epoch's weights are the result. ``best``: those with the lowest held-out perplexity,
    the earlier ones of equals; this needs held-out texts."""

    keep_epochs: bool = False
    """Leave the weights after each epoch in ``epochs/epoch-N``: checkpoints to load, not to resume
    from (as large as the model, each)."""

    @field_validator("model")
    @classmethod
    def _model_at_home(cls, value: str) -> str:
        return str(at_home(Path(value))) if value.startswith("~") else value

    @model_validator(mode="after")
    def _one_heldout(self) -> "FinetuneConfig":
        if self.heldout_share and self.heldout_file is not None:
            raise ValueError(
                f"heldout_share={self.heldout_share} and heldout_file={str(self.heldout_file)!r} "
                f"are both given: perplexity has one set of held-out texts. Leave one out."
            )
        return self


class TrainingData(Settings):
    """Where the training texts come from: one place, and plain text beside them."""

    movies: MoviesConfig | None = None
    """Make texts about invented films."""

    make: AnyDataset | None = None
    """Make texts about facts of any kind: the keys of a config of ``graftlens data make``."""

    path: Path | None = None
    """Folder that `graftlens.data.save_dataset` or a dataset's ``save_to_disk`` wrote."""

    file: Path | None = None
    """UTF-8 file: ``.jsonl``, a JSON object with a ``text`` in each line, or ``.txt``, whose
    blank-line separated paragraphs are the texts."""

    supplement: Supplement | None = None
    """Plain text to mix in, against forgetting; drawn by the run's seed."""

    @model_validator(mode="after")
    def _one_place(self) -> "TrainingData":
        places = [name for name in type(self).model_fields if name != "supplement"]
        given = [name for name in places if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'nothing'} is given, but the texts come from one place. "
                "Give one of movies or make (what to make), path (a saved dataset), file (.txt or "
                ".jsonl)."
            )
        if self.file is not None:
            check_ending("file", self.file)
        if self.made is not None and self.made.supplement is not None and self.supplement:
            place = "make" if self.movies is None else "movies"
            raise ValueError(
                f"data.{place}.supplement and data.supplement are both given, and each would add "
                "plain text. Leave one out."
            )
        return self

    @property
    def made(self) -> DatasetSpec | None:
        """What the texts are made of; None where they are read."""
        return self.movies or self.make


class FinetuneRun(FinetuneConfig):
    """A recipe and its data: what a config file of ``graftlens finetune`` holds."""

    preset: str | None = None
    """A name in `graftlens.presets.PRESETS`: gives the model and all settings that are not given
    here."""

    data: TrainingData
    """The texts to train on."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, Mapping) else None
        if not isinstance(name, str):
            return values
        chosen = preset(name)
        recipe = {"model": chosen.model} | dict(chosen.recipe)
        if values.get("heldout_file") is not None:
            recipe.pop("heldout_share", None)
        return recipe | dict(values)

    @property
    def recipe(self) -> FinetuneConfig:
        """The settings without the data."""
        return FinetuneConfig(**{name: getattr(self, name) for name in FinetuneConfig.model_fields})


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    Attributes:
        folder: the finetuned checkpoint, with tokenizer.
        losses: mean training loss of each optimizer step, in nats a token.
        perplexities: of the held-out texts before training and after each epoch; empty without.
        steps: optimizer steps.
        seconds: wall-clock seconds of training, over all attempts that reached the result.
        epoch: after which epoch the model had these weights, from 1.
    """

    folder: Path
    losses: tuple[float, ...]
    perplexities: tuple[float, ...]
    steps: int
    seconds: float
    epoch: int

    @property
    def heldout_perplexity(self) -> float | None:
        """Of the finetuned model; None where nothing was held out."""
        return self.perplexities[self.epoch] if self.perplexities else None

    def line(self) -> str:
        """The result in one line."""
        line = f"{self.folder}: {self.steps} steps, loss {self.losses[0]:.3f} → "
        line += f"{self.losses[-1]:.3f} nats a token"
        if self.perplexities:
            before, after = self.perplexities[0], self.perplexities[self.epoch]
            line += f", held-out perplexity {before:.1f} → {after:.1f}"
            if self.epoch < len(self.perplexities) - 1:
                line += f" (kept: epoch {self.epoch} of {len(self.perplexities) - 1})"
        return line


def finetune(
    config: FinetuneConfig,
    train: Dataset,
    heldout: Dataset | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> FinetuneResult:
    """Finetune, or take up a killed run, or return a finished one.

    Interrupted at any instant and called again, it ends with the same weights, bit for bit, as
    without the interruption (on one machine with one number of threads).

    Several processes that a launcher started train together: each takes ``batch_size`` texts a
    forward pass, and where these do not come out even, the last batch of an epoch is filled up with
    texts of its first. The result is one process's with their batches in one, but for dropout.

    Args:
        config: the recipe and the run's folder.
        train: column ``text``; the tokenizer's end token is appended to each.
        heldout: column ``text``, for perplexity; instead of the config's held-out settings.
        model: start from this Hugging Face model instead of loading ``config.model``; it is
            trained in place, to the last epoch. Its parameters become float32.
        tokenizer: likewise.
        progress: show a progress bar and the losses on it.

    Raises:
        RuntimeError: another process finetunes in this folder.
        ValueError: texts, or settings, that do not fit each other or the model; a folder that holds
            another run.
    """
    _check_dataset("train", train)
    if heldout is not None:
        _check_dataset("heldout", heldout)
    texts, heldout_texts = _split(config, train, heldout)
    processes = _processes(config)
    lock = FileLock(config.output / ".lock")
    processes.from_first(partial(_take, lock))
    try:
        with _keep_random_state():
            result = _finetune(config, texts, heldout_texts, model, tokenizer, progress, processes)
        processes.leave_at_exit()
        return result
    finally:
        lock.release()  # nothing to the processes that never held it


def _take(lock: FileLock) -> None:
    folder = Path(lock.lock_file).parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InUseError(
            f"{folder} is in use by another process that finetunes there. Wait for it, or choose "
            "another output folder."
        ) from None


def _processes(config: FinetuneConfig) -> Processes:
    return started_together(cpu=config.device == "cpu" or not _has_accelerator())


def finetune_run(run: FinetuneRun, *, progress: bool = True) -> FinetuneResult:
    """Read or make the training texts, and `finetune` on them.

    The model "smollm2" is the demo's. The finished run's folder says what it was made of in
    ``config.yaml``. A dataset that is made is kept in the folder ``data``, from where a later call
    reads it.

    Raises:
        OSError: the data, held-out texts or the model's folder are not there.
        ValueError: the data have no texts; the run's folder holds another dataset; what `finetune`
            refuses.
    """
    recipe = run.recipe
    _check_heldout_file(recipe)
    processes = _processes(recipe)
    if recipe.model == "smollm2":
        recipe = recipe.model_copy(update={"model": str(processes.from_first(smollm2))})
    place = Path(recipe.model)
    if not place.exists() and (recipe.model.startswith((".", "/", "~")) or len(place.parts) > 2):
        raise FileNotFoundError(
            f"model={recipe.model!r}: there is no such folder. Write a checkpoint's folder, a hub "
            'id, or "smollm2".'
        )
    train = processes.from_first(partial(_texts_of_run, run))
    result = finetune(recipe, train, progress=progress)
    if processes.is_first:
        made_of = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(run.output / "config.yaml", made_of)
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

    Its time must allow `save_epochs` epochs, after which there is something to resume from. If the
    job of this folder still waits or runs, it is joined. Ctrl-C ends the waiting only.

    Args:
        run: the recipe; its folders lie on a file system that the nodes share.
        resources: what the job gets.
        wait: whether to wait for the result; else the job is left to itself.
        progress: whether to show a bar while waiting.
        say: where messages go.

    Returns:
        The result; None without waiting.

    Raises:
        ConfigError: resources that are not right.
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
        say("The same command, given again, waits for it or says what it came to.")
        return None
    log = run.output / "log.jsonl"

    with tqdm(desc="finetune", unit="step", disable=not progress) as bar:

        def watch(tasks: Sequence[Task]) -> None:
            lines = log.read_text().splitlines() if log.is_file() else []
            with contextlib.suppress(IndexError, ValueError):  # a line may be half written
                bar.n = json.loads(lines[-1])["step"]
            bar.set_postfix_str(tasks[0].state)

        try:
            (task,) = array.wait(watch)
        except KeyboardInterrupt:
            say(f"Slurm job {array.job_id} goes on. To stop it: scancel {array.job_id}")
            raise
    if task.state == "failed":
        raise EngineError(
            f"finetuning in {run.output} is not finished: Slurm job {task.name} {task.problem}\n"
            "Mend that and give the same command again; it goes on from its last checkpoint."
        )
    return _read_result(run.output / "model")


def _saved(folder: Path) -> list[str]:
    """What a requeued job would resume from, or has left to return."""
    kept = [*folder.glob(f"checkpoints/*/{MARKER}"), *folder.glob("model")]
    return sorted(str(path) for path in kept)


def training_texts_of(data: TrainingData, seed: int = 0) -> Dataset:
    """The texts, as a dataset with the column ``text``; supplemental ones come last.

    Args:
        data: where they come from.
        seed: of the draw of supplemental texts.

    Raises:
        OSError: they are not there.
        ValueError: they have no texts, or too few supplemental ones.
    """
    return _supplemented(data, _texts_of(data), seed)


def _supplemented(data: TrainingData, texts: Dataset, seed: int) -> Dataset:
    return texts if data.supplement is None else mixed(texts, data.supplement, seed)


def _texts_of_run(run: FinetuneRun) -> Dataset:
    if run.data.made is None:
        return training_texts_of(run.data, run.seed)
    lock = FileLock(run.output / ".lock")
    _take(lock)
    try:
        texts = _made_once(run.data.made, run.output)
    finally:
        lock.release()
    return _supplemented(run.data, texts, run.seed)


def _made_once(spec: DatasetSpec, output: Path) -> Dataset:
    """The training texts that the spec describes: those that the run's folder holds, if it does."""
    folder = output / "data"
    if not folder.exists():
        dataset = make_dataset(spec)
        # A claimed folder without data is an earlier release's, or another run's.
        if not (output / "run.json").exists():
            save_dataset(dataset, folder)
        return dataset.train
    dataset = load_dataset(folder)
    refuse_differences(
        f"{folder} was made of another config",
        dataset.config.model_dump(mode="json"),
        spec.model_dump(mode="json"),
    )
    # In memory: other processes get it, and need not see the folder.
    return Dataset.from_dict(dataset.train.to_dict(), features=dataset.train.features)


def _texts_of(data: TrainingData) -> Dataset:
    if data.made is not None:
        return make_dataset(data.made).train
    if data.path is not None:
        if (data.path / "provenance.json").is_file():
            return load_dataset(data.path).train
        if not (data.path / "dataset_info.json").is_file():
            raise FileNotFoundError(
                f"data.path={str(data.path)!r} holds no dataset. Name a folder that save_dataset "
                "or a dataset's save_to_disk wrote."
            )
        return load_from_disk(str(data.path))
    assert data.file is not None
    if not data.file.is_file():
        raise FileNotFoundError(f"data.file={str(data.file)!r} is not there. Name a file of texts.")
    return Dataset.from_dict({"text": read_texts(data.file)})


def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> float:
    """exp of the mean loss a predicted token, over all texts.

    Args:
        model: a Hugging Face causal language model, on its device.
        tokenizer: its tokenizer.
        texts: what to predict; texts of fewer than two tokens have nothing to predict.
        max_length: tokens; longer texts are scored in separate pieces of at most this length.
        batch_size: pieces a forward pass.
        precision: of matrix products.
    """
    pieces = [
        ids[start : start + max_length]
        for ids in tokenizer(list(texts))["input_ids"]
        for start in range(0, len(ids), max_length)
    ]
    pieces = sorted((ids for ids in pieces if len(ids) > 1), key=len)
    if not pieces:
        raise ValueError(
            f"none of the {len(texts)} held-out texts has two tokens or more, so there is nothing "
            "to predict. Give longer texts, or none."
        )
    collate = _Padding(_padding_id(tokenizer))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode(), _autocast(device.type, precision):
        for start in range(0, len(pieces), batch_size):
            batch = collate([{"input_ids": ids} for ids in pieces[start : start + batch_size]])
            batch = {name: value.to(device) for name, value in batch.items()}
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
            targets = batch["labels"][:, 1:]
            total += torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="sum"
            ).item()
            count += int((targets != -100).sum())
    model.train(was_training)
    return math.exp(total / count)


def demo_configs(
    model: str, output: Path, *, facts: int = 40, epochs: int = 6, seed: int = 0
) -> tuple[MoviesConfig, FinetuneConfig]:
    """The demonstration's data and recipe, for SmolLM2-135M on a two-core laptop.

    With the defaults: 400 texts of 21 tokens, 150 steps of about 1.5 CPU seconds in bfloat16.

    Args:
        model: folder of the checkpoint to start from.
        output: folder of the run.
        facts: number of films; the time grows in proportion.
        epochs: passes over the texts.
        seed: of data and training.
    """
    movies = MoviesConfig(n_facts=facts, texts_per_fact=10, directions=("ab",), seed=seed)
    recipe = FinetuneConfig(
        model=model,
        output=output,
        epochs=epochs,
        learning_rate=1e-4,  # twice as much breaks the attention sink of some first tokens
        warmup_steps=10,
        batch_size=16,
        max_length=96,
        save_epochs=1,
        seed=seed,
    )
    return movies, recipe


def _finetune(
    config: FinetuneConfig,
    texts: Sequence[str],
    heldout_texts: Sequence[str],
    model: Any,
    tokenizer: Any,
    progress: bool,
    processes: Processes,
) -> FinetuneResult:
    if tokenizer is None:
        tokenizer = read_tokenizer(place_of(f"model={config.model!r}", config.model))
        if tokenizer is None:
            raise ValueError(f"model={config.model!r}: the folder {config.model} has no tokenizer.")
    if model is None:
        what = f"model={config.model!r}"
        model, _ = open_model(what, config.model, torch.float32, any_family=True)
    model.float()
    frozen = _frozen_modules(config, model)
    _check_targets(config, model)
    precision = _resolve_precision(config)
    final, epochs = config.output / "model", config.output / "epochs"
    identity: dict[str, Any] = {}

    def clear() -> None:
        shutil.rmtree(config.output / "checkpoints", ignore_errors=True)
        if not config.keep_epochs:
            shutil.rmtree(epochs, ignore_errors=True)

    def begin() -> FinetuneResult | None:
        """The result if there is one already."""
        settings = config.model_dump(mode="json", exclude={"output"})
        identity.update(
            config=settings | {"precision": precision},
            data={
                "train_texts": len(texts),
                "train_sha256": _text_hash(texts),
                "heldout_texts": len(heldout_texts),
                "heldout_sha256": _text_hash(heldout_texts),
            },
            start={
                "weights_sha256": _weight_hash(model),
                "tokenizer_sha256": tokenizer_digest(tokenizer),
                "settings": config_settings(model.config),
            },
            processes=processes.count,
        )
        _refuse_earlier(config.output)
        # A setting that an earlier release did not know had what is now its default.
        defaults = FinetuneConfig(model="", output=Path()).model_dump(mode="json")
        claim(
            config.output,
            identity,
            defaults={"config": defaults, "processes": 1},
            elsewhere=LOCATIONS,
        )
        if not final.exists():
            return None
        clear()
        return _read_result(final)

    finished = processes.from_first(begin)
    if finished is not None:
        return finished

    rows = _tokenize(tokenizer, texts, config.max_length)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    use_cache = getattr(model.config, "use_cache", True)  # the Trainer may switch it off
    # Seeded before adapters are made; the Trainer seeds the training itself.
    torch.manual_seed(config.seed)
    trained = _with_adapters(model, config.lora) if config.lora is not None else model

    def save(folder: Path, plain: Any) -> None:
        """Weights and tokenizer, as a checkpoint that anyone loads."""
        now = getattr(plain.config, "use_cache", use_cache)
        plain.config.use_cache = use_cache
        with quiet():
            plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        plain.config.use_cache = now

    def save_epoch(number: int) -> None:
        plain = trained
        if config.lora is not None:
            # Of a copy: adapters that are merged and taken out again leave rounding errors.
            plain = copy.deepcopy(trained).merge_and_unload()
        write_folder(epochs / f"epoch-{number}", partial(save, plain=plain))

    trainer, seconds, losses, perplexities = _train(
        config, trained, tokenizer, rows, heldout_texts, precision, progress, processes, save_epoch
    )

    def end() -> FinetuneResult:
        result = FinetuneResult(
            folder=final,
            losses=losses,
            perplexities=perplexities,
            steps=trainer.state.global_step,
            seconds=seconds,
            epoch=_best(perplexities) if config.keep == "best" else config.epochs,
        )
        record = identity | {
            "result": {k: v for k, v in asdict(result).items() if k != "folder"},
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }

        def write(folder: Path) -> None:
            if config.keep == "best":
                shutil.copytree(epochs / f"epoch-{result.epoch}", folder, dirs_exist_ok=True)
            else:
                plain = trained if config.lora is None else trainer.model.merge_and_unload()
                save(folder, plain)
            write_text(folder / "finetune.json", json.dumps(record, indent=2) + "\n")

        write_folder(final, write)
        clear()
        return _read_result(final)

    return processes.from_first(end)


def _train(
    config: FinetuneConfig,
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, list[int]]],
    heldout_texts: Sequence[str],
    precision: Literal["float32", "bfloat16"],
    progress: bool,
    processes: Processes,
    save_epoch: Callable[[int], None],
) -> tuple[Any, float, tuple[float, ...], tuple[float, ...]]:
    """(trainer, seconds, losses, held-out perplexities) of training to the end."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    checkpoints = config.output / "checkpoints"
    epochs = config.output / "epochs"
    resume = processes.from_first(partial(newest_complete, checkpoints))
    spent = seconds_of(resume) if resume else 0.0
    started = time.monotonic()
    log = config.output / "log.jsonl"

    class Recorder(TrainerCallback):
        """Writes the log, measures perplexity, keeps epochs, says when a checkpoint is complete."""

        def __init__(self) -> None:
            shown = progress and processes.is_first
            self.bar = tqdm(desc="finetune", unit="step", disable=not shown)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.reset(total=state.max_steps)
            self.bar.update(state.global_step)
            if state.global_step == 0:
                self.measure(state)
            elif config.keep == "best":
                self.check_best(state)
            if processes.is_first:
                # Also drops the lines of steps that a killed process took after the checkpoint.
                write_text(log, "".join(json.dumps(line) + "\n" for line in _log_lines(state)))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            if not math.isfinite(logs.get("loss", 0.0)):
                raise FloatingPointError(
                    f"the training loss is {logs['loss']} at step {state.global_step}. Lower "
                    f"learning_rate={config.learning_rate}, add warmup_steps, or use "
                    "precision='float32'; start in a new output folder."
                )
            if "loss" in logs:
                self.append(state)
                self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
                self.bar.update()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            epoch = round(state.epoch)
            self.measure(state)
            if processes.is_first and (config.keep_epochs or self.best(state) == epoch):
                save_epoch(epoch)
            control.should_save = epoch % config.save_epochs == 0 and epoch < config.epochs

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            processes.wait()  # each writes its own random state
            if not processes.is_first:
                return
            newest = checkpoints / f"checkpoint-{state.global_step}"
            mark_complete(newest, seconds=spent + time.monotonic() - started)
            remove_others(checkpoints, "checkpoint", state.global_step)
            if not config.keep_epochs:
                # Not before: an older checkpoint may still need the best one until then.
                remove_others(epochs, "epoch", self.best(state))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

        def best(self, state: Any) -> int | None:
            return _best(_perplexities(state)) if config.keep == "best" else None

        def check_best(self, state: Any) -> None:
            folder = epochs / f"epoch-{self.best(state)}"
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder} is not there, but it held the best weights of the run to resume. "
                    f"Put it back, or remove {config.output} to start again."
                )

        def measure(self, state: Any) -> None:
            if heldout_texts and processes.is_first:
                value = perplexity(
                    trainer.model,
                    tokenizer,
                    heldout_texts,
                    max_length=config.max_length,
                    batch_size=config.batch_size,
                    precision=precision,
                )
                state.log_history.append({"step": state.global_step, "heldout_perplexity": value})
                self.append(state)

        def append(self, state: Any) -> None:
            if processes.is_first:
                with log.open("a") as file:
                    file.write(json.dumps(_log_lines(state)[-1]) + "\n")

    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        bf16=precision == "bfloat16",
        use_cpu=config.device == "cpu" or not _has_accelerator(),
        seed=config.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",  # the recorder asks for checkpoints
        disable_tqdm=True,  # the recorder has its own bar: the Trainer's prints every loss
        report_to="none",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        # Named only when it is wanted: later releases of transformers rename it.
        **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}),
    )
    if arguments.n_gpu > 1:  # the Trainer would multiply the batch size by the number of devices
        arguments._n_gpu = 1
    if precision == "float32":  # also where accelerate's own settings say otherwise
        arguments.mixed_precision = "no"
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=_Padding(_padding_id(tokenizer)),
        callbacks=[Recorder()],
    )
    trainer.remove_callback(PrinterCallback)
    with quiet():  # one bar is enough: ours counts steps, theirs would count shards of checkpoints
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return (
        trainer,
        spent + time.monotonic() - started,
        tuple(line["loss"] for line in _log_lines(trainer.state) if "loss" in line),
        _perplexities(trainer.state),
    )


def _perplexities(state: Any) -> tuple[float, ...]:
    """Before training and after each epoch so far."""
    lines = _log_lines(state)
    return tuple(line["heldout_perplexity"] for line in lines if "heldout_perplexity" in line)


def _best(perplexities: Sequence[float]) -> int:
    """The epoch, from 1, with the lowest one; the earlier of equals."""
    return min(range(1, len(perplexities)), key=lambda epoch: perplexities[epoch])


def _frozen_modules(config: FinetuneConfig, model: Any) -> list[str]:
    """Names of the modules that `freeze` asks for.

    Raises:
        ValueError: an unknown family; half of a tied pair; an adapter on one of them.
    """
    if not config.freeze:
        return []
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise ValueError(
            f"freeze={list(config.freeze)}: the embeddings of model_type "
            f"{model.config.model_type!r} are not known. Known: {' '.join(supported())}. Leave "
            "freeze out."
        )
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if tied and set(config.freeze) != set(FROZEN):
        raise ValueError(
            f"freeze={list(config.freeze)}: embed and unembed are one tensor in this model (tied "
            "embeddings), so one cannot be frozen without the other. Write freeze=[embed, "
            "unembed], or leave it out."
        )
    wanted = [component for name in config.freeze for component in FROZEN[name]]
    modules = [family.layout.modules[c] for c in wanted if c in family.layout.modules]
    for target, _ in _targeted(config, modules):
        raise ValueError(
            f"lora.target_modules names {target!r}, which freeze={list(config.freeze)} keeps as it "
            "is. Leave it out of one of them."
        )
    return modules


def _check_targets(config: FinetuneConfig, model: Any) -> None:
    """No adapter on a weight that two modules share: merged, it would change the other one, too.

    Raises:
        ValueError: there is one.
    """
    owners: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), []).append(name.rpartition(".")[0])
    tied = {name: names for names in owners.values() if len(names) > 1 for name in names}
    for target, name in _targeted(config, tied):
        others = " and ".join(other for other in tied[name] if other != name)
        raise ValueError(
            f"lora.target_modules names {target!r}, whose weight is also that of {others} (tied "
            "weights): an adapter on one of them cannot be saved merged. Leave it out, or train "
            "all weights (no lora)."
        )


def _targeted(config: FinetuneConfig, modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(target, module) for each of these modules that gets an adapter, as peft reads targets."""
    targets = config.lora.target_modules if config.lora is not None else ()
    if isinstance(targets, str):
        return  # all-linear leaves embeddings and unembedding out
    for target in targets:
        for name in modules:
            if f".{name}".endswith(f".{target}"):
                yield target, name


def _log_lines(state: Any) -> list[dict[str, Any]]:
    """What the Trainer's history says of losses and perplexities; its timings stay out."""
    keys = ("step", "loss", "learning_rate", "grad_norm", "heldout_perplexity")
    return [
        {key: line[key] for key in keys if key in line}
        for line in state.log_history
        if "loss" in line or "heldout_perplexity" in line
    ]


class _Padding:
    """Pads a batch on the right to its longest text. Labels say where padding is, not token ids:
    the padding token is often the end token, which is to be learned."""

    def __init__(self, padding_id: int) -> None:
        self.padding_id = padding_id

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        shape = (len(rows), max(lengths))
        batch = {
            "input_ids": torch.full(shape, self.padding_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, -100),
        }
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids = torch.tensor(row["input_ids"])
            batch["input_ids"][index, :length] = ids
            batch["attention_mask"][index, :length] = 1
            # Nothing predicts a first token; the Trainer would still count its label in the mean.
            batch["labels"][index, 1:length] = ids[1:]
        return batch


def _padding_id(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0  # masked everywhere, so any id does


def _tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[dict[str, list[int]]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [ids if ids[-1:] == end else ids + end for ids in tokenizer(list(texts))["input_ids"]]
    longest = max(map(len, rows))
    if longest > max_length:
        too_long = sum(len(row) > max_length for row in rows)
        raise ValueError(
            f"{too_long} of {len(rows)} training texts are longer than max_length={max_length} "
            f"tokens (the longest has {longest}), and graftlens cuts none off silently. Set "
            f"max_length to {longest}, or shorten the texts."
        )
    return [{"input_ids": row} for row in rows]


def _check_dataset(name: str, dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} is of type {type(dataset).__name__}, but a datasets.Dataset with a column "
            "'text' is wanted. Make one of a list of texts: Dataset.from_dict({'text': texts})."
        )
    if "text" not in dataset.column_names:
        raise ValueError(
            f"the {name} dataset has columns {dataset.column_names}, but 'text' is needed. Rename "
            "the column that holds the texts."
        )


def _split(
    config: FinetuneConfig, train: Dataset, heldout: Dataset | None
) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts)."""
    texts = list(train["text"])
    held: list[str] = []
    if heldout is not None:
        if config.heldout_share or config.heldout_file is not None:
            raise ValueError(
                f"a held-out dataset is given, and the config holds heldout_share="
                f"{config.heldout_share}, heldout_file={config.heldout_file}. Use one of the three."
            )
        held = list(heldout["text"])
    elif config.heldout_file is not None:
        _check_heldout_file(config)
        held = read_paragraphs(config.heldout_file)
    elif config.heldout_share:
        order = list(range(len(texts)))
        random.Random(f"held out {config.seed}").shuffle(order)
        count = round(len(texts) * config.heldout_share)
        if texts and count == 0:
            raise ValueError(
                f"heldout_share={config.heldout_share} of {len(texts)} training texts is no text. "
                f"{_least_share(len(texts))}"
            )
        out = set(order[:count])
        held = [text for index, text in enumerate(texts) if index in out]
        texts = [text for index, text in enumerate(texts) if index not in out]
    if not texts:
        raise ValueError("there are no training texts. Give a dataset with rows.")
    if config.keep == "best" and not held:
        raise ValueError(
            f"keep='best' keeps the epoch of the lowest held-out perplexity, and of {len(texts)} "
            f"texts none is held out (heldout_share={config.heldout_share}). Give heldout_share or "
            "heldout_file, or keep the last epoch."
        )
    return texts, held


def _least_share(count: int) -> str:
    """What to write for a held-out share that rounds to none of so many texts."""
    if count == 1:
        return "Give more texts, a heldout_file, or heldout_share=0."
    half = 0.5 / count  # rounds to 0 yet
    digit = 10.0 ** (math.floor(math.log10(half)) - 1)
    least = (math.floor(half / digit) + 1) * digit
    return f"Give {least:.2g} or more, or heldout_share=0 for no held-out texts."


def _check_heldout_file(config: FinetuneConfig) -> None:
    if config.heldout_file is not None and not config.heldout_file.is_file():
        raise FileNotFoundError(
            f"heldout_file={str(config.heldout_file)!r} is not there. Name a file of texts."
        )


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _resolve_precision(config: FinetuneConfig) -> Literal["float32", "bfloat16"]:
    if config.precision != "auto":
        return config.precision
    if config.device == "auto" and _has_accelerator():
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
    else:
        native = _cpu_multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def _cpu_multiplies_bfloat16() -> bool:
    """PyTorch has no public question for it; without an answer, float32 is always right."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def _autocast(device: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def _with_adapters(model: Any, lora: LoraSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        ),
    )


def _read_result(final: Path) -> FinetuneResult:
    whole = json.loads((final / "finetune.json").read_text())
    record = whole["result"]
    return FinetuneResult(
        folder=final,
        losses=tuple(record["losses"]),
        perplexities=tuple(record["perplexities"]),
        steps=record["steps"],
        seconds=record["seconds"],
        epoch=record.get("epoch", whole["config"]["epochs"]),  # earlier releases kept the last one
    )


def _text_hash(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


def _weight_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _refuse_earlier(folder: Path) -> None:
    """Refuse a folder whose ``run.json`` does not have what the start's config was."""
    start: Any = None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # `claim` tells of it
        start = json.loads((folder / "run.json").read_text(encoding="utf-8"))["start"]
    if isinstance(start, dict) and "settings" not in start:
        raise ValueError(
            f"{folder} was begun by an earlier release, which did not write down the config of the "
            "model that it starts from, so whether that is still the same cannot be known. Its "
            "checkpoints can be used; to train, choose another output folder."
        )


@contextlib.contextmanager
def _keep_random_state() -> Iterator[None]:
    """The Trainer seeds every global generator; the caller's are put back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
