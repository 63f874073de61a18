"""Writes the README.md of an exported model."""

from __future__ import annotations

from typing import Any

from nemo_advrm import __version__
from nemo_advrm.convert.tensors import Description
from nemo_advrm.data.reading import ANSWER, CONVERSATION
from nemo_advrm.data.tokenizers import HFTokenizer, build_tokenizer

_KNOWN = (
    ("base_model", "Base model"),
    ("data", "Preference data"),
    ("adversarial_pairs", "Adversarial pairs"),
    ("rounds", "Rounds of adversarial training"),
    ("steps", "Optimizer steps"),
    ("reference_mean", "Mean score of reference responses"),
    ("reference_std", "Standard deviation of a new response's score from the prompt's reference mean"),
    ("converted_from", "Converted from"),
)

_USE_REWARD = """\
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
with torch.no_grad():
    scores = model(**batch).logits[:, 0]
```

"""

_READ = {
    CONVERSATION: """\
`texts` are finished conversations, question and answer, as the chat template writes them:
`tokenizer.apply_chat_template(messages, tokenize=False)`. The score is that of the last token before the padding, as in
training: do not cut off or add anything.""",
    ANSWER: """\
The score is that of the last token before the padding, which must be the token that ends the answer, as in training:
`texts` are the chat template's generation prompt and the answer, and end right after the answer's end token.""",
}

_READ_PLAIN = """\
There is no chat template. Each of `texts` is a prompt in the format of training, the answer, and the end token. The
score is that of the end token."""

_SPECIAL = """\
Text in a message that spells a special token (such as `<|im_end|>`) was ordinary text in training. transformers encodes
it as that token, unless you pass `sanitize_control_tokens=True` to `apply_chat_template` (newer versions only)."""

_USE_LM = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```"""


def model_card(description: Description, class_name: str, notes: list[str]) -> str:
    """Return Markdown with the metadata block of the Hugging Face hub; ``notes`` are sentences about this export."""
    reward = description.head == "reward"
    kind = "Reward model" if reward else "Language model"
    known = {label: description.provenance.get(key) for key, label in _KNOWN}
    facts = [f"- {label}: {_shown(value)}" for label, value in known.items() if value not in (None, "")]
    front = ["---", "library_name: transformers", "tags:", "- nemo_advrm", *(["- reward-model"] if reward else [])]
    front += [f"pipeline_tag: {'text-classification' if reward else 'text-generation'}", "---"]
    sections = [
        "\n".join(front),
        f"# {kind}",
        f"`{class_name}`, written by nemo_advrm {__version__}.",
        "\n".join(facts),
        "\n\n".join(notes),
        f"## Use\n\n{_USE_REWARD + _how_to_read(description) if reward else _USE_LM}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _how_to_read(description: Description) -> str:
    """Return the paragraphs on the text to score and the token at which the score is read."""
    if description.tokenizer is None:
        return _READ_PLAIN
    tokenizer = build_tokenizer(f"hf:{description.tokenizer}", description.rule)
    if not isinstance(tokenizer, HFTokenizer) or not tokenizer.has_template:
        return _READ_PLAIN
    parts = [_READ[description.rule.at], _SPECIAL]
    if tokenizer.template_asks_date:
        parts.append(f"The chat template writes the date. It is fixed to {description.rule.date}, as in training.")
    return "\n\n".join(parts)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
