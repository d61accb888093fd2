"""Every token of an answer, given the conversation before it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from distill.data.tasks.causal_lm import CausalLM, check_row_length
from distill.data.tasks.prompts import answered, last_prompts
from distill.data.tasks.task import Column, Encoder, Features, Seeds, Values
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch
from distill.models.weights import as_input_error, within

Message = dict[str, Any]
Span = tuple[int, int]
"""First character of a learned part of a text, and one more than its last."""

SPEAKERS = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function_response", "observation"), "tool"),
    "system": "system",
}
"""`from` in ShareGPT's form of a message -> role."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark of templates that say themselves what the assistant writes."""
NO_TEMPLATE = (
    "the teacher's tokenizer has no chat template, so nobody knows how it writes a conversation: put the template of "
    "the model, or of its instruct version, as chat_template.jinja into its folder, or use task: causal_lm"
)
EMPTY_TURN = "conversations that are empty, or have a turn that says nothing, left out"
NO_ANSWER = "conversations without a turn of the assistant to learn from, left out"
CUT_ANSWER = "conversations whose first max_length tokens hold no answer, left out"
PATIENCE = 10
"""Seconds for a conversation; a template is a program of a stranger, and its loops may never end."""
HIDDEN_ANSWER = "conversations whose answers are not found in what the chat template writes, left out"
REWRITTEN = "conversations whose earlier turns the chat template writes differently later: one example per answer"


def read_messages(value: Any) -> Any:
    """Accept a list of messages, or its JSON text; nothing where a row has none."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError("is neither a list of messages nor the JSON text of one") from error
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError("is no list of messages, as [{role: user, content: …}, …]")
    return value


def read_side(value: Any) -> Any:
    """Accept a prompt or a completion: a text, or a list of messages; nothing where a row has none."""
    return read_messages(value) if isinstance(value, list) else read_text(value)


def read_text(value: Any) -> str | None:
    """Accept a text; nothing where a row has none."""
    if value is not None and not isinstance(value, str):
        raise ValueError("is neither a text nor a list of messages")
    return value


def read_tools(value: Any) -> Any:
    """Accept a list of tools as JSON schemas, or its JSON text; nothing where a row has none."""
    try:
        return read_messages(value)
    except ValueError as error:
        raise ValueError("is no list of tools, each an object, nor the JSON text of one") from error


@dataclass
class Conversation:
    """Messages as a chat template takes them."""

    messages: list[Message]
    tools: list[Any] | None = None
    given: int = 0
    """Messages at the start that are a prompt: nothing in them is learned."""
    empty: bool = False
    """A turn says nothing."""
    notes: Counter[str] = field(default_factory=Counter)
    """Conversions, for the summary."""


class Chat(CausalLM):
    """Conversations as the chat template of the tokenizer writes them; what the assistant says is learned."""

    name = "chat"
    columns: ClassVar = {
        "messages": Column(read_messages),
        **dict.fromkeys(("prompt", "completion"), Column(read_side)),
        "tools": Column(read_tools),
    }
    observed = ()
    divisible = False
    prompted = True

    def check_row(self, values: dict[str, Any]) -> dict[str, Any]:
        """Read the conversation once, for its mistakes."""
        read_conversation(values)
        return values

    def encode(self, rows: Values, encoder: Encoder) -> Features:
        """Render and encode conversations, the beginning where one is too long, and mark what is learned."""
        tokenizer, notes = encoder.tokenizer, encoder.notes
        check_row_length(encoder)
        _check_tokenizer(tokenizer)
        written: list[tuple[int, str, list[Span] | None]] = []
        for number, place in enumerate(rows["place"]):
            found = read_conversation({name: rows[name][number] for name in self.columns})
            notes.update(found.notes)
            if found.empty:
                encoder.note(EMPTY_TURN)
                continue
            with as_input_error(f"data: {place}: the chat template refuses the conversation"), within(PATIENCE):
                written += [(number, *own) for own in render(tokenizer, found, encoder.spec.learn_from == "all", notes)]
        return encoder.features(_cut(written, encoder) if written else [])

    def collate(self, examples: Mapping[str, Any], padding: int, seeds: Seeds) -> Batch:
        """Label the learned tokens; by `learned` [B, L] the teacher is compared where they are predicted, only."""
        batch = super().collate(examples, padding, seeds)
        if "learned" not in examples:
            return batch
        learned = torch.from_numpy(examples["learned"].pad(0)).bool()
        return {**batch, "labels": batch["labels"].masked_fill(~learned, UNLABELLED), "learned": learned}

    def prompts(self, batch: Batch) -> list[torch.Tensor | None]:
        """Take each conversation up to where its last answer begins."""
        return last_prompts(batch)

    def with_answers(self, prompts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor], **given: Any) -> Batch:
        """Put each answer behind its prompt; the answers are what is learned."""
        return self.collate(answered(prompts, answers, given["sizes"]), given["padding"], ())


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer.chat_template is None:
        raise InputError(NO_TEMPLATE)
    if not tokenizer.is_fast:
        raise InputError("task: chat needs a tokenizer that tells where in a text its tokens are (tokenizer.json)")


def _cut(written: Sequence[tuple[int, str, list[Span] | None]], encoder: Encoder) -> list[dict[str, Any]]:
    """Encode texts, each given with its row and what is learned of it, and cut them to length.

    Those that would teach nothing are left out.
    """
    tokenizer, limit = encoder.tokenizer, encoder.spec.max_length
    texts = [text for _, text, _ in written]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    added = np.array(sorted(tokenizer.added_tokens_decoder), dtype=np.int64)
    examples = []
    for (row, text, own), ids, places in zip(written, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        everything = np.ones(len(ids), dtype=np.int64)
        learned = everything if own is None else mark(text, np.array(ids), np.array(places), own, added)
        if not learned[1:].any():
            encoder.note(NO_ANSWER)
        elif not learned[1:limit].any():
            encoder.note(CUT_ANSWER)
        else:
            encoder.truncated += len(ids) > limit
            marks = {} if own is None else {"learned": learned[:limit]}
            examples.append({"input_ids": ids[:limit], "labelled": True, "row": row, **marks})
    return examples


def read_conversation(values: Mapping[str, Any]) -> Conversation:
    """Bring the columns of a row, messages or prompt and completion, into one form. Raises ValueError."""
    found = Conversation([], values.get("tools") or None)
    messages, prompt, completion = (values.get(name) for name in ("messages", "prompt", "completion"))
    if messages:
        if prompt or completion:
            found.notes["rows with messages and a prompt or completion beside them, which is not read"] += 1
        sides = [messages]
    elif prompt is None and completion is None:
        found.empty, sides = True, []
    elif prompt is None or completion is None:
        raise ValueError(f"has a {'completion' if prompt is None else 'prompt'} and nothing on the other side")
    else:
        sides = [
            [{"role": role, "content": side}] if isinstance(side, str) else side
            for role, side in (("user", prompt), ("assistant", completion))
        ]
        found.given = len(sides[0])
    for number, message in enumerate(message for side in sides for message in side):
        try:
            found.messages.append(_read_message(message, found))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from error
    return found


def _read_message(message: Message, found: Conversation) -> Message:
    read = {name: value for name, value in message.items() if value is not None}  # as `datasets` fills structs up
    if "role" not in read and "from" in read:
        if read["from"] not in SPEAKERS:
            raise ValueError(f"from: {read['from']!r} is nobody known; use {', '.join(SPEAKERS)}")
        found.notes["messages with from and value, read as role and content"] += 1
        read = {"role": SPEAKERS[read.pop("from")], "content": read.pop("value", ""), **read}
    if not isinstance(read.get("role"), str):
        raise ValueError(f"needs a role, as in {{role: user, content: …}}; it has {', '.join(read) or 'nothing'}")
    content = read.get("content", "")
    if isinstance(content, list):
        found.notes["messages in parts, whose texts are joined"] += 1
        content = "".join(map(_text_of_part, content))
    if not isinstance(content, str):
        raise ValueError("its content is neither a text nor a list of parts")
    found.empty |= not content.strip() and "tool_calls" not in read
    return {**read, "content": content}


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"a part of its content is {kind!r}; a language model reads text alone, so remove such rows")


def render(
    tokenizer: Any, conversation: Conversation, learn_all: bool, notes: Counter[str]
) -> Iterator[tuple[str, list[Span] | None]]:
    """Write a conversation with the tokenizer's chat template, and find what is learned in it.

    Yields:
        A text, and the spans that are learned; None: all of it. Several where the template writes earlier turns
        differently once later ones are there, as those that drop earlier thoughts: then each answer is learned as it
        is written when it is the last turn, behind what stands before it then.
    """
    messages, tools = conversation.messages, conversation.tools
    template = tokenizer.get_chat_template(tools=tools)

    def write(part: Sequence[Message], prompting: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(part, tools=tools, tokenize=False, add_generation_prompt=prompting)
            if part
            else ""
        )

    full = write(messages)
    answers = [at for at, each in enumerate(messages) if each["role"] == "assistant" and at >= conversation.given]
    if learn_all:
        yield full, None
    elif GENERATION.search(template):
        _, spans = render_jinja_template(
            [messages], tools, chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
        prompt = shared_start(full, write(messages[: conversation.given]))
        yield full, [span for span in spans[0] if span[1] > prompt]
    else:
        found = [find_answer(messages[: at + 1], full, write, tokenizer.eos_token or "") for at in answers]
        if None not in found:
            yield full, [span for span in found if span is not None]
            return
        notes[REWRITTEN] += 1
        for at in answers:
            text = write(messages[: at + 1])
            span = find_answer(messages[: at + 1], text, write, tokenizer.eos_token or "")
            if span is None:
                notes[HIDDEN_ANSWER] += 1
            else:
                yield text, [span]


def find_answer(messages: Sequence[Message], full: str, write: Callable[..., str], end: str) -> Span | None:
    """Find the last of some messages, an answer, in the text of the whole conversation.

    It begins where the template would let the assistant speak, and ends where the conversation up to it does.

    Args:
        messages: The conversation up to the answer.
        full: The text of the conversation.
        write: Renders messages; with `True`, up to where the assistant speaks.
        end: The end token, which some templates write once, behind whatever comes last.

    Returns:
        None where the turns up to the answer are not written in `full` as they are without later ones.
    """
    before, closed = write(messages[:-1]), write(messages)
    if not full.startswith(before):  # the template writes an end token behind whatever comes last
        before, closed = before.removesuffix(end), closed.removesuffix(end)
    if not full.startswith(closed):
        closed = closed.removesuffix(end)
    if not full.startswith(before) or not full.startswith(closed) or len(closed) <= len(before):
        return None
    # The first turn of all: no template prompts for it, but its header is what does not depend on what it says.
    opened = write(messages[:-1], True) if messages[:-1] else write([{**messages[-1], "content": "\N{DAGGER}"}])
    return max(len(before), shared_start(opened, closed)), len(closed)


def shared_start(one: str, other: str) -> int:
    """Count the characters that two texts begin with alike."""
    differ = (at for at, (mine, yours) in enumerate(zip(one, other, strict=False)) if mine != yours)
    return next(differ, min(len(one), len(other)))


def mark(text: str, ids: np.ndarray, places: np.ndarray, spans: Sequence[Span], added: np.ndarray) -> np.ndarray:
    """Mark the tokens of which a part lies in a span, int64 [L] of 0 and 1.

    White space behind the token that ends a turn belongs to the template: nobody has to say it.

    Args:
        text: The text.
        ids: Its tokens.
        places: Characters of each token, first and one more than last, int64 [L, 2].
        spans: What is learned.
        added: Tokens that are no part of words, ascending; those that end turns are among them.
    """
    learned = np.zeros(len(ids), dtype=np.int64)
    for start, stop in spans:
        inside = np.flatnonzero((places[:, 0] < stop) & (places[:, 1] > start) & (places[:, 1] > places[:, 0]))
        written = [at for at in inside if not text[slice(*places[at])].isspace()]
        if written and ids[written[-1]] in added:
            inside = inside[inside <= written[-1]]
        learned[inside] = 1
    return learned
