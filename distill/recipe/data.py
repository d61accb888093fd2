"""The section `data`: where rows come from, the task that they are for, and how they become examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from distill.recipe.fields import Columns, Count, Index, KeyPath, Mistake, NotASwitch, Positive, Section, dotted
from distill.recipe.locate import is_path
from distill.recipe.names import FORMS, TASK_COLUMNS, TASK_KEYS, BuiltInSource, Reference, TaskName, columns_read
from distill.registry import suggest

FILE = r"^(\.{1,2}|~)?/."
"""A path with its start: `./x`, `../x`, `/x` or `~/x`."""
HUB = r"^hub:[\w.-]+/[\w.-]+$"
"""A dataset of the model hub."""
LINE = r"^.*$"

LABEL = r"^[a-z][a-z0-9-]*$"
SPLITS = ("train", "validation", "test")
SET = "sets."
"""Begins the names of the sets of `evaluation.sets` among the splits."""

SourceName = (
    BuiltInSource | Reference | Annotated[StrictStr, Field(pattern=FILE)] | Annotated[StrictStr, Field(pattern=HUB)]
)


class Source(Section):
    """One place that rows are read from, where its name alone does not say enough."""

    source: SourceName
    """As in `data.source`."""
    weight: Positive = 1.0
    """In a list: how often each row is seen per pass over the training data. 2: twice; 0.5: half of the rows, chosen by
    a hash."""
    limit: Count | None = None
    """Use at most so many of its rows, the first ones."""
    delimiter: Annotated[StrictStr, Field(min_length=1, max_length=1)] | None = None
    """Character between the columns of a `.csv` or `.tsv` file; null: a comma, a tab."""
    quotes: StrictBool | None = None
    """Double quotes enclose values of a `.csv` or `.tsv` file, which may then hold delimiters; false: they are text.
    null: they enclose, and in a `.tsv` file no line break may stand between them."""
    encoding: StrictStr = "utf-8"
    """Encoding of a text file, e.g. latin-1."""
    separator: Annotated[StrictStr, Field(pattern=LINE)] | None = None
    """Line that stands between the documents of a `.txt` file; "" is an empty line. null: a file is one document."""
    revision: StrictStr | None = None
    """Commit, tag or branch of a hub dataset."""
    config: StrictStr | None = None
    """Configuration of a hub dataset."""
    split: StrictStr | None = None
    """Split of a hub dataset or of a saved `DatasetDict`; null: the one that the key asks for."""

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse keys that this kind of source does not have."""
        file = is_path(self.source)
        if not file:
            yield from self.without_effect(("delimiter", "quotes", "encoding", "separator"), ": only files have it")
        if not self.source.startswith("hub:"):
            yield from self.without_effect(("revision", "config"), ": only hub datasets have it")
            if not file:
                yield from self.without_effect(("split",), ": only hub datasets and saved ones have it")


Sources = SourceName | Source | list[SourceName | Source]
Sets = dict[Annotated[StrictStr, Field(pattern=LABEL)], Sources]
"""Name -> rows."""


class Data(Section):
    """Rows, the task, and how they become batches."""

    source: Sources | None = None
    """A built-in corpus; files, as `./x.jsonl`, a pattern `./part-*.csv` or a folder (`.jsonl .json .csv .tsv .parquet
    .txt`, also compressed); a folder of `Dataset.save_to_disk`; `hub:ORG/NAME`; `package.module:function`; a section
    with one of these and its options; or a list of them. Training and test rows are split by a hash."""
    train: Sources | None = None
    """Instead of `source`: rows to train on."""
    validation: Sources | None = None
    """Rows to look at during training; null: some of the training rows, where anything looks."""
    test: Sources | None = None
    """Rows that nobody looks at before the evaluation; null: some of the training rows, by a hash of their text."""
    task: TaskName | Reference
    """Prediction that the model is trained for."""
    columns: Columns = {}
    """The task's columns -> those of the files, e.g. `{text: review, label: stars}`; null: they have the same names."""
    labelled: Count | None = None
    """Keep the labels of only so many training examples (chosen by `seed`); the rest become unlabelled text that the
    teacher labels. null: keep all."""
    max_length: Count = 128
    """Tokens per example; longer texts are cut, and counted. Language models: tokens per row of packed documents."""
    test_share: Annotated[float, Field(gt=0, lt=1), NotASwitch] = 0.2
    """Share of rows held out for the test where no `test` is given."""
    validation_share: Annotated[float, Field(gt=0, lt=1), NotASwitch] = 0.1
    """Share of the training rows held out for looking during training, where no `validation` is given and
    `evaluate_every` or `keep_best` looks."""
    limit: Count | None = None
    """Use at most this many rows of each split, for trials."""
    classes: Annotated[list[StrictStr | StrictInt | StrictBool], Field(min_length=2)] | None = None
    """The classes in the order of the model's outputs, by the names that the data have for them; of labels that are
    whole numbers the names, number 0 first. Needed for a trained teacher whose outputs have no names or others; also
    makes classes of labels that are decimal numbers. null: the teacher's own order, or sorted."""
    contradictions: Literal["refuse", "first", "majority", "drop", "keep"] = "refuse"
    """Rows with equal inputs and different labels: refuse the data, take the first or the most frequent label, drop all
    of them, or keep them all, e.g. several translations of one text."""
    stride: Index | None = None
    """Question answering: tokens that neighbouring windows of a long context share; null: a quarter of `max_length`."""
    none_class: StrictStr | None = None
    """Relation extraction: the class of pairs without a relation, which `f1_relations` leaves out; null: a class
    called none, no_relation, NA or Other; "": there is none."""
    learn_from: Literal["assistant", "all"] = "assistant"
    """Chat: learn the assistant's turns and the tokens that end them, or every token of a conversation."""
    mask_share: Annotated[float, Field(gt=0, lt=1), NotASwitch] = 0.15
    """Masked language models: share of the tokens that are to be predicted; 0.3 is what ModernBERT was trained with."""
    max_target_length: Count | None = None
    """seq2seq: tokens per target, and of texts that are written; longer targets are cut, and counted. null: as
    `max_length`, which is for sources."""
    prefix: StrictStr | None = None
    """seq2seq: text before each source, by which T5 knows its task, e.g. "translate English to German: "."""
    language: StrictStr | None = None
    """speech_to_text: language of all texts, e.g. english; null: as the teacher's own files say."""
    prompts: Columns = {}
    """Text in front of the texts of a column, e.g. `{text: "query: ", pair: "passage: "}`; what is not given is as the
    teacher's folder says, and so does the release."""

    @property
    def learns_from_pairs(self) -> bool:
        """Tell whether the rows of `embedding` are pairs that belong together, all of them."""
        return "pair" in self.columns and "score" not in self.columns

    def mistakes(self) -> Iterator[Mistake]:
        """Refuse rows from two sides or from none, columns that the task does not have, and keys without effect."""
        yield from self.not_one_of("source", "train")
        if self.test is not None:
            yield from self.without_effect(("test_share",), ": test is given")
        if self.validation is not None:
            yield from self.without_effect(("validation_share",), ": validation is given")
        if self.stride is not None and self.stride >= self.max_length:
            yield Mistake(("stride",), f"is not less than max_length: {self.max_length}", "share fewer tokens")
        held_out: dict[KeyPath, Any] = {("validation",): self.validation, ("test",): self.test}
        yield from weights_without_effect(held_out)
        for key, tasks in TASK_KEYS.items():
            if ":" not in self.task and self.task not in tasks:
                yield from self.without_effect((key,), f" with task: {self.task}", f"remove it; it is for {tasks[0]}")
        yield from self.repeated("classes", "the class {}")
        yield from self._wrong_columns()

    def _wrong_columns(self) -> Iterator[Mistake]:
        """Refuse columns that the task does not have, or that do not go together."""
        if "score" in self.columns and "pair" not in self.columns:
            yield Mistake(("columns", "score"), "a score is that of a text and its pair", "name pair as well", at="key")
        for side in self.prompts:
            if side not in (("text", "pair") if self.learns_from_pairs else ("text",)):
                message = f"{side} is no column with a prompt of its own here"
                yield Mistake(("prompts", side), message, "write text; it holds for both texts of a score", at="key")
        roles = TASK_COLUMNS.get(self.task)  # type: ignore[call-overload]
        forms = [form for form in FORMS.get(self.task, ()) if {*form} & {*self.columns}]  # type: ignore[call-overload]
        if len(forms) > 1:
            listed = " and ".join(", ".join(form) for form in forms)
            yield Mistake(("columns",), f"names columns of two forms, {listed}", "give those of one", at="key")
        names = {role: self.columns.get(role, role) for role in columns_read(self.task, roles or (), self.columns)}
        for role, name in self.columns.items():
            if others := [other for other, same in names.items() if same == name and other != role]:
                yield Mistake(
                    ("columns", role), f"{name} is the column of {others[0]} as well", "name another", at="key"
                )
        for role in self.columns if roles is not None else ():
            if role not in roles:
                message = f"task: {self.task} has no column {role}"
                yield Mistake(("columns", role), message, f"{suggest(role, roles)}It has {', '.join(roles)}", at="key")

    def with_sources(self, rename: Callable[[str], str]) -> Data:
        """Return the section with other names for its sources, e.g. absolute paths."""
        given = {key: getattr(self, key) for key in ("source", *SPLITS)}
        return self.model_copy(update={key: renamed(own, rename) for key, own in given.items() if own is not None})

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the sets of rows that may be given."""
        return SPLITS

    def path_of(self, split: str) -> KeyPath:
        """Return the path of the key that gives the rows of a split: `train` may be `source`, `sets.NAME` is a set."""
        if split.startswith(SET):
            return ("evaluation", "sets", split.removeprefix(SET))
        return ("data", "source" if split == "train" and self.train is None else split)

    def key_of(self, split: str) -> str:
        """Name the key that gives the rows of a split."""
        return dotted(self.path_of(split))

    def given(self, split: str) -> Any:
        """Return what the recipe says about the rows of a split."""
        return getattr(self, str(self.path_of(split)[-1]))

    def origins(self, split: str) -> list[Source]:
        """List the sources of a split; none where its rows are taken from those of training."""
        given = self.given(split)
        each = given if isinstance(given, list) else [] if given is None else [given]
        return [one if isinstance(one, Source) else Source(source=one) for one in each]


class AllData(Data):
    """The rows that a recipe names: those of `data`, and the sets that every arm is measured on besides."""

    sets: Sets = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of all sets of rows that may be given, those of `evaluation.sets` as `sets.NAME`."""
        return (*SPLITS, *(f"{SET}{name}" for name in self.sets))

    def given(self, split: str) -> Any:
        """Return what the recipe says about the rows of a split."""
        return self.sets[split.removeprefix(SET)] if split.startswith(SET) else super().given(split)


def renamed(given: Any, rename: Callable[[str], str]) -> Any:
    """Give other names to sources."""
    if isinstance(given, list):
        return [renamed(each, rename) for each in given]
    return given.model_copy(update={"source": rename(given.source)}) if isinstance(given, Source) else rename(given)


def weights_without_effect(given: Mapping[KeyPath, Any]) -> Iterator[Mistake]:
    """Yield a mistake for each source with a weight that is not one of training, by the path of its key."""
    for start, each in given.items():
        for number, source in enumerate(each if isinstance(each, list) else [each]):
            if isinstance(source, Source) and source.weight != 1:
                path = (*start, number, "weight") if isinstance(each, list) else (*start, "weight")
                yield Mistake(path, "has no effect: it is for training rows only", "remove it", at="key")
