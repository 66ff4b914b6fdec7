"""Chat templates in the form of those in use, written here; each with the tokenizer it is tried on.

Together they do what real templates do: trim contents, merge the system prompt into the first (or
the last) user turn, write a default system prompt or a date, leave earlier thinking out, look for
texts inside of contents, write tools and tool calls, refuse roles.
"""

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
