"""Chat templates that imitate one trait each of those that users have, over the tokens of tests/hf_tokenizers.py."""

from __future__ import annotations

from nemo_advrm.data.messages import Message

_TURN = "<|im_start|>{{ m['role'] }}\n{{ %s }}<|im_end|>\n"
_START = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_FOR, _END = "{% for m in messages %}", "{% endfor %}"

TEMPLATES: dict[str, str | None] = {
    "chatml": _FOR + _TURN % "m['content']" + _END + _START,
    "opens_think": _FOR
    + _TURN % "m['content']"
    + _END
    + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "trims": _FOR + _TURN % "m['content'] | trim" + _END + _START,
    "merges_line_breaks": _FOR + _TURN % "m['content'].replace('\n\n', '\n')" + _END + _START,
    "two_turns": "{% if messages|length != 2 %}{{ raise_exception('two turns') }}{% endif %}"
    "Question: {{ messages[0]['content'] }}<|im_start|>Answer: {{ messages[1]['content'] }}<|im_end|>",
    "bos": "{{ bos_token }}" + _FOR + "{{ m['role'] }}: {{ m['content'] }}<|im_end|>" + _END,
    "no_system": _FOR
    + "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + _TURN % "m['content']"
    + _END
    + _START,
    "llama3": _FOR
    + "{% set c = '<|im_start|>' + m['role'] + '<|im_start|>\n\n' + m['content'] | trim + '<|im_end|>' %}"
    + "{% if loop.first %}{% set c = '<|endoftext|>' + c %}{% endif %}{{ c }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_start|>\n\n' }}{% endif %}",
    "no_end": _FOR
    + "{{ m['role'] }}: {{ m['content'] }}\n"
    + _END
    + "{% if add_generation_prompt %}assistant: {% endif %}",
    "drops_thought": _FOR
    + _TURN % "m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content']"
    + _END
    + _START,
    "none": None,
}
ANSWERS = (
    "the answer",
    "\n\nthe answer is\n\n\n the question",
    "  the answer \n",
    "<think>why</think>\nthe answer",
    "",
    "a < b | c >",
)


def conversation(answer: str, turns: int = 1) -> list[Message]:
    messages = []
    for i in range(turns):
        messages.append(Message(role="user", content=f"the question {i}\n\nis "))
        messages.append(Message(role="assistant", content=f"an answer {i}"))
    return [*messages[:-1], Message(role="assistant", content=answer)]
