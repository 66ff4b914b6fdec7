"""Conversations: which message each token is from, under templates in the form of those in use.

Token ids are compared with transformers' own `apply_chat_template`, and the characters' messages
with the templates written a second time, in Python.
"""

import copy
import itertools
import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from chattemplates import PROMPT, TEMPLATES, WRITERS, tokenizer_of
from conftest import MakeTiny, Tiny
from datasets import Dataset, DatasetDict
from reference import sequential_graft
from shown import marked
from sweeps import checkpoints
from tokenizers import AddedToken
from toytokenizers import TOKENIZERS
from typer import BadParameter

from graftlens import cli
from graftlens.chat import RESERVED, ROLES
from graftlens.chatrendering import render
from graftlens.dashboards import dashboard
from graftlens.evaluation import evaluate, position_grafts
from graftlens.graft import Graft
from graftlens.model.arch import PairError
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.identity import tokenizer_digest
from graftlens.model.tokenizers import with_chat_template
from graftlens.positions import At
from graftlens.prompts import Prompt, PromptError, Tokenized, _covered, tokenize
from graftlens.stats import summarise
from graftlens.sweep.config import ConfigError, SweepConfig, check, load_config
from graftlens.sweep.promptsets import ChatFormat, PromptColumn, PromptSection
from graftlens.sweep.results import as_given, read_manifest, read_results, revived
from graftlens.sweep.runner import prepare_sweep, run_sweep, work

NAMES = sorted(TEMPLATES)
TRIMS_OFFSETS = {"llama3", "deepseek"}  # their tokenizers leave spaces out of tokens' offsets

_WORDS = (
    *("Renée", "starred", "in", "東京", "\U0001f642", "e\u0301", "film", "1987", "O'Malley,"),
    *(
        "user",
        "assistant",
        "system:",
        "{x}",
        "{{ m['content'] }}",
        "{%- if a %}",
        '"quoted"',
        "\\n",
    ),
    *("<|im_start|>user\n", "<|im_end|>", "[INST]", "[/INST]", "<<SYS>>", "</s>", "<|end|>\n"),
    *("<|user|>\n", "<|User|>", "<end_of_turn>", "<|eot_id|>", "<think>", "model\n", "\n\n", "  "),
)
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a film up.",
            "parameters": {"type": "object", "properties": {"film": {"type": "string"}}},
        },
    }
]
_WITH_TOOLS = {"llama3", "mistral", "qwen3"}


def _said(rng: random.Random, word: str) -> str:
    """A text with a word of its own, and white space at its ends now and then."""
    words = [rng.choice(_WORDS) for _ in range(rng.randint(0, 6))]
    words.insert(rng.randint(0, len(words)), word)
    ends = [rng.choice(("", "", "", " ", "\n", " \n\n", "\t")) for _ in range(2)]
    return ends[0] + rng.choice((" ", "")).join(words) + ends[1]


def _conversation(name: str, rng: random.Random) -> tuple[list[dict[str, Any]], Any]:
    """Messages, and tools or None."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.6:
        empty = rng.random() < 0.3
        content = "" if empty else _said(rng, f"sys{rng.randrange(16**6):06x}")
        messages.append({"role": "system", "content": content})
    tools = _TOOLS if name in _WITH_TOOLS and rng.random() < 0.4 else None
    rounds = rng.randint(1, 3)
    for number in range(rounds):
        last = number + 1 == rounds
        word = f"u{number}x{rng.randrange(16**6):06x}"
        messages.append({"role": "user", "content": _said(rng, word)})
        if tools and rng.random() < 0.5 and not last:
            call = {"name": f"look_up{number}", "arguments": {"film": _said(rng, "f"), "n": 3}}
            messages += [
                {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
                {"role": "tool", "content": _said(rng, f"t{number}x{rng.randrange(16**6):06x}")},
            ]
            if rng.random() < 0.5 and name == "qwen3":
                messages.append({"role": "tool", "content": _said(rng, f"again{number}")})
        elif last and rng.random() < 0.7:
            break
        answer = {
            "role": "assistant",
            "content": _said(rng, f"a{number}x{rng.randrange(16**6):06x}"),
        }
        if name in ("qwen3", "deepseek") and not last and rng.random() < 0.5:
            answer["content"] = (
                f"<think>\nHm, {rng.choice(_WORDS)}\n</think>\n\n{answer['content']}"
            )
        if name == "qwen3" and last and rng.random() < 0.5:
            answer["reasoning_content"] = _said(rng, "thought")
        messages.append(answer)
    if rng.random() < 0.2 and len(messages) > 2:  # messages that say the same
        same = messages[-1].get("content")
        for m in messages:
            if m["role"] == messages[-1]["role"] and "content" in m and same is not None:
                m["content"] = same
    return messages, tools


def _check(name: str, messages: list[dict[str, Any]], tools: Any) -> Tokenized:
    tokenizer = tokenizer_of(name)
    prompted = messages[-1]["role"] != "assistant"
    prompt = Prompt.chat(messages, tools=tools)
    tokens = tokenize(prompt, tokenizer)
    # The ids are Hugging Face's.
    theirs = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompted)
    assert list(tokens.ids) == theirs["input_ids"]
    # Every token has exactly one role.
    roles = [r for r in (*ROLES, "template") if r in tokens.spans]
    counts = Counter(i for role in roles for run in tokens.spans[role] for i in run)
    assert counts == dict.fromkeys(range(len(tokens)), 1)
    # Each character's message, as the template written in Python has it.
    pieces = WRITERS[name](messages, tools, prompted)
    assert tokens.text == "".join(text for text, _, _ in pieces)
    owners = [owner for text, owner, _ in pieces for _ in text]
    assert prompt.conversation is not None
    rendered = render(prompt.conversation, tokenizer)
    assert list(rendered.owners) == [-1 if owner is None else owner for owner in owners]
    # A token with any character of a message's is that message's role's.
    offsets = tokenizer(tokens.text, add_special_tokens=False, return_offsets_mapping=True)
    role_of = {i: role for role in roles for run in tokens.spans[role] for i in run}
    for i, (a, b) in enumerate(offsets["offset_mapping"]):
        here = {owners[c] for c in range(a, b)} - {None}
        assert len(here) <= 1
        if here or name not in TRIMS_OFFSETS:
            expected = messages[here.pop()]["role"] if here else "template"
            assert role_of[i] == expected, (i, tokens.text[a:b])
    # What a message says is contained in the text of its run, and of no other message's.
    for number, m in enumerate(messages):
        runs = tokens.spans.get(m["role"], ())
        own = [n for n, other in enumerate(messages) if other["role"] == m["role"]]
        said = [text for text, owner, _ in pieces if owner == number and text.strip()]
        if said:
            run = runs[own.index(number)]
            spans = [offsets["offset_mapping"][i] for i in run if offsets["offset_mapping"][i][1]]
            covered = tokens.text[min(a for a, _ in spans) : max(b for _, b in spans)]
            assert all(text.strip() in covered for text in said)
    # Turns.
    written: dict[Any, list[int]] = {}
    for place, turn in enumerate(turn for text, _, turn in pieces for _ in text):
        if turn is not None:
            written.setdefault(turn, []).append(place)
    assert [*rendered.turns] == [(min(p), max(p) + 1) for p in written.values()]
    assert (PROMPT in written) == (prompted and name not in ("llama2", "mistral"))
    for (_, end), (start, _) in itertools.pairwise(rendered.turns):
        assert end == start
    return tokens


def _many(name: str, count: int) -> None:
    for number in range(count):
        rng = random.Random(f"{name} {number}")
        messages, tools = _conversation(name, rng)
        if (
            name == "mistral"
            and messages[-1]["role"] == "assistant"
            and (messages[0]["role"] == "system" and messages[0]["content"].strip())
        ):
            # It writes the system prompt into a user turn that comes last, and else nowhere.
            with pytest.raises(PromptError, match=r"leaves out messages\[0\] \(system\)"):
                tokenize(Prompt.chat(messages, tools=tools), tokenizer_of(name))
            continue
        try:
            _check(name, messages, tools)
        except (PromptError, AssertionError) as error:
            raise AssertionError(f"{name} {number}: {messages}") from error


@pytest.mark.parametrize("name", NAMES)
def test_random_conversations(name: str) -> None:
    _many(name, 15)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_random_conversations(name: str) -> None:
    _many(name, 200)


# -- what a conversation is ------------------------------------------------------------------------

ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who starred with {first_entity}? Name {first_entity}'s partner."},
]


def _texts(tokens: Tokenized, span: str, name: str = "chatml") -> list[str]:
    decode = tokenizer_of(name).decode
    return [decode([tokens.ids[i] for i in run]) for run in tokens.spans[span]]


def test_fields_of_contents_are_spans() -> None:
    prompt = Prompt.chat(ASKED, fields={"first_entity": "Renée Zellner"}, answer="Anders")
    tokens = tokenize(prompt, tokenizer_of("chatml"))
    assert _texts(tokens, "first_entity") == [" Renée Zellner", " Renée Zellner"]
    assert _texts(tokens, "user") == [prompt.text.split("user: ")[1].split("\n\n")[0]]
    assert _texts(tokens, "turn") == [
        "<|im_start|>system\nBe brief.<|im_end|>\n",
        f"<|im_start|>user\n{_texts(tokens, 'user')[0]}<|im_end|>\n",
        "<|im_start|>assistant\n",
    ]
    assert prompt.text == (
        "system: Be brief.\n\nuser: Who starred with Renée Zellner? Name Renée Zellner's partner."
        "\n\nassistant:"
    )
    assert prompt.template == prompt.text.replace("Renée Zellner", "{first_entity}")
    # Without fields, braces are literal.
    literal = Prompt.chat(ASKED)
    assert "{first_entity}" in str(tokenize(literal, tokenizer_of("chatml")).text)
    assert literal.text.count("{first_entity}") == 2


def test_conversations_are_values() -> None:
    made = [
        Prompt.chat(ASKED, fields={"first_entity": n}, prefill="{first_entity} and") for n in "ab"
    ]
    assert len({*made, Prompt.chat(ASKED, fields={"first_entity": "a"}, prefill=" it")}) == 3
    assert made[0] == Prompt.chat(ASKED, fields={"first_entity": "a"}, prefill="{first_entity} and")
    assert revived(as_given(made[0])) == made[0]
    messages = [dict(m) for m in ASKED]
    prompt = Prompt.chat(messages)
    messages[0]["content"] = "changed"
    assert prompt == Prompt.chat(ASKED)
    assert prompt.conversation is not None
    prompt.conversation.messages[0]["content"] = "changed"
    assert prompt == Prompt.chat(ASKED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefill", ["The lead is", "<think>\nHm"])
def test_a_prefill_is_the_begun_message_of_the_assistant(name: str, prefill: str) -> None:
    messages = [{"role": "user", "content": "Who?"}]
    tokenizer = tokenizer_of(name)
    tokens = tokenize(Prompt.chat(messages, prefill=prefill), tokenizer)
    whole = [*messages, {"role": "assistant", "content": prefill}]
    theirs = tokenizer.apply_chat_template(whole, continue_final_message=True)["input_ids"]
    assert list(tokens.ids) == theirs
    assert tokens.text is not None
    assert tokens.text.endswith(prefill)
    assert max(tokens.spans["assistant"][0]) == len(tokens) - 1
    assert set(tokens.spans["assistant"][-1]) <= set(tokens.spans["turn"][-1])


def test_assistant_tokens_are_those_of_the_templates_own_mask() -> None:
    """A template may say itself what is generated: the message, and the marker that ends it."""
    for name in ("chatml", "phi3"):
        tokenizer = tokenizer_of(name)
        for number in range(5):
            messages, _ = _conversation(name, random.Random(number))
            if messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": "So it is."})
            theirs = tokenizer.apply_chat_template(
                messages, return_assistant_tokens_mask=True, return_dict=True
            )
            tokens = tokenize(Prompt.chat(messages), tokenizer)
            generated = {i for i, said in enumerate(theirs["assistant_masks"]) if said}
            ours = {i for run in tokens.spans["assistant"] for i in run}
            template = {i for run in tokens.spans["template"] for i in run}
            if name == "chatml":  # the other's markers take in a message's first white space
                assert ours <= generated
            assert generated - ours <= template


def test_template_options_and_the_generation_prompt() -> None:
    question = [{"role": "user", "content": "Who?"}]
    tokenizer = tokenizer_of("qwen3")
    tokens = tokenize(Prompt.chat(question, template_options={"enable_thinking": False}), tokenizer)
    assert _texts(tokens, "turn", "qwen3")[-1] == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    chosen = At.parse("template & turn#-1").select(tokens.spans, len(tokens))
    assert list(np.flatnonzero(chosen)) == list(tokens.spans["turn"][-1])
    closed = Prompt.chat(question, template_options={"add_generation_prompt": False})
    assert (
        list(tokenize(closed, tokenizer).ids)
        == tokenizer.apply_chat_template(question)["input_ids"]
    )
    dated = Prompt.chat(question, template_options={"date_string": "1 May 2025"})
    assert "1 May 2025" in str(tokenize(dated, tokenizer_of("llama3")).text)


def test_runs_are_counted_from_both_ends() -> None:
    messages = [
        {"role": role, "content": text}
        for role, text in [("user", "one"), ("assistant", "two"), ("user", "three")]
    ]
    tokens = tokenize(Prompt.chat(messages), tokenizer_of("chatml"))

    def text(at: str) -> str:
        chosen = np.flatnonzero(At.parse(at).select(tokens.spans, len(tokens)))
        return tokenizer_of("chatml").decode([tokens.ids[i] for i in chosen])

    assert text("user#1") == text("user#-2") == "one"
    assert text("user#2") == text("user#-1") == "three"
    assert text("turn#-2 & ~user") == "<|im_start|>user\n<|im_end|>\n"
    assert text("user + assistant + template") == tokens.text
    with pytest.raises(ValueError, match="no occurrence user#-3: span 'user' occurs 2 time"):
        text("user#-3")


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral"])
def test_white_space_that_is_a_token_belongs_to_its_field(name: str) -> None:
    """A newline at a field's end was no token of the field's where offsets leave it out."""
    tokenizer = tokenizer_of(name)
    for space in ("\n", " ", "\n\n", "\t"):
        content = "Say {x}: now {x}"
        fields = {"x": f"Anders{space}"}
        prompts = [
            Prompt(content, fields),
            Prompt.chat([{"role": "user", "content": content}], fields=fields),
        ]
        for prompt in prompts:
            tokens = tokenize(prompt, tokenizer, prepend_bos=False)
            first = tokens.spans["x"][0]
            pieces = tokenizer.convert_ids_to_tokens([tokens.ids[i] for i in first])
            assert pieces[-1] in ("Ċ", "Ġ", "▁", "<0x0A>", "ĊĊ", "ĉ", "<0x09>"), (space, pieces)
            following = tokenizer.decode([tokens.ids[first[-1] + 1]])
            assert following.startswith(":")


def test_a_bos_token_that_begins_every_turn_is_in_the_turn() -> None:
    """SmolLM2's `<|im_start|>` is its BOS token, too; that of most templates stands alone."""
    tokenizer = copy.deepcopy(tokenizer_of("chatml"))
    tokenizer.bos_token = "<|im_start|>"
    tokens = tokenize(Prompt.chat(ASKED), tokenizer)
    assert _texts(tokens, "turn")[0] == "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tokens.spans["bos"] == ((0,),)
    tokens = tokenize(Prompt.chat(ASKED), tokenizer_of("gemma"))
    assert tokens.spans["turn"][0][0] == 1
    forced = tokenize(Prompt.chat(ASKED), tokenizer_of("chatml"), prepend_bos=True)
    assert forced.spans["turn"][0][0] == 1
    assert forced.spans["template"][0][:2] == (0, 1)


def test_contents_in_parts_and_tool_calls_as_text() -> None:
    template = (
        "{% for m in messages %}{% if m.content is string %}<{{ m.role }}>{{ m.content }}"
        "{% else %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}|{% endfor %}{% endif %}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }}{{ c.function.arguments }}]"
        "{% endfor %};{% endfor %}"
    )
    tokenizer = TOKENIZERS["gpt2"]()
    tokenizer.chat_template = template
    call = {"type": "function", "function": {"name": "ask", "arguments": '{"who": "Anders"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("Who is", "{x}?")]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Anders"},
    ]
    prompt = Prompt.chat(messages, fields={"x": "Anders"})
    tokens = tokenize(prompt, tokenizer)
    assert tokens.text == '<user>Who is|Anders?|;<assistant>[ask{"who": "Anders"}];<tool>Anders;'

    def said(span: str) -> list[str]:
        return ["".join(tokenizer.decode([tokens.ids[i] for i in r])) for r in tokens.spans[span]]

    assert said("user") == ["Who isAnders?"]
    assert said("assistant") == ['ask{"who": "Anders"}']
    assert said("tool") == said("x") == ["Anders"]
    assert prompt.template.startswith("user: Who is {x}?\n\nassistant:  [{{")


def test_white_space_after_a_word_is_the_tokens_where_offsets_leave_it_out() -> None:
    """Llama 3 has tokens such as `.\\n\\n`; offsets may be those of the full stop alone."""
    text, pieces = "Hm.\n\nSo ,\n b", ["H", "m", ".ĊĊ", "So", "Ġ,Ċ", "Ġb"]
    trimmed = [(0, 1), (1, 2), (2, 3), (5, 7), (8, 9), (11, 12)]
    whole = [(0, 1), (1, 2), (2, 5), (5, 7), (7, 10), (10, 12)]
    assert _covered(text, pieces, trimmed) == _covered(text, pieces, whole) == whole


USER = {"role": "user", "content": "Who?"}

# -- whose each character is, where templates change contents --------------------------------------

SMALL = "{% for m in messages %}[{{ m.role }}]{{ X }};{% endfor %}"
SAID = [
    {"role": "user", "content": "one\ntwo <is> Q"},
    {"role": "assistant", "content": "is it\nme"},
]


def _small(template: str, markers: Sequence[str] = (), manner: str = "gpt2") -> Any:
    tokenizer = TOKENIZERS[manner]()
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
    tokenizer.chat_template = template
    return tokenizer


def _owned(template: str, messages: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """What is written, and of it what each message owns."""
    conversation = Prompt.chat(messages).conversation
    assert conversation is not None
    rendered = render(conversation, _small(template))
    return rendered.text, [
        "".join(c for c, owner in zip(rendered.text, rendered.owners, strict=True) if owner == n)
        for n in range(len(messages))
    ]


@pytest.mark.parametrize(
    ("written", "owned"),
    [
        ("m.content|indent(4)", ["one\ntwo <is> Q", "is it\nme"]),
        ("m.content|replace('\\n', '\\n> ')", ["one\ntwo <is> Q", "is it\nme"]),
        ("m.content|replace('\\n', '> \\n')", ["one\ntwo <is> Q", "is it\nme"]),
        ("m.content|replace('\\n', '<br>')", ["one<br>two <is> Q", "is it<br>me"]),
        ("m.content|title", ["One\nTwo <Is> Q", "Is It\nMe"]),
        ("m.content|tojson", ["one\\ntwo <is> Q", "is it\\nme"]),
        ("m.content|e", ["one\ntwo &lt;is&gt; Q", "is it\nme"]),
    ],
)
def test_what_a_template_writes_inside_of_a_content_is_not_the_contents(
    written: str, owned: list[str]
) -> None:
    assert _owned(SMALL.replace("X", written), SAID)[1] == owned


@pytest.mark.parametrize(
    ("template", "said", "reason"),
    [
        ("{{ m.content|truncate(5) }}", SAID, r"leaves out messages\[0\] \(user\): .*, or a part"),
        ("{{ m.content[:9] }}", SAID, r"leaves out messages\[0\] \(user\)"),
        (
            "{{ m.content.split()|join(' ') }}",
            [{**USER, "content": "a  b"}],
            r"by the text of messages\[0\] \(user\)",
        ),
        (
            "{{ m.content if m.role != 'assistant' }}",
            SAID,
            r"leaves out messages\[1\] \(assistant\): 'is it\\nme'",
        ),
        (
            "{{ m.content + ' (short)' if m.content == 'is it\\nme' else m.content }}",
            SAID,
            r"by the text of messages\[1\] \(assistant\)",
        ),
        (
            "{{ m.content }}",
            [USER, {"role": "assistant", "content": [{"type": "text", "text": "content"}]}],
            r"writes the content of messages\[1\] \(assistant\) as a list",
        ),
        (
            "{{ m.tool_calls[0].name if m.tool_calls else m.content }}",
            [USER, {"role": "assistant", "content": "I ask", "tool_calls": [{"name": "ask"}]}],
            r"leaves out messages\[1\] \(assistant\): 'I ask'",
        ),
        (
            "{{ m.content }}",
            [USER, {"role": "assistant", "content": "Well", "reasoning_content": "Hm"}],
            r"leaves out reasoning_content of messages\[1\] \(assistant\): 'Hm'",
        ),
    ],
)
def test_contents_that_are_written_in_part_are_refused(
    template: str, said: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        _owned(SMALL.replace("{{ X }}", template), said)


@pytest.mark.parametrize("thought", ["abc", "\nabc\n", "\n\nabc\n\n", "", "\n"])
def test_the_markers_of_a_thought_are_the_templates_whatever_it_is(thought: str) -> None:
    said = [USER, {"role": "assistant", "content": f"<think>{thought}</think>\n\nSo"}]
    tokens = tokenize(Prompt.chat(said), tokenizer_of("qwen3"))
    assert _texts(tokens, "assistant", "qwen3") == [thought.strip() + "So"]
    as_written = tokenize(Prompt.chat(said), tokenizer_of("chatml"))
    assert _texts(as_written, "assistant") == [said[1]["content"]]


# -- where turns begin and end ---------------------------------------------------------------------

_MARKERS = ("<|im_start|>", "<|im_end|>", "<|return|>")
_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe.<|im_end|>\n{% endif %}"
_LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\nX{% endfor %}"
_ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_NOT_LAST = _LOOP.replace("X", "{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}")
_RETURNS = _LOOP.replace(
    "X",
    "{{ m.content }}{% if loop.last and m.role == 'assistant' and not add_generation_prompt %}"
    "<|return|>{% else %}<|im_end|>{% endif %}",
)
_TALK = [("user", "a"), ("assistant", "b"), ("user", "c")]
TURNS = [
    (_NOT_LAST + _ASKS, _TALK, "|<s>user\na<e>\n|<s>assistant\nb<e>\n|<s>user\nc|<s>assistant\n"),
    (
        _SYSTEM + _NOT_LAST + _ASKS,
        _TALK,
        "<s>system\nBe.<e>\n|<s>user\na<e>\n|<s>assistant\nb<e>\n|<s>user\nc|<s>assistant\n",
    ),
    (
        _SYSTEM + _RETURNS,
        _TALK[:2] * 2,
        "<s>system\nBe.<e>\n|<s>user\na<e>|<s>assistant\nb<e>|<s>user\na<e>"
        "|<s>assistant\nb<|return|>",
    ),
    (
        _LOOP.replace("X", "{{ m.content or '(empty)' }}<|im_end|>") + _ASKS,
        [("user", ""), ("assistant", "b"), ("user", "")],
        "|<s>user\n(empty)<e>|<s>assistant\nb<e>|<s>user\n(empty)<e>|<s>assistant\n",
    ),
    (
        _LOOP.replace("X", "{% if m.content %}{{ m.content }}{% endif %}<|im_end|>") + _ASKS,
        [("system", ""), ("user", "a"), ("assistant", ""), ("user", "")],
        "|<s>system\n<e>|<s>user\na<e>|<s>assistant\n<e>|<s>user\n<e>|<s>assistant\n",
    ),
    (  # The generation prompt is written, asked for or not.
        _LOOP.replace("X", "{{ m.content }}<|im_end|>") + "<|im_start|>assistant",
        _TALK,
        "|<s>user\na<e>|<s>assistant\nb<e>|<s>user\nc<e>|<s>assistant",
    ),
]


@pytest.mark.parametrize("number", range(len(TURNS)))
@pytest.mark.parametrize("markers", [_MARKERS, ()])
def test_turns_of_templates_whose_last_message_ends_otherwise(
    number: int, markers: tuple[str, ...]
) -> None:
    template, said, expected = TURNS[number]
    messages = [{"role": role, "content": content} for role, content in said]
    prompt = Prompt.chat(messages)
    tokenizer = _small(template, markers)
    assert prompt.conversation is not None
    rendered = render(prompt.conversation, tokenizer)
    assert rendered.turns is not None
    turns = [rendered.text[a:b] for a, b in rendered.turns]
    written = "|".join([rendered.text[: rendered.turns[0][0]], *turns])
    assert written.replace("<|im_start|>", "<s>").replace("<|im_end|>", "<e>") == expected


TOOLS_FIRST = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{{- '<|im_start|>system\\n' + system + '<|im_end|>' -}}
{%- if tools -%}
  {%- if not messages -%}{{- raise_exception('no user') -}}{%- endif -%}
  {{- '<|im_start|>user\\nFunctions: ' + tools | tojson + messages[0].content + '<|im_end|>' -}}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@pytest.mark.parametrize("system", [True, False])
def test_tools_in_the_first_users_message_are_in_its_turn(system: bool) -> None:
    """As Llama 3.1 writes them."""
    messages = [{"role": role, "content": content} for role, content in _TALK]
    if system:
        messages.insert(0, {"role": "system", "content": "Be."})
    prompt = Prompt.chat(messages, tools=_TOOLS)
    assert prompt.conversation is not None
    rendered = render(prompt.conversation, _small(TOOLS_FIRST, _MARKERS))
    assert rendered.turns is not None
    turns = [rendered.text[a:b] for a, b in rendered.turns]
    assert [turn.split("\n")[0].removeprefix("<|im_start|>") for turn in turns] == [
        *(["system"] if system else []),
        *("user", "assistant", "user", "assistant"),
    ]
    assert all(turn.endswith("<|im_end|>") for turn in turns[:-1])
    assert turns[system].startswith("<|im_start|>user\nFunctions: [{")


def test_turns_beside_contents_that_the_template_looks_for() -> None:
    said = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "thought"},
        {"role": "user", "content": "<tool_response>x</tool_response>"},
    ]
    tokens = tokenize(Prompt.chat(said), tokenizer_of("qwen3"))
    assert _texts(tokens, "turn", "qwen3") == [
        "<|im_start|>user\na<|im_end|>\n",
        "<|im_start|>assistant\n<think>\nthought\n</think>\n\nb<|im_end|>\n",
        "<|im_start|>user\n<tool_response>x</tool_response><|im_end|>\n",
        "<|im_start|>assistant\n",
    ]


def test_an_empty_message_has_no_token_to_graft() -> None:
    said = [{"role": "user", "content": content} for content in ("", "a")]
    tokens = tokenize(Prompt.chat(said), tokenizer_of("chatml"))
    assert At.parse("user").select(tokens.spans, len(tokens)).sum() == 1
    with pytest.raises(ValueError, match="user#1 holds no token: that message is empty"):
        At.parse("user#1").select(tokens.spans, len(tokens))


# -- what is refused, and how ----------------------------------------------------------------------

BEGUN = {"role": "assistant", "content": "I"}
BAD = [
    ([], {}, r"messages=\[\]: a conversation has one message or more"),
    ([{"content": "a"}], {}, r"messages\[0\] is .*Write \{\"role\": \"user\""),
    ([{"role": "usr", "content": ""}], {}, r"role='usr' is unknown\. .*Did you mean 'user'\?"),
    ([USER, {"role": "user"}], {}, r"messages\[1\]: no content"),
    ([{"role": "user", "content": 3}], {}, r"messages\[0\]: content=3\. Write a text, or a list"),
    ([{"role": "user", "content": [{"type": "image"}]}], {}, "other kinds of content are not"),
    ([USER], {"prefill": ""}, "prefill='': write how the assistant's answer begins"),
    ([USER, BEGUN], {"prefill": "am"}, "the last message is already the assistant's"),
    ([USER], {"template_options": {"tokenize": False}}, "'tokenize' is not an option of a"),
    ([USER], {"template_options": {"when": {1, 2}}}, "hold JSON values only"),
    ([{"role": "user", "content": "{x"}], {"fields": {"x": "a"}}, "is malformed"),
    ([{"role": "user", "content": "{y}"}], {"fields": {"x": "a"}}, "needs the field 'y'"),
    ([{"role": "user", "content": "a \ud800"}], {}, "half of a surrogate pair"),
    ([{"role": "developer", "content": ""}], {}, "What a developer says is the system's"),
    ([{"from": "human", "value": "a"}], {}, "Rename from to role, value to content"),
    ([{**USER, "thinking": ["a"]}], {}, r"messages\[0\]: thinking=\['a'\]\. Write a text"),
    ([USER], {"template_options": {"self": 1}}, "'self' is not an option of a template"),
    ([{**USER, "tool_calls": "abc"}], {}, r"messages\[0\]: tool_calls='abc'\. Write a list"),
    ([{**USER, "tool_calls": [1]}], {}, r"messages\[0\]: tool_calls=\[1\]\. Write a list"),
]


@pytest.mark.parametrize(("messages", "more", "said"), BAD)
def test_malformed_conversations_are_refused(
    messages: Any, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Prompt.chat(messages, **more)


@pytest.mark.parametrize("name", RESERVED)
def test_no_field_has_the_name_of_a_conversations_span(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is a span of conversations"):
        Prompt(f"Ask {{{name}}}.", {name: "a"})
    with pytest.raises(ValueError, match=rf"'{name}' is a span of conversations"):
        Prompt.chat([USER], fields={name: "a"})  # though nothing uses it


_FIRST, _SECOND = "messages[0].content", "messages[1].content"
UNFOLLOWED = [
    (None, "has no chat template, so it cannot write a conversation"),
    ("{{ raise_exception('one only') }}", "refuses this conversation: one only"),
    (f"{{{{ {_FIRST} + {_FIRST} }}}}", r"a text of messages\[0\] \(user\) more than once"),
    (f"{{{{ {_FIRST} }}}}", r"leaves out messages\[1\] \(system\): 'Be brief\.'"),
    (
        f"{{% if {_FIRST} == 'Who are you?' %}}Who am I?{{% endif %}}",
        r"leaves out messages\[0\] \(user\): 'Who are you\?'",
    ),
    (
        f"{{{{ {_SECOND}[:3] + {_FIRST} + {_SECOND}[3:] }}}}",
        r"decides by the text of messages\[1\] \(system\) what to write",
    ),
    (
        f"{{{{ {_SECOND}.split(' ')[0] + '; ' + {_FIRST} + '; ' + {_SECOND}.split(' ')[1] }}}}",
        r"mixes the texts of messages\[0\] and messages\[1\]",
    ),
    (f"{{{{ {_FIRST} + {_SECOND} }}}}", "holds characters of messages 0 and 1"),
]


@pytest.mark.parametrize(("template", "said"), UNFOLLOWED)
def test_templates_that_cannot_be_followed(template: str | None, said: str) -> None:
    tokenizer = TOKENIZERS["gpt2"]()
    tokenizer.chat_template = template
    tokenizer.add_tokens(["you?Be"])
    prompt = Prompt.chat(
        [
            {"role": "user", "content": "Who are you?"},
            {"role": "system", "content": "Be brief."},
        ]
    )
    with pytest.raises(PromptError, match=said):
        tokenize(prompt, tokenizer)


def test_a_field_that_the_template_drops_is_refused() -> None:
    messages = [
        USER,
        {"role": "assistant", "content": "<think>\n{thought}</think>\n\nWell."},
        USER,
    ]
    prompt = Prompt.chat(messages, fields={"thought": "Hm"})
    with pytest.raises(PromptError, match="the chat template leaves out the field 'thought'"):
        tokenize(prompt, tokenizer_of("qwen3"))
    assert _texts(tokenize(prompt, tokenizer_of("chatml")), "thought") == ["Hm"]


def test_fields_of_reasoning_are_spans_and_those_of_tool_calls_are_refused() -> None:
    said = [USER, {"role": "assistant", "content": "So", "reasoning_content": "Hm {x}"}]
    tokens = tokenize(Prompt.chat(said, fields={"x": "Ann"}), tokenizer_of("qwen3"))
    assert _texts(tokens, "x", "qwen3") == ["Ann"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"k": "{x}"}}}
    said = [USER, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(PromptError, match=r"messages\[1\]: .* a tool call holds \{x\}"):
        tokenize(Prompt.chat(said, fields={"x": "Ann"}), tokenizer_of("qwen3"))


def test_contents_may_hold_characters_that_mark() -> None:
    said = "".join(map(chr, range(0xF0000, 0xFFFFE, 16))) + "".join(
        map(chr, range(0xF0002, 0xF0040))
    )
    assert _owned(SMALL.replace("X", "m.content"), [{"role": "user", "content": said}])[1] == [said]


# -- a grafted conversation ------------------------------------------------------------------------


SHORT = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tiny: MakeTiny) -> Tiny:
    """A tiny pair whose tokenizer has a chat template without tokens of its own."""
    pair = tiny("llama", tokenizer="gpt2")
    pair.model.tokenizer = copy.copy(pair.model.tokenizer)
    pair.model.tokenizer.chat_template = SHORT
    return pair


TALK = Prompt.chat(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who saw {first_entity}?"},
        {"role": "assistant", "content": "José"},
        {"role": "user", "content": "Who else?"},
    ],
    fields={"first_entity": "Anders"},
    answer=" Robert",
    distractors=[" Mary"],
)


_GROUPS = {"attn": {"q", "k", "v", "o"}, "mlp": {"mlp_in", "mlp_gate", "mlp_out"}}


@pytest.mark.parametrize(
    "graft",
    [
        "sft @ system",
        "sft @ ~system : attn",
        "sft @ user#-1 : v + o | sft @ template : mlp",
        "sft @ template & turn#-1",
        "sft @ assistant + first_entity : q + mlp_in : 1",
    ],
)
def test_a_grafted_conversation_is_the_sequential_algorithm(chatty: Tiny, graft: str) -> None:
    model = chatty.model
    (tokens,) = model.tokenized(TALK)
    rules = Graft.parse(graft).rules
    chosen = [set(np.flatnonzero(r.at.select(tokens.spans, len(tokens)))) for r in rules]

    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        source = "pre"
        for rule, positions in zip(rules, chosen, strict=True):
            here = position in positions
            named = {part for word in rule.components for part in _GROUPS.get(word, {word})}
            here &= component in named or "all" in named
            if here and (rule.layers == ("all",) or layer in rule.layers):
                source = "sft"
        return source

    expected = sequential_graft(chatty.sources, list(tokens.ids), choose)
    found = model(TALK, graft=graft)[0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.equal(found, model(TALK)[0])


def test_position_grafts_of_a_chat(chatty: Tiny) -> None:
    grafts = position_grafts("sft", kind="chat")
    assert {name: str(graft) for name, graft in grafts.items()} == {
        "PRE": "none",
        "SFT": "sft @ all",
        "system": "sft @ system",
        "user": "sft @ user",
        "template": "sft @ template",
        "LT": "sft @ last",
        "not-system": "sft @ ~system",
        "not-user": "sft @ ~user",
        "not-template": "sft @ ~template",
        "not-LT": "sft @ ~last",
    }
    table = evaluate(chatty.model, TALK, grafts, progress=False)
    assert table["reason"].isna().all()
    ids = chatty.model.tokenized(TALK)[0].ids
    for name in ("PRE", "SFT"):
        row = table[table["graft"] == name].iloc[0]
        logits = chatty.logits(name.lower(), list(ids))[-1].log_softmax(-1)
        assert row["logprob"] == pytest.approx(float(logits[row["target_id"]]), abs=1e-4)


def test_position_grafts_run_on_chats_without_a_system_message(chatty: Tiny) -> None:
    talks = [Prompt.chat([USER], answer=answer) for answer in (" Bo", " Mara")]
    grafts = position_grafts("sft", kind="chat")
    with pytest.warns(UserWarning, match="2 of 20 rows .* as system says nothing in this conv"):
        table = evaluate(chatty.model, talks, grafts, progress=False)
    silent = table[table["graft"] == "system"]
    assert silent["reason"].str.contains("system selects no position, as system says").all()
    assert silent[["rank", "logprob", "answer_logprob"]].isna().all().all()
    ran = table[table["graft"] != "system"]
    assert ran["reason"].isna().all()
    assert len(ran) == 18
    others = {name: graft for name, graft in grafts.items() if name != "system"}
    alone = evaluate(chatty.model, talks, others, progress=False)
    assert [*ran["answer_logprob"]] == [*alone["answer_logprob"]]
    # Every prompt counts, as the graft that ran on none is left out.
    with pytest.warns(UserWarning, match="graft 'system' ran on no prompt and is left out"):
        summary = summarise(table)
    pd.testing.assert_frame_equal(summary, summarise(alone))
    assert {*summary["n"]} == {2}
    assert {*summarise(table, grafts=["PRE", "system", "SFT"])["n"]} == {0}


@pytest.mark.parametrize(
    "graft", ["sft @ sytem", "sft @ system#2", "sft @ system & [99]", "sft @ user & last"]
)
def test_only_silence_excuses_a_graft_that_no_prompt_can_run(chatty: Tiny, graft: str) -> None:
    with pytest.raises(ValueError, match="can be run on none of 1 prompts"):
        evaluate(
            chatty.model,
            Prompt.chat([USER], answer="!"),
            {"a": graft, "b": "sft @ all"},
            progress=False,
        )


def test_a_reference_has_to_run(chatty: Tiny) -> None:
    talk = Prompt.chat([USER], answer="!")
    with pytest.raises(ValueError, match="graft 'a' can be run on none of 1 prompts"):
        evaluate(
            chatty.model, talk, {"a": "sft @ system", "b": "sft @ all"}, full="a", progress=False
        )
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        evaluate(chatty.model, talk, {"a": "sft @ system#1 | sft @ last"}, progress=False)


def test_the_docs_conversation_is_evaluated(chatty: Tiny) -> None:
    names = {"model": chatty.model}
    exec(marked("docs/howto/conversations.md", "chat"), names)
    assert names["table"]["reason"].isna().all()
    assert len(names["table"]) == 10


def test_messages_are_made_a_prompt_first(chatty: Tiny) -> None:
    with pytest.raises(ValueError, match=r"is not a prompt by itself\. Give Prompt\.chat"):
        chatty.model.tokenized([USER])


def test_generation_goes_on_from_the_conversation(chatty: Tiny) -> None:
    text = chatty.model.generate(TALK, max_new_tokens=3)
    (tokens,) = chatty.model.tokenized(TALK)
    assert text.startswith(tokens.text)


def test_a_dashboard_shows_the_roles(chatty: Tiny, tmp_path: Path) -> None:
    view = dashboard(chatty.model, TALK, {"user": "sft @ user"})
    page = view.save(tmp_path / "chat.html").read_text(encoding="utf-8")
    assert "system: Be brief.\n\nuser: Who saw Anders?" in page
    shown = re.findall(r"</span><small>(\w+)</small></span>", page)
    turns = ["system", "template", "user", "template", "assistant", "template", "user", "template"]
    assert shown == ["template", *turns] * 3  # PRE, SFT and the graft
    (tokens,) = chatty.model.tokenized(TALK)
    assert tokens.roles() is not None
    assert [role for role, _ in itertools.groupby(tokens.roles())] == ["template", *turns]
    assert chatty.model.tokenized("Anders")[0].roles() is None


# -- one template per model ------------------------------------------------------------------------


def test_all_sources_share_one_chat_template(tmp_path: Path) -> None:
    def tokenizer(template: str | None) -> Any:
        made = TOKENIZERS["gpt2"]()
        made.chat_template = template
        return made

    plain, a, b = tokenizer(None), tokenizer("{{ 'a' }}"), tokenizer("{{ 'b' }}")
    kept, told = with_chat_template(a, [("pre", a), ("sft", b)], None)
    assert kept is a
    assert told == "chat template of 'pre' ('sft' has another)"
    taken, told = with_chat_template(plain, [("pre", plain), ("sft", b), ("other", b)], None)
    assert (taken.chat_template, plain.chat_template) == ("{{ 'b' }}", None)
    assert told == "chat template of 'sft'"
    assert with_chat_template(plain, [("pre", plain)], None) == (plain, "")
    file = tmp_path / "own.jinja"
    file.write_text("{{ 'é' }}", encoding="utf-8")
    for given in ("{{ 'é' }}", file, str(file)):
        found, told = with_chat_template(a, [("pre", a)], given)
        assert (found.chat_template, a.chat_template, told) == (
            "{{ 'é' }}",
            "{{ 'a' }}",
            "chat template as given",
        )
    odd = tmp_path / "own {x}.jinja"
    odd.write_text("{{ 'odd' }}", encoding="utf-8")
    assert with_chat_template(a, [("pre", a)], str(odd))[0].chat_template == "{{ 'odd' }}"
    for lost in ("lost.jinja", "lost {x}.jinja", tmp_path, "", "a" * 5000):
        with pytest.raises(PairError, match=r"chat_template=.* is neither a template"):
            with_chat_template(a, [("pre", a)], lost)
    assert tokenizer_digest(a) != tokenizer_digest(b) != tokenizer_digest(plain)


def test_loading_tells_whose_template_it_is(
    tiny: MakeTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = tiny("llama", tokenizer="gpt2").sources
    template = TEMPLATES["olmo"][0]
    model = GraftedTransformer.from_pretrained(
        sources, tokenizer=TOKENIZERS["gpt2"](), chat_template=template, check=False
    )
    assert capsys.readouterr().out.strip().endswith("; chat template as given")
    assert model.tokenizer.chat_template == template


# -- sweeps over conversations ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two tiny checkpoints, of which only the second has a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    found = checkpoints(folder)
    tokenizer = TOKENIZERS["llama3"]()
    tokenizer.chat_template = SHORT
    tokenizer.save_pretrained(found["sft"])
    return found


def _rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Who is {i}{{?"},
                {"role": "assistant", "content": f" Ann{'e' * i}"},
            ],
            "said": f" Bo{i}",
        }
        for i in range(count)
    ]


def test_a_sweep_of_conversations_equals_them_one_by_one(
    places: dict[str, str], tmp_path: Path
) -> None:
    """From the config, a file and a dataset's column, read again by a worker of its own."""
    file = tmp_path / "talks.jsonl"
    lines = [
        {"messages": ASKED, "fields": {"first_entity": name}, "answer": " Mara", "name": "talk"}
        for name in ("Ann", "Siobhán")
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    Dataset.from_list(_rows(5)).save_to_disk(tmp_path / "rows")
    config = SweepConfig.model_validate(
        {
            "sources": places,
            "prompts": [
                {
                    "messages": [USER],
                    "prefill": "It is {x",
                    "answer": " Mara",
                    "distractors": ["!"],
                },
                {"file": str(file)},
                {"dataset": str(tmp_path / "rows"), "limit": 2},
            ],
            "grafts": {str(name): graft for name, graft in position_grafts(kind="chat").items()},
            "metrics": {"top_k": 3},
        }
    )
    run_sweep(config, tmp_path / "out", progress=False, say=lambda line: None)
    table = read_results(tmp_path / "out")
    refused = table[table["reason"].notna()]
    assert {*refused["graft"]} == {"system"}
    assert refused["reason"].str.contains("selects no position, as system says nothing").all()
    # What is not the system's is everything where the system says nothing.
    whole = table[(table["graft"] == "SFT") & table["prompt"].isin(refused["prompt"])]
    rest = table[(table["graft"] == "not-system") & table["prompt"].isin(refused["prompt"])]
    assert [*rest["answer_logprob"]] == [*whole["answer_logprob"]]
    model = GraftedTransformer.from_pretrained(places, check=False, verbose=False)
    prompts = [
        Prompt.chat([USER], prefill="It is {x", answer=" Mara", distractors=["!"]),
        *(Prompt.chat(ASKED, fields=line["fields"], answer=" Mara", name="talk") for line in lines),
    ]
    drawn = [p for p in table["prompt"].unique() if p > 2]
    assert len(drawn) == 2
    for number, prompt in enumerate(prompts):
        for name, graft in position_grafts(kind="chat").items():
            row = table[(table["prompt"] == number) & (table["graft"] == name)].iloc[0]
            if row["reason"] is None:
                alone = evaluate(model, prompt, {name: graft}, progress=False).query(
                    "graft == @name"
                )
                assert row["answer_logprob"] == pytest.approx(
                    alone["answer_logprob"].iloc[0], abs=1e-5
                )
                assert (row["text"], row["rank"]) == (prompt.text, alone["rank"].iloc[0])
    assert [*table["template"].unique()] == ["chat", "talk", "rows"]
    # The same command again: nothing is left to run, and nothing is another sweep.
    run_sweep(config, tmp_path / "out", progress=False, say=lambda line: None)
    pd.testing.assert_frame_equal(read_results(tmp_path / "out"), table)


def test_a_sweep_of_chats_without_a_system_message(places: dict[str, str], tmp_path: Path) -> None:
    config = {
        "sources": places,
        "prompts": [{"messages": [USER], "answer": " Mara"}],
        "grafts": {str(name): graft for name, graft in position_grafts(kind="chat").items()},
    }
    with pytest.warns(
        UserWarning, match=r"grafts\.system: none of 1 prompts can run it.*says noth"
    ):
        run_sweep(
            SweepConfig.model_validate(config),
            tmp_path / "out",
            progress=False,
            say=lambda line: None,
        )
    table = read_results(tmp_path / "out")
    assert [*table.loc[table["reason"].notna(), "graft"]] == ["system"]
    assert len(table) == 10
    for wrong in ({"full": "system"}, {"grafts": {"a": "sft @ sytem"}}):
        with pytest.raises(ConfigError, match="none of 1 prompts can run it"):
            check(SweepConfig.model_validate(config | wrong))


def test_a_dataset_s_column_is_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = _rows(8)
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in ("rows", "rows.jsonl"):
        section = PromptColumn(dataset=str(tmp_path / name), limit=3, name="talks")
        drawn = {seed: section.prompts(seed) for seed in (0, 0, 1)}
        every = PromptColumn(dataset=str(tmp_path / name), name="talks").prompts(0)
        assert every == [
            Prompt.chat(row["messages"][:1], answer=row["messages"][1]["content"], name="talks")
            for row in rows
        ]
        assert len(drawn[0]) == 3
        assert drawn[0] != drawn[1]
        assert drawn[0] == [p for p in every if p in drawn[0]]
    said = PromptColumn(dataset=str(tmp_path / "rows"), answer="said").prompts(0)
    assert [p.answer for p in said] == [row["said"] for row in rows]
    assert said[0].conversation is not None
    assert len(said[0].conversation.messages) == 2
    texts = PromptColumn(dataset=str(tmp_path / "rows"), column="said", answer="said").prompts(0)
    assert texts[0] == Prompt(" Bo0", {}, " Bo0", name="rows")


def test_columns_have_tools_prefills_and_reasoning(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "Be."}, USER]
    thought = {"role": "assistant", "content": "It is Ann", "reasoning_content": "Hm"}
    parts = [{"type": "text", "text": text} for text in ("It", " is Bo")]
    rows = [
        {"talk": [*asked, thought], "begun": "It is", "can": _TOOLS},
        {"talk": json.dumps([*asked, {**BEGUN, "content": parts}]), "can": json.dumps(_TOOLS)},
        {"talk": [USER, {**BEGUN, "content": "It", "tool_calls": None}], "begun": "", "can": []},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[:1])), encoding="utf-8")
    column = PromptColumn(
        dataset=str(tmp_path / "rows.jsonl"), column="talk", prefill="begun", tools="can"
    )
    more = {"tools": _TOOLS, "name": "rows.jsonl"}
    begun = Prompt.chat(asked, reasoning="Hm", prefill="It is", answer=" Ann", **more)
    assert column.prompts(0) == [begun]
    assert column._prompt({"begun": None, **rows[1]}, answered=True) == Prompt.chat(
        asked, answer="It is Bo", **more
    )
    assert column._prompt(rows[2], answered=True) == Prompt.chat(
        [USER], answer="It", name="rows.jsonl"
    )
    # Arrow gives each message the keys of all, and each call the arguments of all.
    calls = [
        {**BEGUN, "tool_calls": [{"name": "f", "arguments": arguments}]}
        for arguments in ({"film": "x"}, {"year": '[{"a": 1}]'})
    ]
    talk = [USER, *calls, {"role": "tool", "content": '[{"b": 2}]'}]
    Dataset.from_list([{"talk": [*talk, thought]}]).save_to_disk(tmp_path / "made")
    (made,) = PromptColumn(dataset=str(tmp_path / "made"), column="talk", name="m").prompts(0)
    assert made == Prompt.chat(talk, reasoning="Hm", answer="It is Ann", name="m")


BAD_ROWS = [
    ([], r"messages=\[\]: a conversation has one message"),
    (None, "messages=None: write a list of messages"),
    (3, "messages=3: write a list of messages"),
    ([3], r"messages\[0\] is 3\. Write \{"),
    ([USER, {"role": "assistant", "content": 3}], r"messages\[1\]: content=3"),
    ([USER, {"role": "assistant", "content": None}], r"messages\[1\]: no content"),
    ([USER, {"role": "assistant", "content": [{"text": "a"}]}], r"messages\[1\]: content="),
    ([USER, {"role": "assistant", "content": "a", "tool_calls": [{"name": "f"}]}], "in words"),
    ([{**BEGUN, "content": "It is so"}], "it has no question, or no answer"),
    ([USER, BEGUN], "the last message, 'I', does not go on after the prefill 'It is'"),
    ([USER, {**BEGUN, "content": "It is"}], "does not go on after the prefill 'It is'"),
    ("text", "a text without an answer"),
]


@pytest.mark.parametrize(("given", "said"), BAD_ROWS)
def test_rows_that_are_not_prompts_are_refused(given: Any, said: str) -> None:
    column = PromptColumn(dataset="rows", prefill="begun")
    with pytest.raises(ValueError, match=said):
        column._prompt({"messages": given, "begun": "It is"}, answered=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tools": "tool"}, "tools='tool' is not one of the columns of .*: messages, said"),
        ({"column": "message"}, "column='message' is not one of the columns of .*: messages, said"),
        ({"column": "said"}, "row 0: a text without an answer. Name the column of answers"),
        ({"dataset": "nowhere.jsonl"}, r"dataset='nowhere\.jsonl', split='train' could not be"),
        ({"split": "test"}, "split='test' could not be read"),
    ],
)
def test_columns_without_prompts_are_refused(
    tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    DatasetDict({"train": Dataset.from_list(_rows(2))}).save_to_disk(tmp_path / "rows")
    section = PromptColumn(**({"dataset": str(tmp_path / "rows")} | changes))
    with pytest.raises((ValueError, OSError), match=said):
        section.prompts(0)


def test_a_row_that_ends_with_a_question_has_no_answer(tmp_path: Path) -> None:
    Dataset.from_list([{"messages": [USER]}]).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="row 0: the last message is not an answer of the assist"):
        PromptColumn(dataset=str(tmp_path / "rows")).prompts(0)


def test_prompts_are_a_template_or_messages() -> None:
    for given, said in [
        ({"answer": " a"}, "neither is given. Give exactly one of template and messages"),
        ({"answer": " a", "template": "x", "messages": [USER]}, "both are given"),
        (
            {"answer": " a", "template": "x", "prefill": "y"},
            "prefill is allowed only with messages",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            PromptSection.model_validate(given)


@pytest.mark.filterwarnings("ignore:.*more than the model's context")
def test_the_shipped_sweep_of_roles_runs(places: dict[str, str], tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "experiments" / "sweeps" / "chat_roles.yaml"
    config = load_config(
        path,
        [*(f"sources.{n}={p}" for n, p in places.items()), "limit=1", "dataset.templates=[qa]"],
    )
    run_sweep(config, tmp_path / "out", progress=False, say=lambda line: None)
    table = read_results(tmp_path / "out")
    assert table["reason"].isna().all()
    assert table["text"].iloc[0].startswith("system: Answer with a name.\n\nuser: Question: ")
    assert table["text"].iloc[0].endswith("\n\nassistant: The name is")
    # What all but a role says is everything less that role: the two together are the full graft.
    (prompt, *_) = check(config).prompts
    tokens = tokenize(prompt, check(config).tokenizer)
    for role in ("system", "user", "assistant", "template"):
        both = At.parse(f"{role} + ~{role}").select(tokens.spans, len(tokens))
        assert both.all()
        assert At.parse(role).select(tokens.spans, len(tokens)).any()


def test_a_prompt_is_asked_in_a_chat() -> None:
    plain = Prompt("{x} met {{y", {"x": "Ann"}, " Bo", [" Cy"], "met", [" Bo", " Di"])
    asked = ChatFormat(system="No {braces}.").asked(plain)
    assert asked.text == "system: No {braces}.\n\nuser: Ann met {y\n\nassistant:"
    assert (asked.answer, asked.distractors, asked.answers) == ("Bo", ("Cy",), ("Bo", "Di"))
    assert (asked.name, asked.fields) == ("met", plain.fields)
    begun = ChatFormat(prefill="{ It is").asked(Prompt("Who {{x}}?", {}, " Bo"))
    assert begun.text == "user: Who {x}?\n\nassistant: { It is"
    assert begun.answer == " Bo"


def test_a_template_that_writes_the_date_is_told(chatty: Tiny) -> None:
    model = copy.copy(chatty.model)
    model.tokenizer = copy.copy(model.tokenizer)
    model.tokenizer.chat_template = "{{ date_string or strftime_now('%d %b %Y') }}" + SHORT
    told = "the chat template writes today's date where none is given"
    with pytest.warns(UserWarning, match=told):
        evaluate(model, TALK, {"PRE": "none"}, progress=False)
    for ask in (model, model.to_tokens, partial(model.generate, max_new_tokens=1)):
        with pytest.warns(UserWarning, match=told):
            ask(TALK)
    fixed = Prompt.chat([USER], answer=" Bo", template_options={"date_string": "1 May 2025"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, [fixed, Prompt("Ann met", {}, " Bo")], {"PRE": "none"}, progress=False)


def test_a_sweep_is_not_resumed_on_another_day(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "sources": places,
        "chat_template": "{{ day_or_date or strftime_now('%d %b %Y') }}" + SHORT,
        "prompts": [{"messages": [USER], "answer": " Bo"}],
        "grafts": {"LT": "sft @ last"},
    }
    with pytest.warns(UserWarning, match='Fix it: template_options=\\{"day_or_date"'):
        prepare_sweep(config, tmp_path / "out", say=lambda line: None)
    known = read_manifest(tmp_path / "out").identity["prompts"]
    assert known["day that the chat template writes"] == date.today().isoformat()

    class Later(date):
        @classmethod
        def today(cls) -> "Later":
            return cls(2100, 1, 2)

    monkeypatch.setattr("graftlens.sweep.prepared.date", Later)
    with (
        pytest.warns(UserWarning, match="writes today's date"),
        pytest.raises(ValueError, match=r"day that the chat template writes: .* there, '2100-01-0"),
    ):
        prepare_sweep(config, tmp_path / "out", say=lambda line: None)
    with pytest.raises(ValueError, match="prompts have other tokens today, 2100-01-02"):
        work(tmp_path / "out", progress=False, say=lambda line: None)


def test_the_dashboard_command_asks_in_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Prompt] = []
    monkeypatch.setattr(
        "graftlens.dashboards.write_dashboard",
        lambda sources, prompt, *_, **__: asked.append(prompt) or Path("page.html"),
    )
    given: Any = {"pair": ("a", "b"), "prompt": "Who met {x}?", "field": ["x=Ann"]}
    cli.dashboard(**given, answer=" Bo", chat=True, system="Be brief.")
    assert [prompt.text for prompt in asked] == [
        "system: Be brief.\n\nuser: Who met Ann?\n\nassistant:"
    ]
    with pytest.raises(BadParameter, match="--system works only with --chat"):
        cli.dashboard(**given, system="Be brief.")


def test_the_dashboard_command_takes_a_file_of_conversations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Prompt] = []
    monkeypatch.setattr(
        "graftlens.dashboards.write_dashboard",
        lambda sources, prompt, *_, **__: asked.append(prompt) or Path("page.html"),
    )
    file = tmp_path / "talks.jsonl"
    lines = [
        {"template": "Ann met", "answer": " Bo"},
        {"messages": ASKED, "fields": {"first_entity": "Ann"}, "answer": "Bo", "prefill": "It is "},
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    cli.dashboard(pair=("a", "b"), file=file)
    cli.dashboard(pair=("a", "b"), file=file, number=1)
    talk = Prompt.chat(ASKED, fields={"first_entity": "Ann"}, answer="Bo", prefill="It is ")
    assert asked == [Prompt("Ann met", answer=" Bo"), talk]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"file": file, "number": 2}, "holds 2 prompts, 0 to 1"),
        ({"file": file, "answer": " Bo"}, "--answer goes with --prompt"),
        ({"file": file, "chat": True}, "--chat goes with --prompt"),
        ({"file": file, "prompt": "Hm"}, "both are given"),
        ({}, "neither is given"),
        ({"prompt": "Hm", "number": 1}, "--number works only with --file"),
    ]
    for given, said in refused:
        with pytest.raises(BadParameter, match=said):
            cli.dashboard(pair=("a", "b"), **given)
