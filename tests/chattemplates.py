"""Chat templates in the form of those in use, written here; each with the tokenizer it is tried on.

Together they do what real templates do: trim contents, merge the system prompt into the first (or
the last) user turn, write a default system prompt or a date, leave earlier thinking out, look for
texts inside of contents, write tools and tool calls, refuse roles.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken
from toytokenizers import TOKENIZERS
from transformers import PreTrainedTokenizerFast

Messages = Sequence[Mapping[str, Any]]

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
<|im_start|>system
Answer as well as you can.<|im_end|>
{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}
{%- else %}{{ m['content'] }}<|im_end|>{% endif %}

{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set rest = messages[1:] -%}
  {%- set ns = namespace(system=messages[0]['content']) -%}
{%- else -%}
  {%- set rest = messages -%}
  {%- set ns = namespace(system=none) -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles take turns: user, assistant, user, assistant') -}}
  {%- endif -%}
  {%- if m['role'] == 'user' -%}
    {%- if loop.first and ns.system is not none -%}
      {%- set text = '<<SYS>>\\n' + ns.system + '\\n<</SYS>>\\n\\n' + m['content'] -%}
    {%- else -%}
      {%- set text = m['content'] -%}
    {%- endif -%}
    {{- bos_token + '[INST] ' + text.strip() + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + m['content'].strip() + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- set date = date_string if date_string is defined else '26 Jul 2024' -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] | trim -%}
  {%- set rest = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set rest = messages -%}
{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge ends in: December 2023\\n' -}}
{{- 'Today is: ' + date + '\\n\\n' -}}
{%- if tools -%}
  {{- 'You may call these functions.\\n\\n' -}}
  {%- for tool in tools -%}{{- tool | tojson(indent=4) + '\\n\\n' -}}{%- endfor -%}
{%- endif -%}
{{- system + '<|eot_id|>' -}}
{%- for m in rest -%}
  {%- if m['tool_calls'] -%}
    {%- set call = m['tool_calls'][0]['function'] -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call['name'] + '", ' -}}
    {{- '"parameters": ' + call['arguments'] | tojson + '}<|eot_id|>' -}}
  {%- elif m['role'] == 'tool' -%}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m['content'] | tojson -}}
    {{- '<|eot_id|>' -}}
  {%- else -%}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim -}}
    {{- '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

GEMMA = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
  {%- set first = messages[0]['content'] + '\\n\\n' -%}
  {%- set rest = messages[1:] -%}
{%- else -%}
  {%- set first = '' -%}
  {%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must alternate') -}}
  {%- endif -%}
  {%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
  {{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') -}}
  {{- m['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] -%}
  {%- set rest = messages[1:] -%}
{%- else -%}
  {%- set system = none -%}
  {%- set rest = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for m in rest -%}
  {%- if m['role'] == 'user' -%}
    {%- if loop.last and tools -%}
      {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {%- if loop.last and system is not none -%}
      {{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' -}}
    {%- else -%}
      {{- '[INST] ' + m['content'] + '[/INST]' -}}
    {%- endif -%}
  {%- elif m['role'] == 'tool' -%}
    {{- '[TOOL_RESULTS] {"content": ' + m['content'] + '}[/TOOL_RESULTS]' -}}
  {%- elif m['tool_calls'] -%}
    {{- '[TOOL_CALLS] [' -}}
    {%- for call in m['tool_calls'] -%}
      {{- call['function'] | tojson -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}
    {%- endfor -%}
    {{- ']' + eos_token -}}
  {%- else -%}
    {{- ' ' + m['content'] | trim + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

PHI3 = """\
{%- for m in messages -%}
  {%- if m['role'] == 'system' and m['content'] -%}
    {{- '<|system|>\\n' + m['content'] + '<|end|>\\n' -}}
  {%- elif m['role'] == 'user' -%}
    {{- '<|user|>\\n' + m['content'] + '<|end|>\\n' -}}
  {%- elif m['role'] == 'assistant' -%}
    {{- '<|assistant|>\\n' -}}
    {%- generation -%}{{- m['content'] + '<|end|>\\n' -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""

ZEPHYR = """\
{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

QWEN3 = """\
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
  {{- '# Tools\\n\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
  {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns = namespace(asked=-1) -%}
{%- for m in messages -%}
  {%- if m.role == 'user' and not (m.content.startswith('<tool_response>')
                                   and m.content.endswith('</tool_response>')) -%}
    {%- set ns.asked = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
  {%- elif m.role == 'assistant' -%}
    {%- set content = m.content | default('') -%}
    {%- set thought = '' -%}
    {%- if m.reasoning_content is string -%}
      {%- set thought = m.reasoning_content -%}
    {%- elif '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] -%}
      {%- set thought = thought.lstrip('\\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > ns.asked and (loop.last or thought) -%}
      {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
    {%- else -%}
      {{- content -}}
    {%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {{- '\\n' if content or not loop.first else '' -}}
      {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
      {{- call.function.arguments | tojson + '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
      {{- '<|im_start|>user' -}}
    {%- endif -%}
    {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
      {{- '<|im_end|>\\n' -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}
    {{- '<think>\\n\\n</think>\\n\\n' -}}
  {%- endif -%}
{%- endif -%}
"""

DEEPSEEK = """\
{%- set ns = namespace(system='') -%}
{%- for m in messages -%}
  {%- if m['role'] == 'system' -%}{%- set ns.system = ns.system + m['content'] -%}{%- endif -%}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}
    {{- '<|User|>' + m['content'] -}}
  {%- elif m['role'] == 'assistant' -%}
    {%- set content = m['content'] -%}
    {%- if '</think>' in content -%}
      {%- set content = content.split('</think>')[-1] -%}
    {%- endif -%}
    {{- '<|Assistant|>' + content + eos_token -}}
  {%- elif m['role'] == 'tool' -%}
    {{- '<|tool_out|>' + m['content'] + '<|tool_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}
"""

OLMO = """\
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m['role'] == 'system' -%}
    {{- '<|system|>\\n' + m['content'] + '\\n' -}}
  {%- elif m['role'] == 'user' -%}
    {{- '<|user|>\\n' + m['content'] + '\\n' -}}
  {%- elif m['role'] == 'assistant' -%}
    {%- if not loop.last -%}
      {{- '<|assistant|>\\n' + m['content'] + eos_token + '\\n' -}}
    {%- else -%}
      {{- '<|assistant|>\\n' + m['content'] + eos_token -}}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

#: Name -> the template, the manner of its tokenizer, and the markers that are tokens of their own.
TEMPLATES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "chatml": (CHATML, "gpt2", ("<|im_start|>", "<|im_end|>")),
    "llama2": (LLAMA2, "sentencepiece", ()),
    "llama3": (LLAMA3, "llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": (GEMMA, "gemma", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": (MISTRAL, "sentencepiece", ("[INST]", "[/INST]", "[TOOL_CALLS]")),
    "phi3": (PHI3, "sentencepiece", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "zephyr": (ZEPHYR, "sentencepiece", ()),
    "qwen3": (QWEN3, "gpt2", ("<|im_start|>", "<|im_end|>", "<think>", "</think>")),
    "deepseek": (DEEPSEEK, "llama3", ("<|User|>", "<|Assistant|>")),
    "olmo": (OLMO, "gpt2", ()),
}

# -- the same templates a second time, in Python: an oracle for each character's message ----------

#: (text, the number of the message that says it or None, the turn that it is in or None).
Piece = tuple[str, int | None, int | str | None]

#: How the turn of the generation prompt is called here.
PROMPT = "prompt"


def _around(i: int, before: str, said: str, after: str) -> list[Piece]:
    return [(before, None, i), (said, i, i), (after, None, i)]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _call(i: int, call: Any) -> list[Piece]:
    """`{"name": …, "arguments": …}`, whose texts are the assistant's."""
    pieces: list[Piece] = [
        ('{"name": "', None, i),
        (call["name"], i, i),
        ('", "arguments": ', None, i),
    ]
    return [*pieces, *_arguments(i, call["arguments"]), ("}", None, i)]


def _arguments(i: int, arguments: Mapping[str, Any]) -> list[Piece]:
    pieces: list[Piece] = []
    for key, value in arguments.items():
        pieces.append((f"{', ' if pieces else '{'}{_json(key)}: ", None, i))
        if isinstance(value, str):
            pieces += [('"', None, i), (_json(value)[1:-1], i, i), ('"', None, i)]
        else:
            pieces.append((_json(value), None, i))
    return [*pieces, ("}", None, i)]


def _merged(messages: Messages) -> tuple[str | None, list[tuple[int, Any]]]:
    """The system prompt, and the numbered messages after it."""
    numbered = list(enumerate(messages))
    if messages[0]["role"] == "system":
        return messages[0]["content"], numbered[1:]
    return None, numbered


def _chatml(messages: Messages, tools: Any, prompted: bool) -> list[Piece]:
    pieces: list[Piece] = []
    if messages[0]["role"] != "system":
        usual = "<|im_start|>system\nAnswer as well as you can.<|im_end|>\n"
        pieces.append((usual, None, None))
    for i, m in enumerate(messages):
        pieces += _around(i, f"<|im_start|>{m['role']}\n", m["content"], "<|im_end|>\n")
    return [*pieces, ("<|im_start|>assistant\n", None, PROMPT)] if prompted else pieces


def _llama2(messages: Messages, tools: Any, prompted: bool) -> list[Piece]:
    system, rest = _merged(messages)
    pieces: list[Piece] = []
    for place, (i, m) in enumerate(rest):
        if m["role"] == "assistant":
            pieces += _around(i, " ", m["content"].strip(), " </s>")
        elif place == 0 and system is not None:
            pieces += _around(0, "<s>[INST] <<SYS>>\n", system, "\n<</SYS>>\n\n")
            pieces[-3:] = [(text, owner, i) for text, owner, _ in pieces[-3:]]
            pieces += [(m["content"].rstrip(), i, i), (" [/INST]", None, i)]
        else:
            pieces += _around(i, "<s>[INST] ", m["content"].strip(), " [/INST]")
    return pieces


def _llama3(messages: Messages, tools: Any, prompted: bool) -> list[Piece]:
    system, rest = _merged(messages)
    turn = None if system is None else 0

    def head(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    about = f"{head('system')}Knowledge ends in: December 2023\nToday is: 26 Jul 2024\n\n"
    if tools:
        about += "You may call these functions.\n\n"
        about += "".join(json.dumps(t, indent=4, ensure_ascii=False) + "\n\n" for t in tools)
    pieces: list[Piece] = [("<|begin_of_text|>", None, None), (about, None, turn)]
    pieces += [((system or "").strip(), turn, turn), ("<|eot_id|>", None, turn)]
    for i, m in rest:
        if m.get("tool_calls"):
            call = m["tool_calls"][0]["function"]
            pieces += _around(i, head("assistant") + '{"name": "', call["name"], '", ')
            pieces += [('"parameters": ', None, i), *_arguments(i, call["arguments"])]
            pieces.append(("}<|eot_id|>", None, i))
        elif m["role"] == "tool":
            said = _json(m["content"])[1:-1]
            pieces += _around(i, head("ipython") + '"', said, '"<|eot_id|>')
        else:
            pieces += _around(i, head(m["role"]), m["content"].strip(), "<|eot_id|>")
    return [*pieces, (head("assistant"), None, PROMPT)] if prompted else pieces


def _gemma(messages: Messages, tools: Any, prompted: bool) -> list[Piece]:
    system, rest = _merged(messages)
    pieces: list[Piece] = [("<bos>", None, None)]
    for place, (i, m) in enumerate(rest):
        role = "model" if m["role"] == "assistant" else m["role"]
        pieces.append((f"<start_of_turn>{role}\n", None, i))
        if place == 0 and system is not None:
            pieces += [(system, 0, i), ("\n\n", None, i)]
        pieces += [(m["content"].strip(), i, i), ("<end_of_turn>\n", None, i)]
    return [*pieces, ("<start_of_turn>model\n", None, PROMPT)] if prompted else pieces


def _mistral(messages: Messages, tools: Any, prompted: bool) -> list[Piece]:
    system, rest = _merged(messages)
    pieces: list[Piece] = [("<s>", None, None)]
    for place, (i, m) in enumerate(rest):
        if m["role"] == "user":
            last = place + 1 == len(rest)
            if last and tools:
                # Before the first message these are no turn's; later they begin the user's.
                said = f"[AVAILABLE_TOOLS] {_json(tools)}[/AVAILABLE_TOOLS]"
                pieces.append((said, None, i))
            pieces.append(("[INST] ", None, i))
            if last and system is not None:
                pieces += [(system, 0, i), ("\n\n", None, i)]
            pieces += [(m["content"], i, i), ("[/INST]", None, i)]
        elif m["role"] == "tool":
            pieces += _around(i, '[TOOL_RESULTS] {"content": ', m["content"], "}[/TOOL_RESULTS]")
        elif m.get("tool_calls"):
            pieces.append(("[TOOL_CALLS] [", None, i))
            for number, call in enumerate(m["tool_calls"]):
                pieces += [(", " if number else "", None, i), *_call(i, call["function"])]
            pieces.append(("]</s>", None, i))
        else:
            pieces += _around(i, " ", m["content"].strip(), "</s>")
    return pieces


def _phi3(messages: Messages, tools: Any, prompted: bool) -> list[Piece]:
    pieces: list[Piece] = []
    for i, m in enumerate(messages):
        if m["content"] or m["role"] != "system":
            pieces += _around(i, f"<|{m['role']}|>\n", m["content"], "<|end|>\n")
    last = max(i for i, _ in enumerate(messages))
    end: Piece = ("<|assistant|>\n", None, PROMPT) if prompted else ("</s>", None, last)
    return [*pieces, end]


def _zephyr(messages: Messages, tools: Any, prompted: bool) -> list[Piece]:
    pieces: list[Piece] = []
    for i, m in enumerate(messages):
        pieces += _around(i, f"<|{m['role']}|>\n", m["content"], "</s>\n")
    return [*pieces, ("<|assistant|>\n", None, PROMPT)] if prompted else pieces


def _qwen3(messages: Messages, tools: Any, prompted: bool) -> list[Piece]:
    system, rest = _merged(messages)
    pieces: list[Piece] = []
    if tools:
        turn = None if system is None else 0
        pieces.append(("<|im_start|>system\n", None, turn))
        if system is not None:
            pieces += [(system, 0, 0), ("\n\n", None, 0)]
        said = "# Tools\n\n<tools>" + "".join(f"\n{_json(t)}" for t in tools)
        pieces.append((f"{said}\n</tools><|im_end|>\n", None, turn))
    elif system is not None:
        pieces += _around(0, "<|im_start|>system\n", system, "<|im_end|>\n")
    fake = ("<tool_response>", "</tool_response>")
    asked = max(
        i
        for i, m in rest
        if m["role"] == "user"
        and not (m["content"].startswith(fake[0]) and m["content"].endswith(fake[1]))
    )
    for place, (i, m) in enumerate(rest):
        near = [rest[j][1]["role"] if 0 <= j < len(rest) else "" for j in (place - 1, place + 1)]
        if m["role"] == "user":
            pieces += _around(i, "<|im_start|>user\n", m["content"], "<|im_end|>\n")
        elif m["role"] == "tool":
            opening = "" if near[0] == "tool" else "<|im_start|>user"
            closing = "" if near[1] == "tool" else "<|im_end|>\n"
            pieces += _around(
                i, f"{opening}\n<tool_response>\n", m["content"], f"\n</tool_response>{closing}"
            )
        else:
            said, thought = m.get("content") or "", m.get("reasoning_content", "")
            if "</think>" in said:
                said = said.split("</think>")[-1].lstrip("\n")
            pieces.append(("<|im_start|>assistant\n", None, i))
            if i > asked and (thought or i + 1 == len(messages)):
                pieces += _around(i, "<think>\n", thought.strip("\n"), "\n</think>\n\n")
                said = said.lstrip("\n")
            pieces.append((said, i, i))
            for number, call in enumerate(m.get("tool_calls", ())):
                pieces.append(("\n" if said or number else "", None, i))
                pieces += [("<tool_call>\n", None, i), *_call(i, call["function"])]
                pieces.append(("\n</tool_call>", None, i))
            pieces.append(("<|im_end|>\n", None, i))
    return [*pieces, ("<|im_start|>assistant\n", None, PROMPT)] if prompted else pieces


def _deepseek(messages: Messages, tools: Any, prompted: bool) -> list[Piece]:
    pieces: list[Piece] = [("<|begin_of_text|>", None, None)]
    for i, m in enumerate(messages):
        match m["role"]:
            case "system":
                pieces.append((m["content"], i, i))
            case "user":
                pieces += _around(i, "<|User|>", m["content"], "")
            case "assistant":
                said = m["content"].split("</think>")[-1]
                pieces += _around(i, "<|Assistant|>", said, "<|end_of_text|>")
    return [*pieces, ("<|Assistant|><think>\n", None, PROMPT)] if prompted else pieces


def _olmo(messages: Messages, tools: Any, prompted: bool) -> list[Piece]:
    pieces: list[Piece] = [("<|endoftext|>", None, None)]
    for i, m in enumerate(messages):
        end = "<|endoftext|>" if m["role"] == "assistant" else "\n"
        if m["role"] == "assistant" and i + 1 < len(messages):
            end += "\n"  # a conversation that ends here ends without it
        pieces += _around(i, f"<|{m['role']}|>\n", m["content"], end)
    if prompted:
        pieces.append(("<|assistant|>\n", None, PROMPT))
    return pieces


WRITERS: dict[str, Callable[[Messages, Any, bool], list[Piece]]] = {
    "chatml": _chatml,
    "llama2": _llama2,
    "llama3": _llama3,
    "gemma": _gemma,
    "mistral": _mistral,
    "phi3": _phi3,
    "zephyr": _zephyr,
    "qwen3": _qwen3,
    "deepseek": _deepseek,
    "olmo": _olmo,
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with one of the templates and its markers."""
    template, manner, markers = TEMPLATES[name]
    tokenizer = TOKENIZERS[manner]()
    tokenizer.add_tokens(
        [AddedToken(m, special=True, normalized=False, rstrip=name == "phi3") for m in markers]
    )
    tokenizer.chat_template = template
    return tokenizer
