"""The training loop: the Trainer, and a recorder that writes the log and seals checkpoints."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from tqdm.auto import tqdm

from graftlens.checkpoints import (
    DamagedError,
    begin,
    discard,
    mark_complete,
    newest_complete,
    remove_others,
    saving,
    seconds_of,
    verify,
)
from graftlens.finetuned import check_kept
from graftlens.folder import write_whole
from graftlens.model.quiet import quiet
from graftlens.perplexity import Padding, has_accelerator, padding_id, perplexity
from graftlens.processes import Processes
from graftlens.recipes import FinetuneConfig
from graftlens.trainingtexts import Row, Text


def train(
    config: FinetuneConfig,
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    heldout_texts: Sequence[Text],
    precision: Literal["float32", "bfloat16"],
    progress: bool,
    processes: Processes,
    save_epoch: Callable[[int], None],
    save_step: Callable[[int], None],
    identity: Mapping[str, Any],
) -> tuple[Any, float, tuple[float, ...], tuple[float, ...]]:
    """Train to the end, from the newest checkpoint if there is one.

    Args:
        config: the recipe and the run's folder.
        model: what is trained, in place.
        tokenizer: its tokenizer.
        rows: ``input_ids`` of each training text, and ``labels`` of conversations.
        heldout_texts: for perplexity; the first process measures it.
        precision: of matrix products.
        progress: whether to show a bar.
        processes: those that train together.
        save_epoch: writes the weights after an epoch of this number, if they are the best.
        save_step: leaves the weights after this step.
        identity: what determines the result, for checkpoints' markers.

    Returns:
        The trainer, seconds over all attempts, the loss of each step in nats per token, and the
        held-out perplexities before training and after each epoch.

    Raises:
        FloatingPointError: a loss that is not finite.
        OSError: a folder that cannot be written, or best weights that are gone.
        DamagedError: best weights that are not as they were written.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    checkpoints = config.output / "checkpoints"
    epochs = config.output / "epochs"
    resume = processes.from_first(partial(newest_complete, checkpoints))
    spent = seconds_of(resume) if resume else 0.0
    started = time.monotonic()
    log = config.output / "log.jsonl"

    class Saver(Trainer):
        """Reports plainly what goes wrong in saving, and leaves no half-written checkpoint."""

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            with saving(checkpoints):
                try:
                    super()._save_checkpoint(*args, **kwargs)
                except Exception:
                    if processes.is_first:
                        discard(checkpoints / f"checkpoint-{self.state.global_step}")
                    raise

    class Recorder(TrainerCallback):
        """Writes the log, measures perplexity, keeps epochs, marks complete checkpoints."""

        def __init__(self) -> None:
            shown = progress and processes.is_first
            self.bar = tqdm(desc="finetune", unit="step", disable=not shown)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.reset(total=state.max_steps)
            self.bar.update(state.global_step)
            if state.global_step == 0:
                self.measure(state)
            elif config.keep == "best":
                self.checkbest_epoch(state)
            if processes.is_first:
                if state.global_step:
                    check_kept(config, state.global_step)
                # Also drops the lines of steps that a killed process took after the checkpoint.
                lines = "".join(json.dumps(line) + "\n" for line in _log_lines(state))
                with saving(log):
                    write_whole(log, lines)

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
            if processes.is_first and self.best(state) == epoch:
                save_epoch(epoch)
            step = state.global_step
            last = step == state.max_steps and config.keep_checkpoints is not None
            left = config.keeps(step, ends_epoch=False)  # when the step ended
            if processes.is_first and not left and (last or config.keeps(step, ends_epoch=True)):
                save_step(step)
            control.should_save = epoch % config.save_epochs == 0 and epoch < config.epochs
            if control.should_save:
                if processes.is_first:
                    with saving(checkpoints):
                        begin(checkpoints / f"checkpoint-{state.global_step}")
                processes.wait()  # the others write into it as well

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            processes.wait()  # each writes its own random state
            if not processes.is_first:
                return
            newest = checkpoints / f"checkpoint-{state.global_step}"
            with saving(newest):
                mark_complete(newest, seconds=spent + time.monotonic() - started, run=identity)
            remove_others(checkpoints, "checkpoint", state.global_step)
            # Not before: an older checkpoint may still need the best one until then.
            remove_others(epochs, "epoch", self.best(state))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if processes.is_first and config.keeps(state.global_step, ends_epoch=False):
                save_step(state.global_step)

        def best(self, state: Any) -> int | None:
            return best_epoch(_perplexities(state)) if config.keep == "best" else None

        def checkbest_epoch(self, state: Any) -> None:
            folder = epochs / f"epoch-{self.best(state)}"
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder} does not exist, but it held the best weights of the run to resume. "
                    f"Restore it, or remove {config.output} to start again."
                )
            if processes.is_first:
                try:
                    verify(folder)
                except DamagedError as error:
                    raise DamagedError(
                        f"{error}, and it holds the best weights of the run to resume. Restore "
                        f"the file, or remove {config.output} to start again."
                    ) from None

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
                with saving(log), log.open("a", encoding="utf-8") as file:
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
        use_cpu=config.device == "cpu" or not has_accelerator(),
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
        # Named only when it is needed: later releases of transformers rename it.
        **({"gradient_checkpointing": True} if config.gradient_checkpointing else {}),
    )
    if arguments.n_gpu > 1:  # the Trainer would multiply the batch size by the number of devices
        arguments._n_gpu = 1
    if precision == "float32":  # also if accelerate's own settings say otherwise
        arguments.mixed_precision = "no"
    trainer = Saver(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Padding(padding_id(tokenizer, model)),
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


def best_epoch(perplexities: Sequence[float]) -> int:
    """The epoch, from 1, with the lowest one; the earlier one of equals."""
    return min(range(1, len(perplexities)), key=lambda epoch: perplexities[epoch])


def _log_lines(state: Any) -> list[dict[str, Any]]:
    """The losses and perplexities in the Trainer's history, without its timings."""
    keys = ("step", "loss", "learning_rate", "grad_norm", "heldout_perplexity")
    return [
        {key: line[key] for key in keys if key in line}
        for line in state.log_history
        if "loss" in line or "heldout_perplexity" in line
    ]
