"""Broken and odd data files: what is written, and what must be read from it or said about it."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import parquet

Content = str | bytes | Callable[[Path], Any]
"""Text, bytes, or a function that makes what lies at a path."""


@dataclass(frozen=True)
class Odd:
    """One input."""

    name: str
    files: dict[str, Content]
    rows: list[tuple[str, Any]] | None = None
    """Texts and labels that must be read from it, in any order; None: it is refused."""
    words: str = ""
    """Must appear in the refusal, in this order."""
    source: Any = ""
    """As in a recipe; empty: the first of the files."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Of the section `data`."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows that are read or left out, by reason; those that are not zero."""


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(text: Any, label: Any = "x") -> dict[str, Any]:
    return {"text": text, "label": label}


def table(**columns: Any) -> Callable[[Path], None]:
    return lambda path: parquet.write_table(pa.table(columns), path)


def described(features: dict[str, Any], **columns: Any) -> Callable[[Path], None]:
    """A parquet file as `datasets` writes it, with its own features as metadata."""
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return lambda path: parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def saved(rows: dict[str, list[Any]], features: Any = None) -> Callable[[Path], None]:
    return lambda path: datasets.Dataset.from_dict(rows, features=features).save_to_disk(path)


def saved_splits(path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": [name], "label": ["x"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(path)


def unsound(path: Path) -> None:
    """A saved dataset whose numbers go beyond its classes."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    saved({"text": ["one"], "label": [2]}, features)(path)
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace('"a",', "").replace('"b",', ""))
    file = next(path.glob("*.arrow"))
    file.write_bytes(file.read_bytes().replace(b'"a", "b", "c"', b'"c"          '))


def saved_picture(path: Path) -> None:
    """A saved dataset of pictures, of which one lies on another machine."""
    kinds = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"text": kinds, "label": datasets.Value("string")})
    saved({"text": [{"bytes": None, "path": "http://127.0.0.1:9/x.png"}], "label": ["x"]}, features)(path)
    info = json.loads((path / "dataset_info.json").read_text())
    info["features"]["text"] = {"_type": "Image"}
    (path / "dataset_info.json").write_text(json.dumps(info))


def listen(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may be short only
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(before)


AB = [("one", "a"), ("two", "b")]
CSV = "text,label\none,a\ntwo,b\n"
JSONL = lines(row("one", "a"), row("two", "b"))
WORDS = ["None", "NA", "N/A", "null", "nan", "NaN", "1e5", "2021-01-01", "true", "007", "1.0", "-", "#N/A", "inf"]
CLASSES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
TAGGED = {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
PICTURE = {"text": {"_type": "Image"}, "label": {"dtype": "string", "_type": "Value"}}
REMOTE = pa.array([{"bytes": None, "path": "http://127.0.0.1:9/x.png"}])
DEEP = "[" * 100_000 + "]" * 100_000

READ = [
    Odd("byte order mark", {"a.csv": "\ufeff" + CSV}, AB),
    Odd("windows line ends", {"a.csv": CSV.replace("\n", "\r\n")}, AB),
    Odd("old mac line ends", {"a.csv": CSV.replace("\n", "\r")}, AB),
    Odd("mixed line ends", {"a.jsonl": JSONL.replace("\n", "\r\n", 1)}, AB),
    Odd("no line end at the end", {"a.csv": CSV.strip()}, AB),
    Odd(
        "classes that begin with a bracket",
        {"a.csv": "text,label\none,[CLS]\ntwo,[a\n"},
        [("one", "[CLS]"), ("two", "[a")],
    ),
    Odd(
        "one column with its own name in it",
        {"a.csv": "text\none\ntext\n"},
        [("one", None), ("text", None)],
        keys={"task": "causal_lm"},
    ),
    Odd("blank lines", {"a.csv": CSV.replace("\n", "\n\n"), "b.jsonl": ""}, AB),
    Odd("blank lines of JSON", {"a.jsonl": "\n\n" + JSONL.replace("\n", "\n \n")}, AB),
    Odd("line break in quotes", {"a.csv": 'text,label\n"one\n,""1""",a\n'}, [('one\n,"1"', "a")]),
    Odd("names in quotes", {"a.csv": '"text","label"\n"one","a"\n'}, AB[:1]),
    Odd("column without a name", {"a.csv": ",text,label\n0,one,a\n1,two,b\n"}, AB),
    Odd("tabs", {"a.tsv": "text\tlabel\none, 1\ta\n"}, [("one, 1", "a")]),
    Odd("quotes that are text", {"a.tsv": 'text\tlabel\n"one\ta\n'}, [('"one', "a")], source={"quotes": False}),
    Odd("quotes over lines", {"a.tsv": 'text\tlabel\n"one\n"\ta\n'}, [("one\n", "a")], source={"quotes": True}),
    Odd("semicolons", {"a.csv": CSV.replace(",", ";")}, AB, source={"delimiter": ";"}),
    Odd(
        "latin-1", {"a.csv": "text,label\ncafé,a\n".encode("latin-1")}, [("café", "a")], source={"encoding": "latin-1"}
    ),
    Odd("utf-16", {"a.csv": CSV.encode("utf-16")}, AB, source={"encoding": "utf-16"}),
    Odd("gzip", {"a.jsonl.gz": gzip.compress(JSONL.encode())}, AB),
    Odd("bzip2", {"a.csv.bz2": bz2.compress(CSV.encode())}, AB),
    Odd("xz", {"a.json.xz": lzma.compress(json.dumps([row("one", "a"), row("two", "b")]).encode())}, AB),
    Odd(
        "pattern",
        {"a1.csv": CSV, "a2.csv": "label,text\nc,three\n", "b.csv": "x"},
        [*AB, ("three", "c")],
        source="./a*.csv",
    ),
    Odd(
        "folder",
        {"in/a.csv": CSV, "in/deep/b.csv": "text,label\nthree,c\n", "in/README.md": "x"},
        [*AB, ("three", "c")],
        source="./in",
    ),
    Odd("brackets in a name", {"a[1].jsonl": JSONL, "a1.jsonl": lines(row("no"))}, AB),
    Odd(
        "several sources",
        {"a.csv": CSV, "b.jsonl": lines(row("three", "c"))},
        [*AB, ("three", "c")],
        source=["./a.csv", "./b.jsonl"],
    ),
    Odd("list of objects", {"a.json": json.dumps([row("one", "a"), row("two", "b")])}, AB),
    Odd("list over several lines", {"a.json": json.dumps([row("one", "a"), row("two", "b")], indent=2)}, AB),
    Odd("lines in .json", {"a.json": JSONL}, AB),
    Odd(
        "long list",
        {"a.json": json.dumps([row(f"{i} " + "x" * i, "a") for i in range(900)])},
        [(f"{i} " + "x" * i, "a") for i in range(900)],
    ),
    Odd(
        "keys that some rows lack",
        {"a.jsonl": lines(row("one", "a"), {"text": "two"}, {"label": "b"}, {})},
        [("one", "a"), ("two", None)],
        counts={"read": 4, "empty": 2},
    ),
    Odd(
        "words that readers guess",
        {"a.csv": "text,label\n" + "".join(f"{w} it,{w}\n" for w in WORDS)},
        [(f"{w} it", w) for w in WORDS],
    ),
    Odd("words as texts", {"a.csv": "text,label\n" + "".join(f"{w},x\n" for w in WORDS)}, [(w, "x") for w in WORDS]),
    Odd("words in JSON", {"a.jsonl": lines(*(row(w, w) for w in WORDS))}, [(w, w) for w in WORDS]),
    Odd("words in parquet", {"a.parquet": table(text=WORDS, label=WORDS)}, [(w, w) for w in WORDS]),
    Odd("blank label", {"a.csv": "text,label\none, \ntwo,b\n"}, [("one", None), ("two", "b")]),
    Odd("empty label", {"a.csv": "text,label\none,\ntwo,b\n"}, [("one", None), ("two", "b")]),
    Odd("spaces", {"a.csv": "text,label\n one , a\none,a \n"}, [(" one ", " a"), ("one", "a ")]),
    Odd("case", {"a.csv": "text,label\nOne,A\none,a\n"}, [("One", "A"), ("one", "a")]),
    Odd(
        "emoji and right to left",
        {"a.jsonl": lines(row("👩‍👩‍👧 ok", "👍"), row("שלום עולם", "א"))},
        [("👩‍👩‍👧 ok", "👍"), ("שלום עולם", "א")],
    ),
    Odd(
        "nothing but spaces",
        {"a.jsonl": lines(row("one"), row("\u00a0"), row("\u3000 \t\n"), row(""))},
        [("one", "x")],
        counts={"read": 4, "empty": 3},
    ),
    Odd(
        "line separator in text",
        {"a.jsonl": '{"text": "one\u2028two\u0085", "label": "x"}\n'},
        [("one\u2028two\u0085", "x")],
    ),
    Odd("null character in JSON", {"a.jsonl": '{"text": "a\\u0000b", "label": "x"}\n'}, [("a\0b", "x")]),
    Odd("whole surrogate pair", {"a.jsonl": '{"text": "\\ud83d\\ude00", "label": "x"}\n'}, [("😀", "x")]),
    Odd("true and false", {"a.jsonl": lines(row("one", True), row("two", False))}, [("one", True), ("two", False)]),
    Odd("huge number", {"a.jsonl": lines(row("one", 10**40), row("two", 0))}, [("one", 10**40), ("two", 0)]),
    Odd("equal rows", {"a.jsonl": JSONL * 3}, AB, counts={"read": 6, "equal": 4}),
    Odd(
        "label before none",
        {"a.jsonl": lines(row("one", None), row("one", "a"))},
        AB[:1],
        counts={"read": 2, "equal": 1},
    ),
    Odd(
        "other names",
        {"a.csv": "body,stars,text\none,a,no\ntwo,b,no\n"},
        AB,
        keys={"columns": {"text": "body", "label": "stars"}},
    ),
    Odd(
        "one column",
        {"a.csv": "text\none\n\ntwo\n"},
        [("one", None), ("two", None)],
        keys={"task": "causal_lm"},
        counts={"read": 3, "empty": 1},
    ),
    Odd("a document", {"a.txt": "one\r\n\r\nand two\n"}, [("one\n\nand two\n", None)], keys={"task": "causal_lm"}),
    Odd(
        "documents",
        {"a.txt": "one\n\n\nand two\n"},
        [("one\n", None), ("and two\n", None)],
        source={"separator": ""},
        keys={"task": "causal_lm"},
        counts={"read": 3, "empty": 1},
    ),
    Odd(
        "null in parquet",
        {"a.parquet": table(text=["one", None, "two"], label=["a", "a", None])},
        [("one", "a"), ("two", None)],
        counts={"read": 3, "empty": 1},
    ),
    Odd(
        "dictionary in parquet",
        {
            "a.parquet": table(
                text=pa.array(["one", "two"]).dictionary_encode(), label=pa.array(["a", "b"]).dictionary_encode()
            )
        },
        AB,
    ),
    Odd(
        "other columns in parquet",
        {"a.parquet": table(text=["one"], label=["a"], when=[datetime.datetime(2021, 1, 1)], raw=[b"\xff"])},
        AB[:1],
    ),
    Odd(
        "whole numbers in parquet",
        {"a.parquet": table(text=["one", "two"], label=pa.array([1, 0], pa.int8()))},
        [("one", 1), ("two", 0)],
    ),
    Odd(
        "classes of a parquet file",
        {"a.parquet": described(TAGGED, text=["one", "two"], label=[1, -1])},
        [("one", "yes"), ("two", None)],
    ),
    Odd("saved dataset", {"in": saved({"text": ["one", "two"], "label": ["a", "b"]})}, AB),
    Odd(
        "classes of a saved dataset",
        {"in": saved({"text": ["one", "two"], "label": [1, -1]}, CLASSES)},
        [("one", "yes"), ("two", None)],
    ),
    Odd("saved dataset with the name of a file", {"in.csv": saved({"text": ["one"], "label": ["a"]})}, AB[:1]),
    Odd("saved splits", {"in": saved_splits}, [("train", "x")]),
    Odd("one of the saved splits", {"in": saved_splits}, [("test", "x")], source={"split": "test"}),
]

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 9\n"

REFUSED = [
    Odd("two files put together", {"a.csv": CSV + CSV}, words="a.csv line 4 repeats the names of the columns"),
    Odd(
        "tabs in a .csv",
        {"a.csv": CSV.replace(",", "\t")},
        words='a.csv its first line is one column delimiter: "\\t"',
    ),
    *(
        Odd(f"pointer in place of a {end}", {f"a.{end}": POINTER}, words=f"a.{end} is a pointer of Git LFS")
        for end in ("csv", "jsonl", "parquet")
    ),
    Odd("pointer in place of prose", {"a.txt": POINTER}, keys={"task": "causal_lm"}, words="a.txt is a pointer of"),
    Odd(
        "copy that an editor hides in a folder",
        {"in/a.csv": CSV, "in/.ipynb_checkpoints/a-checkpoint.csv": CSV},
        source="./in",
        words="in holds .ipynb_checkpoints/a-checkpoint.csv, which would be read as data",
    ),
    Odd(
        "remark of an archiver in a folder",
        {"in/a.csv": CSV, "in/__MACOSX/a.csv": CSV},
        source="./in",
        words="in holds __MACOSX/a.csv, which would be read as data",
    ),
    Odd(
        "readme in a folder of texts",
        {"in/a.txt": "one\n", "in/README.txt": "Download it from …\n"},
        source="./in",
        keys={"task": "causal_lm"},
        words="in holds README.txt, which would be read as data",
    ),
    Odd(
        "list as Python writes it",
        {"a.csv": "text,label\none,\"['a', 'b']\"\n"},
        words="a.csv, line 2: column 'label' is a list, but not one as JSON",
    ),
    Odd(
        "list as numpy writes it",
        {"a.csv": "text,label\none,[0 1 1]\n"},
        words="a.csv, line 2: column 'label' is a list, but not one as JSON",
    ),
    Odd("empty file", {"a.csv": ""}, words="a.csv is empty"),
    Odd("header only", {"a.csv": "text,label\n"}, words="a.csv has no row"),
    Odd("blank lines only", {"a.jsonl": "\n \n\n"}, words="a.jsonl has no row"),
    Odd("empty list", {"a.json": "[]"}, words="a.json has no row"),
    Odd("a name twice", {"a.csv": "text,label,text\n1,2,3\n"}, words="a.csv two columns are called 'text'"),
    Odd("too few values", {"a.csv": CSV + "three\n"}, words="a.csv line 4 has 1 columns, the first line has 2"),
    Odd("too many values", {"a.csv": "text,label\none, and two,a\n"}, words="a.csv line 2 has 3 columns"),
    Odd("a quote that never closes", {"a.csv": CSV + '"three,c\nfour,d\n' * 3}, words="a.csv line 4: quotes: false"),
    Odd("text behind a quote", {"a.csv": 'text,label\n"one" more,a\n'}, words="a.csv line 2: quotes: false"),
    Odd(
        "quotes that would swallow rows",
        {"a.tsv": 'text\tlabel\n"one\ta\ntwo"\tb\n'},
        words="a.tsv line 2: line 3 quotes: true false",
    ),
    Odd(
        "another delimiter", {"a.csv": CSV.replace(",", ";")}, words='a.csv its first line is one column delimiter: ";"'
    ),
    Odd(
        "a space in a name",
        {"a.csv": "text, label\none,a\n"},
        words="a.csv has no column 'label'; it has 'text', ' label'",
    ),
    Odd(
        "no such column",
        {"a.jsonl": lines({"body": "a", "label": "x"})},
        words="a.jsonl has no column 'text'; it has 'body'",
    ),
    Odd(
        "one of two files lacks a column",
        {"a1.jsonl": JSONL, "a2.jsonl": lines({"text": "c"})},
        source="./a*.jsonl",
        words="a2.jsonl has no column 'label'",
    ),
    Odd(
        "thousands of columns",
        {"a.csv": ",".join(f"c{i}" for i in range(5000)) + "\n" + "," * 4999 + "\n"},
        words="a.csv 'c9' and 4990 more",
    ),
    Odd(
        "latin-1 unsaid",
        {"a.csv": "text,label\ncafé,a\n".encode("latin-1")},
        words="a.csv it is not utf-8 encoding: cp1252",
    ),
    Odd("utf-16 unsaid", {"a.csv": CSV.encode("utf-16")}, words="a.csv UTF-16 encoding: utf-16"),
    Odd("utf-16 without its mark", {"a.csv": CSV.encode("utf-16-le")}, words="a.csv line 1 holds a null byte"),
    Odd(
        "encoding that is none", {"a.csv": CSV}, source={"encoding": "utf-7.5"}, words="a.csv unknown encoding: utf-7.5"
    ),
    Odd("null bytes", {"a.txt": "one\n\0two"}, keys={"task": "causal_lm"}, words="a.txt line 2 holds a null byte"),
    Odd("cut gzip", {"a.jsonl.gz": gzip.compress(JSONL.encode() * 99)[:-20]}, words="a.jsonl.gz cannot read it"),
    Odd("gzip that is none", {"a.jsonl.gz": JSONL}, words="a.jsonl.gz cannot read it: Not a gzipped file"),
    Odd("cut xz", {"a.jsonl.xz": lzma.compress(JSONL.encode() * 99)[:-20]}, words="a.jsonl.xz cannot read it"),
    Odd("zip under another name", {"a.jsonl": b"PK\x03\x04\x14\xff\xfe"}, words="a.jsonl it is a zip archive"),
    Odd(
        "gzip under another name", {"a.jsonl": gzip.compress(JSONL.encode())}, words="a.jsonl compressed with gzip .gz"
    ),
    Odd("parquet under another name", {"a.csv": table(text=["one"], label=["x"])}, words="a.csv it is a parquet file"),
    Odd(
        "separator within lines",
        {"a.txt": "one<|end|>two\n---- \nthree\n"},
        source={"separator": "<|end|>"},
        keys={"task": "causal_lm"},
        words="a.txt: no line is the separator '<|end|>' alone",
    ),
    Odd("markdown", {"a.md": "# one"}, words="a.md has none of the known endings give a copy the ending .txt"),
    Odd("zip", {"a.zip": b"PK\x03\x04"}, words="a.zip has none of the known endings"),
    Odd("zstd", {"a.jsonl.zst": b"\x28\xb5\x2f\xfd"}, words="a.jsonl.zst has none of the known endings"),
    Odd(
        "ending in capitals in a folder",
        {"in/a.csv": CSV, "in/B.CSV": CSV},
        source="./in",
        words="in holds B.CSV, which cannot be read",
    ),
    Odd("archive in a folder", {"in/a.csv": CSV, "in/b.tar.gz": b"x"}, source="./in", words="in holds b.tar.gz, which"),
    Odd("spreadsheet", {"a.xlsx": b"PK"}, words="a.xlsx has none of the known endings"),
    Odd("pipe", {"a.jsonl": os.mkfifo}, words="a.jsonl is no regular file"),
    Odd(
        "pipe in a pattern",
        {"a1.jsonl": JSONL, "a2.jsonl": os.mkfifo},
        source="./a*.jsonl",
        words="a2.jsonl is no regular file",
    ),
    Odd("socket", {"a.jsonl": listen}, words="a.jsonl is no regular file"),
    Odd("link to nothing", {"a.jsonl": lambda path: path.symlink_to("gone")}, words="a.jsonl is no regular file"),
    Odd("no file", {}, source="./a.jsonl", words="there is no file a.jsonl"),
    Odd("pattern without a file", {"b.csv": CSV}, source="./a*.csv", words="there is no file a*.csv"),
    Odd("folder without a file", {"in/notes.md": "x"}, source="./in", words="in holds no file that ends in .jsonl"),
    Odd(
        "folder with data that is not read",
        {"in/a.csv": CSV, "in/b.csv.zst": b"x"},
        source="./in",
        words="in holds b.csv.zst, which cannot be read",
    ),
    Odd(
        "folder of several kinds",
        {"in/a.csv": CSV, "in/b.jsonl": JSONL},
        source="./in",
        words="several kinds a.csv, b.jsonl",
    ),
    Odd(
        "folder of splits",
        {"in/train.csv": CSV, "in/my-test.csv": CSV},
        source="./in",
        words="train.csv and my-test.csv train: ./FILE",
    ),
    Odd(
        "pattern that takes several splits",
        {"my-train.csv": CSV, "my-test.csv": CSV},
        source="./my-*.csv",
        words="holds my-train.csv and my-test.csv train: ./FILE",
    ),
    Odd("broken line", {"a.jsonl": JSONL + '{"text": "a"\n'}, words="a.jsonl line 3: Expecting ',' delimiter"),
    Odd(
        "object over several lines",
        {"a.json": json.dumps(row("one"), indent=2)},
        words="a.json line 1: one object on one line",
    ),
    Odd(
        "object of lists",
        {"a.json": json.dumps({"text": ["a"], "label": ["x"]})},
        words="a.json line 1 column 'text' is no text: ['a']",
    ),
    Odd("line that is a number", {"a.jsonl": JSONL + "3\n"}, words="a.jsonl line 3 is no object with columns: 3"),
    Odd("line that is a list", {"a.jsonl": JSONL + '["a", "b"]\n'}, words="a.jsonl line 3 is no object with columns"),
    Odd(
        "deep value in a column nobody reads",
        {"a.jsonl": JSONL + f'{{"text": "a", "label": "x", "z": {DEEP}}}\n'},
        words="a.jsonl line 3: recursion",
    ),
    Odd(
        "deep value",
        {"a.jsonl": f'{{"text": {"[" * 500 + "]" * 500}, "label": "x"}}\n'},
        words="a.jsonl line 1 column 'text' is no text: [[[[[[",
    ),
    Odd("deep list", {"a.json": DEEP}, words="a.json cannot read it: recursion"),
    Odd("deep value in a list", {"a.json": f'[{{"text": {DEEP}}}]'}, words="a.json cannot read it: recursion"),
    Odd(
        "key twice",
        {"a.jsonl": '{"text": "a", "label": "x", "text": "b"}\n'},
        words="a.jsonl line 1: a key stands twice",
    ),
    Odd("NaN", {"a.jsonl": '{"text": "a", "label": NaN}\n'}, words="a.jsonl line 1: NaN is no number"),
    Odd("infinity", {"a.jsonl": JSONL + '{"text": "a", "label": 1e999}\n'}, words="a.jsonl line 3"),
    Odd(
        "number with thousands of digits",
        {"a.jsonl": f'{{"text": "a", "label": {"9" * 5000}}}\n'},
        words="a.jsonl line 1: limit",
    ),
    Odd(
        "list that does not end",
        {"a.json": '[{"text": "a", "label": "x"},'},
        words="a.json line 1 column",
    ),
    Odd("item that does not end", {"a.json": '[{"text": "a", "label": "x'}, words="a.json line 1 column"),
    Odd(
        "no comma",
        {"a.json": '[{"text": "a"} {"text": "b"}]'},
        words="a.json Expecting ',' delimiter: line 1 column",
    ),
    Odd("comma too many", {"a.json": '[{"text": "a", "label": "x"},]'}, words="a.json line 1 column"),
    Odd(
        "broken item",
        {"a.json": '[{"text": "a", "label": }, {"text": "b", "label": "x"}' + " " * 99 + "]"},
        words="a.json Expecting value: line 1 column",
    ),
    Odd(
        "something after a list",
        {"a.json": '[{"text": "a", "label": "x"}]\n{"text": "b"}'},
        words="a.json Extra data: line 2 column 1",
    ),
    Odd("number as text", {"a.jsonl": lines(row("one"), row(5))}, words="a.jsonl, line 2: column 'text' is no text: 5"),
    Odd("true as text", {"a.jsonl": lines(row(True))}, words="a.jsonl, line 1: column 'text' is no text: True"),
    Odd(
        "object as text",
        {"a.jsonl": lines(row({"en": "a"}))},
        words="a.jsonl, line 1: column 'text' is no text: {'en': 'a'}",
    ),
    Odd("object as label", {"a.jsonl": lines(row("a", {"x": 1}))}, words="a.jsonl, line 1: column 'label' {'x': 1}"),
    Odd(
        "nested lists as label", {"a.jsonl": lines(row("a", [["x"]]))}, words="a.jsonl, line 1: column 'label' [['x']]"
    ),
    Odd(
        "half a surrogate pair",
        {"a.jsonl": JSONL + '{"text": "a\\ud83d", "label": "x"}\n'},
        words="a.jsonl, line 3: half of a surrogate pair",
    ),
    Odd(
        "half a surrogate pair as label",
        {"a.jsonl": '{"text": "a", "label": "\\udc00"}\n'},
        words="a.jsonl, line 1: half of a surrogate pair",
    ),
    Odd(
        "half a surrogate pair in a pair",
        {"a.jsonl": '{"text": "a", "pair": "\\udc00", "label": "x"}\n'},
        keys={"columns": {"pair": "pair"}},
        words="a.jsonl, line 1: half of a surrogate pair",
    ),
    Odd("no second text", {"a.csv": CSV}, keys={"columns": {"pair": "second"}}, words="a.csv has no column 'second'"),
    Odd("parquet that is none", {"a.parquet": CSV}, words="a.parquet"),
    Odd(
        "cut parquet",
        {"a.parquet": lambda path: (table(text=["a"], label=["x"])(path), os.truncate(path, 60))},
        words="a.parquet",
    ),
    Odd(
        "damaged parquet",
        {
            "a.parquet": lambda path: (
                table(text=["a" * 999], label=["x"])(path),
                path.write_bytes(path.read_bytes()[:4] + bytes(60) + path.read_bytes()[64:]),
            )
        },
        words="a.parquet cannot read it",
    ),
    Odd(
        "parquet without a column",
        {"a.parquet": table(text=["a"], kind=["x"])},
        words="a.parquet has no column 'label'; it has 'text', 'kind'",
    ),
    Odd(
        "time in parquet",
        {"a.parquet": table(text=["a", "b"], label=[datetime.datetime(2021, 1, 1)] * 2)},
        words="a.parquet, row 1: column 'label' datetime",
    ),
    Odd(
        "time as text",
        {"a.parquet": table(text=[datetime.date(2021, 1, 1)], label=["x"])},
        words="a.parquet, row 1: column 'text' is no text",
    ),
    Odd(
        "decimal in parquet",
        {"a.parquet": table(text=["a"], label=[decimal.Decimal("1.5")])},
        words="a.parquet, row 1: column 'label' Decimal('1.5')",
    ),
    Odd(
        "bytes in parquet",
        {"a.parquet": table(text=[b"a"], label=["x"])},
        words="a.parquet, row 1: column 'text' is no text: b'a'",
    ),
    Odd(
        "structure in parquet",
        {"a.parquet": table(text=[{"a": 1}], label=["x"])},
        words="a.parquet, row 1: column 'text' is no text: {'a': 1}",
    ),
    Odd(
        "picture in parquet",
        {"a.parquet": described(PICTURE, text=REMOTE, label=["x"])},
        words="a.parquet, row 1: column 'text' is no text: {'bytes': None",
    ),
    Odd(
        "NaN in parquet",
        {"a.parquet": table(text=["a"], label=[float("nan")])},
        words="a.parquet, row 1: column 'label' is no finite number",
    ),
    Odd(
        "class that is not named",
        {"a.parquet": described(TAGGED, text=["one"], label=[2])},
        words="a.parquet, row 1: column 'label' is 2, classes 0 to 1, 'no', 'yes'",
    ),
    Odd(
        "broken metadata",
        {
            "a.parquet": lambda path: parquet.write_table(
                pa.table({"text": ["a"], "label": ["x"]}).replace_schema_metadata({"huggingface": "["}), path
            )
        },
        words="a.parquet cannot read it",
    ),
    Odd(
        "picture in a saved dataset", {"in": saved_picture}, words="in, row 1: column 'text' is no text: {'bytes': None"
    ),
    Odd("saved class that is not named", {"in": unsound}, words="in, row 1: column 'label' is 2"),
    Odd(
        "saved dataset that is none",
        {"in/state.json": "{}"},
        source="./in",
        words="in is no folder that `datasets` saved",
    ),
    Odd(
        "split that is not saved",
        {"in": saved_splits},
        source={"split": "dev"},
        words="in has the splits train, test, not dev",
    ),
    Odd(
        "delimiter of a file that has none",
        {"a.jsonl": JSONL},
        source={"delimiter": ";"},
        words="a.jsonl: delimiter has no effect on a .jsonl",
    ),
    Odd(
        "separator of a table",
        {"a.csv": CSV},
        source={"separator": ""},
        words="a.csv: separator has no effect on a .csv",
    ),
    Odd(
        "encoding of parquet",
        {"a.parquet": table(text=["a"], label=["x"])},
        source={"encoding": "latin-1"},
        words="a.parquet: encoding has no effect",
    ),
    Odd(
        "quotes of a text",
        {"a.txt": "x"},
        source={"quotes": False},
        keys={"task": "causal_lm"},
        words="a.txt: quotes has no effect",
    ),
    Odd("split of a file", {"a.csv": CSV}, source={"split": "train"}, words="a.csv: split has no effect"),
    Odd("labels in prose", {"a.txt": "x"}, words="a.txt has no column 'label'; it has 'text'"),
    Odd(
        "columns of a corpus",
        {},
        source="pydoc-topics",
        keys={"columns": {"text": "body"}},
        words="pydoc-topics has no column 'body'",
    ),
    Odd(
        "function that gives texts",
        {},
        source="odd_inputs:texts",
        words="odd_inputs:texts, row 1 is no row with columns: 'a'",
    ),
    Odd(
        "function that gives splits", {}, source="odd_inputs:splits", words="odd_inputs:splits returns the splits train"
    ),
    Odd("function that gives nothing", {}, source="odd_inputs:nothing", words="odd_inputs:nothing has no row"),
    Odd("function that is none", {}, source="odd_inputs:missing", words="odd_inputs has no function 'missing'"),
]


def texts() -> list[str]:
    return ["a", "b"]


def splits() -> datasets.DatasetDict:
    return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]})})


def nothing() -> list[dict[str, str]]:
    return []
