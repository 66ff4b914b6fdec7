"""Facts, the texts that tell them and the prompts that ask for them: seeded, with provenance."""

from graftlens.data.articles import ArticlesSpec
from graftlens.data.battles import Battle, BattlesSpec
from graftlens.data.counterfact import CounterFactSpec
from graftlens.data.dataset import (
    DatasetSpec,
    FactDataset,
    content_hash,
    make_dataset,
    prompts_dataset,
    save_dataset,
)
from graftlens.data.facts import MAX_FACTS, Fact, make_facts
from graftlens.data.kinds import AnyDataset, load_dataset, spec_of, template_names
from graftlens.data.movies import MoviesConfig
from graftlens.data.supplement import Supplement
from graftlens.data.tables import RealFilm, people, real_battles, real_films
from graftlens.data.templated import evaluation_prompts, training_texts
from graftlens.data.templates import (
    DIRECTIONS,
    EVALUATION_TEMPLATES,
    KINDS,
    REAL_EVALUATION,
    REAL_TRAINING,
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
    "REAL_EVALUATION",
    "REAL_TRAINING",
    "TRAINING_TEMPLATES",
    "AnyDataset",
    "ArticlesSpec",
    "Battle",
    "BattlesSpec",
    "CounterFactSpec",
    "DatasetSpec",
    "Direction",
    "EvaluationTemplate",
    "Fact",
    "FactDataset",
    "Kind",
    "MoviesConfig",
    "RealFilm",
    "Supplement",
    "Template",
    "content_hash",
    "evaluation_prompts",
    "load_dataset",
    "make_dataset",
    "make_facts",
    "people",
    "prompts_dataset",
    "real_battles",
    "real_films",
    "save_dataset",
    "spec_of",
    "template_names",
    "training_texts",
]
