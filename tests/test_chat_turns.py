"""Turns under templates in the form of those in use: written here, with what each turn should be.

Each writes its markers in another place of its program: outside of its loop, in another message's
branch, in a macro, by index, or only for the first message.
"""

import json
import re
from typing import Any

import pytest
from tokenizers import AddedToken
from toytokenizers import TOKENIZERS

from graftlens.chatrendering import render
from graftlens.evaluation import position_grafts
from graftlens.graft import Graft
from graftlens.model.mask import select
from graftlens.positions import At
from graftlens.prompts import Prompt, PromptError, dated, tokenize
from graftlens.sweep.prepared import joined_answers

SYSTEM = {"role": "system", "content": "Be."}
A, B, C = (
    {"role": role, "content": text}
    for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
ASKS_TOOL = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "t"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<u>", "parameters": {}}}]

#: The default system prompt is written in the first round, before the user's message.
SMOL = """\
{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<s>system
You are X.<e>
' }}{% endif %}{{ '<s>' + m['role'] + '
' + m['content'] + '<e>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant
' }}{% endif %}"""

#: The assistant's marker is written in the user's branch, asked for or not.
PHI4 = """\
{% for m in messages %}{% if m['role'] == 'system' %}{{ '<s>system<p>' + m['content'] + '<e>' }}\
{% elif m['role'] == 'user' %}{{ '<s>user<p>' + m['content'] + '<e><s>assistant<p>' }}\
{% elif m['role'] == 'assistant' %}{{ m['content'] + '<e>' }}{% endif %}{% endfor %}"""

#: The system prompt is written outside of the loop, contents are trimmed.
COMMAND = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}\
{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}\
{% set system = false %}{% endif %}{% if system != false %}{{ '<t><sys>' + system + '</t>' }}\
{% endif %}{% for m in rest %}{% set content = m['content'] %}{% if m['role'] == 'user' %}\
{{ '<t><u>' + content.strip() + '</t>' }}{% elif m['role'] == 'assistant' %}\
{{ '<t><bot>' + content.strip() + '</t>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<t><bot>' }}{% endif %}"""

#: A tool's answers are closed by what comes after them.
SEEK = """\
{%- set ns = namespace(tool=false, first=true) -%}
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m['role'] == 'system' -%}{{- m['content'] -}}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}
    {%- set ns.tool = false -%}{{- '<u>' + m['content'] -}}
  {%- elif m['role'] == 'assistant' and m['tool_calls'] -%}
    {{- '<bot>' -}}
    {%- for call in m['tool_calls'] -%}
      {{- '<call>' + call['function']['name'] + '<sep>' -}}
      {{- call['function']['arguments'] | tojson + '</call>' -}}
    {%- endfor -%}
    {{- '</bot>' -}}
  {%- elif m['role'] == 'assistant' -%}
    {%- if ns.tool -%}
      {{- '</outs>' + m['content'] + '</bot>' -}}{%- set ns.tool = false -%}
    {%- else -%}
      {{- '<bot>' + m['content'].split('</think>')[-1] + '</bot>' -}}
    {%- endif -%}
  {%- elif m['role'] == 'tool' -%}
    {%- if not ns.tool -%}{{- '<outs>' -}}{%- endif -%}
    {%- set ns.tool = true -%}{{- '<out>' + m['content'] + '</out>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if ns.tool -%}{{- '</outs>' -}}{%- endif -%}
{%- if add_generation_prompt and not ns.tool -%}{{- '<bot>' -}}{%- endif -%}
"""

#: Messages are written by macros; the system prompt is an invented message of the loop's.
MACROS = """\
{%- macro head(role) -%}<s>{{ role }}<p>{%- endmacro -%}
{%- macro said(m) -%}
  {%- if m.thinking is defined %}{{ head('assistant:thought') }}{{ m.thinking }}<e>{% endif -%}
  {{ head(m.role) }}{{ m.content }}<e>
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}
  {%- set messages = [{'role': 'system', 'content': 'Default.'}] + messages -%}
{%- endif -%}
{%- for m in messages -%}
  {%- generation -%}{{- said(m) -}}{%- endgeneration -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- head('assistant') -}}{%- endif -%}
"""

#: Contents in parts; the system prompt is written into the user's first turn.
PARTS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
  {%- set first = messages[0]['content'] if messages[0]['content'] is string
      else messages[0]['content'][0]['text'] -%}
  {%- set first = first + '\\n\\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}
  {%- set first = '' -%}{%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles take turns') }}
  {%- endif -%}
  {{ '<s>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}
  {{- first if loop.first }}
  {%- if m['content'] is string -%}{{ m['content'] | trim }}
  {%- else -%}
    {%- for part in m['content'] -%}
      {%- if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{ '<e>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<s>model\\n' }}{%- endif -%}
"""

#: What asks for an answer is written in the last message's round.
INSIDE = """\
{% for m in messages %}
{{ '<' + m['role'] + '>\\n' + m['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<assistant>' }}
{% endif %}
{% endfor %}
"""

#: The system prompt, or a default one, is written in the first round, before the user's marker.
FIRST_ROUND = """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}\
{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}\
{% set system = 'A chat.' %}{% endif %}{% for m in rest %}{% if loop.index0 == 0 %}{{ system }}\
{% endif %}{{ ' ' + m['role'].upper() + ': ' + m['content'] }}{% endfor %}\
{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""

#: What is written of tools depends on the call before; its name is written again.
NAMES = """\
{{- bos_token + '<s>system<p>X.<e>' -}}
{%- set last = namespace(name=none) -%}
{%- if tools -%}
  {{- '<s>user<p>You may call ' + tools[0].function.name + '. ' + messages[0].content + '<e>' -}}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.tool_calls -%}
    {%- set last.name = m.tool_calls[0].function.name -%}
    {{- '<s>assistant to ' + last.name + '<p>' + m.tool_calls[0].function.arguments | tojson -}}
    {{- '<e>' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<s>' + last.name + ' to assistant<p>' + m.content | tojson + '<e>' -}}
  {%- else -%}
    {{- '<s>' + m.role + '<p>' + m.content + '<e>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<s>assistant{%- endif -%}
"""

#: The end of a text is written whatever comes before.
ALWAYS_ENDS = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{{ eos_token }}"

BOS, EOS = "<|endoftext|>", "<|endoftext|>"
MANY = [SYSTEM, A, B, C]
PARTED = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MANY]

#: Template, messages, options, and the turns: before the first `|` is what is in none.
CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    (SMOL, [A], {}, "<s>system\nYou are X.<e>\n|<s>user\na<e>\n|<s>assistant\n"),
    (SMOL, [SYSTEM, A], {}, "|<s>system\nBe.<e>\n|<s>user\na<e>\n|<s>assistant\n"),
    (SMOL, [A], {"prefill": "It"}, "<s>system\nYou are X.<e>\n|<s>user\na<e>\n|<s>assistant\nIt"),
    (SMOL, [{**A, "content": ""}], {}, "<s>system\nYou are X.<e>\n|<s>user\n<e>\n|<s>assistant\n"),
    (PHI4, [A], {}, "|<s>user<p>a<e>|<s>assistant<p>"),
    (
        PHI4,
        MANY,
        {},
        "|<s>system<p>Be.<e>|<s>user<p>a<e>|<s>assistant<p>b<e>|<s>user<p>c<e>|<s>assistant<p>",
    ),
    (PHI4, [A, B], {}, "|<s>user<p>a<e>|<s>assistant<p>b<e>"),
    (PHI4, [A], {"prefill": "It"}, "|<s>user<p>a<e>|<s>assistant<p>It"),
    (COMMAND, MANY, {}, f"{BOS}|<t><sys>Be.</t>|<t><u>a</t>|<t><bot>b</t>|<t><u>c</t>|<t><bot>"),
    (COMMAND, [{**SYSTEM, "content": ""}, A], {}, f"{BOS}|<t><sys></t>|<t><u>a</t>|<t><bot>"),
    (COMMAND, [A, B], {}, f"{BOS}|<t><u>a</t>|<t><bot>b</t>"),
    (SEEK, MANY, {}, f"{BOS}|Be.|<u>a|<bot>b</bot>|<u>c|<bot>"),
    (
        SEEK,
        [SYSTEM, A, ASKS_TOOL, TOLD, TOLD, B, C],
        {},
        f'{BOS}|Be.|<u>a|<bot><call>f<sep>{{"x": "y"}}</call></bot>|<outs><out>t</out>'
        "|<out>t</out></outs>|b</bot>|<u>c|<bot>",
    ),
    (SEEK, [SYSTEM, {**SYSTEM, "content": "So."}, A], {}, f"{BOS}|Be.|So.|<u>a|<bot>"),
    (MACROS, [A], {}, "<s>system<p>Default.<e>|<s>user<p>a<e>|<s>assistant<p>"),
    (
        MACROS,
        [SYSTEM, A, {**B, "reasoning_content": "h"}],
        {},
        "|<s>system<p>Be.<e>|<s>user<p>a<e>|<s>assistant:thought<p>h<e><s>assistant<p>b<e>",
    ),
    (
        MACROS,
        [A],
        {"reasoning": "h", "prefill": "I"},
        "<s>system<p>Default.<e>|<s>user<p>a<e>|<s>assistant:thought<p>h<e><s>assistant<p>I",
    ),
    (
        PARTS,
        PARTED,
        {},
        f"{BOS}|<s>user\nBe.\n\na<e>\n|<s>model\nb<e>\n|<s>user\nc<e>\n|<s>model\n",
    ),
    (PARTS, MANY, {}, f"{BOS}|<s>user\nBe.\n\na<e>\n|<s>model\nb<e>\n|<s>user\nc<e>\n|<s>model\n"),
    (
        INSIDE,
        MANY,
        {},
        f"|<system>\nBe.{EOS}\n|<user>\na{EOS}\n|<assistant>\nb{EOS}\n|<user>\nc{EOS}\n|<assistant>\n",
    ),
    (FIRST_ROUND, [A], {}, "A chat.| USER: a| ASSISTANT:"),
    (FIRST_ROUND, MANY, {}, "|Be. USER: a| ASSISTANT: b| USER: c| ASSISTANT:"),
    (
        NAMES,
        [A, ASKS_TOOL, TOLD],
        {},
        f'{BOS}<s>system<p>X.<e>|<s>user<p>a<e>|<s>assistant to f<p>{{"x": "y"}}<e>'
        '|<s>f to assistant<p>"t"<e>|<s>assistant',
    ),
    (
        NAMES,
        [A],
        {"tools": TOOLS},
        f"{BOS}<s>system<p>X.<e>|<s>user<p>You may call f. a<e>|<s>assistant",
    ),
    (ALWAYS_ENDS, [A], {}, f"|[user]a;{EOS}"),
    (ALWAYS_ENDS, [A, B], {}, f"|[user]a;|[assistant]b;{EOS}"),
]


def tokenizer_with(template: str) -> Any:
    tokenizer = TOKENIZERS["gpt2"]()
    tokenizer.bos_token = tokenizer.eos_token = BOS
    markers = ("<s>", "<e>", "<p>", "<bot>", "</bot>", "<u>")
    tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("number", range(len(CASES)))
def test_turns(number: int) -> None:
    template, messages, options, expected = CASES[number]
    tokenizer = tokenizer_with(template)
    prompt = Prompt.chat(messages, **options)
    assert prompt.conversation is not None
    rendered = render(prompt.conversation, tokenizer)
    assert rendered.turns is not None
    turns = [rendered.text[a:b] for a, b in rendered.turns]
    assert "|".join([rendered.text[: rendered.turns[0][0]], *turns]) == expected
    said = [m["content"] for m in messages if isinstance(m["content"], str)]
    said += [text for text in options.values() if isinstance(text, str)]
    owned = "".join(c for c, o in zip(rendered.text, rendered.owners, strict=True) if o >= 0)
    assert all(text in owned for text in said)
    begun = [m for m in [prompt.conversation.begun] if m]
    theirs = tokenizer.apply_chat_template(
        [*messages, *begun],
        tools=options.get("tools"),
        **{"continue_final_message": True}
        if begun
        else {"add_generation_prompt": messages[-1]["role"] != "assistant"},
    )
    assert list(tokenize(prompt, tokenizer).ids) == theirs["input_ids"]


@pytest.mark.parametrize("start", [0, 1])
def test_turns_of_messages_that_are_written_by_index(start: int) -> None:
    template = (
        "{% for t in range(2) %}{{ t }}{% endfor %}{% set rest = messages[START:] %}"
        "{% for i in range(rest|length) %}<s>{{ rest[i].role }}<p>{% set before = rest[i - 1] %}"
        "{% for k in range(2) %}{{ k }}{% endfor %}{{ rest[i]['content'] }}<e>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant<p>{% endif %}"
    ).replace("START", str(start))
    conversation = Prompt.chat([A, *MANY[1:]] if start else MANY).conversation
    assert conversation is not None
    if start:
        template = "{{ messages[0].content }}" + template
    rendered = render(conversation, tokenizer_with(template))
    assert rendered.turns is not None
    turns = [rendered.text[a:b] for a, b in rendered.turns]
    first = "a01" if start else "<s>system<p>01Be.<e>"
    assert turns == [
        first,
        "<s>user<p>01a<e>",
        "<s>assistant<p>01b<e>",
        "<s>user<p>01c<e>",
        "<s>assistant<p>",
    ]


def test_messages_that_are_written_by_a_reckoned_index_have_no_turns() -> None:
    template = (
        "{% for i in range(messages|length) %}{% set m = messages[i + 0] %}<s>{{ m.role }}<p>"
        "{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<s>assistant<p>{% endif %}"
    )
    tokens = tokenize(Prompt.chat(MANY), tokenizer_with(template))
    assert len(tokens.spans["user"]) == 2
    with pytest.raises(ValueError, match="no span 'turn' here: where each message ends under"):
        At.parse("turn#-1").select(tokens.spans, len(tokens))


def test_what_a_template_writes_of_messages_before_it_writes_them_is_in_no_turn() -> None:
    template = (
        "{% for m in messages %}{{ m.role }} {% endfor %}"
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    conversation = Prompt.chat(MANY).conversation
    assert conversation is not None
    rendered = render(conversation, tokenizer_with(template))
    assert rendered.turns is not None
    turns = [rendered.text[a:b] for a, b in rendered.turns]
    assert turns == ["[Be.]", "[a]", "[b]", "[c]"]


# -- the answer's reasoning ------------------------------------------------------------------------


def test_reasoning_begins_the_answer() -> None:
    tokenizer = tokenizer_with(MACROS)
    prompt = Prompt.chat([A], reasoning="h {x}", fields={"x": "Ann"}, answer="b")
    tokens = tokenize(prompt, tokenizer)
    assert tokens.text == (
        "<s>system<p>Default.<e><s>user<p>a<e><s>assistant:thought<p>h Ann<e><s>assistant<p>"
    )
    assert [tokenizer.decode([tokens.ids[i] for i in run]) for run in tokens.spans["x"]] == ["Ann"]
    assert prompt.text.endswith("user: a\n\nassistant (reasoning): h Ann\n\nassistant:")
    with pytest.raises(PromptError, match=r"leaves out reasoning_content of messages\[1\]"):
        tokenize(prompt, tokenizer_with(SMOL))
    with pytest.raises(ValueError, match="reasoning='': write what the assistant thinks before"):
        Prompt.chat([A], reasoning="")


# -- what a transcript says ------------------------------------------------------------------------


def test_transcripts_say_all_that_the_template_reads() -> None:
    prompt = Prompt.chat(
        [A, {**B, "thinking": "h"}, ASKS_TOOL, TOLD],
        tools=TOOLS,
        template_options={"enable_thinking": False},
    )
    assert prompt.text == "\n\n".join(
        [
            f"tools: {json.dumps(TOOLS)}",
            'template_options: {"enable_thinking": false}',
            "user: a",
            "assistant (reasoning): h",
            "assistant: b",
            f"assistant:  {json.dumps([CALL])}",
            "tool: t",
            "assistant:",
        ]
    )


# -- refusals that say why -------------------------------------------------------------------------


def test_a_template_that_writes_the_time_of_day_is_refused() -> None:
    template = "{{ strftime_now('%H:%M:%S.%f') }}" + SMOL
    with pytest.raises(PromptError, match="the chat template writes the time of day"):
        tokenize(Prompt.chat([A]), tokenizer_with(template))


@pytest.mark.parametrize("ends", [(" " * 9000, "\n" * 9000), ("\n\n  ", "  \n")])
@pytest.mark.parametrize(
    "written", ["content", "content|trim", "content.lstrip('\\n')", "content.rstrip()"]
)
def test_long_white_space_is_followed(ends: tuple[str, str], written: str) -> None:
    text = f"{ends[0]}a b{ends[1]}"
    template = f"{{% for m in messages %}}[{{{{ m.{written} }}}}]{{% endfor %}}"
    conversation = Prompt.chat([{"role": "user", "content": text}]).conversation
    assert conversation is not None
    rendered = render(conversation, tokenizer_with(template))
    assert set(rendered.owners[1:-1]) == {0}
    assert rendered.owners[0] == rendered.owners[-1] == -1


@pytest.mark.parametrize(
    ("template", "more", "said"),
    [
        (COMMAND, {"prefill": " \n"}, r"trims away how the assistant's answer begins \(' \\n'\)"),
        ("{% for m in messages %}{{ m.role }", {}, r"is not valid Jinja \(line 1: "),
        (
            "{% for m in messages %}{{ m.content.upper() }}{% endfor %}",
            {"prefill": "It is"},
            r"does not write how the assistant's answer begins \('It is'\) as it is given",
        ),
        ("{{ messages[0].lost.more }}", {}, "refuses this conversation: .*lost"),
    ],
)
def test_refusals_say_what_is_wrong(template: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        tokenize(Prompt.chat([A], **more), tokenizer_with(template))


@pytest.mark.parametrize("parts", [["a"], ["a", "b c"]])
def test_contents_in_parts_that_a_template_takes_for_a_text_are_refused(parts: list[str]) -> None:
    content = [{"type": "text", "text": text} for text in parts]
    template = "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}"
    with pytest.raises(
        PromptError, match=r"writes the content of messages\[1\] \(user\) as a list"
    ):
        tokenize(
            Prompt.chat([SYSTEM, {"role": "user", "content": content}]), tokenizer_with(template)
        )


def test_a_last_thought_that_is_left_out_is_refused() -> None:
    said = "<think>\nHm\n</think>\n\nb"
    with pytest.raises(
        PromptError, match=r"leaves out what messages\[1\] .* thinks before its ans"
    ):
        tokenize(Prompt.chat([A, {**B, "content": said}]), tokenizer_with(SEEK))
    # An earlier one may be left out.
    tokens = tokenize(Prompt.chat([A, {**B, "content": said}, C]), tokenizer_with(SEEK))
    assert tokens.text == f"{BOS}<u>a<bot>\n\nb</bot><u>c<bot>"


# -- roles that say nothing ------------------------------------------------------------------------


def test_the_complement_of_a_role_that_says_nothing_is_every_token() -> None:
    tokens = tokenize(Prompt.chat([A, B]), tokenizer_with(SMOL))

    def chosen(rule: str) -> int:
        return int(select(Graft.parse(f"sft @ {rule}").rules[0], tokens).sum())

    assert chosen("~system") == chosen("all") == chosen("template + user + assistant + tool")
    assert chosen("~(system + template)") == chosen("user + assistant")
    with pytest.raises(PromptError, match="system selects no position, as system says nothing in"):
        chosen("system")
    with pytest.raises(PromptError, match="tool & user selects no position, as tool says nothing"):
        chosen("tool & user")
    with pytest.raises(PromptError, match="no occurrence system#1: no message here is system's"):
        chosen("system#1")
    with pytest.raises(PromptError, match="no span 'sytem' here"):
        chosen("~sytem")
    # No prompt but a conversation has such spans.
    plain = tokenize(Prompt("a {x}", {"x": "b"}), tokenizer_with(SMOL))
    with pytest.raises(PromptError, match="no span 'system' here"):
        select(Graft.parse("sft @ ~system").rules[0], plain)


def test_position_grafts_leave_out_roles_that_say_nothing_and_tell() -> None:
    with pytest.warns(UserWarning, match="system says nothing in these conversations"):
        grafts = position_grafts(kind="chat", prompts=Prompt.chat([{**SYSTEM, "content": " "}, A]))
    assert [*grafts] == [
        "PRE",
        "SFT",
        "user",
        "template",
        "LT",
        "not-user",
        "not-template",
        "not-LT",
    ]
    mixed = [Prompt.chat([A]), Prompt.chat([SYSTEM, A])]
    assert position_grafts(kind="chat", prompts=mixed) == position_grafts(kind="chat")
    with pytest.raises(ValueError, match=r"number 1 is Prompt.*, not a conversation"):
        position_grafts(kind="chat", prompts=[mixed[0], Prompt("Hm")])
    with pytest.raises(ValueError, match='prompts is for kind="chat"'):
        position_grafts(prompts=mixed)


# -- the day's date --------------------------------------------------------------------------------

DATED = (
    "{% if today_date is not defined %}{% set today_date = strftime_now('%d %B %Y') %}{% endif %}"
)
WRITES = DATED + "{{ today_date }}" + SMOL


@pytest.mark.parametrize(
    ("template", "options", "said"),
    [
        (SMOL, {}, None),
        (DATED + SMOL, {}, None),  # it knows the day, and writes it nowhere
        (WRITES, {"today_date": "1 May 2025"}, None),
        (WRITES, {"other_date": "1 May 2025"}, r'template_options=\{"today_date": "26 Jul 2024"\}'),
        (WRITES, {}, "writes today's date where none is given, so tomorrow's tokens would be"),
        ("{{ strftime_now('%Y') }}" + SMOL, {}, "reads no option for the date: give another temp"),
    ],
)
def test_a_template_that_writes_the_day_is_told(
    template: str, options: dict[str, Any], said: str | None
) -> None:
    prompts = ["Hm", Prompt("Hm"), Prompt.chat([A], template_options=options)]
    note = dated(prompts, tokenizer_with(template))
    assert note is None if said is None else re.search(said, str(note))


def test_of_several_templates_the_one_for_tools_is_followed() -> None:
    tokenizer = tokenizer_with(SMOL)
    tokenizer.chat_template = {"default": SMOL, "tool_use": PHI4}
    for tools, template in ((None, SMOL), (TOOLS, PHI4)):
        prompt = Prompt.chat([A], tools=tools)
        expected = tokenize(Prompt.chat([A]), tokenizer_with(template))
        found = tokenize(prompt, tokenizer)
        assert (found.ids, found.spans) == (expected.ids, expected.spans)
    tokenizer.chat_template = {"rag": SMOL, "tool_use": PHI4}
    assert dated([Prompt.chat([A])], tokenizer) is None
    with pytest.raises(PromptError, match=r"refuses this conversation: .*multiple chat templates"):
        tokenize(Prompt.chat([A]), tokenizer)


# -- white space that a tokenizer leaves out of its tokens' offsets --------------------------------


@pytest.mark.parametrize("name", ["llama3", "gpt2", "gemma"])
def test_white_space_at_a_conversations_ends_is_in_a_turn(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    prompt = Prompt.chat([{**A, "content": " q"}], prefill="The end ")
    tokens = tokenize(prompt, tokenizer)
    assert tokens.text == " q;The end "
    runs = tokens.spans["turn"]
    assert sorted(i for run in runs for i in run) == [*range(len(tokens))]
    assert [tokenizer.decode([tokens.ids[i] for i in run]) for run in runs] == [" q;", "The end "]


def test_only_an_answer_that_goes_on_after_a_prefill_may_continue_its_word() -> None:
    ended = Prompt.chat([A, B], answer="c")
    begun = Prompt.chat([A], prefill="b", answer="c")
    assert joined_answers([ended, Prompt.chat([A], answer="c")]) is None
    assert "the answer 'c' continues the prompt's last word" in str(joined_answers([begun]))
