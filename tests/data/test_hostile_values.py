"""Values and templates of strangers that would end in no message, or never."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conversations import byte_tokenizer, encoded

from distill.data import TASKS
from distill.data.rows import Order, read_split
from distill.data.sources import read_source, source_fingerprint
from distill.data.tasks import chat
from distill.errors import InputError
from distill.recipe.gguf import gguf_size
from distill.recipe.schema import Data, Source

DEEP = "[" * 100_000 + "]" * 100_000
NESTED = {"token_classification": "labels", "relation_extraction": "head", "question_answering": "answers"}


@pytest.mark.parametrize(("task", "column"), [*NESTED.items(), ("chat", "messages"), ("classification", "label")])
def test_a_text_of_deep_lists_is_refused_with_its_place_or_kept_as_text(task, column, tmp_path):
    own = TASKS[task]()
    row = {name: DEEP if name == column else ["red"] if name == "tokens" else "red" for name in own.columns}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    spec = Data(source="./x.jsonl", task=task)
    try:
        read_split(Order(own, spec, None, 0, tmp_path), "train", tmp_path)
    except InputError as error:
        assert "x.jsonl, line 1" in str(error) and len(str(error)) < 1000
    else:
        assert task == "classification"  # a class may be called anything


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.2 s"),
        ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__.os.system('touch RAN') }}", "access to attribute"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('no') }}", "no"),
    ],
)
def test_a_template_that_loops_for_ever_or_walks_to_python_is_refused(template, words, monkeypatch):
    monkeypatch.setattr(chat, "PATIENCE", 0.2)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match=rf"line 1: the chat template refuses the conversation.*{words}"):
        encoded(chat.Chat(), byte_tokenizer(template), [{"messages": talk}], max_length=500)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="writes GGUF files")
@pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"])
def test_sizes_of_a_gguf_file_are_bounded(key, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint64(f"llama.{key}", 10**9)
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"1,000,000,000; no model is larger"):
        gguf_size(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("os:system", "data source 'os:system' cannot be called with 0 arguments"),
        ("os.path:join", "cannot be called with 0 arguments"),
        ("os:getpid", r"data source 'os:getpid' returns \d+, which are no rows"),
        ("builtins:print", "returns None, which are no rows"),
        ("os:getcwd", "row 1 is no row with columns"),
        ("os:sep", "os has no function 'sep'"),
    ],
)
def test_what_is_importable_and_gives_no_rows_is_no_source(name, words, tmp_path):
    with pytest.raises(InputError, match=words):
        list(read_source(Source(source=name), "train", ["text"], tmp_path))
    if "row 1" not in words:
        with pytest.raises(InputError, match=words):
            source_fingerprint(Source(source=name), "train", tmp_path)
