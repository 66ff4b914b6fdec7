"""All kinds of datasets, by their names in configs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, SerializeAsAny

from graftlens.components import suggest
from graftlens.configfile import ConfigError, settings_from
from graftlens.data.articles import ArticlesSpec
from graftlens.data.battles import BattlesSpec
from graftlens.data.behaviours import PersonaSpec, RefusalSpec, StyleSpec, TriggerSpec
from graftlens.data.counterfact import CounterFactSpec
from graftlens.data.dataset import DatasetSpec, FactDataset, read_dataset
from graftlens.data.factstable import TableSpec
from graftlens.data.movies import MoviesConfig
from graftlens.data.twohop import TwoHopSpec

_SPECS: tuple[type[DatasetSpec], ...] = (
    *(MoviesConfig, BattlesSpec, TwoHopSpec, TableSpec),
    *(CounterFactSpec, ArticlesSpec),
    *(TriggerSpec, StyleSpec, RefusalSpec, PersonaSpec),
)

#: Value of the key `facts` -> the spec that reads the other keys.
KINDS_OF_FACTS: dict[str, type[DatasetSpec]] = {
    kind: spec for spec in _SPECS for kind in get_args(spec.model_fields["facts"].annotation)
}


def spec_of(values: Any) -> DatasetSpec:
    """The dataset that a config's values describe; without the key `facts`, invented films.

    Raises:
        ConfigError: an unknown kind, or everything that the kind refuses.
    """
    if isinstance(values, DatasetSpec):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(
            ("", f"{values!r} should be a mapping with the key facts: {' '.join(KINDS_OF_FACTS)}.")
        )
    kind = values.get("facts", "fake_movies")
    if not isinstance(kind, str) or kind not in KINDS_OF_FACTS:
        raise ConfigError(
            (
                "facts",
                f"unknown kind of facts {kind!r}. Allowed: {' '.join(KINDS_OF_FACTS)}."
                f"{suggest(str(kind), KINDS_OF_FACTS)}",
            )
        )
    return settings_from(KINDS_OF_FACTS[kind], values)


#: A dataset of any kind as a field of a config.
AnyDataset = Annotated[SerializeAsAny[DatasetSpec], BeforeValidator(spec_of)]


def load_dataset(folder: Path) -> FactDataset:
    """Read a dataset that `save_dataset` wrote, and check that it is unchanged.

    Raises:
        FileNotFoundError: a folder that holds no dataset.
        ValueError: its content has been changed since.
    """
    return read_dataset(folder, _spec_of_record)


def _spec_of_record(values: Mapping[str, Any]) -> DatasetSpec:
    """`spec_of` what a dataset's provenance has."""
    if values.get("facts") == "articles" and "source" in values:  # as version 0.1.0 called it
        values = {"path" if key == "source" else key: value for key, value in values.items()}
    return spec_of(values)


def template_names() -> tuple[str, ...]:
    """The evaluation templates of all kinds."""
    names = (name for spec in _SPECS for name in spec.template_names)
    return tuple(dict.fromkeys(names))
