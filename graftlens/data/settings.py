"""What all groups of settings have in common."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, field_validator

from graftlens.components import HALF, brief

T = TypeVar("T")


class Settings(BaseModel):
    """Frozen, without unknown keys; numbers are finite and not booleans; text can be stored in a
    file; ``~`` at the beginning of a path is the home folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: Any) -> Any:
        # Pydantic would read true as 1.
        wanted = set(_own_types(cls.model_fields[info.field_name].annotation))
        if isinstance(value, bool) and wanted & {int, float} and bool not in wanted:
            what = "a number" if float in wanted else "a whole number"
            raise ValueError(
                f"{info.field_name}={value} is a boolean, but {what} is expected. Write the "
                "number, or leave the setting out for its default."
            )
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _whole_characters(cls, value: Any) -> Any:
        for text in within(value, str):
            if HALF.search(text):
                raise ValueError(
                    f"{brief(text)} contains half of a character (a lone surrogate), which no "
                    "file can hold. Write the whole character."
                )
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _home_folder(cls, value: Any) -> Any:
        return at_home(value) if isinstance(value, Path) else value


def at_home(path: Path) -> Path:
    """The path with a ``~`` at its beginning replaced by the home folder."""
    try:
        return path.expanduser()
    except RuntimeError:  # no such user: the missing path is reported where it is read
        return path


def within(value: Any, kind: type[T]) -> Iterator[T]:
    """All values of a kind in settings and plain values, however deep; keys, too."""
    if isinstance(value, kind):
        yield value
    inner: Iterable[Any] = ()
    if isinstance(value, BaseModel):
        inner = (getattr(value, name) for name in type(value).model_fields)
    elif isinstance(value, Mapping):
        inner = (*value.keys(), *value.values())
    elif isinstance(value, list | tuple):
        inner = value
    for item in inner:
        yield from within(item, kind)


def _own_types(annotation: Any) -> Iterator[Any]:
    """The types that a value may have, without those inside a container."""
    if get_origin(annotation) is Annotated:
        yield from _own_types(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for inner in get_args(annotation):
            yield from _own_types(inner)
    else:
        yield annotation
