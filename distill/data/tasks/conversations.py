"""Conversations as files have them, brought into the one form that chat templates take."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from distill.data.tasks.task import Column

Message = dict[str, Any]
SPEAKERS = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation"), "tool"),
    "system": "system",
}
TEXTS = ("text", "input_text", "output_text")
"""Types of the parts of a content that are text."""
"""`from` in ShareGPT's form of a message, or another word for a role, in small letters -> role."""


def read_messages(value: Any, what: str = "list of messages, as [{role: user, content: …}, …]") -> Any:
    """Accept a list of messages, or of other objects, or its JSON text; nothing where a row has none."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"is neither a {what}, nor the JSON text of one") from error
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"is no {what}")
    return value


def read_side(value: Any) -> Any:
    """Accept a prompt or a completion: a text, or a list of messages; nothing where a row has none."""
    if isinstance(value, list):
        return read_messages(value)
    if value is not None and not isinstance(value, str):
        raise ValueError("is neither a text nor a list of messages")
    return value


COLUMNS = {
    "messages": Column(read_messages),
    **dict.fromkeys(("prompt", "completion"), Column(read_side)),
    "tools": Column(partial(read_messages, what="list of tools, each an object")),
}


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
        sides = [_read_side(*each, found) for each in (("user", prompt), ("assistant", completion))]
        found.given = len(sides[0])
    for number, message in enumerate(message for side in sides for message in side):
        try:
            found.messages.append(_read_message(message, found))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from error
    return found


def _read_side(role: str, side: Any, found: Conversation) -> list[Message]:
    """Make messages of a prompt or completion, a text or a list; in some files the list is JSON text."""
    if isinstance(side, str) and side.lstrip().startswith("[{"):
        with suppress(ValueError):
            listed = read_messages(side)
            if all({"role", "from"} & each.keys() for each in listed):
                found.notes["prompts and completions that are lists of messages as JSON text, read as these"] += 1
                return list(listed)
    return [{"role": role, "content": side}] if isinstance(side, str) else list(side)


def _read_message(message: Message, found: Conversation) -> Message:
    given = {name: own for name, own in message.items() if own is not None}  # `datasets` fills structs up
    read = _with_role(given, found.notes)
    if isinstance(read.get("function_call"), dict):
        found.notes["messages with function_call, read as tool_calls"] += 1
        read["tool_calls"] = [{"type": "function", "function": read.pop("function_call")}]
    if "tool_calls" not in read and "content" not in {**message, **read}:
        raise ValueError(f"needs a content, as in {{role: user, content: …}}; it has {', '.join(read)}")
    content, calls = read.get("content", ""), read.pop("tool_calls", [])
    if isinstance(content, list):
        found.notes["messages in parts, whose texts are joined"] += 1
        content = "".join(map(_text_of_part, content))
    if not isinstance(content, str):
        raise ValueError("its content is neither a text nor a list of parts")
    if not isinstance(calls, list):
        raise ValueError(f"its tool_calls are no list: {reprlib.repr(calls)}")
    if calls:
        read["tool_calls"] = [_read_call(call, found.notes) for call in calls]
    found.empty |= not content.strip() and not calls
    return {**read, "content": content}


def _with_role(read: Message, notes: Counter[str]) -> Message:
    """Give a message a role that templates know, where its own is another word for one."""
    if "role" not in read and "from" in read:
        speaker = str(read.pop("from")).strip()
        if speaker.lower() not in SPEAKERS:
            raise ValueError(f"from: {speaker!r} is nobody known; use {', '.join(SPEAKERS)}")
        notes["messages with from and value, read as role and content"] += 1
        return {"role": SPEAKERS[speaker.lower()], "content": read.pop("value", ""), **read}
    if not isinstance(read.get("role"), str):
        raise ValueError(f"needs a role, as in {{role: user, content: …}}; it has {', '.join(read) or 'nothing'}")
    role = SPEAKERS.get(read["role"].strip().lower())
    if role is None:
        notes["messages with a role other than system, user, assistant and tool, written as it is"] += 1
    elif role not in ("tool", read["role"]):  # some templates have words of their own for tools
        notes[f"messages with role: {read['role']}, read as {role}"] += 1
        read["role"] = role
    return read


def _read_call(call: Any, notes: Counter[str]) -> Any:
    """Bring the arguments of a call into the form that templates write: an object, without what `datasets` fills up."""
    if not (isinstance(call, dict) and isinstance(function := call.get("function"), dict)):
        return call
    given = function.get("arguments")
    if isinstance(given, str) and given.strip().startswith("{"):
        given = json.loads(given)
        notes["tool calls with arguments as JSON text, read as objects"] += 1
    if not isinstance(given, dict):
        return call
    return {**call, "function": {**function, "arguments": {k: own for k, own in given.items() if own is not None}}}


def _text_of_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") in TEXTS and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"a part of its content is {kind!r}; a language model reads text alone, so remove such rows")
