"""The tests' own check of annotations finds what does not fit, as it says it does."""

import importlib
import sys
from pathlib import Path

import jaxtyping
import pytest
import typecheck

MODULE = '''
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


def joined(a: Float[Tensor, "pos d"], b: Float[Tensor, "d"]) -> Float[Tensor, "pos"]:
    return a @ b if a.shape[0] != 5 else b


def spread(a: Float[Tensor, "*rows d"], b: Float[Tensor, "*rows 2"]) -> Float[Tensor, "..."]:
    return a


def square(a: Float[Tensor, "d d"], b: Float[Tensor, "_ d"] | None = None) -> Float[Tensor, "d d"]:
    return joined(a, a[0])[None].expand(len(a), -1)  # with axes of its own


def doubled(number: int) -> int:
    return 2 * number if number else "nought"


def adder(first: int):
    def add(second: int) -> int:
        return first + second

    return add


def later(thing: "Unknown") -> "Unknown":
    return thing


@contextmanager
def held(number: int) -> Iterator[int]:
    yield number


@dataclass(frozen=True)
class Pair:
    left: int
    right: str = ""

    @property
    def text(self) -> str:
        return self.right * self.left

    @classmethod
    def of(cls, left: int) -> "Pair":
        return cls(left)

    @staticmethod
    def half(number: int) -> float:
        return number / 2


@dataclass
class Named:
    """Its own `__init__` is a function like others."""

    name: str

    def __init__(self, name: str) -> None:
        self.name = name


class Plain:
    def method(self, number: int = 1) -> int:
        return number
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory):
    """A module inside the package, as the tests import its own."""
    import graftlens

    folder = tmp_path_factory.mktemp("inside")
    (folder / "annotated.py").write_text(MODULE)
    graftlens.__path__.append(str(folder))
    yield importlib.import_module("graftlens.annotated")
    graftlens.__path__.remove(str(folder))
    del sys.modules["graftlens.annotated"]


def test_what_does_not_fit_its_annotation_is_a_type_error(module) -> None:
    assert module.doubled(2) == 4
    with pytest.raises(TypeError, match="doubled"):
        module.doubled("2")
    with pytest.raises(TypeError, match="nought"):
        module.doubled(0)
    with pytest.raises(TypeError), module.held("1"):
        pass
    with module.held(1) as number:
        assert number == 1


def test_named_axes_have_one_size_in_a_call(module) -> None:
    import torch

    assert module.joined(torch.ones(3, 2), torch.ones(2)).tolist() == [2, 2, 2]
    assert module.joined(torch.ones(4, 1), torch.ones(1)).tolist() == [1, 1, 1, 1]
    with pytest.raises(TypeError, match=r"shape \(3,\) does not go with .*'pos': 3, 'd': 2"):
        module.joined(torch.ones(3, 2), torch.ones(3))
    with pytest.raises(TypeError):
        module.joined(torch.ones(5, 2), torch.ones(2))  # what it returns is not as long
    with pytest.raises(TypeError):
        module.joined(torch.ones(3, 2).int(), torch.ones(2))
    for shape in ((), (4,), (4, 5)):
        assert module.spread(torch.ones(*shape, 3), torch.ones(*shape, 2)).shape == (*shape, 3)
        for wrong in ((*shape, 3), (9, *shape, 2)):
            with pytest.raises(TypeError):
                module.spread(torch.ones(*shape, 3), torch.ones(wrong))
    assert module.square(torch.ones(2, 2), torch.ones(7, 2)).tolist() == [[2, 2], [2, 2]]
    for wrong in ((torch.ones(2, 3),), (torch.ones(2, 2), torch.ones(2, 3)), (torch.ones(2),)):
        with pytest.raises(TypeError):
            module.square(*wrong)


def test_functions_made_anew_keep_what_they_close_over(module) -> None:
    two, ten = module.adder(2), module.adder(10)
    assert [two(1), ten(1), two(3)] == [3, 11, 5]
    for add in (two, ten):
        with pytest.raises(TypeError):
            add("1")


def test_classes_are_checked_where_they_are_made_and_called(module) -> None:
    assert module.Pair(2, "a").text == "aa"
    assert module.Pair.of(3).left == 3
    assert module.Pair.half(3) == 1.5
    assert module.Named("a").name == "a"
    assert module.Plain().method() == 1
    for wrong in (
        lambda: module.Pair("2"),
        lambda: module.Pair.of("2"),
        lambda: module.Pair.half("2"),
        lambda: module.Named(1),
        lambda: module.Plain().method("1"),
    ):
        with pytest.raises(TypeError):
            wrong()


def test_annotations_that_are_text_are_not_checked(module) -> None:
    assert module.later(1) == 1
    assert module.later.__annotations__ == {"thing": "Unknown", "return": "Unknown"}


def test_the_check_can_be_left_out(module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert module.doubled("2") == "22"
    assert module.adder(1.5)(1.5) == 3
    assert module.Pair("2").left == "2"


@pytest.mark.parametrize("again", [1, 2])
def test_the_first_calls_of_each_test_are_checked(module, again: int) -> None:
    for _ in range(typecheck.OFTEN):
        with pytest.raises(TypeError):
            module.doubled("2")
        with pytest.raises(TypeError):
            module.adder(1)("1")
    assert module.doubled("2") == "22"
    assert module.adder(1.5)(1.5) == 3


def test_every_module_of_the_package_is_checked() -> None:
    importlib.import_module("graftlens.model.grafted")
    found = [m for name, m in sys.modules.items() if name.split(".")[0] == "graftlens"]
    assert len(found) > 20
    files = [m for m in found if Path(str(m.__file__)).suffix == ".py"]
    assert [m.__name__ for m in files if not hasattr(m, "__checked__")] == []
