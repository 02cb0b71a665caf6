"""A tool, a chat template that takes tools and shows calls in Hermes's form, and a conversation that uses both."""

from __future__ import annotations

from typing import Any

# For the special tokens of `molora.testing`'s tokenizer.
TEMPLATE = (
    "{% if tools %}<|system|>Tools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|user|><tool_response>{{ m.content }}</tool_response>"
    "{% else %}{{ '<|' + m.role + '|>' + m.content }}{% for call in m.tool_calls %}"
    '\n<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "hue",
        "description": "Says its hue.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
    },
}
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "hue", "arguments": {"of": "rose"}}}
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "a rose?"}]
CALLED: dict[str, Any] = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
TOLD: dict[str, Any] = {"role": "tool", "tool_call_id": "c1", "content": "red"}
