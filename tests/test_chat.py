"""Conversations: whose each token is, under templates in the form of those in use.

Token ids are held against transformers' own `apply_chat_template`, and whose each character is
against the templates written a second time, in Python.
"""

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from chattemplates import PROMPT, TEMPLATES, WRITERS, tokenizer_of

from graftlens.chat import ROLES, render
from graftlens.prompts import Prompt, PromptError, Tokenized, tokenize

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
    roles = [r for r in (*ROLES, "template") if r in tokens.runs]
    counts = Counter(i for role in roles for run in tokens.runs[role] for i in run)
    assert counts == dict.fromkeys(range(len(tokens)), 1)
    # Whose each character is, as the template written in Python has it.
    pieces = WRITERS[name](messages, tools, prompted)
    assert tokens.text == "".join(text for text, _, _ in pieces)
    owners = [owner for text, owner, _ in pieces for _ in text]
    assert prompt.conversation is not None
    rendered = render(prompt.conversation, tokenizer)
    assert list(rendered.owners) == [-1 if owner is None else owner for owner in owners]
    # A token with any character of a message's is that message's role's.
    offsets = tokenizer(tokens.text, add_special_tokens=False, return_offsets_mapping=True)
    role_of = {i: role for role in roles for run in tokens.runs[role] for i in run}
    for i, (a, b) in enumerate(offsets["offset_mapping"]):
        here = {owners[c] for c in range(a, b)} - {None}
        assert len(here) <= 1
        if here or name not in TRIMS_OFFSETS:
            expected = messages[here.pop()]["role"] if here else "template"
            assert role_of[i] == expected, (i, tokens.text[a:b])
    # What a message says is contained in the text of its run, and of no other message's.
    for number, m in enumerate(messages):
        runs = tokens.runs.get(m["role"], ())
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
    bos = len(tokenizer.bos_token) if tokens.text.startswith(tokenizer.bos_token or "\0") else 0
    expected_turns = [(max(bos, min(p)), max(p) + 1) for p in written.values()]
    assert [(max(bos, a), b) for a, b in rendered.turns] == expected_turns
    assert (PROMPT in written) == (prompted and name not in ("llama2", "mistral"))
    for (_, end), (start, _) in pairwise(rendered.turns):
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
