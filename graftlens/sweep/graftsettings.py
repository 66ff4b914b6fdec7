"""What is grafted, as configs of sweeps and parts of experiments say it."""

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, field_validator, model_validator

from graftlens.components import brief, check_name, suggest
from graftlens.configfile import ConfigError
from graftlens.graft import Graft
from graftlens.model.arch import Architecture
from graftlens.model.made import SourceField, made_problems
from graftlens.sweep.grid import GraftField, Grid
from graftlens.sweep.paper import Kind, checked_kind, published
from graftlens.sweep.promptsets import Section, listed


class GraftSettings(Section):
    """What is grafted, in a sweep or in a part of an experiment, which is a sweep."""

    sources: Mapping[str, SourceField] = {}
    """Name -> location of the weights, or what the source is made of."""

    grafts: Mapping[str, GraftField] = {}
    """Name -> graft, as one line of text in quotes or a list of rules. Or `paper`, or `paper KIND`,
    for the key `paper`."""

    paper: Kind | None = None
    """Grafts that equal those of the paper's published code (`graftlens.paper_grafts`), in front of
    the others: positions, components, quarters, eighths or hybrid."""

    grids: Annotated[tuple[Grid, ...], BeforeValidator(listed)] = ()
    """Families of grafts."""

    base: str | None = None
    """The graft that recovery is measured from, by name; by default the one without rules."""

    full: str | None = None
    """The graft that recovery is measured to; by default the second source everywhere."""

    @model_validator(mode="before")
    @classmethod
    def _paper_as_grafts(cls, values: Any) -> Any:
        given = values.get("grafts") if isinstance(values, Mapping) else None
        if not isinstance(given, str):
            return values
        word, _, kind = given.strip().partition(" ")
        if word != "paper":
            what = (
                f"{brief(given)} is not a mapping of names to grafts. Write {{NAME: GRAFT}}, or "
                "paper for the grafts of the paper's published code."
            )
            raise ConfigError(("grafts", what))
        try:
            kind = checked_kind(kind.strip() or "positions")
        except ValueError as error:
            raise ConfigError(("grafts", str(error))) from None
        return {**values, "grafts": {}, "paper": kind}

    @field_validator("grafts")
    @classmethod
    def _one_line_names(cls, grafts: Mapping[str, Graft]) -> Mapping[str, Graft]:
        for name in grafts:
            check_name(name)
        return grafts

    def named_grafts(
        self,
        sources: Collection[str] = (),
        arch: Architecture | None = None,
        tied: bool = False,
    ) -> dict[str, Graft]:
        """All grafts that have names: the published ones, then those of `grafts`.

        Args:
            sources: the names of the sources, of which published grafts take the second.
            arch, tied: what published grafts depend on; without these, their names and sources
                alone hold.
        """
        if self.paper is None:
            return dict(self.grafts)
        source = [*sources, "sft"][1] if sources else "sft"
        return published(self.paper, arch, tied, source) | dict(self.grafts)

    def graft_problems(self, origins: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(where, what): no grafts, every source that grafts name but that does not exist, and
        sources that cannot be made; `origins` are the sources."""
        sources, problems = self.with_ranks(origins)
        problems = [(f"sources.{n}", what) for n, what in made_problems(sources)] + problems
        given = self.named_grafts(tuple(sources))
        if not given and not self.grids:
            problems.append(("", "no grafts: give grafts or grids."))
        if self.paper is not None:
            both = self.grafts.keys() & published(self.paper, None, False, "sft").keys()
            problems += [
                (f"grafts.{name}", f"the paper's grafts have one of that name. Rename {name!r}.")
                for name in self.grafts
                if name in both
            ]
        named = [(f"grafts.{name}", graft.sources) for name, graft in given.items()]
        for i, grid in enumerate(self.grids):
            named += [(f"grids.{i}.source", grid.source or ())]
            named += [(f"grids.{i}.base", grid.base.sources)]
        return problems + unknown_sources(named, sources)

    def with_ranks(
        self, origins: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """The sources that are given and those that grids' ranks add, and names that are used for
        both."""
        sources, problems = dict(origins), []
        for i, grid in enumerate(self.grids):
            for name, made in grid.made(tuple(origins)).items():
                if sources.setdefault(name, made) != made:
                    what = f"it adds a source {name!r}, but another has that name. Rename that one."
                    problems.append((f"grids.{i}.ranks", what))
        return sources, problems


def unknown_sources(
    named: Iterable[tuple[str, Iterable[str]]], sources: Collection[str]
) -> list[tuple[str, str]]:
    """(where, what) of every source that is named but does not exist."""
    return [
        (where, f"no source {name!r}. There are: {' '.join(sources)}.{suggest(name, sources)}")
        for where, names in named
        for name in names
        if name not in sources
    ]
