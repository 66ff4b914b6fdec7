"""graftlens as the tests import it: annotations are held against values, by beartype.

jaxtyping's own import hook binds the arguments of every call to a signature and has them checked
twice, which was more than half of the suite's time. Here beartype wraps the function itself, and
jaxtyping keeps the sizes of named axes only for functions that name axes.
"""

import ast
import dataclasses
import functools
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import config, jaxtyped

PACKAGE = "graftlens"

_check = beartype(conf=BeartypeConf(violation_type=TypeError))


def checked(function: Any) -> Any:
    """A function, or a dataclass's `__init__`, that checks its annotations at each call.

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
    strict, names_axes = _strict(function)
    switch, own_axes = config, jaxtyped
    if names_axes:

        def call(*args: Any, **kwargs: Any) -> Any:
            if switch.jaxtyping_disable:
                return function(*args, **kwargs)
            with own_axes("context"):
                return strict(*args, **kwargs)

    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            return (function if switch.jaxtyping_disable else strict)(*args, **kwargs)

    # In the function's own module, so that a warning finds the line outside that it is about.
    made = FunctionType(
        call.__code__, function.__globals__, function.__name__, None, call.__closure__
    )
    if "<locals>" not in function.__qualname__:
        return functools.update_wrapper(made, function)
    made.__qualname__, made.__wrapped__ = function.__qualname__, function  # type: ignore[attr-defined]
    return made


_made: dict[tuple[Any, ...], tuple[FunctionType, bool]] = {}


def _strict(function: FunctionType) -> tuple[FunctionType, bool]:
    """What beartype makes of a function, and whether its annotations name axes.

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
    strict, names_axes = known
    defaults = strict.__kwdefaults__ or {}
    if "__beartype_func" not in defaults:
        return _new(function)
    twin = FunctionType(strict.__code__, strict.__globals__, strict.__name__)
    twin.__kwdefaults__ = {**defaults, "__beartype_func": function}
    return twin, names_axes


def _hollow(function: FunctionType) -> FunctionType:
    """The function without what it has from around it, which is kept no longer than itself."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    found = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    found.__defaults__, found.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    found.__annotations__, found.__qualname__ = function.__annotations__, function.__qualname__
    return found


def _new(function: FunctionType) -> tuple[FunctionType, bool]:
    written = function.__annotations__
    function.__annotations__ = {
        name: _by_class(hint) if getattr(hint, "_is_protocol", False) else hint
        for name, hint in written.items()
        if not isinstance(hint, str)
    }
    try:
        strict = _check(function)
    finally:
        function.__annotations__ = written
    return strict, any("jaxtyping." in repr(hint) for hint in written.values())


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
