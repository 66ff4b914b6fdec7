"""The closed vocabulary of what can be grafted: components, their groups, and layer groups.

`COMPONENTS` has one row per component with everything that the library needs to know about it;
nothing else keeps a list of components. Only the forward, and what reads one component's output by
design, names them one by one.
"""

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, Protocol, get_args, runtime_checkable


class Side(StrEnum):
    """On which rows a component works: those that attention reads, those that read, or outside."""

    INPUT = "input"  # makes the rows that enter the layers
    KEY = "key"  # rows whose keys and values are read
    QUERY = "query"  # rows that read, and continue to the next layer
    BOTH = "both"  # rows of either kind
    OUTPUT = "output"  # reads logits from the rows that leave the layers


class Cut(StrEnum):
    """Into which units a component's weight can be cut."""

    NONE = "not at all"
    HEAD = "head"
    KV_HEAD = "key-value head"
    NEURON = "neuron"


Group = Literal["attn", "mlp", "ln"]


@runtime_checkable
class Facts(Protocol):
    """What a component's row needs of an architecture (`graftlens.model.arch.Architecture`)."""

    @property
    def family(self) -> str: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def d_head(self) -> int: ...
    @property
    def d_mlp(self) -> int: ...
    @property
    def d_vocab(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def norm(self) -> str: ...
    @property
    def pre_norms(self) -> bool: ...
    @property
    def post_norms(self) -> bool: ...
    @property
    def qk_norm(self) -> str: ...
    @property
    def rotary_dim(self) -> int: ...
    @property
    def mlp(self) -> str: ...


def _always(arch: Facts) -> bool:
    return True


@dataclass(frozen=True)
class ComponentRow:
    """Everything that the library knows about one component.

    Attributes:
        side: on which rows it works; says also whether it is in the layers or outside.
        shape: its weight's shape, [d_out, d_in] of a linear map, from the architecture.
        group: the group that it belongs to besides `block` and `all`.
        cut: the units that its weight can be cut into.
        axis: the axis of the weight that the units are on. On rows (0) the bias is cut as well; on
            columns (1) the bias belongs to no unit.
        home: the module of a layer that it is in, where it is not the layer itself.
        view: the model's name for its weights in all sources, as in HookedTransformer; None for a
            norm, whose weight is found at its module.
        present: which architectures have it.
    """

    side: Side
    shape: Callable[[Facts], tuple[int, ...]]
    group: Group | None = None
    cut: Cut = Cut.NONE
    axis: Literal[0, 1] | None = None
    home: Literal["attn", "mlp"] | None = None
    view: str | None = None
    present: Callable[[Facts], bool] = _always

    @property
    def in_layers(self) -> bool:
        """Whether every layer has one, or the model one outside the layers."""
        return self.side not in (Side.INPUT, Side.OUTPUT)


def _attn(
    side: Side, view: str, cut: Cut, axis: Literal[0, 1], shape: Callable[[Facts], tuple[int, ...]]
) -> ComponentRow:
    return ComponentRow(side, shape, "attn", cut, axis, "attn", view)


def _mlp(
    view: str,
    axis: Literal[0, 1],
    shape: Callable[[Facts], tuple[int, ...]],
    present: Callable[[Facts], bool] = _always,
) -> ComponentRow:
    return ComponentRow(Side.QUERY, shape, "mlp", Cut.NEURON, axis, "mlp", view, present)


def _norm(
    side: Side, group: Group | None, present: Callable[[Facts], bool] = _always
) -> ComponentRow:
    def there(arch: Facts) -> bool:
        return arch.norm != "layer_plain" and present(arch)

    return ComponentRow(side, lambda arch: (arch.d_model,), group, present=there)


def _qk_norm(side: Side, heads: Callable[[Facts], int]) -> ComponentRow:
    def shape(arch: Facts) -> tuple[int, ...]:
        return (arch.d_head * (heads(arch) if arch.qk_norm == "full" else 1),)

    return ComponentRow(
        side, shape, "attn", home="attn", present=lambda arch: arch.qk_norm != "none"
    )


class Component(StrEnum):
    """One weight-bearing part of a layer or of the model. A bias travels with its weight.

    A member is the word with its row, so no member can lack one; `COMPONENTS` has the rows.
    """

    _row: ComponentRow

    def __new__(cls, word: str, row: ComponentRow | None = None) -> "Component":
        if row is None:  # in a definition; a look-up, Component("q"), does not come here
            raise TypeError(f"component {word!r} has no row")
        member = str.__new__(cls, word)
        member._value_ = word
        member._row = row
        return member

    EMBED = (
        "embed",
        ComponentRow(Side.INPUT, lambda arch: (arch.d_vocab, arch.d_model), view="W_E"),
    )
    POS_EMBED = (
        "pos_embed",
        ComponentRow(
            Side.INPUT,
            lambda arch: (arch.n_ctx, arch.d_model),
            view="W_pos",
            present=lambda arch: arch.rotary_dim == 0,
        ),
    )
    LN1 = "ln1", _norm(Side.BOTH, "ln", lambda arch: arch.pre_norms)
    Q = (
        "q",
        _attn(Side.QUERY, "W_Q", Cut.HEAD, 0, lambda a: (a.n_heads * a.d_head, a.d_model)),
    )
    K = (
        "k",
        _attn(Side.KEY, "W_K", Cut.KV_HEAD, 0, lambda a: (a.n_kv_heads * a.d_head, a.d_model)),
    )
    V = (
        "v",
        _attn(Side.KEY, "W_V", Cut.KV_HEAD, 0, lambda a: (a.n_kv_heads * a.d_head, a.d_model)),
    )
    Q_NORM = "q_norm", _qk_norm(Side.QUERY, lambda arch: arch.n_heads)
    K_NORM = "k_norm", _qk_norm(Side.KEY, lambda arch: arch.n_kv_heads)
    O = (
        "o",
        _attn(Side.QUERY, "W_O", Cut.HEAD, 1, lambda a: (a.d_model, a.n_heads * a.d_head)),
    )
    LN1_POST = "ln1_post", _norm(Side.QUERY, "ln", lambda arch: arch.post_norms)
    LN2 = "ln2", _norm(Side.QUERY, "ln", lambda arch: arch.pre_norms)
    MLP_IN = "mlp_in", _mlp("W_in", 0, lambda arch: (arch.d_mlp, arch.d_model))
    MLP_GATE = (
        "mlp_gate",
        _mlp("W_gate", 0, lambda a: (a.d_mlp, a.d_model), lambda a: a.mlp == "gated"),
    )
    MLP_OUT = "mlp_out", _mlp("W_out", 1, lambda arch: (arch.d_model, arch.d_mlp))
    LN2_POST = "ln2_post", _norm(Side.QUERY, "ln", lambda arch: arch.post_norms)
    LN_FINAL = "ln_final", _norm(Side.OUTPUT, None)
    UNEMBED = (
        "unembed",
        ComponentRow(Side.OUTPUT, lambda arch: (arch.d_vocab, arch.d_model), view="W_U"),
    )


#: Every component's row, in the vocabulary's order.
COMPONENTS: Mapping[Component, ComponentRow] = MappingProxyType({c: c._row for c in Component})


def components_where(holds: Callable[[ComponentRow], bool]) -> tuple[Component, ...]:
    """The components whose row satisfies `where`, in the vocabulary's order."""
    return tuple(component for component, row in COMPONENTS.items() if holds(row))


#: Components whose weights split by head. q and o split by query head, k and v by key-value head.
HEAD_COMPONENTS = frozenset(components_where(lambda row: row.cut in (Cut.HEAD, Cut.KV_HEAD)))

#: Components whose weights split by neuron.
NEURON_COMPONENTS = frozenset(components_where(lambda row: row.cut is Cut.NEURON))

GROUPS: dict[str, tuple[Component, ...]] = {
    **{g: components_where(lambda row, g=g: row.group == g) for g in get_args(Group)},  # type: ignore[misc]
    "block": components_where(lambda row: row.in_layers),
    "all": tuple(Component),
}

_FRACTIONS: dict[str, tuple[int, tuple[str, ...]]] = {
    "half": (2, ("lower", "upper")),
    "quarter": (4, ("first", "second", "third", "fourth")),
    "eighth": (
        8,
        ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"),
    ),
}

#: Layer-group name -> (part, of how many). `all` is the one part of a family of one.
LAYER_GROUPS: dict[str, tuple[int, int]] = {"all": (0, 1)} | {
    f"{ordinal}_{fraction}": (i, n)
    for fraction, (n, ordinals) in _FRACTIONS.items()
    for i, ordinal in enumerate(ordinals)
}


#: Half of a character: text that can be written to a file never contains one.
HALF = re.compile(r"[\ud800-\udfff]")


def cut(text: str, most: int) -> str:
    """A text for a message: its middle is left out if it is longer than `most`."""
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]} … {text[-(most // 3) :]}"


def brief(value: object) -> str:
    """A value as a message shows it: as in Python, but never long."""
    if isinstance(value, str) and len(value) > 1000:  # so that the whole is never copied
        value = cut(value, 900)
    return cut(repr(value), 300)


#: Longest graft as text, or name of a graft, which may be that text.
MAX_CHARACTERS = 1_000_000

#: Unicode's categories of control characters, halves of characters, line and paragraph separators.
_UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")


def check_name(name: str, what: str = "a graft's name") -> str:
    """A name that fits into a table cell, a plot's legend and a line of a log.

    Raises:
        ValueError: a name that is empty or very long, or that contains a newline, a control
            character or half of a character.
    """
    if not name.strip():
        raise ValueError(f"{name!r} is {what} and empty. Write a name.")
    if len(name) > MAX_CHARACTERS:
        raise ValueError(
            f"{brief(name)} is {what} of {len(name):,} characters. Write a shorter one."
        )
    odd = next((c for c in name if unicodedata.category(c) in _UNWRITABLE), None)
    if odd is not None:
        raise ValueError(
            f"{brief(name)} is {what} and has the character {odd!a} in it. Write a name on one "
            "line, without control characters."
        )
    return name


def suggest(value: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a near miss, else an empty string."""
    if len(value) > 200:  # the comparison takes time quadratic in the length
        return ""
    close = difflib.get_close_matches(value, [str(a) for a in allowed], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def parse_components(words: str | Sequence[str]) -> tuple[str, ...]:
    """Component and group names from `"o + mlp"` or `["o", "mlp"]`, checked and kept as written.

    Groups stay groups: what `attn` holds depends on the architecture, so it is expanded only
    against one (`expand_components`).

    Raises:
        ValueError: a name that is neither a component nor a group, or no name at all.
    """
    if isinstance(words, str):
        names = [word.strip() for word in words.split("+")]
    elif not isinstance(words, Sequence):
        raise ValueError(
            f"components={words!r} is a {type(words).__name__}. "
            'Write names, as "o + mlp" or ["o", "mlp"].'
        )
    else:
        names = [str(word).strip() for word in words]
    if not names or not all(names):
        raise ValueError(
            f"components={brief(words)} does not name a component. Write one or more of "
            f"{_vocabulary()}, "
            'as "o + mlp" or ["o", "mlp"].'
        )
    known = [*Component, *GROUPS]
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown component {brief(name)}. Allowed: {_vocabulary()}.{suggest(name, known)}"
            )
    return tuple(dict.fromkeys(names))


def _vocabulary() -> str:
    return f"{' '.join(Component)} (groups: {' '.join(GROUPS)})"


def expand_components(
    names: Sequence[str], available: Sequence[Component], architecture: str
) -> tuple[Component, ...]:
    """The components of one architecture that `names` select, in the vocabulary's order.

    A group gives those of its members that the architecture has; a component named by itself
    must be there.

    Raises:
        ValueError: a named component that the architecture lacks, or a group that is empty there.
    """
    chosen: set[Component] = set()
    for name in names:
        if name in GROUPS:
            members = set(GROUPS[name]) & set(available)
            if not members:
                raise ValueError(
                    f"component group {name!r} is empty in {architecture}, "
                    f"whose components are: {' '.join(available)}. Leave it out."
                )
            chosen |= members
        elif name not in available:
            raise ValueError(
                f"{architecture} has no component {name!r}. "
                f"Its components are: {' '.join(available)}. Leave it out of the graft."
            )
        else:
            chosen.add(Component(name))
    return tuple(c for c in Component if c in chosen)


def layer_group(name: str, n_layers: int) -> tuple[int, ...]:
    """The layers of a named group, for a model of `n_layers` layers.

    Each family (halves, quarters, eighths) cuts `range(n_layers)` at `round-down(i * n / parts)`,
    so it partitions the layers exactly at any depth; if there are fewer layers than parts, some
    groups are empty.

    Raises:
        ValueError: an unknown group name.
    """
    if name not in LAYER_GROUPS:
        raise ValueError(
            f"unknown layer group {brief(name)}. Allowed: {' '.join(LAYER_GROUPS)}, or layer "
            f'numbers such as 3 or "8-15".{suggest(name, LAYER_GROUPS)}'
        )
    part, parts = LAYER_GROUPS[name]
    return tuple(range(part * n_layers // parts, (part + 1) * n_layers // parts))


#: Layers and heads are numbered below this: far beyond any model, because a range is expanded.
MAX_NUMBER = 10_000
#: And neurons below this.
MAX_NEURON = 200_000

_RANGE = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?")


def parse_numbers(text: str, what: str, most: int = MAX_NUMBER) -> tuple[int, ...]:
    """`"3"`, `"8-15"` (both ends in) or `"0,2-4"` as a sorted tuple of distinct numbers.

    Raises:
        ValueError: anything else, a range that runs backwards, or numbers of `most` and more;
            `what` names the argument.
    """
    numbers: set[int] = set()
    written = 0
    for piece in (p.strip() for p in text.split(",")):
        match = _RANGE.fullmatch(piece)
        if match is None:
            raise ValueError(
                f"{what}={brief(text)}: {brief(piece)} is not a number or range. "
                'Write numbers and inclusive ranges, such as "3", "8-15" or "0,2-4".'
            )
        ends = [end for end in match.groups() if end]
        for end in ends:
            # A very long text is not parsed: that would take time quadratic in its length.
            if len(end) > 9 or int(end) >= most:
                raise too_many(piece, what, most)
        low, high = int(ends[0]), int(ends[-1])
        if high < low:
            raise ValueError(
                f"{what}={text!r}: the range {piece!r} runs backwards. Write it as {high}-{low}."
            )
        written += high - low + 1
        if written > most:
            raise too_many(text, what, most)
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def too_many(number: object, what: str, most: int = MAX_NUMBER) -> ValueError:
    """The message about a layer or head that no model has, before a range to it is expanded."""
    return ValueError(
        f"{what}={brief(number)}: no model has {most:,} {what}. Write lower numbers, and fewer."
    )


def format_numbers(numbers: Sequence[int]) -> str:
    """The shortest text that `parse_numbers` reads back: `(0, 2, 3, 4)` is `"0,2-4"`."""
    ranges: list[list[int]] = []
    for n in sorted(numbers):
        if ranges and n == ranges[-1][1] + 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
