"""Grafts: which weights come from which source, where. Frozen values without tensors.

A graft is an ordered list of rules; where two rules meet, the later one wins; where no rule
reaches, the base runs. In text, a rule reads:

    sft @ first_entity + last : o + q   : upper_half : 2
    0.5*sft @ last            : mlp_out : 20         : n12-13
    strength*source @ positions : components : layers : heads, or neurons after an n

Everything after the positions may be left out and then means all. Rules are joined by ``|``, and
the graft without rules is written ``none``.

A rule with a *strength* s gives y = (1 - s) * (what ran there without the rule) + s * (what the
source gives). Each component is linear in its own weights, so this mixes weights. s is any finite
number: 1, which may be left out, is the source's weights alone, 0 changes nothing, 2 and -1
extrapolate. Later rules act on what earlier ones made.

The bias of o and of mlp_out belongs to no head or neuron. A rule that names none mixes it as all
the rest; one that names some leaves it what all of the row's units then run, by the sources'
names, or the base's where they differ. A rule of strength 0 does nothing.

Positions are an expression over spans: ``+`` is union, ``&`` intersection, ``~`` complement,
``(…)`` groups, ``[0, -1]`` names token positions of the prompt. ``name#2`` is the second
occurrence of a span that occurs more than once, ``name#-1`` the last. q and o act at the
destination position, k and v at the source position: a k or v graft at position i changes what
later positions read there.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import yaml

from graftlens import plainyaml
from graftlens.components import (
    GROUPS,
    HEAD_COMPONENTS,
    LAYER_GROUPS,
    MAX_CHARACTERS,
    MAX_NEURON,
    MAX_NUMBER,
    NEURON_COMPONENTS,
    Component,
    brief,
    check_name,
    format_numbers,
    layer_group,
    parse_components,
    parse_numbers,
    suggest,
    too_many,
)
from graftlens.positions import At, integers

#: Of a graft as text, far beyond what anyone writes or a search finds.
MAX_RULES = 10_000

_SOURCE = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")

#: Layers as written: group names and numbers. `("all",)` sets no limit, so that components outside
#: the layers (embed, unembed, …) are meant too; any other value stays inside the layers.
Layers = tuple[str | int, ...]


def parse_layers(layers: str | int | Sequence[int | str]) -> Layers:
    """Layers from a group name, a number, a range (`"8-15"`), a `+`-sum of these, or a list.

    Raises:
        ValueError: an unknown group, a malformed or negative number, or no layer at all.
    """
    items: list[str | int] = []
    pieces: list[Any]
    if isinstance(layers, str):
        pieces = [piece.strip() for piece in layers.split("+")]
    elif isinstance(layers, int | np.integer) and not isinstance(layers, bool):
        pieces = [layers]
    elif isinstance(layers, Sequence | np.ndarray):
        pieces = list(layers)
    else:
        raise ValueError(
            f"layers={brief(layers)} is a {type(layers).__name__}. "
            'Write a group ("upper_half"), numbers ([3, 4]) or a range ("8-15").'
        )
    for piece in pieces:
        if isinstance(piece, str) and not re.match(r"\d", piece.strip()):
            layer_group(piece.strip(), 1)
            items.append(piece.strip())
        elif isinstance(piece, str):
            items.extend(parse_numbers(piece, "layers"))
        else:
            (number,) = integers([piece], "layers")
            if number < 0:
                raise ValueError(
                    f"layers={brief(layers)}: layers are counted from 0; {number} is not a layer."
                )
            if number >= MAX_NUMBER:
                raise too_many(number, "layers")
            items.append(number)
        if len(items) > 2 * MAX_NUMBER:
            raise too_many(layers, "layers")
    if not items:
        raise ValueError(
            f"layers={brief(layers)} does not name a layer. Write a group "
            f"({' '.join(LAYER_GROUPS)}), "
            'numbers ([3, 4]) or a range ("8-15"), or leave layers out for all.'
        )
    if "all" in items:
        return ("all",)
    groups = [item for item in items if isinstance(item, str)]
    numbers = sorted({item for item in items if not isinstance(item, str)})
    return (*dict.fromkeys(groups), *numbers)


@dataclass(frozen=True)
class Rule:
    """Take the weights of `source` for `components`, in `layers`, at the positions `at`.

    `heads` restricts q and o to those query heads, k and v to those key-value heads; `units`
    restricts mlp_in, mlp_gate and mlp_out to those neurons; None is all. `strength` is the s of
    y = (1 - s) * (what ran there without the rule) + s * (what the source gives).
    """

    source: str
    at: At
    components: tuple[str, ...] = ("all",)
    layers: Layers = ("all",)
    heads: tuple[int, ...] | None = None
    units: tuple[int, ...] | None = None
    strength: float | int = 1.0

    def __post_init__(self) -> None:
        # However a rule is made, it holds what the vocabulary allows, in one form.
        object.__setattr__(self, "at", At.parse(self.at))
        object.__setattr__(self, "components", parse_components(self.components))
        object.__setattr__(self, "layers", parse_layers(self.layers))
        object.__setattr__(self, "strength", _strength(self.strength))
        for kind in _CUTS:
            if getattr(self, kind.name) is not None:
                object.__setattr__(self, kind.name, self._numbers(kind))
        if not isinstance(self.source, str) or not _SOURCE.fullmatch(self.source):
            raise ValueError(
                f"source={brief(self.source)} is not a source name. Names begin with a letter or "
                "_, followed by letters, digits, _ . -"
            )

    def _numbers(self, kind: "_Cut") -> tuple[int, ...]:
        """The heads or neurons that the rule keeps to, checked and in order."""
        given = sorted(set(integers(getattr(self, kind.name), kind.name)))
        if without := [c for c in self.components if not kind.fits(GROUPS.get(c, (c,)))]:
            raise ValueError(
                f"{kind.name}={brief(given)} with components {' + '.join(self.components)}: "
                f"{' '.join(without)} cannot be split by {kind.word}. {kind.way}"
            )
        if given and max(given) >= kind.most:
            raise too_many(max(given), kind.name, kind.most)
        if not given or min(given) < 0:
            raise ValueError(
                f"{kind.name}={brief(given)}: name at least one {kind.word}, counted from 0, "
                f"or leave {kind.name} out for all."
            )
        return tuple(given)

    def of(self, component: Component) -> tuple[int, ...] | None:
        """The heads or neurons of a component that the rule keeps to; None is all."""
        return self.heads if component in HEAD_COMPONENTS else self.units

    def __str__(self) -> str:
        layers = [item for item in self.layers if isinstance(item, str)]
        numbers = [item for item in self.layers if not isinstance(item, str)]
        if numbers:
            layers.append(format_numbers(numbers))
        units = "" if self.heads is None else format_numbers(self.heads)
        if self.units is not None:
            units = f"n{format_numbers(self.units)}"
        parts = [" + ".join(self.components), " + ".join(layers), units]
        while parts and parts[-1] in ("", "all"):
            parts.pop()
        strength = "" if self.strength == 1 else f"{format_number(self.strength)}*"
        return " : ".join([f"{strength}{self.source} @ {self.at}", *parts])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML, without what is at its default."""
        record: dict[str, Any] = {"source": self.source, "at": str(self.at)}
        if self.components != ("all",):
            record["components"] = list(self.components)
        if self.layers != ("all",):
            record["layers"] = list(self.layers)
        if self.heads is not None:
            record["heads"] = list(self.heads)
        if self.units is not None:
            record["units"] = list(self.units)
        if self.strength != 1:
            record["strength"] = self.strength
        return record


@dataclass(frozen=True)
class _Cut:
    """What a component can be cut into, in a rule's words."""

    name: str
    word: str
    components: frozenset[Component]
    most: int
    way: str

    def fits(self, components: Iterable[str]) -> bool:
        """Whether all of them can be cut so."""
        return self.components.issuperset(components)


_CUTS = (
    _Cut(
        "heads",
        "head",
        HEAD_COMPONENTS,
        MAX_NUMBER,
        'Heads apply to q, k, v and o only: write components="q + k + v + o", or leave heads out.',
    ),
    _Cut(
        "units",
        "neuron",
        NEURON_COMPONENTS,
        MAX_NEURON,
        'Neurons apply to mlp_in, mlp_gate and mlp_out only: write components="mlp", or leave '
        "units out.",
    ),
)


def _strength(value: Any) -> float:
    plain = isinstance(value, int | float | np.integer | np.floating)
    if plain and not isinstance(value, bool):
        try:
            number = float(value) + 0.0  # no -0.0
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise ValueError(
        f"strength={brief(value)} is not a finite number. Write one, such as 0.5 (half of the way "
        "to the source), 2 or -1; 1, the source itself, may be left out."
    )


def format_number(value: float) -> str:
    """The shortest text that reads back as this number: `2`, `0.5`, `1e-05`."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


#: A rule's keys in YAML.
_KEYS = ("source", "at", "components", "layers", "heads", "units", "strength")

_FACTOR = re.compile(r"([^*@\s]*)\s*\*\s*(.*)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,9})?")


def _factor(text: str) -> tuple[float, str]:
    """The strength and the source of `0.5*sft`; of `sft` the strength is 1."""
    match = _FACTOR.fullmatch(text)
    if match is None:
        return 1.0, text
    written = match[1]
    if not (len(written) <= 100 and _NUMBER.fullmatch(written)):
        return _strength(written), match[2]
    number = float(written)
    if number == 0 and re.search("[1-9]", re.split("[eE]", written)[0]):
        raise ValueError(
            f"strength={brief(written)} is closer to 0 than a number here can be. Write 0, which "
            "changes nothing, or a larger one."
        )
    return _strength(number), match[2]


@dataclass(frozen=True)
class Graft:
    """An ordered list of rules; where two meet, the later wins. `Graft()` runs the base alone.

    Grafts are values: hashable, comparable, joined with ``|`` (the right one wins), written as one
    line (`str`, `Graft.parse`) and as YAML (`to_yaml`, `from_yaml`).

    Example:
        >>> graft = Graft.rule("sft", at="first_entity + last")
        >>> str(graft | Graft.rule("pre", at="last", components="o", layers="8-15"))
        'sft @ first_entity + last | pre @ last : o : 8-15'
    """

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if len(self.rules) > MAX_RULES:
            raise _too_many_rules(len(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise ValueError(
                    f"{brief(rule)} is not a Rule. Build grafts with Graft.rule and |."
                )

    @classmethod
    def rule(
        cls,
        source: str,
        at: str | int | Sequence[int] | At = "all",
        components: str | Sequence[str] = "all",
        layers: str | int | Sequence[int | str] = "all",
        heads: str | int | Sequence[int] | None = None,
        units: str | int | Sequence[int] | None = None,
        strength: float | int = 1.0,
    ) -> "Graft":
        """A graft of one rule.

        Args:
            source: the name of the source whose weights are used.
            at: spans (`"first_entity + last"`, `"~last"`) or token positions (`[0, -1]`).
            components: components and groups (`"o + mlp"`, `["o", "mlp"]`).
            layers: a layer group, numbers or a range (`"upper_half"`, `[3]`, `"8-15"`). With
                anything but `"all"` the rule stays inside the layers, so `embed`, `pos_embed`,
                `ln_final` and `unembed` are left out of `components="all"`.
            heads: query heads for q and o, key-value heads for k and v; None is all. o's bias
                belongs to no head: a row takes it from a source only if all its heads do.
            units: neurons of mlp_in, mlp_gate and mlp_out (`[12, 13]`, `"12-13"`); None is all.
                mlp_out's bias belongs to no neuron, as o's to no head.
            strength: the s of y = (1 - s) * (what ran there without the rule) + s * (what the
                source gives): any finite number.

        Raises:
            ValueError: anything that is not in the vocabulary; the message lists what is.
        """
        return cls(
            (
                Rule(
                    source,
                    At.parse(at),
                    parse_components(components),
                    parse_layers(layers),
                    _numbered(heads, "heads", MAX_NUMBER),
                    _numbered(units, "units", MAX_NEURON),
                    strength,
                ),
            )
        )

    def scaled(self, strength: float | int, base: str = "pre") -> "Graft":
        """The graft at a strength: followed by (1 - strength) of the base everywhere.

        Args:
            strength: 1 is the graft, 0 the base, 2 twice the way from the base to the graft.
            base: the name of the model's first source.

        Example:
            >>> str(Graft.rule("sft", at="last").scaled(0.7))
            'sft @ last | 0.3*pre @ all'
        """
        rest = Decimal(1) - Decimal(repr(_strength(strength)))
        return self | Graft.rule(base, strength=float(rest))

    def __or__(self, other: "Graft") -> "Graft":
        if not isinstance(other, Graft):
            return NotImplemented
        return Graft(self.rules + other.rules)

    def __bool__(self) -> bool:
        return bool(self.rules)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __str__(self) -> str:
        return " | ".join(map(str, self.rules)) if self.rules else "none"

    def __repr__(self) -> str:
        return f"Graft.parse({str(self)!r})"

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that the rules name, in order of first use."""
        return tuple(dict.fromkeys(rule.source for rule in self.rules))

    @property
    def extrapolates(self) -> bool:
        """Whether some rule goes beyond its source, or away from it: its strength is not from 0 to
        1."""
        return not all(0 <= rule.strength <= 1 for rule in self.rules)

    @classmethod
    def parse(cls, text: str) -> "Graft":
        """Read the one-line form (see the module's docstring).

        Raises:
            ValueError: text of another form, or words outside the vocabulary.
        """
        if text.strip() == "none":
            return cls()
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"graft {brief(text)} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are "
                "allowed."
            )
        if text.count("|") >= MAX_RULES:
            raise _too_many_rules(text.count("|") + 1)
        rules: list[Rule] = []
        for piece in text.split("|"):
            source, separator, rest = piece.partition("@")
            fields = [field.strip() for field in rest.split(":")]
            if not separator or not 1 <= len(fields) <= 4:
                word = piece.strip()
                hint = f" For all positions: {word + ' @ all'!r}." if word.isidentifier() else ""
                raise ValueError(
                    f"graft {brief(text)}: {brief(word)} is not a rule. Write "
                    '"source @ positions : components : layers : heads" (from components on, what '
                    'is left out means all), such as "sft @ last : o + mlp : upper_half" or '
                    '"0.5*sft @ last : mlp_out : 20 : n12-13"; join rules with |; "none" is the '
                    "graft without rules." + hint
                )
            fields += [""] * (4 - len(fields))
            at, components, layers, last = fields
            strength, name = _factor(source.strip())
            neurons = re.match(r"n\s*(?=[0-9])", last)
            made = cls.rule(
                name,
                at,
                components or "all",
                layers or "all",
                (last or None) if neurons is None else None,
                None if neurons is None else last[neurons.end() :],
                strength,
            )
            rules.extend(made.rules)
        return cls(tuple(rules))

    def to_list(self) -> list[dict[str, Any]]:
        """The rules as plain dictionaries, for YAML or JSON."""
        return [rule.to_dict() for rule in self.rules]

    @classmethod
    def from_list(cls, rules: Any) -> "Graft":
        """Read what `to_list` wrote, or a one-line text, or a list that mixes both.

        Raises:
            ValueError: a key or value outside the vocabulary.
        """
        if isinstance(rules, str):
            return cls.parse(rules)
        if isinstance(rules, Mapping):
            rules = [rules]
        if not isinstance(rules, Sequence):
            raise ValueError(
                f"{brief(rules)} is not a graft. Write one line of text, or a list of rules, each "
                f"with the keys {', '.join(_KEYS)}."
            )
        made: list[Rule] = []
        for rule in rules:
            if isinstance(rule, str):
                made.extend(cls.parse(rule).rules)
                continue
            if not isinstance(rule, Mapping):
                raise ValueError(
                    f"{brief(rule)} is not a rule. A rule has the keys {' '.join(_KEYS)}."
                )
            for key in rule:
                if key not in _KEYS:
                    quote = " Put a one-line rule in quotes." if "@" in str(key) else ""
                    raise ValueError(
                        f"unknown key {brief(key)} in rule {brief(dict(rule))}. "
                        f"Allowed: {' '.join(_KEYS)}.{suggest(str(key), _KEYS)}{quote}"
                    )
            if rule.get("source") is None or rule.get("at") is None:
                raise ValueError(f"rule {brief(dict(rule))} needs the keys source and at.")
            # A key left empty in YAML is null, which must not silently mean all (heads: null does).
            empty = [k for k, v in rule.items() if v is None and k not in ("heads", "units")]
            if empty:
                raise ValueError(
                    f"rule {brief(dict(rule))}: {empty[0]} is empty. Give it a value, or leave the "
                    "key out for all."
                )
            made.extend(cls.rule(**rule).rules)
        return cls(tuple(made))

    def to_yaml(self) -> str:
        """The rules as a YAML list."""
        return yaml.safe_dump(self.to_list(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str) -> "Graft":
        """Read what `to_yaml` wrote.

        Raises:
            ValueError: a key or value outside the vocabulary.
        """
        try:
            rules = plainyaml.load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"graft {brief(text)} is not YAML ({error}). Put a one-line rule in quotes: "
                '"sft @ last : o".'
            ) from None
        return cls.from_list(rules)


def _numbered(given: Any, what: str, most: int) -> tuple[int, ...] | None:
    """Heads or neurons as numbers, from a range, a number or a list; None is all."""
    if isinstance(given, str):
        return None if given.strip() == "all" else parse_numbers(given, what, most)
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        given = [given]
    elif given is not None and not isinstance(given, Sequence | np.ndarray):
        raise ValueError(
            f"{what}={brief(given)} is a {type(given).__name__}. "
            'Write numbers ([0, 2]) or a range ("0-3").'
        )
    return None if given is None else integers(given, what)


def _too_many_rules(count: int) -> ValueError:
    return ValueError(
        f"a graft of {count:,} rules; at most {MAX_RULES:,} are allowed. Name several positions, "
        "components and layers in one rule."
    )


#: What tables of results say about a graft of one rule, a column each.
PARTS = ("source", "span", "component", "layer", "head", "neuron", "strength")


def parts_of(graft: Graft) -> dict[str, Any]:
    """What `PARTS` are of a graft's only rule, as text but for the strength; all are None where the
    graft has no rule, or several."""
    if len(graft.rules) != 1:
        return dict.fromkeys(PARTS)
    (rule,) = graft.rules
    # The text leaves out what means all.
    component, layer = [*str(rule).split(" : ")[1:], "all", "all"][:2]
    head, neuron = ("all" if n is None else format_numbers(n) for n in (rule.heads, rule.units))
    values = (rule.source, str(rule.at), component, layer, head, neuron, rule.strength)
    return dict(zip(PARTS, values, strict=True))


#: Positions as an expression, or as numbers of tokens.
Where = At | str | int | Sequence[int]

#: One or more grafts: by name, or keyed by their text.
Grafts = Graft | str | Mapping[str, Graft | str] | Sequence[Graft | str]


def named_grafts(grafts: Grafts) -> dict[str, Graft]:
    """Grafts by name; those given without a name are keyed by their text.

    Raises:
        ValueError: text that is not a graft, what is neither a graft nor its text, or a name that
            is not one line of text.
    """
    if isinstance(grafts, Mapping):
        for name in grafts:
            check_name(str(name))
        return {name: as_graft(g, f"grafts[{name!r}]") for name, g in grafts.items()}
    if isinstance(grafts, Graft | str) or not isinstance(grafts, Iterable):
        return {str(grafts): as_graft(grafts, "grafts")}
    return {str(g): as_graft(g, f"grafts[{i}]") for i, g in enumerate(grafts)}


def as_graft(given: Any, what: str) -> Graft:
    """A graft, or its text, as a graft; `what` is its name in messages.

    Raises:
        ValueError: text that is not a graft, or what is neither a graft nor its text.
    """
    if isinstance(given, str):
        return Graft.parse(given)
    if isinstance(given, Graft):
        return given
    if isinstance(getattr(given, "graft", None), Graft):
        raise ValueError(
            f"{what} is a {type(given).__name__}, which belongs to one batch of prompts. "
            "Give the graft itself: mask.graft."
        )
    raise ValueError(
        f"{what}={brief(given)} is not a graft. Give a Graft or its one-line text, such as "
        '"sft @ last : o + mlp"; "none" is the base alone.'
    )
