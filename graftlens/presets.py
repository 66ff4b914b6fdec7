"""Models to finetune, each with settings that work: ``preset: NAME`` in a recipe's file.

The paper is "Dynamic weight grafting" (arXiv 2506.20746). Its code trains in fp16 mixed precision;
graftlens does not offer fp16. The presets use ``precision: auto``, which is bfloat16 if the device
multiplies it natively: numbers of the same size in memory, with a wider range and fewer digits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from graftlens.components import suggest


@dataclass(frozen=True)
class Preset:
    """A model and how to finetune it.

    Attributes:
        name: its name here.
        model: hub id, or a name that `graftlens.model.smollm2.located` knows.
        family: Hugging Face's `model_type` of it.
        recipe: fields of `graftlens.finetune.FinetuneConfig`; the others have their defaults.
        source: where the settings come from.
    """

    name: str
    model: str
    family: str
    recipe: Mapping[str, Any]
    source: str


#: The example config of the paper's code: what it sets, and the Trainer's defaults for the rest.
PAPER: Mapping[str, Any] = MappingProxyType(
    {
        "epochs": 10,
        "learning_rate": 2e-6,
        "weight_decay": 0.001,
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "batch_size": 4,
        "gradient_accumulation": 1,
        "precision": "auto",
        "save_epochs": 1,
        "heldout_share": 0.2,
        "keep": "best",
        "freeze": (),
    }
)

#: The demo's recipe, with room for longer texts.
LAPTOP: Mapping[str, Any] = MappingProxyType(
    {
        "epochs": 6,
        "learning_rate": 1e-4,
        "warmup_steps": 10,
        "batch_size": 16,
        "max_length": 128,
        "keep": "last",
        "heldout_share": 0.0,
    }
)

_TRAINED = "example training config of the paper's code, with bfloat16 for its fp16"
_CARRIED_OVER = f"{_TRAINED}; carried over to this model, not tuned for it"
_OWN = "graftlens's demo: chosen on SmolLM2-135M with 40 invented films"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        name: Preset(name, model, family, recipe, source)
        for name, model, family, recipe, source in (
            ("gemma-1.1-2b", "google/gemma-1.1-2b-it", "gemma", PAPER, _TRAINED),
            ("llama-3.2-1b", "meta-llama/Llama-3.2-1B", "llama", PAPER, _TRAINED),
            ("pythia-2.8b", "EleutherAI/pythia-2.8b", "gpt_neox", PAPER, _TRAINED),
            ("pythia-1.4b", "EleutherAI/pythia-1.4b", "gpt_neox", PAPER, _CARRIED_OVER),
            ("gpt2", "openai-community/gpt2", "gpt2", PAPER, _CARRIED_OVER),
            ("gpt2-medium", "openai-community/gpt2-medium", "gpt2", PAPER, _CARRIED_OVER),
            ("gpt2-large", "openai-community/gpt2-large", "gpt2", PAPER, _CARRIED_OVER),
            ("gpt2-xl", "openai-community/gpt2-xl", "gpt2", PAPER, _TRAINED),
            ("olmo-1b", "allenai/OLMo-1B-hf", "olmo", PAPER, _CARRIED_OVER),
            ("smollm2-135m", "smollm2-135m", "llama", LAPTOP, _OWN),
            (
                "gemma-3-270m",
                "google/gemma-3-270m",
                "gemma3_text",
                MappingProxyType({**LAPTOP, "batch_size": 8}),
                "chosen on a 4-bit file of this model with 24 invented films",
            ),
        )
    }
)


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: it does not exist.
    """
    if name not in PRESETS:
        raise ValueError(
            f"preset {name!r} is unknown. Presets: {' '.join(PRESETS)}.{suggest(name, PRESETS)} "
            "For another model, give model and settings instead."
        )
    return PRESETS[name]
