"""Chat templates of the forms that models have, and a tokenizer of bytes that takes them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.data.tasks.task import Encoder
from distill.recipe.schema import Data

MARKS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|end|>", "<mask>",
)  # fmt: skip

# What the assistant says stands between « and »: the `{% generation %}` of the template, or nothing at all.
_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n«{{ m.content }}<|im_end|>»"
        "{{ '\n' }}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %}« {{ m.content | trim }} {{ eos_token }}»"
        "{% else %}{{ raise_exception('Only user and assistant take turns') }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'assistant' %}«{{ m.content | trim }}<|eot_id|>»"
        "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% if m.role == 'assistant' %}«{{ m.content | trim }}<end_of_turn>»{{ '\n' }}"
        "{% else %}{{ m.content | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %}« {{ m.content }}{{ eos_token }}»{% endif %}{% endfor %}"
    ),
    "phi3": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n«{{ m.content }}<|end|>»{{ '\n' }}"
        "{% else %}<|user|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
}
TEMPLATES = {name: text.replace("«", "").replace("»", "") for name, text in _TEMPLATES.items()}
MARKED = {
    name: text.replace("«", "{% generation %}").replace("»", "{% endgeneration %}") for name, text in _TEMPLATES.items()
}
"""The same ones, which say themselves what the assistant writes."""

THINKING = (  # as Qwen 3: thoughts before the last question are left out
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTING_THOUGHTS = (  # as DeepSeek R1: the prompt begins a thought that no conversation keeps
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
SYSTEM_LAST = (  # as Mistral v3: the system's turn is written into the last question
    "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if messages[0].role == 'system' and loop.index0 > loop.length - 3 %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


def byte_tokenizer(template: str | None = None, **names):
    """One token per byte of UTF-8, and the marks of all templates."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(MARKS))
    given = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **names}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **given)
    made.chat_template = template
    return made


def save_tokenizer(folder: Path, template: str | None = None, **names) -> Path:
    byte_tokenizer(template, **names).save_pretrained(folder)
    return folder


def encoded(task, tokenizer, rows, measured=False, **spec):
    """The features of rows, given as values by column, and the encoder with its counts."""
    own = Data(source="./x.jsonl", task=task.name, **spec)
    encoder = Encoder(tokenizer, own, task.settle({}, own), measured=measured)
    columns = {name: [row.get(name) for row in rows] for name in task.columns}
    columns["place"] = [f"x.jsonl, line {number}" for number in range(1, len(rows) + 1)]
    return task.encode(columns, encoder), encoder
