"""A YAML file and `key=value` overrides as one strict settings value; every error in one message.

The schema is a pydantic model; its errors are reworded in the terms of this project: which key,
which value, what is allowed. Problems are `(where, what)`, `where` a dotted path into the file.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from graftlens import plainyaml
from graftlens.components import brief, cut, suggest
from graftlens.folder import read_text

#: How many problems an error lists.
SHOWN = 50

S = TypeVar("S", bound=BaseModel)
T = TypeVar("T")


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line each; only the first ones if there are very
    many.

    Attributes:
        problems: (where, what); `where` is empty for a problem of the whole file.
    """

    def __init__(self, *problems: tuple[str, str]) -> None:
        super().__init__(*problems)
        self.problems = tuple(dict.fromkeys((cut(w, 400), cut(what, 2000)) for w, what in problems))

    def __str__(self) -> str:
        lines = [f"{where}: {what}" if where else what for where, what in self.problems[:SHOWN]]
        more = len(self.problems) - len(lines)
        return "\n".join([*lines, f"And {more} more problems like these."] if more else lines)

    def under(self, place: str, joint: str = ".") -> "ConfigError":
        """The same problems, as found inside `place`."""
        return ConfigError(
            *((f"{place}{joint if w else ''}{w}", what) for w, what in self.problems)
        )


def read_settings(model: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """Read a YAML file into `model`.

    Args:
        model: the schema.
        path: the file.
        overrides: `key=value`, with dots into sections and lists (`grids.0.layers=each`). The value
            is YAML, but one that contains `: ` is text; a mapping is written `{key: value}`.

    Raises:
        ConfigError: a file that is missing, empty or not YAML; an override that does not apply;
            whatever the schema refuses.
    """
    try:
        return settings_from(model, overridden(read_mapping(Path(path)), overrides))
    except ConfigError as error:
        raise error.under(str(path), ": ") from None


def text_with(path: Path, typed: Sequence[str]) -> str:
    """A config file's text, followed by a comment on what was typed beside it."""
    said = "".join(f"#   {one}\n" for one in typed)
    note = f"\n# and on the command line:\n{said}" if typed else ""
    return path.read_text(encoding="utf-8") + note


def refuse_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides of what is not a file.

    Raises:
        ValueError: there are some.
    """
    if overrides:
        raise ValueError(
            f"overrides={list(overrides)}: these apply to a config file only. Change the config "
            "itself."
        )


def settings_from(model: type[S], values: Any) -> S:
    """Validate plain values against `model`.

    Raises:
        ConfigError: everything that `model` refuses.
    """
    if isinstance(values, model):
        return values
    if not isinstance(values, Mapping):
        keys = " ".join(model.model_fields)
        raise ConfigError(("", f"{brief(values)} should be a mapping with keys of: {keys}."))
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(*_problems(error, model)) from None


def gather(read: Callable[[Any], T], items: Iterable[tuple[str, Any]]) -> list[T]:
    """`read` of every item; the problems of all of them in one ConfigError.

    Args:
        read: raises ValueError or OSError on a bad item.
        items: (where, item).
    """
    made: list[T] = []
    problems: list[tuple[str, str]] = []
    for where, item in items:
        with noted(problems, where):
            made.append(read(item))
    if problems:
        raise ConfigError(*problems)
    return made


@contextlib.contextmanager
def noted(problems: list[tuple[str, str]], where: str) -> Iterator[None]:
    """Add the problems of what is read at `where` to `problems` instead of raising them."""
    try:
        yield
    except ConfigError as error:
        problems.extend(error.under(where).problems)
    except (ValueError, OSError) as error:
        problems.append((where, str(error)))


# -- YAML --------------------------------------------------------------------------------------


def read_yaml(text: str) -> Any:
    """Plain values of a YAML text, as `graftlens.plainyaml.load` reads it.

    Raises:
        ConfigError: text that is not YAML, or that would not be read as it is written, with the
            place.
    """
    try:
        return plainyaml.load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"
        what = getattr(error, "problem", None) or str(error)
        quotes = ""
        if "mapping values" in what:
            quotes = ' Put quotes around text that contains " : ", such as "sft @ last : o".'
        elif what.startswith("expected <block end>"):
            quotes = ' Put quotes around text that begins with {, [ or ", such as "{name} sings.".'
        raise ConfigError((where, f"{what}.{quotes}")) from None


def read_mapping(path: Path) -> dict[Any, Any]:
    """The content of a YAML file whose top level is a mapping.

    Raises:
        ConfigError: a file that is missing, empty or not a mapping.
    """
    try:
        values = read_yaml(read_text(path))
    except FileNotFoundError:
        raise ConfigError(("", "there is no such file.")) from None
    except ConfigError:
        raise
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(("", f"the file could not be read ({why}).")) from None
    except ValueError as error:  # another encoding
        raise ConfigError(("", str(error).removeprefix(f"{path} "))) from None
    if values is None:
        raise ConfigError(("", "the file is empty. Write keys and values, such as seed: 0."))
    if not isinstance(values, dict):
        raise ConfigError(("", f"a mapping of keys is expected, not a {type(values).__name__}."))
    return values


def overridden(values: dict[Any, Any], overrides: Sequence[str]) -> Any:
    """`values` with `key=value` overrides laid over them, as `read_settings` takes them.

    Raises:
        ConfigError: every override that is malformed or does not apply.
    """
    changed = _copied(values)
    problems = []
    for text in overrides:
        key, equals, given = (part.strip() for part in text.partition("="))
        path = key.split(".")
        if not equals or not all(path) or len(path) > plainyaml.MAX_DEPTH:
            what = "not an override. Write key=value, with dots into sections: metrics.top_k=5."
            problems.append((text, what))
            continue
        try:
            # A graft is text, though YAML reads a mapping: sft @ last : o
            is_text = ": " in given and given[0] not in "{['\""
            _put(changed, path, given if is_text else read_yaml(given))
        except ValueError as error:
            problems.append((text, f"this override cannot be applied: {error}"))
    if problems:
        raise ConfigError(*problems)
    return changed


def _copied(values: Any) -> Any:
    """A copy in which no two places share one value, as those of a YAML alias do."""
    if isinstance(values, dict):
        return {key: _copied(value) for key, value in values.items()}
    return [_copied(value) for value in values] if isinstance(values, list) else values


def _put(values: Any, path: Sequence[str], value: Any) -> None:
    """Set what is at `path`; missing sections on the way are created, entries of lists must
    exist."""
    here: Any = values
    for depth, part in enumerate(path):
        key: Any = part
        above = ".".join(path[:depth])
        if isinstance(here, list):
            if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(here):
                raise ValueError(f"{above} is a list of {len(here)}, so it has no entry {part!r}.")
            key = int(part)
        elif not isinstance(here, dict):
            raise ValueError(f"{above} is {brief(here)} and has no keys.")
        if depth == len(path) - 1:
            here[key] = value
        elif isinstance(here, dict):
            here = here.setdefault(key, {})
        else:
            here = here[key]


# -- pydantic's errors in the project's words --------------------------------------------------


def _problems(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    listed = error.errors(include_url=False)
    # A list is also too short without its bad entries, which are told themselves.
    inside = {found["loc"][:-1] for found in listed if found["loc"]}
    listed = [f for f in listed if f["type"] != "too_short" or f["loc"] not in inside]
    for found in listed[:SHOWN]:
        loc, value, cause = found["loc"], found["input"], found.get("ctx", {}).get("error")
        where, above = ".".join(map(str, loc)), ".".join(map(str, loc[:-1]))
        fields = _model_at(model, loc[:-1]).model_fields
        if isinstance(cause, ConfigError):
            problems.extend(cause.under(where).problems if where else cause.problems)
        elif cause is not None:
            problems.append((where, str(cause)))
        elif loc and loc[-1] == "[key]":
            where = ".".join(map(str, loc[:-2]))
            problems.append((where, f"the key {brief(value)} is not text. Put it in quotes."))
        elif found["type"] == "extra_forbidden":
            hint = suggest(str(loc[-1]), fields)
            what = f"unknown key {brief(str(loc[-1]))}. Allowed: {' '.join(fields)}.{hint}"
            problems.append((above, what))
        elif found["type"] == "missing":
            short = isinstance(loc[-1], int)  # a list, of which an entry is missing
            key = str(loc[-2 if short else -1])
            described = fields[key].description if key in fields else None
            advice = " ".join((described or "Give it a value.").split())
            what = f"entry {int(loc[-1]) + 1} is missing" if short else "this key is missing"
            problems.append((above if short else where, f"{what}. {advice}"))
        else:
            what = f"{brief(value)} {_plainly(found['msg'])}."
            quotes = " Put it in quotes." if found["type"] == "string_type" else ""
            if quotes and isinstance(value, bool):
                quotes += " In YAML, yes, no, on and off are booleans."
            problems.append((where, what + quotes))
    problems += [(".".join(map(str, e["loc"])), "this is also wrong.") for e in listed[SHOWN:]]
    return problems


def _plainly(message: str) -> str:
    """Pydantic's message without Python's types."""
    for theirs, ours in (
        (r"^Input should", "should"),
        (r"a valid dictionary( or instance of \w+)?", "a mapping"),
        (r"a valid tuple", "a list"),
        (r"a valid string", "text"),
        (r"^[A-Z]\w+ should have (.*) 1 item after validation", r"should have \1 1 entry"),
        (r"^[A-Z]\w+ should have (.*) items after validation", r"should have \1 entries"),
    ):
        message = re.sub(theirs, ours, message)
    return message


def _model_at(model: type[BaseModel], loc: Sequence[str | int]) -> type[BaseModel]:
    """The schema of the section at `loc`."""
    for part in loc:
        if str(part) in model.model_fields:
            model = next(_models(model.model_fields[str(part)].annotation), model)
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not get_args(annotation):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for inner in get_args(annotation):
        yield from _models(inner)
