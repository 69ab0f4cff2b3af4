"""Chat templates with the habits of well-known ones, each as short as shows the habit."""

# Turns are trimmed, a beginning token comes first, a date is written (Llama 3.1's habits)
TRIMMING = (
    "{{- bos_token }}{{- strftime_now('%d %b %Y') }}\n"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"
)
# Earlier thinking is removed, the last answer gets a thinking block even where it has none (Qwen3's habits)
FORGETTING = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[1:] | join | trim %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- answer + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# The generation prompt opens the thinking, the rendering removes it (DeepSeek R1's habits)
OPENING = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + m.content }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant<think>\n' }}{%- endif %}"
)
# No system role, and roles must alternate (Gemma's habits)
STRICT = (
    "{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{%- endif %}"
    "{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>model\n' }}{%- endif %}"
)
# Tool calls as JSON, tool results in a turn of their own
TOOLS = (
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{%- for call in m.tool_calls or [] %}{{- '<call>' + call | tojson + '</call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
