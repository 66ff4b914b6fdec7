"""What holds annotations against values in tests: beartype, asked once for each function's text.

jaxtyping wraps a function each time its `def` runs, so one inside another is compiled by beartype
at each call of the outer one: 40 % of the time of some tests. jaxtyping gives the checker a
function without a body, which is the same for every such `def`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

_made: dict[tuple[Any, ...], Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations checked at each call."""
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    signature = inspect.signature(function)
    parameters = [(p.name, p.kind, p.annotation) for p in signature.parameters.values()]
    key = (function.__module__, function.__qualname__, *parameters, signature.return_annotation)
    try:
        if key not in _made:
            _made[key] = beartype(function)
    except TypeError:  # an annotation that cannot be hashed
        return beartype(function)
    return _made[key]
