"""graftlens as the tests import it: annotations are held against values, by beartype.

jaxtyping's own import hook binds the arguments of every call to a signature and has them checked
twice, which was more than half of the suite's time. Here beartype wraps the function itself, when
it is first called; the first calls of a test are checked; and what jaxtyping says of an annotation
and a shape is asked once: after that, an array is looked at for the sizes of its named axes only.
"""

import ast
import dataclasses
import functools
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, config

PACKAGE = "graftlens"

#: How many calls of a function are checked in each test: what is called a thousand times in one
#: test is called with the same kinds of things.
OFTEN = 20

_check = beartype(conf=BeartypeConf(violation_type=TypeError))


def checked(function: Any) -> Any:
    """A function, or a dataclass's `__init__`, that checks its annotations when it is called: the
    first `OFTEN` times in each test.

    As with jaxtyping's own hook, annotations that are text are not checked, and nothing is while
    `jaxtyping.config.jaxtyping_disable` is set.
    """
    if isinstance(function, type):
        init = vars(function).get("__init__")
        if dataclasses.is_dataclass(function) and not hasattr(init, "__wrapped__") and init:
            function.__init__ = checked(init)  # type: ignore[misc]
        return function
    if not function.__annotations__:
        return function
    now, often, seen = _test, OFTEN, _seen.setdefault(function.__code__, [0, 0])
    if "<locals>" in function.__qualname__ and seen[0] == now[0] and seen[1] >= OFTEN:
        return function
    switch, here, bound, strict = config, _here, _strict, None
    if any("jaxtyping." in repr(hint) for hint in function.__annotations__.values()):

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal strict
            if seen[0] != now[0]:
                seen[:] = now[0], 0
            seen[1] += 1
            if seen[1] > often or switch.jaxtyping_disable:
                return function(*args, **kwargs)
            if strict is None:
                strict = bound(function)
            outside, here.axes = here.axes, {}
            try:
                return strict(*args, **kwargs)
            finally:
                here.axes = outside

    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal strict
            if seen[0] != now[0]:
                seen[:] = now[0], 0
            seen[1] += 1
            if seen[1] > often or switch.jaxtyping_disable:
                return function(*args, **kwargs)
            if strict is None:
                strict = bound(function)
            return strict(*args, **kwargs)

    # In the function's own module, so that a warning finds the line outside that it is about.
    made = FunctionType(
        call.__code__, function.__globals__, function.__name__, None, call.__closure__
    )
    if "<locals>" not in function.__qualname__:
        return functools.update_wrapper(made, function)
    made.__qualname__, made.__wrapped__ = function.__qualname__, function  # type: ignore[attr-defined]
    return made


#: How many tests began, and in which a function's code was last called, and how often.
_test = [0]
_seen: dict[CodeType, list[int]] = {}


def pytest_runtest_logstart() -> None:
    """Each test begins to count again."""
    _test[0] += 1


_made: dict[tuple[Any, ...], FunctionType] = {}


def _strict(function: FunctionType) -> FunctionType:
    """What beartype makes of a function.

    A function inside another is made at each call of the outer one; beartype is asked once, and
    what it made then is pointed at the function of now.
    """
    if "<locals>" not in function.__qualname__:
        return _new(function)
    key = (function.__module__, function.__code__, *function.__annotations__.items())
    try:
        known = _made.get(key)
    except TypeError:  # an annotation that cannot be hashed
        return _new(function)
    if known is None:
        known = _made[key] = _new(_hollow(function))
    defaults = known.__kwdefaults__ or {}
    if "__beartype_func" not in defaults:
        return _new(function)
    twin = FunctionType(known.__code__, known.__globals__, known.__name__)
    twin.__kwdefaults__ = {**defaults, "__beartype_func": function}
    return twin


def _hollow(function: FunctionType) -> FunctionType:
    """The function without what it has from around it, which is kept no longer than itself."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    found = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    found.__defaults__, found.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    found.__annotations__, found.__qualname__ = function.__annotations__, function.__qualname__
    return found


def _new(function: FunctionType) -> FunctionType:
    written = function.__annotations__
    function.__annotations__ = {
        name: _by_class(hint) if getattr(hint, "_is_protocol", False) else hint
        for name, hint in written.items()
        if not isinstance(hint, str)
    }
    try:
        return _check(function)
    finally:
        function.__annotations__ = written


class _Here(threading.local):
    """The sizes of the named axes of the call that is being checked; None outside one."""

    axes: dict[str, Any] | None = None


_here = _Here()

#: By annotation, type, dtype and shape: the sizes of the named axes, or None where it does not fit.
_sizes: dict[tuple[Any, ...], dict[str, Any] | None] = {}

_Annotation: Any = type(AbstractArray)  # whose instances are annotations such as Float[Tensor, "d"]
_jaxtypings_word = _Annotation.__instancecheck_str__


def _fits(annotation: Any, thing: Any) -> bool:
    """What jaxtyping says, which is asked once, and whether the axes are as long as others."""
    try:
        key = (annotation, type(thing), thing.dtype, thing.shape)
    except AttributeError:
        return False
    if key not in _sizes:
        fits = _jaxtypings_word(annotation, thing) == ""
        _sizes[key] = _named(annotation.dim_str, tuple(thing.shape)) if fits else None
    sizes, known = _sizes[key], _here.axes
    if sizes is None:
        return False
    if known is not None and sizes:
        for name, size in sizes.items():
            if known.get(name, size) != size:
                return False
        known.update(sizes)
    return True


def _named(axes: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The sizes of a shape's named axes; of `*axes`, several."""
    assert not set(axes) & set("#?={}()+-/"), f"axes {axes!r}: this check knows names and numbers"
    names, sizes = axes.split(), list[Any](shape)
    for i, name in enumerate(names):
        if name == "..." or name.startswith("*"):
            end = len(shape) - (len(names) - i - 1)
            sizes[i:end] = [shape[i:end]]
    found = zip(names, sizes, strict=True)
    return {n: size for n, size in found if n != "..." and n[0] != "_" and not n.isdigit()}


def _word(annotation: Any, thing: Any) -> str:
    """Why it does not fit, for an error."""
    said = str(_jaxtypings_word(annotation, thing))
    if said or _fits(annotation, thing):
        return said
    return f"its shape {tuple(thing.shape)} does not go with the axes of the call, {_here.axes}"


@functools.cache
def _by_class(protocol: Any) -> type:
    """A protocol that is asked once about a class: before Python 3.12 each look takes long."""
    known: dict[type, bool] = {}

    class Asked(type):
        def __instancecheck__(cls, thing: object) -> bool:
            if not known.get(type(thing), False):
                known[type(thing)] = isinstance(thing, protocol)
            return known[type(thing)]

    return Asked(protocol.__name__, (), {})


class _Decorator(ast.NodeTransformer):
    """Puts `checked` around every function, inside its other decorators, and around every class."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.append(self._name(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.insert(0, self._name(node))
        return node

    def _name(self, node: ast.AST) -> ast.expr:
        return ast.copy_location(ast.Name(_Loader.NAME, ast.Load()), node)


class _Loader(SourceFileLoader):
    NAME = "__checked__"

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = _Decorator().visit(ast.parse(self.get_data(path), path))
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, self.NAME, checked)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.split(".")[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


# A plugin of pytest's: graftlens is checked wherever it is imported from now on.
assert PACKAGE not in sys.modules, f"{PACKAGE} was imported before it could be checked"
sys.meta_path.insert(0, _Finder())
_Annotation.__instancecheck__, _Annotation.__instancecheck_str__ = _fits, _word
