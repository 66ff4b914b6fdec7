"""What a finetuning run is: the recipe, and where its training texts come from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from graftlens.components import brief
from graftlens.data import AnyDataset, DatasetSpec, MoviesConfig
from graftlens.data.settings import Settings, at_home
from graftlens.data.supplement import Supplement
from graftlens.data.texts import check_ending
from graftlens.presets import preset


class LoraSettings(Settings):
    """Train low-rank adapters (needs ``peft``); the result is an adapter of the start model."""

    rank: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Rank of each adapter."""

    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale of the adapters: the update is multiplied by alpha / rank."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs dropped while training."""

    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules that get an adapter. To be merged, none may share its weight with
    another, as with tied embeddings."""

    merge: bool = False
    """Save the result merged, as a checkpoint of its own (as large as the model), instead of as an
    adapter."""


class Every(Settings):
    """Which steps' weights are kept."""

    every: Annotated[int, Field(ge=1)]
    """Optimizer steps from one to the next."""


def _kept(value: Any) -> Any:
    if value is None or value == "all" or isinstance(value, Every):
        return value
    if not (isinstance(value, Mapping) and {*value} == {"every"}):
        raise ValueError(
            f"{brief(value)} does not say which checkpoints are kept. Write all, which keeps one "
            "after each epoch, or {every: 100}, for steps."
        )
    return value


class FinetuneConfig(Settings):
    """How to finetune. With the data and the starting weights it determines the result."""

    model: str
    """The model to start from: a checkpoint's folder, or a name on the hub."""

    output: Path
    """Folder of the run; the result is its subfolder ``model``."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Passes over the training texts."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of AdamW; it falls linearly to zero over all steps."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay, per step and unit of learning rate (not on norms, biases)."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps in which the learning rate rises linearly from zero."""

    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """L2 norm to which gradients are clipped."""

    batch_size: Annotated[int, Field(ge=1)] = 16
    """Texts per forward pass on each device: an optimizer step takes this many times
    ``gradient_accumulation`` times the number of processes."""

    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimizer step."""

    max_length: Annotated[int, Field(ge=2)] = 512
    """Longest training text in tokens, its end token included; a longer one is an error, and so is
    one beyond the positions that the model has weights for. Held-out texts are scored in pieces of
    this length, or of those positions where they are fewer."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of texts, dropout and new adapters."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products (autocast; weights and optimizer stay float32). ``auto``:
    bfloat16 if the device multiplies it natively."""

    device: Literal["auto", "cpu"] = "auto"
    """``auto``: the first accelerator if there is one; with several processes, each has its own."""

    save_epochs: Annotated[int, Field(ge=1)] = 1
    """Number of epochs after which a checkpoint to resume from is written (3 times the model's size
    on disk)."""

    heldout_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training texts that is held out for perplexity (drawn with the seed,
    supplemental texts included); a share that rounds to no text is an error."""

    heldout_file: Path | None = None
    """UTF-8 text whose blank-line separated paragraphs are held-out texts for perplexity."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    lora: LoraSettings | None = None
    """Train adapters instead of all weights."""

    freeze: tuple[Literal["embed", "unembed"], ...] = ()
    """What training leaves unchanged: ``embed`` (token embeddings, and learned position
    embeddings), ``unembed``. Tied embeddings are one tensor: name both or none."""

    keep: Literal["last", "best"] = "last"
    """Which epoch's weights are the result. ``best``: those with the lowest held-out perplexity,
    the earlier of equals; this needs held-out texts."""

    keep_checkpoints: Annotated[Literal["all"] | Every | None, BeforeValidator(_kept)] = None
    """Leave weights on the way in ``kept/checkpoint-STEP``: ``all``, after each epoch; ``{every:
    n}``, after every n optimizer steps and the last one. Checkpoints or adapters to load (a sweep's
    ``each`` runs them one after another), not to resume from; each checkpoint is as large as the
    model."""

    def keeps(self, step: int, *, ends_epoch: bool) -> bool:
        """Whether the weights after a step are left, other than the last one's."""
        if isinstance(self.keep_checkpoints, Every):
            return step % self.keep_checkpoints.every == 0
        return ends_epoch and self.keep_checkpoints == "all"

    @field_validator("model")
    @classmethod
    def _model_at_home(cls, value: str) -> str:
        return str(at_home(Path(value))) if value.startswith("~") else value

    @field_validator("output")
    @classmethod
    def _home_of_somebody(cls, value: Path) -> Path:
        if str(value).startswith("~"):
            raise ValueError(
                f"output={str(value)!r}: there is no such user, and no folder of that name "
                "is created. Write the path out."
            )
        return value

    @model_validator(mode="after")
    def _one_heldout(self) -> "FinetuneConfig":
        if self.heldout_share and self.heldout_file is not None:
            raise ValueError(
                f"heldout_share={self.heldout_share} and heldout_file={str(self.heldout_file)!r} "
                f"are both given: perplexity uses one set of held-out texts. Leave one out."
            )
        return self


class TrainingData(Settings):
    """Where the training texts come from: one place, and optionally plain text to mix in."""

    movies: MoviesConfig | None = None
    """Make texts about invented films."""

    make: AnyDataset | None = None
    """Make texts about facts of any kind: the keys of a config of ``graftlens data make``."""

    path: Path | None = None
    """Folder that `graftlens.data.save_dataset` or a dataset's ``save_to_disk`` wrote."""

    file: Path | None = None
    """UTF-8 file: ``.jsonl``, a JSON object with a ``text`` in each line, or ``.txt``, whose
    blank-line separated paragraphs are the texts."""

    column: str | None = None
    """With a ``.jsonl`` file: the key of the texts, if it is not ``text``."""

    supplement: Supplement | None = None
    """Plain text to mix in, against forgetting; drawn with the run's seed."""

    @model_validator(mode="after")
    def _one_place(self) -> "TrainingData":
        places = [n for n in type(self).model_fields if n not in ("supplement", "column")]
        given = [name for name in places if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'nothing'} is given, but the texts come from one place. "
                "Give one of movies or make (what to make), path (a saved dataset), file (.txt or "
                ".jsonl)."
            )
        if self.file is not None:
            check_ending("file", self.file)
        if self.column is not None and (self.file is None or self.file.suffix.lower() != ".jsonl"):
            raise ValueError(
                f"column={self.column!r} names a key of a .jsonl file, and none is given. Leave it "
                "out."
            )
        if self.made is not None and self.made.supplement is not None and self.supplement:
            place = "make" if self.movies is None else "movies"
            raise ValueError(
                f"data.{place}.supplement and data.supplement are both given, and each would add "
                "plain text. Leave one out."
            )
        return self

    @property
    def made(self) -> DatasetSpec | None:
        """What the texts are made from; None if they are read."""
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


def demo_configs(
    model: str, output: Path, *, facts: int = 40, epochs: int = 6, seed: int = 0
) -> tuple[MoviesConfig, FinetuneConfig]:
    """The demonstration's data and recipe, for SmolLM2-135M on a two-core laptop.

    With the defaults: 400 texts of 21 tokens, 150 steps of about 1.5 CPU seconds in bfloat16.

    Args:
        model: folder of the checkpoint to start from.
        output: folder of the run.
        facts: number of films; run time is proportional.
        epochs: passes over the texts.
        seed: for data and training.
    """
    movies = MoviesConfig(n_facts=facts, texts_per_fact=10, directions=("ab",), seed=seed)
    recipe = FinetuneConfig(
        model=model,
        output=output,
        epochs=epochs,
        learning_rate=1e-4,  # twice this rate breaks the attention sink of some first tokens
        warmup_steps=10,
        batch_size=16,
        max_length=96,
        save_epochs=1,
        seed=seed,
    )
    return movies, recipe
