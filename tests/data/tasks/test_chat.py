"""Conversations: what the template writes, what of it is learned, and what is refused."""

from __future__ import annotations

import csv
import json
import re

import datasets
import pytest
import torch
from conversations import MARKED, PROMPTING_THOUGHTS, SYSTEM_LAST, TEMPLATES, THINKING, byte_tokenizer, encoded

from distill.data import collate
from distill.data.prepare import prepare
from distill.data.rows import Order
from distill.data.tasks.chat import DATED, EMPTY_TURN, LOST_CALL, Chat, read_conversation
from distill.data.tasks.conversations import read_messages
from distill.data.tasks.task import Ragged
from distill.errors import InputError
from distill.losses import PREDICTION_KINDS, Objective
from distill.models.forward import UNLABELLED, Outputs
from distill.recipe.schema import Data, Term

TASK = Chat()


def turns(*contents, first="user"):
    """Messages in which user and assistant take turns."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
TALK = turns("Hi, who are you?", "I am\nMax.", "And 你好?", "สวัสดี 🙂 <b>")


def learned_texts(template, messages, **row):
    """What is learned of each example, as texts, run by run."""
    tokenizer = byte_tokenizer(template)
    features, encoder = encoded(TASK, tokenizer, [{"messages": messages, **row}], max_length=500)
    found = []
    for ids, learned in zip(features["input_ids"], features["learned"], strict=True):
        runs = [[]]
        for token, own in zip(ids, learned, strict=True):
            if own:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        found.append([tokenizer.decode(run) for run in runs if run])
    return found, encoder


LEARNED = {
    "chatml": ["I am\nMax.<|im_end|>", "สวัสดี 🙂 <b><|im_end|>"],
    "llama2": [" I am\nMax. </s>", " สวัสดี 🙂 <b> </s>"],
    "llama3": ["I am\nMax.<|eot_id|>", "สวัสดี 🙂 <b><|eot_id|>"],
    "gemma": ["I am\nMax.<end_of_turn>", "สวัสดี 🙂 <b><end_of_turn>"],
    "mistral": [" I am\nMax.</s>", " สวัสดี 🙂 <b></s>"],
    "phi3": ["I am\nMax.<|end|>", "สวัสดี 🙂 <b><|end|>"],
}


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("templates", [TEMPLATES, MARKED], ids=["by prefixes", "by the template"])
def test_answers_and_the_tokens_that_end_them_are_learned_and_nothing_else(form, templates):
    found, encoder = learned_texts(templates[form], TALK)
    assert found == [LEARNED[form]]
    assert not encoder.notes


def test_both_ways_of_finding_answers_agree_on_every_conversation():
    talks = [TALK, turns("a"), turns("a", "b"), turns("a", " b ", "c", "  d\n"), turns("a", "<|im_end|>", "c", "d")]
    for form in TEMPLATES:
        for talk in talks:
            by_prefix, by_template = (
                encoded(TASK, byte_tokenizer(templates[form]), [{"messages": talk}], max_length=500)[0]
                for templates in (TEMPLATES, MARKED)
            )
            assert by_prefix["input_ids"] == by_template["input_ids"]
            assert [list(own) for own in by_prefix.get("learned", [])] == [
                list(own) for own in by_template.get("learned", [])
            ], (form, talk)


def test_the_template_alone_writes_a_start_token():
    features, _ = encoded(TASK, byte_tokenizer(TEMPLATES["llama3"]), [{"messages": TALK}], max_length=500)
    start = byte_tokenizer().bos_token_id
    assert features["input_ids"][0][0] == start and features["input_ids"][0].count(start) == 1


def test_system_turns_tools_and_calls_go_through_the_template():
    template = (
        "{% if tools %}tools {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.tool_calls %}call {{ m.tool_calls[0].name }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "Noon.", "tool_calls": None},
    ]
    tokenizer = byte_tokenizer(template)
    row = {"messages": messages, "tools": [{"name": "clock"}]}
    features, _ = encoded(TASK, tokenizer, [row], max_length=500)
    text = tokenizer.decode(features["input_ids"][0])
    assert text.startswith('tools [{"name": "clock"}]\n<|im_start|>system\nBe short.<|im_end|>')
    assert "<|im_start|>tool\n12<|im_end|>" in text
    assert learned_texts(template, messages, tools=row["tools"])[0] == [["call clock<|im_end|>", "Noon.<|im_end|>"]]


def test_a_template_that_drops_earlier_thoughts_gives_one_example_per_answer():
    talk = turns("1+1?", "<think>hm</think>2", "2+2?", "<think>ah</think>4")
    found, encoder = learned_texts(THINKING, talk)
    assert found == [["<think>hm</think>2<|im_end|>"], ["<think>ah</think>4<|im_end|>"]]
    assert [note for note in encoder.notes if "one example per answer" in note]
    tokenizer = byte_tokenizer(THINKING)
    second = encoded(TASK, tokenizer, [{"messages": talk}], max_length=500)[0]["input_ids"][1]
    assert "hm" not in tokenizer.decode(second)  # as the model will see it
    features, _ = encoded(TASK, tokenizer, [{"messages": talk}], max_length=500)
    assert features["row"] == [0, 0]


def test_a_prompt_that_begins_a_thought_is_not_taken_for_a_part_of_the_answer():
    assert learned_texts(PROMPTING_THOUGHTS, turns("a", "b", "c", "d"))[0] == [["b</s>", "d</s>"]]
    assert learned_texts(PROMPTING_THOUGHTS, turns("a", "<think>\nx</think>b"))[0] == [["x</think>b</s>"]]


def test_a_system_turn_that_moves_with_the_last_question_does_not_spoil_what_is_learned():
    talk = [{"role": "system", "content": "S"}, *turns("a", "b", "c", "d")]
    found, encoder = learned_texts(SYSTEM_LAST, talk)
    assert found == [["b</s>"], ["d</s>"]]
    assert sum(encoder.notes.values()) == 1


def test_a_first_turn_of_the_assistant_is_learned_without_its_header():
    assert learned_texts(TEMPLATES["chatml"], turns("Welcome!", "hi", "yes?", first="assistant"))[0] == [
        ["Welcome!<|im_end|>", "yes?<|im_end|>"]
    ]


def test_everything_can_be_learned():
    features, _ = encoded(
        TASK, byte_tokenizer(TEMPLATES["chatml"]), [{"messages": turns("alone")}], learn_from="all", max_length=500
    )
    assert "learned" not in features and len(features["input_ids"]) == 1


def test_prompt_and_completion_are_one_conversation_whose_prompt_is_not_learned():
    given = turns("a", "b", "c")
    for templates in (TEMPLATES, MARKED):
        row = {"prompt": given, "completion": turns("d", first="assistant")}
        assert learned_texts(templates["chatml"], None, **row)[0] == [["d<|im_end|>"]]
        assert learned_texts(templates["chatml"], None, prompt="a", completion="b")[0] == [["b<|im_end|>"]]


def test_other_forms_of_messages_are_read_and_counted():
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    found, encoder = learned_texts(TEMPLATES["chatml"], talk)
    assert found == [["b<|im_end|>"]] and encoder.notes["messages with from and value, read as role and content"] == 2
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "!"}]}]
    found, encoder = learned_texts(TEMPLATES["chatml"], [*parts, {"role": "assistant", "content": "b"}])
    assert found == [["b<|im_end|>"]] and encoder.notes["messages in parts, whose texts are joined"] == 1
    assert read_messages(json.dumps(talk)) == talk and TASK.columns["tools"].read('[{"name": "x"}]') == [{"name": "x"}]
    _, encoder = learned_texts(TEMPLATES["chatml"], turns("a", "b"), prompt="a")
    assert encoder.notes["rows with messages and a prompt or completion beside them, which is not read"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "has a prompt and nothing on the other side"),
        ({"completion": "a"}, "has a completion and nothing on the other side"),
        ({"messages": [{"content": "a"}]}, "message 0: needs a role"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 3}]}, "message 1: its content is"),
        ({"messages": [{"role": "user", "value": "a"}]}, "message 0: needs a content, .* it has role, value"),
        ({"messages": [{"from": "martian", "value": "a"}]}, "martian"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of its content is 'image'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "part of its content is 'str'"),
        ({"messages": [{**CALL, "tool_calls": "[]"}]}, "tool_calls are no list"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        TASK.check_row({**dict.fromkeys(TASK.columns), **row})


@pytest.mark.parametrize("value", ["hello", 3, {"a": 1}, ["a"]])
def test_a_value_that_is_no_list_of_messages_is_refused(value):
    with pytest.raises(ValueError, match="list of messages"):
        read_messages(value)


def test_a_role_that_the_template_refuses_is_named_with_its_row():
    rows = [{"messages": turns("a", "b")}, {"messages": [{"role": "system", "content": "s"}, *turns("a", "b")]}]
    with pytest.raises(InputError, match=r"x\.jsonl, line 2: the chat template refuses .*Only user and assistant"):
        encoded(TASK, byte_tokenizer(TEMPLATES["llama2"]), rows)


def test_conversations_that_teach_nothing_are_left_out_and_counted():
    rows = [
        {"messages": turns("a", "b")},
        {"messages": turns("a", "  ")},
        {"messages": turns("a")},
        {"messages": turns("a" * 40, "b")},
        {"messages": []},
        {},
    ]
    features, encoder = encoded(TASK, byte_tokenizer(TEMPLATES["chatml"]), rows, max_length=32)
    assert features["row"] == [0]
    assert sorted(encoder.notes.values()) == [1, 1, 3]


PLAIN = "{% for m in messages %}{% if m.role != 'system' %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"messages": turns("a", "b")}, []),
        ({"messages": [{"role": "system", "content": "be brief"}, *turns("a", "b")]}, ["a turn"]),
        ({"messages": turns("a", "b"), "tools": [{"name": "add"}]}, ["tools"]),
        ({"messages": [*turns("a"), {**CALL, "content": "b"}, *turns("3", "c")]}, ["tool_calls"]),
        ({"messages": [*turns("a"), {"role": "assistant", "content": "b", "weight": 0}]}, ["weight"]),
    ],
)
def test_what_the_template_passes_over_is_counted(row, lost):
    _, encoder = encoded(TASK, byte_tokenizer(PLAIN), [row, row], max_length=64)
    assert encoder.notes == {f"conversations with {what} that the chat template does not write": 2 for what in lost}


def test_an_answer_of_nothing_is_never_learned():
    called = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}
    nothing = [{**CALL, "tool_calls": []}, {"role": "assistant", "content": None, "refusal": "No."}]
    for turn, note in ((CALL, LOST_CALL), (called, LOST_CALL), *((turn, EMPTY_TURN) for turn in nothing)):
        rows = [{"messages": [*turns("a"), turn, *turns("3", "c")]}, {"messages": turns("a", "b")}]
        features, encoder = encoded(TASK, byte_tokenizer(PLAIN), rows, max_length=64)
        assert features["row"] == [1] and encoder.notes[note] == 1
    template = PLAIN.replace("<|end|>", "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}<|end|>")
    told = {"role": "function", "name": "add", "content": "3"}
    features, encoder = encoded(TASK, byte_tokenizer(template), [{"messages": [*turns("a"), called, told]}])
    assert byte_tokenizer().decode(features["input_ids"][0]) == "<|user|>a<|end|><|user|>add<|end|><|user|>3<|end|>"
    assert encoder.notes["messages with function_call, read as tool_calls"] == 1


def test_a_template_that_writes_the_day_is_said():
    _, encoder = encoded(TASK, byte_tokenizer("{{ strftime_now('%Y') }}" + PLAIN), [{"messages": turns("a", "b")}])
    assert encoder.notes == {DATED: 1}


def test_lists_of_messages_as_json_text_are_read_on_both_sides_and_other_json_stays_text():
    prompt, completion = json.dumps(turns("a")), json.dumps(turns("b", first="assistant"))
    found, encoder = learned_texts(TEMPLATES["chatml"], None, prompt=prompt, completion=completion)
    assert found == [["b<|im_end|>"]] and [*encoder.notes.values()] == [2]
    found, encoder = learned_texts(TEMPLATES["chatml"], None, prompt="a", completion='[{"a": 1}]')
    assert found == [['[{"a": 1}]<|im_end|>']] and not encoder.notes


def test_a_key_that_the_template_reads_is_not_counted():
    template = PLAIN.replace("{{ m.content }}", "{{ m.name + ': ' + m.content }}")
    talk = [{**turn, "name": "Max"} for turn in turns("a", "b")]
    _, encoder = encoded(TASK, byte_tokenizer(template), [{"messages": talk}], max_length=64)
    assert not encoder.notes


def test_keys_are_looked_for_once_for_conversations_that_have_the_same(monkeypatch):
    template = PLAIN.replace("<|end|>", "{% if m.name and loop.last %}{{ m.name }}{% endif %}<|end|>")
    plain = [{**turn, **{key: key for key in "defgh"}} for turn in turns("a", "b", "c", "d")]
    named = [*plain[:-1], {**plain[-1], "name": "Max"}]
    early = [{**plain[0], "name": "Max"}, *plain[1:]]
    tokenizer, calls = byte_tokenizer(template), []
    write = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *given, **own: calls.append(1) or write(*given, **own))
    _, encoder = encoded(TASK, tokenizer, [{"messages": talk} for talk in (plain, named, early) for _ in range(20)])
    lost = {key: encoder.notes[f"conversations with {key} that the chat template does not write"] for key in "defgh"}
    assert set(lost.values()) == {60}
    assert encoder.notes["conversations with name that the chat template does not write"] == 20
    assert len(calls) <= 60 * 6 + 3 * 6  # of each the text, and three for every answer; of each kind one for every key


def test_arguments_of_calls_are_objects_whatever_the_file_has():
    template = PLAIN.replace(
        "<|end|>", "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}<|end|>"
    )
    written = []
    for arguments in ({"a": 1}, '{"a": 1}', {"a": 1, "b": None}):  # as `datasets` fills up what only other rows have
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
        features, encoder = encoded(TASK, byte_tokenizer(template), [{"messages": [*turns("a"), call]}], max_length=64)
        written.append(features["input_ids"])
        assert [*encoder.notes.values()] == [1] * isinstance(arguments, str)
    assert written[0] == written[1] == written[2]
    with pytest.raises(ValueError, match="message 1: Expecting"):
        read_conversation({"messages": [*turns("a"), {**CALL, "tool_calls": [{"function": {"arguments": "{x"}}]}]})


def test_other_words_for_a_role_are_read_and_counted():
    roles = {"Human": "a", "model": "b", "observation": "c"}  # the last one is a word of some templates
    talk = [{"role": role, "content": content} for role, content in roles.items()]
    found, encoder = learned_texts(TEMPLATES["chatml"], talk)
    assert found == [["b<|im_end|>"]]
    read = {"Human": "user", "model": "assistant"}
    assert encoder.notes == {f"messages with role: {role}, read as {known}": 1 for role, known in read.items()}
    found, encoder = learned_texts(TEMPLATES["chatml"], [*turns("a", "b"), {"role": "narrator", "content": "c"}])
    assert found == [["b<|im_end|>"]] and [*encoder.notes.values()] == [1]
    found, _ = learned_texts(TEMPLATES["chatml"], [{"from": " Human", "value": "a"}, {"from": "GPT", "value": "b"}])
    assert found == [["b<|im_end|>"]]


def test_a_long_conversation_keeps_its_beginning_and_is_counted():
    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    features, encoder = encoded(TASK, tokenizer, [{"messages": TALK}], max_length=45)
    assert tokenizer.decode(features["input_ids"][0]).startswith("<|im_start|>user\nHi, who are you?<|im_end|>\n")
    assert len(features["input_ids"][0]) == len(features["learned"][0]) == 45 and encoder.truncated == 1


def test_a_tokenizer_without_a_template_is_refused_with_the_fix():
    with pytest.raises(InputError, match=r"chat_template\.jinja"):
        encoded(TASK, byte_tokenizer(), [{"messages": TALK}])


def a_batch():
    features, _ = encoded(TASK, byte_tokenizer(TEMPLATES["chatml"]), [{"messages": turns("abc", "de", "f", "g")}])
    ragged = {
        name: Ragged(torch.tensor(features[name][0]).numpy(), torch.tensor([len(features[name][0])]).numpy())
        for name in ("input_ids", "learned")
    }
    return TASK.collate(ragged, 0, [(0,)])


def test_labels_and_the_teacher_are_compared_where_a_learned_token_is_predicted():
    batch, kind = a_batch(), PREDICTION_KINDS["next_token"]
    learned = batch["learned"][0]
    assert learned.sum() == 5  # d, e, its end; g, its end
    assert ((batch["labels"][0] != UNLABELLED) == learned).all()
    assert kind.predicted(batch)[0].tolist() == learned[1:].tolist() == kind.labelled(batch)[0].tolist()
    assert kind.states(batch)[0].tolist() == [*learned[1:].tolist(), False]
    terms = [Term(match="labels"), Term(match="logits")]
    assert Objective(terms, "next_token").counts([batch]).tolist() == [5, 5]


def test_what_is_not_learned_has_no_gradient():
    batch = a_batch()
    rows, length = batch["input_ids"].shape
    logits = torch.randn(rows, length, 300, requires_grad=True)
    teacher = torch.randn(rows, length, 300)
    objective = Objective([Term(match="labels"), Term(match="logits")], "next_token")
    loss, _ = objective(Outputs(logits), Outputs(teacher), batch, objective.counts([batch]))
    moved = torch.autograd.grad(loss, logits)[0].abs().sum(-1)[0] > 0
    assert moved.tolist() == [*batch["learned"][0, 1:].tolist(), False]


def test_a_conversation_reads_the_same_after_it_is_kept_as_json():
    values = {"messages": TALK, "prompt": None, "completion": None, "tools": None}
    assert read_conversation(json.loads(json.dumps(values))).messages == TALK


def prepared(folder, template="chatml", packs=True, **spec):
    """The corpus of a file, packed, and its tokenizer."""
    tokenizer = byte_tokenizer(TEMPLATES[template])
    own = Data(task="chat", **{"max_length": 128, "test_share": 0.5, **spec})
    (folder / "out").mkdir(exist_ok=True)
    return prepare(Order(TASK, own, tokenizer, 0, folder, packs=packs), folder / "out"), tokenizer


ASKED = [turns(f"What is {number}?", f"It is {number}.") for number in range(40)]


def write_jsonl(path):
    path.write_text("".join(json.dumps({"id": 1, "messages": talk}) + "\n" for talk in ASKED))


def write_json_text(path):
    rows = [[json.dumps(talk), ""] for talk in ASKED]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "tools"], *rows])


def write_pairs(path):
    rows = [[talk[0]["content"], talk[1]["content"]] for talk in ASKED]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], *rows])


def write_structs(path):
    rows = [[{**message, "tool_calls": None, "name": None} for message in talk] for talk in ASKED]
    datasets.Dataset.from_dict({"messages": rows}).to_parquet(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", write_jsonl), ("a.csv", write_json_text), ("b.csv", write_pairs), ("a.parquet", write_structs)],
)
def test_every_kind_of_file_gives_the_same_conversations(tmp_path, name, write):
    write(tmp_path / name)
    corpus, tokenizer = prepared(tmp_path, source=f"./{name}")
    texts = "".join(tokenizer.decode(ids) for split in corpus.splits.values() for ids in split)
    assert sorted(re.findall(r"assistant\n(.*?)<\|im_end", texts)) == sorted(talk[1]["content"] for talk in ASKED)


def test_conversations_share_rows_and_keep_what_is_learned(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    packed, tokenizer = prepared(tmp_path, source="./a.jsonl")
    assert packed.summary["test"]["filled"] > 0.8
    batch = collate(packed, packed.test, range(len(packed.test)))
    assert {"learned", "document_ids", "position_ids"} < batch.keys()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        said = tokenizer.decode(labels[labels != UNLABELLED])
        count = tokenizer.decode(ids).count("<|im_start|>assistant")
        assert len(re.findall(r"It is \d+\.<\|im_end\|>", said)) == count and said.count("It") == count


def test_a_broken_row_is_named_with_its_file_and_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}) + "\n")
    with pytest.raises(
        InputError, match=r"data\.source: a\.jsonl, line 41: message 0: a part of its content is 'image'"
    ):
        prepared(tmp_path, source="./a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"conversation": []}\n')
    with pytest.raises(InputError, match=r"b\.jsonl has none of messages, .* but conversation; name them"):
        prepared(tmp_path, source="./b.jsonl")
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="no column 'talk'"):
        prepared(tmp_path, source="./a.jsonl", columns={"prompt": "talk"})
    with pytest.raises(InputError, match=r"data: a\.jsonl, line \d+: the chat template refuses .* must alternate"):
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write(json.dumps({"messages": turns("Hi", "a", first="assistant")}) + "\n")
        prepared(tmp_path, "gemma", source="./a.jsonl")


def test_data_in_which_nobody_answers_are_refused(tmp_path):
    rows = [json.dumps({"messages": turns(f"question {number}")}) + "\n" for number in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    with pytest.raises(InputError, match=r"no example is left of the train split .*without a turn of the assistant"):
        prepared(tmp_path, source="./a.jsonl")


@pytest.mark.parametrize(("task", "key"), [("causal_lm", "learn_from: all"), ("chat", "mask_share: 0.3")])
def test_keys_of_other_tasks_are_refused(task, key):
    name, value = key.split(": ")
    with pytest.raises(ValueError, match=f"with task: {task}"):
        Data.model_validate({"source": "./x.jsonl", "task": task, name: float(value) if "0" in value else value})
