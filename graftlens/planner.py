"""Which rows a sweep needs: every distinct (layer, position, everything upstream) once.

All grafts of a prompt are merged. Going up the layers, each (node, graft) gets the
number of its residual row; two have the same number exactly if nothing that feeds the row differs:
the sources of every component at this position and below, and the keys and values that it attends
to. Numbers are made by sorting pairs of numbers, so they are exact, and vectorised over grafts.

A row's *structure* is all that this depends on besides the grafts: where the spans lie, how answers
and distractors branch. Prompts of equal structure share one plan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from graftlens.components import Component, brief, expand_components
from graftlens.graft import Graft, Rule
from graftlens.model.arch import Architecture, Site
from graftlens.model.choice import Choice, Equal, Mixtures, agreed, atoms
from graftlens.model.lineage import Lineage, layer_rows, renumbered, wanted_nodes
from graftlens.model.mask import GraftMask, select, sites_of
from graftlens.model.rotary import Rotary, mixed_tables
from graftlens.model.tree import (
    INPUT_SIDE,
    KEY_SIDE,
    OUTPUT_SIDE,
    QUERY_SIDE,
    Choices,
    Sides,
    TokenTree,
    TreeLayer,
    shared,
)
from graftlens.model.vocabulary import Vocabularies
from graftlens.positions import At
from graftlens.prompts import PromptError, Tokenized

#: Bytes of the trees that a planner keeps for prompts to come.
KEPT_BYTES = 1 << 28

#: A site -> for each source, the first source with the same tensors there.
EqualAt = Callable[[Component, int | None], Equal]


#: Entries of a choice, from one up to another, at which the same sources are equal.
_EqualEntries = tuple[Equal, int, int]


@dataclass(frozen=True, eq=False)
class _Reach:
    """Which layers a rule reaches on one side, and which entries of their choices.

    `cut` has the entries of each component that it reaches by unit, with that of the bias which
    belongs to none of them.
    """

    layers: Bool[np.ndarray, " layer"]
    entries: Int[np.ndarray, " entry"]
    cut: tuple[tuple[slice, int], ...]


@dataclass(frozen=True)
class Branches:
    """A prompt with what may follow it, as a tree of tokens.

    Attributes:
        tokens: the token of each node; the prompt's own come first.
        parents: the node before each, -1 at the first.
        totals: per node, the length of its text where rotary tables depend on it, else 0.
        columns: per node, its position in the prompt; those that follow it all count as the
            position behind its end.
        paths: per continuation, the nodes that predict its tokens.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    totals: tuple[int, ...]
    columns: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        continuations: Sequence[Sequence[int]],
        rope_limit: int | None = None,
    ) -> "Branches":
        """Texts that begin in the same way share nodes, unless their length changes their rotary
        tables."""
        nodes: dict[tuple[int, int, int], int] = {}
        columns: list[int] = []
        paths = []
        for continuation in continuations:
            text = [*prompt, *continuation[:-1]]
            total = len(text) if rope_limit is not None and len(text) > rope_limit else 0
            node, path = -1, []
            for place, token in enumerate(text):
                key = (node, token, total)
                if key not in nodes:
                    nodes[key] = len(nodes)
                    columns.append(min(place, len(prompt)))
                node = nodes[key]
                if place >= len(prompt) - 1:
                    path.append(node)
            paths.append(tuple(path))
        parents, tokens, totals = zip(*nodes, strict=True)
        return cls(tokens, parents, totals, tuple(columns), tuple(paths))


@dataclass(frozen=True)
class Structure:
    """What a plan depends on besides the grafts.

    Attributes:
        selected: per column, which position expressions select it, as bytes.
        runnable: numbers of the grafts that the prompt can run.
        references: those of the reference runs that it can run.
    """

    parents: tuple[int, ...]
    totals: tuple[int, ...]
    columns: tuple[int, ...]
    scored: tuple[int, ...]
    selected: tuple[bytes, ...]
    runnable: tuple[int, ...]
    references: tuple[tuple[str, int], ...] = ()


class Planner:
    """Plans the trees of one set of grafts; what prompts share is computed once."""

    def __init__(
        self,
        arch: Architecture,
        sources: Sequence[str],
        grafts: Sequence[Graft],
        equal: EqualAt | None = None,
        references: Mapping[str, Graft] | None = None,
        rotary: Rotary | None = None,
        vocabularies: Vocabularies | None = None,
        goes_on: bool = False,
    ) -> None:
        """`equal` says which sources share tensors (at q and k also rotary tables); without it, all
        count as different. Every tree has rows of the `references`, runs that the grafts are
        compared with. `rotary` and `vocabularies` say in which tables and tokens sources differ;
        without them, in none. With `goes_on`, trees know each graft's key rows, which positions
        after them will read.

        Raises:
            ValueError: a graft that this architecture or these sources cannot run.
        """
        self.arch, self.sources, self._goes_on = arch, tuple(sources), goes_on
        self._asked = len(grafts)
        self.grafts = (*grafts, *(g for g in (references or {}).values() if g not in grafts))
        self.references = {run: self.grafts.index(g) for run, g in (references or {}).items()}
        self._rotary = rotary if rotary is not None and rotary.differ else None
        self._vocabularies = vocabularies if vocabularies and vocabularies.differ else None
        self._equal = equal or (lambda component, layer: tuple(range(len(self.sources))))
        first = {rule.at: rule for g in reversed(self.grafts) for rule in reversed(g.rules)}
        number: dict[At, int] = {at: i for i, at in enumerate(first)}
        #: per position expression, a rule that has it
        self._first_at = tuple(first.values())
        shapes: dict[tuple[object, ...], int] = {}
        self._shapes: list[Rule] = []
        #: per graft, per rule: its position expression and its shape (all but the positions)
        self._rules: list[list[tuple[int, int]]] = []
        for graft in self.grafts:
            rules = []
            for rule in graft.rules:
                key = (
                    *(rule.source, rule.components, rule.layers),
                    *(rule.heads, rule.units, rule.strength),
                )
                if key not in shapes:
                    shapes[key] = len(self._shapes)
                    self._shapes.append(rule)
                rules.append((number[rule.at], shapes[key]))
            self._rules.append(rules)
        self.mixtures = Mixtures(len(self.sources))
        self._atom_of = self._atoms()
        self.sides = Sides(
            self.sources,
            *(
                Choices([c for c in side if c in arch.components], self.mixtures, self._atom_of)
                for side in (INPUT_SIDE, KEY_SIDE, QUERY_SIDE, OUTPUT_SIDE)
            ),
        )
        self._sites = [sites_of(rule, arch, self.sources) for rule in self._shapes]
        self._masks = [self._mask_of(i) for i in range(len(self._shapes))]
        self._equals = self._equal_tables()
        self._made: dict[tuple[object, ...], int] = {}
        self._numbered: dict[tuple[int, ...], tuple[np.ndarray, ...]] = {}
        self._columns: dict[bytes, tuple[np.ndarray, ...]] = {}
        self._trees: dict[tuple[Structure, int | None], tuple[Piece, ...]] = {}

    # -- structures --------------------------------------------------------------------------

    def structure(self, prompt: Tokenized, branches: Branches) -> tuple[Structure, dict[int, str]]:
        """A prompt's structure, and for the grafts that it cannot run, why."""
        places = np.zeros((len(self._first_at), len(prompt) + 1), dtype=bool)
        failed: dict[Rule, str] = {}
        for number, rule in enumerate(self._first_at):
            try:
                select(rule, prompt)
                places[number] = select(rule, prompt, len(prompt) + 1)
            except PromptError as error:
                failed[rule] = str(error)
        reasons: dict[int, str] = {}
        if failed:
            bad = {rule.at for rule in failed}
            for index, graft in enumerate(self.grafts):
                if wrong := [rule for rule in graft.rules if rule.at in bad]:
                    reasons[index] = _why(wrong[0], prompt)
        columns = tuple(column.tobytes() for column in places.T)
        if self._vocabularies is not None:
            reasons = self._lacking(self._vocabularies, branches, columns) | reasons
        structure = Structure(
            branches.parents,
            branches.totals,
            branches.columns,
            tuple(sorted({node for path in branches.paths for node in path})),
            columns,
            tuple(i for i in range(self._asked) if i not in reasons),
            tuple((run, i) for run, i in self.references.items() if i not in reasons),
        )
        return structure, {i: reason for i, reason in reasons.items() if i < self._asked}

    def _lacking(
        self, vocabularies: Vocabularies, branches: Branches, columns: Sequence[bytes]
    ) -> dict[int, str]:
        """The grafts under which a source reads a token that it lacks, with the reason."""
        found: dict[int, str] = {}
        depths: list[int] = []
        place = self.sides.input.slots[Component.EMBED].start
        for node, token in enumerate(branches.tokens):
            parent = branches.parents[node]
            depths.append(0 if parent < 0 else depths[parent] + 1)
            if token < vocabularies.common:
                continue
            numbers = self._choices_at(columns[branches.columns[node]])[0][:, 0]
            for graft, number in enumerate(numbers.tolist()):
                mixture = self.mixtures[int(self.sides.input.choice(number)[place])]
                sources = [source for source, _ in mixture]
                if why := vocabularies.lacking(token, sources, depths[node]):
                    found.setdefault(graft, why)
        return found

    def pieces(self, structure: Structure, peak: int | None = None) -> tuple["Piece", ...]:
        """The trees of a structure: one, or several of at most `peak` rows if it is too large.

        Grafts that share most stay together. A single graft is never cut.
        """
        key = (structure, peak)
        if key not in self._trees:
            whole = self._cut(structure, np.array(structure.runnable, dtype=np.int64), peak)
            self._trees[key] = tuple(whole)
            kept = [sum(piece.tree.nbytes for piece in pieces) for pieces in self._trees.values()]
            while len(kept) > 1 and sum(kept) > KEPT_BYTES:
                kept.pop(0)
                del self._trees[next(iter(self._trees))]
        return self._trees[key]

    def piece(self, structure: Structure, grafts: Int[np.ndarray, " graft"]) -> "Piece":
        """The tree of some of the grafts that prompts of a structure can run."""
        return self._cut(structure, grafts, None)[0]

    def following(self, rows: Sequence[tuple[Structure, int]]) -> GraftMask:
        """What the positions that follow prompts run, [row, 1].

        `rows` are structures, each with a graft by its number; what follows a prompt is one
        selection, however long it is.
        """
        found = [self._choices_at(structure.selected[-1]) for structure, _ in rows]
        numbers = [
            np.stack(
                [choices[side][graft] for choices, (_, graft) in zip(found, rows, strict=True)]
            )
            for side in range(4)
        ]
        sides, made = self.sides, dict[tuple[bytes, bytes], dict[Component, Choice]]()
        sites: dict[Site, Choice] = {}
        for choices, side in ((sides.input, 0), (sides.output, 3)):
            chosen = choices.selections(numbers[side][:, 0])
            sites |= {(component, None): choice for component, choice in chosen.items()}
        for layer in range(self.arch.n_layers):
            keys, queries = numbers[1][:, layer], numbers[2][:, layer]
            both = keys.tobytes(), queries.tobytes()
            if both not in made:
                made[both] = shared(sides.query.selections(queries), sides.key.selections(keys))
            sites |= {(component, layer): choice for component, choice in made[both].items()}
        return GraftMask(Graft(), self.sources, (len(rows), 1), sites)

    def cut(self, structure: Structure, piece: "Piece", peak: int) -> list["Piece"]:
        """Cut a tree into several of at most `peak` rows."""
        return self._cut(structure, piece.grafts, peak)

    def _cut(
        self, structure: Structure, grafts: Int[np.ndarray, " graft"], peak: int | None
    ) -> list["Piece"]:
        if len(grafts) == 0:
            return []
        references = dict(structure.references)
        whole = np.union1d(grafts, np.array([*references.values()], dtype=np.int64))
        tree = self._tree(structure, whole)
        columns = np.searchsorted(whole, grafts)
        if peak is None or tree.peak <= peak or len(grafts) == 1:
            places = {run: int(np.searchsorted(whole, i)) for run, i in references.items()}
            return [Piece(grafts, tree, columns, places)]
        # Rows are numbered by what they share, so neighbours in this order share most. Each piece
        # has some rows of its own, so there are a few more than would fit exactly.
        order = grafts[np.lexsort(tree.outputs[::-1, columns])]
        count = max(2, -(-10 * tree.peak // (9 * peak)))
        return [
            piece
            for some in np.array_split(order, min(count, len(order)))
            for piece in self._cut(structure, np.sort(some), peak)
        ]

    # -- choices -----------------------------------------------------------------------------

    def _atoms(self) -> dict[Component, Int[np.ndarray, " unit"]]:
        """Of each component that rules cut, the atom of each unit: which ones no rule parts."""
        cuts: dict[Component, list[tuple[int, ...]]] = {}
        for rule in self._shapes:
            if rule.heads is None and rule.units is None:
                continue
            for component in expand_components(
                rule.components, self.arch.components, self.arch.family
            ):
                if (units := rule.of(component)) is not None:
                    cuts.setdefault(component, []).append(units)
        return {c: atoms(units, self.arch.n_units_of(c)) for c, units in cuts.items()}

    def _mask_of(self, shape: int) -> tuple[_Reach, ...]:
        """Where a rule's shape applies, per side."""
        rule, sites = self._shapes[shape], self._sites[shape]
        entries = {component: self._entries(rule, component) for component in {c for c, _ in sites}}
        reaches = []
        for choices, layers in self._sides_and_layers:
            # A rule reaches the same components in each of its layers.
            here = [place.start + entries[c] for c, place in choices.slots.items() if c in entries]
            there = [any((c, l) in sites for c in choices.slots) for l in layers]
            biases = {c: bias for c, bias in choices.biases.items() if c in entries}
            own = [bias for c, bias in biases.items() if rule.of(c) is None]
            cut = [(choices.slots[c], b) for c, b in biases.items() if rule.of(c) is not None]
            reached = np.concatenate([*here, np.array(own, dtype=np.int64)])
            reaches.append(_Reach(np.array(there), reached, tuple(cut)))
        return tuple(reaches)

    def _entries(self, rule: Rule, component: Component) -> Int[np.ndarray, " atom"]:
        """The atoms of a component that a rule reaches."""
        units = rule.of(component)
        if component not in self._atom_of:
            return np.zeros(1, dtype=np.int64)
        atom_of = self._atom_of[component]
        return np.unique(atom_of if units is None else atom_of[list(units)])

    @cached_property
    def _sides_and_layers(self) -> list[tuple[Choices, Sequence[int | None]]]:
        sides, layers = self.sides, range(self.arch.n_layers)
        return [
            (sides.input, [None]),
            (sides.key, layers),
            (sides.query, layers),
            (sides.output, [None]),
        ]

    def _equal_tables(self) -> list[tuple[tuple[_EqualEntries, ...], ...]]:
        """Per side and layer: which sources have the same tensors at the entries of a choice, so
        that equal choices are one."""
        known: dict[Site, Equal] = {}
        tables = []
        for choices, layers in self._sides_and_layers:
            of_side = []
            for layer in layers:
                pieces: list[_EqualEntries] = []
                for component, place in choices.slots.items():
                    site = (component, layer)
                    if site not in known:
                        known[site] = self._equal(component, layer)
                    start = place.start
                    if pieces and pieces[-1][0] == known[site]:
                        start = pieces.pop()[1]
                    stop = place.stop + (component in choices.biases)
                    pieces.append((known[site], start, stop))
                of_side.append(tuple(pieces))
            tables.append(tuple(of_side))
        return tables

    def _number(self, side: int, index: int, shapes: tuple[int, ...]) -> int:
        """The number of the choice that these rules make in a layer that they all reach; `index`
        numbers the layers of the side."""
        equal = self._equals[side][index]
        layer = self._sides_and_layers[side][1][index]
        tables = None if self._rotary is None or layer is None else self._rotary.equal(layer)
        key = (side, equal, shapes, tables)
        if key not in self._made:
            choices, _ = self._sides_and_layers[side]
            choice = np.zeros(choices.width, dtype=np.int32)
            for shape in shapes:
                rule, reach = self._shapes[shape], self._masks[shape][side]
                if rule.strength == 0:
                    continue
                source, entries = self.sources.index(rule.source), reach.entries
                choice[entries] = self.mixtures.blend(choice[entries], source, rule.strength)
                for place, bias in reach.cut:
                    choice[bias] = agreed(choice[place, None])[0]
            if tables is not None and layer is not None:
                self._refuse_mixed_tables(choices, choice, tables, layer)
            for same, start, stop in equal:
                choice[start:stop] = self.mixtures.merge(choice[start:stop], same)
            self._made[key] = choices.number(choice)
        return self._made[key]

    def _refuse_mixed_tables(
        self, choices: Choices, choice: Int[np.ndarray, " entry"], tables: Equal, layer: int
    ) -> None:
        for component in (Component.Q, Component.K):
            place = choices.slots.get(component, slice(0))
            for code in set(choice[place].tolist()):
                sources = [source for source, _ in self.mixtures[code]]
                if why := mixed_tables(sources, tables, self.sources, component, layer):
                    raise ValueError(why)

    def _numbers(self, shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """Per side and layer, the number of the choice that these rules make, in this order."""
        if shapes not in self._numbered:
            numbers = []
            for side, (_, layers) in enumerate(self._sides_and_layers):
                reached = [self._masks[shape][side].layers for shape in shapes]
                of_side = []
                for layer in range(len(layers)):
                    pairs = zip(shapes, reached, strict=True)
                    here = tuple(shape for shape, there in pairs if there[layer])
                    of_side.append(self._number(side, layer, here))
                numbers.append(np.array(of_side, dtype=np.int32))
            self._numbered[shapes] = tuple(numbers)
        return self._numbered[shapes]

    def _choices_at(self, active: bytes) -> tuple[Int[np.ndarray, "graft layer"], ...]:
        """Per side, the numbers of the choices at a column that these expressions select."""
        if active not in self._columns:
            found = []
            for graft, rules in zip(self.grafts, self._rules, strict=True):
                try:
                    found.append(self._numbers(tuple(shape for at, shape in rules if active[at])))
                except ValueError as error:
                    raise ValueError(f"graft {brief(str(graft))}: {error}") from None
            self._columns[active] = tuple(np.stack(side) for side in zip(*found, strict=True))
        return self._columns[active]

    # -- the tree ----------------------------------------------------------------------------

    def _tree(self, structure: Structure, grafts: Int[np.ndarray, " graft"]) -> TokenTree:
        n_layers, n_nodes = self.arch.n_layers, len(structure.parents)
        of_column = [self._choices_at(structure.selected[c]) for c in structure.columns]
        # [layer, node, graft] numbers of the choices on each side
        inputs, keys, queries, outputs = (
            np.ascontiguousarray(
                np.stack([choices[side][grafts].T for choices in of_column], axis=1)
            )
            for side in range(4)
        )
        lineage = Lineage(structure.parents)
        scored = np.array(structure.scored)

        rows = renumbered(np.arange(n_nodes)[:, None], inputs[0])
        entering = [rows]
        read: list[np.ndarray] = []
        settled: tuple[int | None, int] | None = None
        for layer in range(n_layers):
            window = lineage.effective(self.arch.windows[layer])
            if (
                settled is not None
                and settled[0] == window
                and _same(layer, settled[1], keys, queries)
            ):
                # The last layer chose the same and told no rows apart, so this one tells none.
                read.append(read[-1])
                entering.append(rows)
                continue
            own = renumbered(rows, keys[layer])
            seen = lineage.accumulated(own, window)
            after = renumbered(seen, queries[layer])
            read.append(own)
            if after.max() == rows.max():
                settled = (window, layer)  # as many as before: the same rows are told apart
            else:
                settled, rows = None, after
            entering.append(rows)

        wanted = wanted_nodes(lineage, self.arch.windows, scored, n_nodes)
        layers: list[TreeLayer] = []
        last: tuple[object, ...] = ()
        for layer in range(n_layers):
            these = (
                *map(id, (entering[layer], read[layer], entering[layer + 1])),
                wanted[layer].tobytes(),
                wanted[layer + 1].tobytes(),
                lineage.effective(self.arch.windows[layer]),
            )
            if these == last and _same(layer, layer - 1, keys, queries):
                layers.append(layers[-1])
                continue
            last = these
            layers.append(
                layer_rows(
                    entering[layer],
                    read[layer],
                    entering[layer + 1],
                    keys[layer],
                    queries[layer],
                    wanted[layer],
                    wanted[layer + 1],
                    lineage.within(self.arch.windows[layer]),
                    self._goes_on,
                )
            )

        live = np.unique(rows[wanted[n_layers]])
        finals = renumbered(rows[scored], outputs[0][scored])
        _, first = np.unique(finals, return_index=True)
        node, graft = np.unravel_index(first, finals.shape)
        embedded = np.flatnonzero(wanted[0])
        _, first_embedded = np.unique(entering[0][embedded], return_index=True)
        place, of_graft = np.unravel_index(first_embedded, (len(embedded), len(grafts)))
        return TokenTree(
            parents=structure.parents,
            depths=lineage.depths,
            totals=np.array(structure.totals),
            embed_nodes=embedded[place],
            embed_choices=inputs[0][embedded[place], of_graft],
            layers=tuple(layers),
            final_rows=np.searchsorted(live, rows[scored][node, graft]),
            final_choices=outputs[0][scored[node], graft],
            final_nodes=scored[node],
            scored=structure.scored,
            outputs=finals,
        )


@dataclass(frozen=True, eq=False)
class Piece:
    """Some grafts of a structure, by number, and their tree.

    Attributes:
        columns: their columns in `tree.outputs`.
        references: the column of each reference run.
    """

    grafts: Int[np.ndarray, " graft"]
    tree: TokenTree
    columns: Int[np.ndarray, " graft"]
    references: Mapping[str, int]


def _why(rule: Rule, prompt: Tokenized) -> str:
    try:
        select(rule, prompt)
    except PromptError as error:
        return str(error)
    raise AssertionError(f"{rule} runs")


def _same(a: int, b: int, *choices: Int[np.ndarray, "layer node graft"]) -> bool:
    """Whether two layers make the same choices everywhere."""
    return all(np.array_equal(c[a], c[b]) for c in choices)
