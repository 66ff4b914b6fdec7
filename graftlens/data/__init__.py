"""Invented films: facts, training texts and held-out prompts."""

from graftlens.data.facts import MAX_FACTS, Fact, make_facts
from graftlens.data.movies import (
    MoviesConfig,
    MoviesDataset,
    content_hash,
    evaluation_prompts,
    load_dataset,
    make_dataset,
    save_dataset,
    training_texts,
)
from graftlens.data.templates import (
    DIRECTIONS,
    EVALUATION_TEMPLATES,
    KINDS,
    TRAINING_TEMPLATES,
    Direction,
    EvaluationTemplate,
    Kind,
    Template,
)

__all__ = [
    "DIRECTIONS",
    "EVALUATION_TEMPLATES",
    "KINDS",
    "MAX_FACTS",
    "TRAINING_TEMPLATES",
    "Direction",
    "EvaluationTemplate",
    "Fact",
    "Kind",
    "MoviesConfig",
    "MoviesDataset",
    "Template",
    "content_hash",
    "evaluation_prompts",
    "load_dataset",
    "make_dataset",
    "make_facts",
    "save_dataset",
    "training_texts",
]
