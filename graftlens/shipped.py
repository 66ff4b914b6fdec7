"""The configs that come with graftlens, by name: experiments, sweeps, localisations, finetuning
and data.

Their home is the folder `experiments` of the repository, to which `configs` is a link; a wheel has
them there as files.
"""

import os
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from graftlens.components import suggest
from graftlens.configfile import ConfigError
from graftlens.folder import at_home, read_text, write_whole

#: What the name of a config's file ends in.
SUFFIXES = (".yaml", ".yml")


class Kind(Enum):
    """A kind of config: where its files are in their home, what one is, and what runs it."""

    EXPERIMENT = ("", "experiments", "an experiment", "graftlens run")
    SWEEP = ("sweeps", "sweeps", "a sweep", "graftlens sweep")
    LOCALISE = ("localise", "localise", "a localisation", "graftlens localise")
    FINETUNE = ("finetune", "finetune", "a finetuning run", "graftlens finetune")
    DATA = ("data", "data", "a dataset", "graftlens data make")

    def __init__(self, folder: str, prefix: str, called: str, command: str) -> None:
        self.folder, self.prefix, self.called, self.command = folder, prefix, called, command


@dataclass(frozen=True)
class Shipped:
    """A config that comes with graftlens.

    Attributes:
        kind: what it is of.
        name: its file's name without the suffix.
        path: the file.
    """

    kind: Kind
    name: str
    path: Path

    @property
    def whole_name(self) -> str:
        """Its name where several kinds may be meant: `data/counterfact`."""
        return f"{self.kind.prefix}/{self.name}"

    @property
    def about(self) -> str:
        """What it is, in a sentence: the first one of its file."""
        lines = read_text(self.path).splitlines()
        said = re.match(r"(?:# \S.*\n?)*", "\n".join(lines))
        text = " ".join(line.removeprefix("# ") for line in (said[0] if said else "").splitlines())
        return re.split(r"(?<=[.?])\s", text)[0]


def home() -> Path:
    """The folder with all of them."""
    return Path(__file__).parent / "configs"


def shipped(*kinds: Kind) -> list[Shipped]:
    """The configs of some kinds, or of all, by kind and name."""
    return [
        Shipped(kind, path.stem, path)
        for kind in kinds or Kind
        for path in sorted((home() / kind.folder).glob("*.yaml"))
    ]


def config_file(kind: Kind, given: str | Path) -> Path:
    """The file of a config that is given by its path, or by the name of one that is shipped.

    A path ends in .yaml or .yml, or is a file.

    Raises:
        ConfigError: no config of that kind has the name.
    """
    path = at_home(given)
    if path.suffix.lower() in SUFFIXES or path.is_file():
        return path
    name = str(given)
    known = {one.name: one for one in shipped(kind)}
    bare = name.removeprefix(f"{kind.prefix}/")
    if bare in known:
        return known[bare].path
    others = [one for one in shipped() if name in (one.name, one.whole_name)]
    if others:
        called = " and ".join(o.kind.called for o in others)
        advice = f"It is {called}: {others[0].kind.command} {name}"
    else:
        mine = path.with_name(f"{path.name}.yaml")
        hint = f" Did you mean {mine}?" if mine.is_file() else suggest(bare, known)
        advice = f"There are: {' '.join(known)}.{hint} A config of your own ends in .yaml"
    what = f"no {kind.called.split(' ', 1)[1]} of this name comes with graftlens. {advice}."
    raise ConfigError((name, what))


def copy(name: str, target: str | Path | None = None) -> Path:
    """Copy a config that is shipped, to be changed.

    Args:
        name: its name, with its kind where several have it: `data/counterfact`.
        target: the new file; by default NAME.yaml in the working directory.

    Returns:
        The new file.

    Raises:
        ConfigError: no config, or several, of that name; a target that exists, or whose name does
            not end in .yaml.
    """
    found = [one for one in shipped() if name in (one.name, one.whole_name)]
    if not found:
        names = [one.name for one in shipped()]
        hint = suggest(name, [*names, *(one.whole_name for one in shipped())])
        what = f"no config of this name comes with graftlens.{hint} graftlens list shows them all."
        raise ConfigError((name, what))
    if len(found) > 1:
        what = (
            f"this is the name of {' and of '.join(o.kind.called for o in found)}. Write "
            f"{' or '.join(o.whole_name for o in found)}."
        )
        raise ConfigError((name, what))
    (one,) = found
    path = at_home(target) if target is not None else Path(one.path.name)
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError((str(path), f"a config's name ends in .yaml: {path.name}.yaml."))
    if os.path.lexists(path):
        raise ConfigError((str(path), "this exists and is left untouched. Choose another name."))
    return write_whole(path, read_text(one.path))


def listing() -> str:
    """All shipped configs as text: a line each, by kind, and how to run one."""
    lines: list[str] = []
    width = max(len(one.name) for one in shipped())
    for kind in Kind:
        lines.append(f"{kind.command} NAME")
        lines += [f"  {one.name:{width}}  {one.about}" for one in shipped(kind)]
        lines.append("")
    return "\n".join([*lines, "graftlens copy NAME mine.yaml gives one of your own to change."])
