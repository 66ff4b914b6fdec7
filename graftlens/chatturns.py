"""Where each message of a conversation begins and ends, with the markers that a template writes.

A chat template is a program that goes through the messages. It is run again, and says at the
beginning of each round of its loops which message it is at: what a round writes is that message's
turn. Only where a template writes a message outside of its loops, or two turns in one round, is
what it writes compared with what it writes of other messages.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from typing import Any, NoReturn, Protocol, runtime_checkable

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from graftlens.chat import REASONING

#: What is written at none of the messages; at one that the template made itself.
OUTSIDE, FOREIGN = -1, -2

#: What a followed template calls at a loop's beginning, at each round's, and at its end.
_ENTER, _AT, _LEFT = "_loop_entered", "_loop_at", "_loop_left"


@runtime_checkable
class Rendering(Protocol):
    """A conversation under one template, and what is known of its characters.

    Attributes:
        tokenizer: whose template it is.
        source: the template.
        given: the conversation's tools and template options.
        plain: what the template writes.
        messages: the conversation, a given beginning of the answer included.
        marks: characters that the conversation lacks.
        open: the last message goes on.
        prompted: a generation prompt follows.
    """

    tokenizer: Any
    given: dict[str, Any]
    plain: str
    messages: list[Any]
    marks: list[str]
    open: bool
    prompted: bool

    @property
    def source(self) -> str: ...


@dataclass(frozen=True)
class _Region:
    """What is written at one message, or between the loops.

    Attributes:
        number: the message's number, or OUTSIDE or FOREIGN.
        start, end: where, in the text.
        text: what.
    """

    number: int
    start: int
    end: int
    text: str


class Turns:
    """The turns of a conversation whose characters' messages are known."""

    def __init__(self, rendering: Rendering, owners: Sequence[int]) -> None:
        self.of, self.plain, self.owners = rendering, rendering.plain, owners
        self.messages = rendering.messages
        #: A message's number -> its first character.
        self.first = {owner: i for i, owner in reversed([*enumerate(owners)]) if owner >= 0}
        count = len(self.messages) + 8
        self.mark, self.bos, self.outside, self.foreign, *self.rounds = rendering.marks[:count]

    def found(self) -> tuple[tuple[int, int], ...] | None:
        """(start, end) of each message with its markers, the generation prompt last.

        What the template writes before the first message (a default system prompt, tools) is in no
        turn, unless it writes it as that message's beginning. None where a message's end cannot be
        told.
        """
        regions = self.whole()
        if regions is None:
            return None
        turns: list[_Region] = []
        for region in regions:
            inside, number = self.inside(region), region.number
            if number >= 0 and (number in inside or number not in self.first):
                turns.append(region)
            elif inside:
                more = self.apart(replace(region, number=OUTSIDE), inside)
                if more is None:
                    return None
                turns += more
            elif turns and region is not regions[-1]:
                turns[-1] = self.cut(turns[-1], turns[-1].start, region.end)
        if not turns:
            return ()
        numbers = [turn.number for turn in turns if turn.number >= 0]
        if len({*numbers}) < len(numbers):
            return None  # a message is written in two places
        turns[0] = self.without_preamble(turns[0])
        self.give_back(turns)
        more = self.prompt(turns[-1], regions[-1])
        if more is None:
            return None
        return tuple((t.start, t.end) for t in [*turns[:-1], *more] if t.start < t.end)

    # -- what the template writes, round by round --------------------------------------------------

    def follow(
        self, messages: Sequence[Mapping[str, Any]], *, prompted: bool = False
    ) -> list[_Region] | None:
        """What the template writes at each message; None where it refuses them."""
        given = as_seen(messages)
        loops: list[int | None] = []

        def enter() -> str:
            loops.append(None)
            return ""

        def at(item: Any, *lists: Any) -> str:
            if isinstance(item, int):  # `messages[i]`
                found = (
                    one[item] for one in lists if isinstance(one, list) and 0 <= item < len(one)
                )
                item = next((message for message in found if isinstance(message, Mapping)), None)
            number = next((i for i, message in enumerate(given) if message is item), None)
            if number is None and isinstance(item, Mapping) and "role" in item:
                number = FOREIGN
            loops[-1] = number
            return "" if number is None else self.written_at(number)

        def left() -> str:
            if loops.pop() is None:
                return ""
            return self.written_at(next((n for n in reversed(loops) if n is not None), OUTSIDE))

        words = self.of.tokenizer.special_tokens_map
        if words.get("bos_token"):
            words = {**words, "bos_token": words["bos_token"] + self.bos}
        more = {**words, **self.of.given["template_options"], "add_generation_prompt": prompted}
        more |= {_ENTER: enter, _AT: at, _LEFT: left}
        text = write(self.of.source, given, self.of.given["tools"], more)
        return None if text is None else list(self.regions(text))

    def written_at(self, number: int) -> str:
        """The mark of a message's beginning."""
        return {OUTSIDE: self.outside, FOREIGN: self.foreign}.get(number) or self.rounds[number]

    def regions(self, text: str) -> Iterator[_Region]:
        """The regions of a text with marks."""
        numbers = {mark: i for i, mark in enumerate(self.rounds)}
        numbers |= {self.outside: OUTSIDE, self.foreign: FOREIGN}
        number, pieces = OUTSIDE, list[tuple[int, str]]()
        for character in text:
            if character in numbers:
                number = numbers[character]
            else:
                pieces.append((number, character))
        start = 0
        for number, found in groupby(pieces, key=lambda piece: piece[0]):
            written = "".join(character for _, character in found)
            end = start + len(written.replace(self.bos, ""))
            yield _Region(number, start, end, written)
            start = end

    def whole(self) -> list[_Region] | None:
        """The conversation's regions; None where they are not what the template wrote."""
        for _ in range(2):  # the time may have changed
            regions = self.follow(self.messages, prompted=self.of.prompted) or []
            text, length = self.text(regions), len(self.plain)
            if text == self.plain or (self.of.open and text.startswith(self.plain)):
                kept = [r for r in self.after_bos(regions) if r.start < length]
                return [self.cut(r, r.start, min(r.end, length)) for r in kept]
        return None

    def text(self, regions: Sequence[_Region]) -> str:
        """What regions say together."""
        return "".join(region.text for region in regions).replace(self.bos, "")

    def after_bos(self, regions: Sequence[_Region]) -> Iterator[_Region]:
        """The regions without the BOS token that begins the text, which belongs to none."""
        for region in regions:
            before, bos, _ = region.text.partition(self.bos)
            if region.start or region.number >= 0 or not bos or before != self.written_bos:
                yield region
            elif region.end > len(before):
                yield replace(region, start=len(before), text=region.text[len(before) + 1 :])

    @cached_property
    def written_bos(self) -> str:
        """The BOS token's text."""
        return str(self.of.tokenizer.special_tokens_map.get("bos_token") or "")

    def cut(self, region: _Region, start: int, end: int) -> _Region:
        """A region with other ends."""
        return replace(region, start=start, end=end, text=self.plain[start:end])

    # -- messages outside of loops -----------------------------------------------------------------

    def inside(self, region: _Region) -> list[int]:
        """The messages whose texts are in a region, in the order of the text."""
        here = {*self.owners[region.start : region.end]} - {-1}
        places = {number: self.first[number] for number in here}
        if region.number == OUTSIDE:
            blank = self.blank.items()
            places |= {n: place for n, place in blank if region.start <= place <= region.end}
        return sorted(places, key=lambda number: (places[number], number))

    @cached_property
    def blank(self) -> dict[int, int]:
        """Where messages without a character would be that are written outside of loops."""
        found = {}
        for number, message in enumerate(self.messages):
            said = message.get("content")
            if isinstance(said, str) and not said.strip() and number not in self.first:
                regions = self.follow(self.with_mark(number), prompted=self.of.prompted) or []
                text = self.text(regions)
                place = text.find(self.mark)
                here = next((r for r in regions if self.mark in r.text), None)
                if here and here.number == OUTSIDE and self.plain.startswith(text[:place]):
                    found[number] = place
        return found

    def apart(self, region: _Region, inside: Sequence[int]) -> list[_Region] | None:
        """The turns of messages that are written in one region outside of loops.

        A message begins a turn of its own where it begins as it does in a loop; else the template
        has merged it with the one before.
        """
        starts, number = [region.start], inside[0]
        if self.messages[number]["role"] != "system" and (head := self.head(number) or "").strip():
            text = self.plain[region.start : self.first.get(number, region.start)]
            starts = [region.start + max(0, text.find(head))]  # after a default system prompt
        for before, after in pairwise(inside):
            own = [i + 1 for i in range(region.start, region.end) if self.owners[i] == before]
            low = max(own, default=self.blank.get(before, region.start))
            high = self.first[after] if after in self.first else self.blank[after]
            head, gap = self.head(after) or "", self.plain[low:high]
            if gap.strip() and not head.strip():
                return None
            if head.strip() and head in gap:
                starts.append(low + gap.index(head))
            number = after
        ends = [*starts[1:], region.end]
        found = [self.cut(region, a, b) for a, b in zip(starts, ends, strict=True)]
        return [*found[:-1], replace(found[-1], number=number)]

    # -- what is written beside a message ----------------------------------------------------------

    def with_mark(self, number: int, messages: Sequence[Any] | None = None) -> list[Any]:
        """The messages, one of which says nothing but a mark."""
        copied = list(self.messages if messages is None else messages)
        copied[number] = {**copied[number], "content": self.mark}
        return copied

    def around(self, messages: Sequence[Any], number: int) -> tuple[str, str] | None:
        """What is written before and after a message's content in its round: nothing where it is
        written elsewhere; None where the template refuses the messages."""
        regions = self.follow(self.with_mark(number, messages))
        if regions is None:
            return None
        text = self.text([region for region in regions if region.number == number])
        before, _, after = text.partition(self.mark)
        return (before, after) if text.count(self.mark) == 1 else ("", "")

    def head(self, number: int) -> str | None:
        """What begins a message like this one where it comes again; None if it cannot."""
        message = self.messages[number]
        other = "user" if message["role"] == "assistant" else "assistant"
        more = [{"role": other, "content": "x"}, message]
        found = self.around([*self.messages[: number + 1], *more], number + 2)
        return None if found is None else found[0]

    def without_preamble(self, turn: _Region) -> _Region:
        """The first turn without what is written before it because it is the first: a default
        system prompt, tools."""
        if turn.number < 0 or self.messages[turn.number]["role"] == "system":
            return turn
        found, head = self.around(self.messages, turn.number), self.head(turn.number)
        if found is None or not (head or "").strip() or not turn.text.startswith(found[0]):
            return turn
        start = turn.start + len(found[0]) - len(str(head))
        merged = any(owner >= 0 for owner in self.owners[turn.start : start])
        if merged or not found[0].endswith(str(head)):
            return turn
        return self.cut(turn, start, turn.end)

    def tail(self, turn: _Region) -> str:
        """What is written after a message in its round."""
        own = [i for i in range(turn.start, turn.end) if self.owners[i] >= 0]
        if own:
            return self.plain[own[-1] + 1 : turn.end]
        found = self.around(self.messages, turn.number) if turn.number >= 0 else None
        return found[1] if found and turn.text.endswith(found[1]) else ""

    def give_back(self, turns: list[_Region]) -> None:
        """Move what a round writes of another turn: the assistant's marker after the user's text,
        the end of a tool's answer before the next message."""
        for place in range(len(turns) - 1):
            one, other = turns[place : place + 2]
            end = one.end
            if other.number >= 0 and self.messages[other.number]["role"] == "assistant":
                end -= len(self.asks(one, other.number))
            if one.number >= 0 and self.messages[one.number]["role"] == "tool":
                closed = self.closed(one.number)
                end += len(closed) if other.text.startswith(closed) else 0
            if end != one.end:
                turns[place] = self.cut(one, one.start, end)
                turns[place + 1] = self.cut(other, end, other.end)

    def asks(self, turn: _Region, number: int) -> str:
        """The assistant's marker at a turn's end, where its own round begins with its text.

        Args:
            turn: the turn before.
            number: that of the assistant's message.
        """
        found = self.around([*self.messages[:number], {"role": "assistant"}], number)
        tail = self.tail(turn)
        if found is None or found[0] or not found[1].strip() or not tail.startswith(found[1]):
            return ""
        return tail[len(found[1]) :]

    def closed(self, number: int) -> str:
        """What is written after the loop where a tool's answer is the last message, and is not
        where another is."""
        earlier = [i for i, m in enumerate(self.messages[:number]) if m["role"] == "user"]
        if not earlier:
            return ""
        one, other = (
            self.follow(self.messages[: n + 1]) or [_Region(OUTSIDE, 0, 0, "")]
            for n in (number, earlier[-1])
        )
        ends = [r[-1].text if r[-1].number == OUTSIDE else "" for r in (one, other)]
        return "" if ends[0] == ends[1] else ends[0]

    def prompt(self, last: _Region, end: _Region) -> list[_Region] | None:
        """The last message's turn, and the generation prompt's if there is one.

        Args:
            last: the last turn, as far as it is known.
            end: the last region, which follows it or is it.
        """
        after = self.plain[last.end :]
        whole = self.cut(last, last.start, len(self.plain))
        if not self.of.prompted:
            return [whole]
        usual = [*self.after_bos(self.follow(self.messages) or [])] or [_Region(FOREIGN, 0, 0, "")]
        before = self.text(usual[-1:])
        own = last.end
        if after:
            unasked = before if usual[-1].number == OUTSIDE else ""
            if after != unasked:
                own += len(unasked) if after.startswith(unasked) else 0
            elif after.strip() in ("", self.of.tokenizer.eos_token):
                return [whole]  # it ends every conversation
        elif usual[-1].number == end.number and before != end.text:
            if not end.text.startswith(before):
                return None
            own = end.start + len(before)
        elif asks := self.asks(last, len(self.messages)):
            own -= len(asks)
        return [self.cut(last, last.start, own), self.cut(end, own, len(self.plain))]


def as_seen(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """New messages, their reasoning under each name: as transformers gives them to a template."""
    given: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for message in given:
        thought = next((message[n] for n in REASONING if message.get(n) is not None), None)
        if thought is not None:
            message.update({"thinking": thought} | message | {REASONING[0]: thought})
    return given


def write(
    source: str, messages: Sequence[Mapping[str, Any]], tools: Any, more: Mapping[str, Any]
) -> str | None:
    """What a chat template writes; None where it refuses the messages.

    Args:
        source: the template.
        messages: as it sees them.
        tools: likewise.
        more: what else it reads; a function `strftime_now` gives it another day.
    """
    silent = dict.fromkeys((_ENTER, _AT, _LEFT), lambda *_: "")
    known = {"documents": None} | silent | dict(more) | {"messages": messages, "tools": tools}
    try:
        return _followed(source).render(known)
    except Exception:  # a template raises whatever its author wrote
        return None


def reads(source: str) -> set[str]:
    """The names of what a chat template reads and does not set before."""
    return meta.find_undeclared_variables(_environment().parse(source))


class _Loops(NodeTransformer):
    """Has a template say at each round of its loops which message it is at.

    A loop may go through the messages, or through their numbers.
    """

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.generic_visit(node)
        target = node.target
        at: list[nodes.Expr] = [nodes.Const(None)]
        if isinstance(target, nodes.Name):
            indexed = {
                found.node.name
                for found in node.find_all(nodes.Getitem)
                if isinstance(found.node, nodes.Name)
                and isinstance(found.arg, nodes.Name)
                and found.arg.name == target.name
            }
            at = [nodes.Name(name, "load") for name in (target.name, *sorted(indexed))]
        node.body.insert(0, _said(_AT, *at))
        return [_said(_ENTER), node, _said(_LEFT)]


def _said(function: str, *arguments: nodes.Expr) -> nodes.Output:
    return nodes.Output([nodes.Call(nodes.Name(function, "load"), [*arguments], [], None, None)])


class _Generation(Extension):
    """The tag by which templates say what an assistant generates; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@lru_cache(maxsize=32)
def _followed(source: str) -> Template:
    """A chat template that says where it is; what it writes is compared with the original's."""
    environment = _environment()
    tree = _Loops().visit(environment.parse(source))
    tree.set_environment(environment)
    return environment.from_string(tree)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers has it for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
