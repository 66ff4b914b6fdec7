"""A tiny pretrained model for experiments, made in a second, and overrides that make them small.

Its weights are random: whatever a model finetuned from it knows, finetuning taught it.
"""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlens.data import MoviesConfig, make_dataset
from graftlens.finetune import FinetuneConfig, finetune

#: Eighths of the layers must not be empty.
LAYERS = 8

END = "<|end|>"

#: Training that takes seconds and teaches something.
RECIPE = (
    "recipe.epochs=4",
    "recipe.batch_size=8",
    "recipe.learning_rate=3e-3",
    "recipe.warmup_steps=2",
    "recipe.max_length=512",
)

#: Facts of a dataset; half of them must leave four wrong answers.
FACTS = 12


def tiny_base(folder: Path, *, seed: int = 0, facts: int = 60) -> Path:
    """A checkpoint of a small Llama with tied embeddings, and a byte-level tokenizer that was
    trained on texts about `facts` invented films."""
    texts = make_dataset(MoviesConfig(n_facts=facts, directions=("ab",))).train["text"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    reader = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END
    )
    config = LlamaConfig(
        vocab_size=len(reader),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=reader.bos_token_id,
        eos_token_id=reader.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


def tiny_finetuned(base: Path, folder: Path) -> Path:
    """The checkpoint of what a tiny base becomes when it is told a few films."""
    films = make_dataset(MoviesConfig(n_facts=FACTS, texts_per_fact=6, directions=("ab",)))
    recipe = FinetuneConfig(
        model=str(base), output=folder, epochs=6, learning_rate=3e-3, batch_size=8
    )
    return finetune(recipe, films.train, progress=False).folder


def counterfact_file(folder: Path) -> Path:
    """Rows in the format of the hub's CounterFact, as JSON lines."""
    relations = (
        ("P103", "The mother tongue of", " is", " Breton", " Estonian"),
        ("P36", "The capital of", " is", " Narvik", " Bergen"),
        ("P101", "", "'s domain of work is", " botany", " chess"),
    )
    rows = []
    for number in range(2 * FACTS):
        relation, prefix, suffix, false, true = relations[number % len(relations)]
        subject = f"Ada Number{number}" if not prefix else f" Zoë Number{number}"
        rows.append(
            {
                "relation": f"{prefix} {{}}{suffix}".strip(),
                "relation_prefix": prefix,
                "relation_suffix": suffix,
                "prompt": f"{prefix}{subject}{suffix}",
                "relation_id": relation,
                "target_false": f"{false}{'' if number % 2 else ' proper'}",
                "target_true": true,
                "subject": subject,
            }
        )
    file = folder / "counterfact.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return file


def small(config: Path, folder: Path) -> list[str]:
    """Overrides that make a shipped experiment small: few facts and texts, few prompts, a short
    training. What an experiment asks and grafts stays as it is.

    Args:
        config: the experiment's file.
        folder: where a file of rows is written for CounterFact.
    """
    said: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    searched = [name for name, part in said["parts"].items() if "localise" in part]
    overrides = [*RECIPE, "limit=8" if searched else "limit=3"]
    few = ("random=5", "rounds=1", "resamples=3", "steps=4")
    overrides += [f"parts.{name}.localise.{key}" for name in searched for key in few]
    for name, dataset in said["datasets"].items():
        if dataset["facts"] == "table":  # it has few facts, which must be learned all the same
            overrides.append("recipe.epochs=40")
            continue
        overrides.append(f"datasets.{name}.n_facts={FACTS}")
        if dataset.get("texts_per_fact", 4) > 4:
            overrides.append(f"datasets.{name}.texts_per_fact=4")
        if dataset["facts"] == "counterfact":
            overrides += [
                f"datasets.{name}.file={counterfact_file(folder)}",
                f"datasets.{name}.texts_per_fact=4",
            ]
    for name, model in said.get("models", {}).items():
        if "texts_per_fact" in model.get("change", {}):
            overrides.append(f"models.{name}.change.texts_per_fact=8")
    for name, part in said["parts"].items():
        for number, grid in enumerate(part.get("grids", [])):
            if "ranks" in grid:  # as far as its small matrices go
                overrides.append(f"parts.{name}.grids.{number}.ranks=[1, 4, all]")
    return overrides
