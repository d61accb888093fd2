"""Every token of an answer, given the conversation before it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from distill.data.tasks.causal_lm import CausalLM, check_row_length
from distill.data.tasks.conversations import COLUMNS, Conversation, Message, read_conversation
from distill.data.tasks.prompts import answered, last_prompts
from distill.data.tasks.task import Encoder, Features, Seeds, Values
from distill.errors import InputError
from distill.models.forward import UNLABELLED, Batch
from distill.models.weights import as_input_error, within

Span = tuple[int, int]
"""First character of a learned part of a text, and one more than its last."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark of templates that say themselves what the assistant writes."""
NO_TEMPLATE = (
    "the teacher's tokenizer has no chat template, so nobody knows how it writes a conversation: put the template of "
    "the model, or of its instruct version, as chat_template.jinja into its folder, or use task: causal_lm"
)
EMPTY_TURN = "conversations that are empty, or have a turn without content and tool_calls, left out"
LOST_CALL = "conversations with a turn of nothing but tool_calls, which the chat template does not write, left out"
DATED = "conversations into which the chat template writes the time of this run: on another day they are others"
NO_ANSWER = "conversations without a turn of the assistant to learn from, left out"
CUT_ANSWER = "conversations whose first max_length tokens hold no answer, left out"
PATIENCE = 10
"""Seconds for a conversation; a template is a program of a stranger, and its loops may never end."""
HIDDEN_ANSWER = "conversations whose answers are not found in what the chat template writes, left out"
REWRITTEN = "conversations whose earlier turns the chat template writes differently later: one example per answer"


class Chat(CausalLM):
    """Conversations as the chat template of the tokenizer writes them; what the assistant says is learned."""

    name = "chat"
    columns: ClassVar = COLUMNS
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
        lost: dict[Any, list[str]] = {}
        written: list[tuple[int, str, list[Span] | None]] = []
        for number, place in enumerate(rows["place"]):
            found = read_conversation({name: rows[name][number] for name in self.columns})
            notes.update(found.notes)
            if found.empty:
                encoder.note(EMPTY_TURN)
                continue
            with as_input_error(f"data: {place}: the chat template refuses the conversation"), within(PATIENCE):
                texts = render(tokenizer, found, encoder.spec.learn_from == "all", notes, lost)
                written += [(number, *own) for own in texts]
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
    without = dict.fromkeys(("add_special_tokens", "return_attention_mask", "return_token_type_ids"), False)
    encoded = tokenizer(texts, **without, verbose=False)
    added = tokenizer.added_tokens_decoder
    examples = []
    for (row, text, own), ids, places in zip(written, encoded["input_ids"], encoded.encodings, strict=True):
        everything = np.ones(len(ids), dtype=np.int64)
        learned = everything if own is None else mark(text, ids, places, own, added)
        if not learned[1:].any():
            encoder.note(NO_ANSWER)
        elif not learned[1:limit].any():
            encoder.note(CUT_ANSWER)
        else:
            encoder.truncated += len(ids) > limit
            marks = {} if own is None else {"learned": learned[:limit]}
            examples.append({"input_ids": ids[:limit], "labelled": True, "row": row, **marks})
    return examples


def render(
    tokenizer: Any, conversation: Conversation, learn_all: bool, notes: Counter[str], lost: dict[Any, list[str]]
) -> Iterator[tuple[str, list[Span] | None]]:
    """Write a conversation with the tokenizer's chat template, and find what is learned in it.

    Args:
        tokenizer: With a template.
        conversation: What is written.
        learn_all: Everything is learned.
        notes: Counts what happens.
        lost: Keeps what the template passes over, by what the messages have.

    Yields:
        A text, and the spans that are learned; None: all of it. Several where the template writes earlier turns
        differently once later ones are there, as those that drop earlier thoughts: then each answer is learned as it
        is written when it is the last turn, behind what stands before it then.
    """
    messages, tools = conversation.messages, conversation.tools
    template = tokenizer.get_chat_template(tools=tools)

    def write(part: Sequence[Message], prompting: bool = False, tools: list[Any] | None = tools) -> str:
        return str(
            tokenizer.apply_chat_template(part, tools=tools, tokenize=False, add_generation_prompt=prompting)
            if part
            else ""
        )

    full = write(messages)
    shape = _shape(conversation)
    if shape not in lost:
        lost[shape] = [*_lost(conversation, full, write)]
    unwritten = [] if all(each["content"].strip() in full for each in messages) else ["a turn"]
    notes.update(f"conversations with {what} that the chat template does not write" for what in lost[shape] + unwritten)
    notes.update([DATED] if "strftime_now" in template else [])
    if "tool_calls" in lost[shape] and not all(each["content"].strip() for each in messages):
        notes[LOST_CALL] += 1
        return
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
        found = [find_answer(messages, at, full, write, tokenizer.eos_token or "") for at in answers]
        if None not in found:
            yield full, [span for span in found if span is not None]
            return
        notes[REWRITTEN] += 1
        for at in answers:
            text = write(messages[: at + 1])
            span = find_answer(messages[: at + 1], at, text, write, tokenizer.eos_token or "")
            if span is None:
                notes[HIDDEN_ANSWER] += 1
            else:
                yield text, [span]


def _shape(conversation: Conversation) -> Any:
    """List what decides which keys a template writes: those of the last and of other messages, by role, and tools."""
    last = conversation.messages[-1]
    keys = {(each is last, each["role"], key, bool(own)) for each in conversation.messages for key, own in each.items()}
    return bool(conversation.tools), frozenset(keys)


def _lost(conversation: Conversation, full: str, write: Callable[..., str]) -> Iterator[str]:
    """Name what a conversation has and its text `full` has not: a template passes over what it does not know."""
    messages = conversation.messages
    if conversation.tools and write(messages, tools=None) == full:
        yield "tools"
    for key in sorted({key for each in messages for key in each} - {"role", "content"}):
        try:
            if write([{name: own for name, own in each.items() if name != key} for each in messages]) == full:
                yield key
        except (TemplateError, TypeError):  # it cannot do without
            pass


def find_answer(messages: Sequence[Message], at: int, full: str, write: Callable[..., str], end: str) -> Span | None:
    """Find an answer in the text of a conversation.

    It begins where the template would let the assistant speak, and ends where the conversation up to it does.

    Args:
        messages: The conversation.
        at: Which of them is the answer.
        full: The text of the conversation.
        write: Renders messages; with `True`, up to where the assistant speaks.
        end: The end token, which some templates write once, behind whatever comes last.

    Returns:
        None where the turns up to the answer are not written in `full` as they are without later ones.
    """
    closed = full if at == len(messages) - 1 else write(messages[: at + 1])
    # The first turn of all: no template prompts for it, but its header is what does not depend on what it says.
    opened = write(messages[:at], True) if at else write([{**messages[at], "content": "\N{DAGGER}"}])
    known = at and full.startswith(opened) and not (end and full.endswith(end))
    before = opened if known else write(messages[:at])
    if not full.startswith(before):  # the template writes an end token behind whatever comes last
        before, closed = before.removesuffix(end), closed.removesuffix(end)
    if not full.startswith(closed):
        closed = closed.removesuffix(end)
    if not full.startswith(before) or not full.startswith(closed) or len(closed) <= len(before):
        return None
    return max(len(before), shared_start(opened, closed)), len(closed)


def shared_start(one: str, other: str) -> int:
    """Count the characters that two texts begin with alike."""
    counts = range(1, min(len(one), len(other)) + 1)
    return bisect_left(counts, True, key=lambda count: one[:count] != other[:count])


def mark(text: str, ids: Sequence[int], places: Any, spans: Sequence[Span], added: Collection[int]) -> np.ndarray:
    """Mark the tokens of which a part lies in a span, int64 [L] of 0 and 1.

    White space behind the token that ends a turn belongs to the template: nobody has to say it.

    Args:
        text: The text.
        ids: Its tokens.
        places: The `tokenizers.Encoding` of it, which says where each token is; a list of that would take long.
        spans: What is learned.
        added: Tokens that are no part of words; those that end turns are among them.
    """
    learned = np.zeros(len(ids), dtype=np.int64)

    def token_at(place: int) -> int:
        found = (places.char_to_token(at) for at in range(place, len(text)))  # none writes some white space
        return next((token for token in found if token is not None), len(ids))

    for start, stop in spans:
        first, past = token_at(start), token_at(stop)
        past += past < len(ids) and places.token_to_chars(past)[0] < stop
        inside = range(first, past)
        last = next((at for at in reversed(inside) if not text[slice(*places.token_to_chars(at))].isspace()), None)
        learned[first : past if last is None or ids[last] not in added else last + 1] = 1
    return learned
