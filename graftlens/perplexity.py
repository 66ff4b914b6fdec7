"""Perplexity of texts, and the batches that it shares with training."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from graftlens.model.start import fixed_positions
from graftlens.recipes import FinetuneConfig
from graftlens.trainingtexts import Row, Text, rows_of


def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    max_length: int,
    batch_size: int,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> float:
    """exp of the mean loss per predicted token, over all texts; in conversations, only
    replies are predicted.

    Args:
        model: a Hugging Face causal language model, on its device.
        tokenizer: its tokenizer.
        texts: what to predict; texts of fewer than two tokens have nothing to predict.
        max_length: tokens; longer texts are scored in separate pieces of at most this length, or of
            the positions that the model has, if these are fewer.
        batch_size: pieces per forward pass.
        precision: precision of matrix products.
    """
    cut = pieces(model, tokenizer, texts, max_length)
    collate = Padding(padding_id(tokenizer, model))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode(), autocast(device.type, precision):
        for start in range(0, len(cut), batch_size):
            batch = collate(cut[start : start + batch_size])
            batch = {name: value.to(device) for name, value in batch.items()}
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
            targets = batch["labels"][:, 1:]
            total += torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="sum"
            ).item()
            count += int((targets != -100).sum())
    model.train(was_training)
    return math.exp(total / count)


def pieces(model: Any, tokenizer: Any, texts: Sequence[Text], max_length: int) -> list[Row]:
    """What `perplexity` scores at a time, shortest first.

    Raises:
        ValueError: there is nothing to predict.
    """
    longest = min(max_length, fixed_positions(model) or max_length)
    cut = [
        {name: values[start : start + longest] for name, values in row.items()}
        for row in rows_of(tokenizer, texts)
        for start in range(0, len(row["input_ids"]), longest)
    ]
    cut = [row for row in cut if any(i != -100 for i in row.get("labels", row["input_ids"])[1:])]
    if not cut:
        raise ValueError(
            f"none of the {len(texts)} held-out texts has two tokens or more, so there is nothing "
            "to predict. Give longer texts, or none."
        )
    return sorted(cut, key=lambda row: len(row["input_ids"]))


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")


class Padding:
    """Pads a batch on the right to its longest text. Labels say where padding is, not token ids:
    the padding token is often the end token, which is to be learned. A row's own labels say what
    else is not."""

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
            batch["labels"][index, 1:length] = torch.tensor(row.get("labels", row["input_ids"]))[1:]
        return batch


def padding_id(tokenizer: Any, model: Any) -> int:
    """A token to pad with, which the model must embed though nothing sees it."""
    size = model.get_input_embeddings().weight.shape[0]
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and token < size:
            return int(token)
    return 0  # masked everywhere, so any id does


def has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def resolve_precision(config: FinetuneConfig) -> Literal["float32", "bfloat16"]:
    if config.precision != "auto":
        return config.precision
    if config.device == "auto" and has_accelerator():
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
    else:
        native = _cpu_multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def _cpu_multiplies_bfloat16() -> bool:
    """PyTorch has no public function for this; if it does not answer, float32 is always right."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)
