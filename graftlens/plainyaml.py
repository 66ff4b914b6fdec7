"""YAML in which everything means what it looks like, with a size that is known before it is built.

PyYAML reads YAML 1.1, which reads 1:30 in base 60 and 010 in base 8, takes the last of two equal
keys, and expands a few lines of aliases into a list that no memory can hold.
"""

import re
from typing import Any

import yaml

from graftlens.components import HALF, brief

#: Bounds of a YAML text: characters, levels of lists and mappings, and what aliases may add (in
#: characters), as every alias repeats its whole value.
MAX_CHARACTERS, MAX_DEPTH, MAX_ALIASED = 10_000_000, 100, 1_000_000

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, but anything that it would read differently from what is written is an
    error.

    These are a key that appears twice, and numbers that are not plain decimal ones: YAML 1.1 reads
    1:30 in base 60 and 010 in base 8. A date is text.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth, self.aliased = 0, 0
        self.sizes: dict[yaml.Node, int] = {}  # in characters, aliases counted as their values

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            found = super().compose_node(parent, index)
            if found not in self.sizes:
                raise _refused(event, f"the alias *{event.anchor} is inside its own value")
            self.aliased += self.sizes[found]
            if self.aliased > MAX_ALIASED:
                raise _refused(
                    event,
                    f"the aliases up to *{event.anchor} expand to more than {MAX_ALIASED:,} "
                    "characters. Use fewer of them",
                )
            return found
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", *_PLAIN_TAGS):
            raise _refused(
                event,
                f"could not determine a constructor for the tag {tag!r}: only plain values can be "
                "read. Leave the tag out",
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _refused(
                event, f"lists and mappings are nested more than {MAX_DEPTH} levels deep"
            )
        before = self.aliased
        node = super().compose_node(parent, index)
        self.depth -= 1
        assert node is not None
        written = node.end_mark.index - node.start_mark.index
        self.sizes[node] = written + 1 + self.aliased - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, because merging (`<<`) adds keys again, which a mapping's own keys replace.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(key, "a list or a mapping cannot be a key. Write text")
            if key.value in seen:
                raise _refused(key, f"the key {brief(key.value)} appears twice")
            seen.add(key.value)
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if isinstance(text, str) and HALF.search(text):
            # JSON-style escapes may write a character as two halves.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return text

    def plain_whole(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if not _WHOLE.fullmatch(text):
            raise _refused(
                node,
                f"{brief(text)} is not a plain decimal number, and YAML readers disagree on what "
                "it is. Write only digits, without a leading 0, _ or : (a range is 1-3), or "
                "put it in quotes if it is text",
            )
        if len(text) > 20 or abs(int(text)) >= 2**63:
            raise _refused(node, f"{brief(text)} is too large a number: 2^63 - 1 is the largest")
        return int(text)

    def plain_decimal(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node)
        if not _DECIMAL.fullmatch(text):
            raise _refused(
                node,
                f"{brief(text)} is not a plain decimal number. Write one such as 0.5 or 3e-4, or "
                "put it in quotes if it is text",
            )
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


# Also what YAML 1.1 takes for text, though it is a number to other readers: 08, 0o17.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?0([0-9_]+|[oO][0-7_]+)$"), list("-+0")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.plain_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.plain_decimal)
_AS_TEXT = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in _AS_TEXT]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}


def _refused(at: Any, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=at.start_mark)


def load(text: str) -> Any:
    """Plain values of a YAML text.

    A number is a plain decimal one; a date is text; aliases and merging (`<<`) work as in YAML 1.1,
    and so do its booleans (yes, no, on, off).

    Raises:
        yaml.YAMLError: text that is not YAML, or that would not be read as it is written: a key
        that
            appears twice or is not text, numbers such as 1:30, 010, 0x1F and 1_000, tags; or text
            that is nested too deeply, or longer than any config.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(
            f"{len(text):,} characters, which is more than the {MAX_CHARACTERS:,} of a config"
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        start = before.rfind("\n") + 1
        line, column = before.count("\n"), len(before) - start
        mark = yaml.Mark("the text", error.position, line, column, None, 0)
        what = f"the character {chr(error.character)!a} is not allowed in YAML. Remove it"
        raise yaml.MarkedYAMLError(problem=what, problem_mark=mark) from None
