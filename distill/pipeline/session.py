"""A recipe at work in a run folder: tokenizer, data and teacher, each loaded once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from distill.data import TASKS, Corpus, collate, load_corpus
from distill.data.tasks import Task
from distill.errors import InputError
from distill.evaluation.arms import ARMS, trained_arms
from distill.losses import PREDICTION_KINDS
from distill.losses.kinds import PredictionKind
from distill.models.dtensor import shard_model
from distill.models.family import layers_of
from distill.models.forward import Batch, Capture
from distill.models.load import (
    ModelHead,
    add_tokens,
    folder_fingerprint,
    grow_embeddings,
    load_config,
    load_model,
    load_tokenizer,
    random_model,
    teacher_path,
)
from distill.models.precision import DTYPES
from distill.pipeline.folder import RunDir
from distill.ranks import process_state, shards_weights
from distill.recipe.schema import Recipe, Teacher
from distill.recipe.teachers import source_names
from distill.registry import find
from distill.teacher import LiveTeacher

NOTHING = Capture()
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Session:
    """One recipe at work in one run folder, with what several stages need loaded once."""

    recipe: Recipe
    base: Path
    """Folder that the recipe's relative paths start from."""
    folder: RunDir
    say: Callable[[str], None]
    remote_code: bool = False
    continue_changed: bool = False
    """Continue trainings from checkpoints that were made from other inputs as well."""
    accept_weak_teacher: bool = False
    """Go on with a teacher that is no better than chance."""
    oldest: Path | None = None
    """Folder with the oldest transformers that distill is for, where the release is loaded with it, too."""
    packs: bool = True
    """Rows may hold several documents, as far as the models that are here are concerned."""
    _said: set[str] = field(default_factory=set, repr=False)
    _folders: dict[str, Path] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def source(self) -> Path:
        """Local folder of the teacher as the recipe names it."""
        return self.folder_of(next(iter(self.recipe.models)))

    @property
    def folders_beside(self) -> dict[str, Path]:
        """Folders of the models beside the first teacher, which read what its tokenizer writes, by their keys."""
        return {key: self.folder_of(key) for key in list(self.recipe.models)[1:]}

    def folder_of(self, key: str) -> Path:
        """Return the local folder of the model that a key of the recipe names."""
        if key not in self._folders:
            model = self.recipe.models[key]
            self._folders[key] = teacher_path(model, self.base, self.remote_code, self.say, key)
        return self._folders[key]

    @property
    def teacher(self) -> Path:
        """Local folder of the teacher that distils: fitted, or as the recipe names it."""
        return self.folder.teacher if self.recipe.teacher.fit else self.source

    @property
    def teacher_key(self) -> str:
        """Key of the only or first teacher's section in the recipe: `teacher`, or `teachers.0`."""
        return next(iter(self.recipe.models)).removesuffix(".model")

    @property
    def teachers(self) -> list[tuple[Teacher, Path]]:
        """Section and local folder of every teacher, the first one fitted where the recipe asks for it."""
        others = enumerate(self.recipe.teachers[1:], start=1)
        beside = [(one, self.folder_of(f"teachers.{number}.model")) for number, one in others]
        return [(self.recipe.teacher, self.teacher), *beside]

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer, with the tokens that the task writes. Raises InputError where nobody trains them."""
        tokenizer = load_tokenizer(self.source, self.remote_code)
        new = ", ".join(add_tokens(tokenizer, self.task.added_tokens))
        if new and self.recipe.teacher.fit is None:
            raise InputError(
                f"{self.source}: task: {self.task.name} writes {new}, which the teacher's tokenizer lacks, so the "
                f"teacher never learned them; add `fit: {{epochs: …, lr: …}}` under `teacher:`"
            )
        if new:
            self.say_once(f"  the teacher's tokenizer gets {new}, as task: {self.task.name} writes them")
        return tokenizer

    @property
    def task(self) -> Task:
        """The row of the task: tokens, head and metrics."""
        return find(TASKS, self.recipe.data.task, "task")()

    @cached_property
    def bound_task(self) -> Task:
        """The task with what it needs of the teacher's folder."""
        return self.task.bind(self.source, self.tokenizer, self.recipe.data)

    @cached_property
    def corpus(self) -> Corpus:
        """The examples of every split, as the stage `data` left them in the run folder."""
        return load_corpus(self.folder.data, self.bound_task)

    @property
    def kind(self) -> PredictionKind:
        """The row of what is predicted."""
        return PREDICTION_KINDS[self.corpus.head]

    def batches(self, examples: range, size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Batch those of some training examples that there are, every `ranks`-th batch from number `rank` on."""
        own = range(len(self.corpus.train))[examples.start : examples.stop]
        for start in range(0, len(own), size)[rank::ranks]:
            yield collate(self.corpus, self.corpus.train, own[start : start + size])

    def first_examples(self, count: int) -> Batch:
        """Make a batch of so many training examples, or of all where there are fewer."""
        return next(self.batches(range(count), count))

    @property
    def preprocessors(self) -> list[Any]:
        """List what turns rows into what a model reads, and is saved beside it: tokenizer, feature extractor."""
        tokenizer = copy.deepcopy(self.tokenizer)
        if tokenizer.is_fast:  # the last call's settings would cut whatever is read with the file
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        return [tokenizer, *self.bound_task.preprocessors]

    @property
    def released_preprocessors(self) -> list[Any]:
        """List the same for a release: the tokenizer's limit is the length of the training."""
        tokenizer, *others = self.preprocessors
        tokenizer.model_max_length = self.recipe.data.max_length
        for key in ("is_local", "local_files_only"):  # how it was loaded here
            tokenizer.init_kwargs.pop(key, None)
        return [tokenizer, *others]

    @cached_property
    def head(self) -> ModelHead:
        """The task's model class and class names."""
        settings = self.task.model_settings(self.corpus.settled)
        return ModelHead(self.task.auto_class, self.corpus.classes, self.corpus.padding, settings, self.kind.vectors)

    @property
    def vocabulary(self) -> int | None:
        """Entries of the vocabulary that are tokens; heads are often padded beyond. None for class heads."""
        return self.task.vocabulary(self.tokenizer) if self.kind.vocabulary else None

    @property
    def children(self) -> list[Session]:
        """List the runs with other seeds: they share what does not depend on the seed, and measure what is trained."""
        recipe, found = self.recipe, []
        measured = [arm for arm in recipe.evaluation.arms if arm in trained_arms(recipe)]
        own = {"arms": measured, "seeds": 1, "efficiency": False, "harness": None}
        for seed in range(recipe.seed + 1, recipe.seed + recipe.evaluation.seeds):
            changed = {"seed": seed, "evaluation": recipe.evaluation.model_copy(update=own)}
            child = recipe.model_copy(update=changed)
            say = partial(self._say_of_seed, seed)
            found.append(replace(self, recipe=child, folder=self.folder.child(seed), say=say))
        return found

    def _say_of_seed(self, seed: int, line: str) -> None:
        self.say(f"seed {seed}: {line.strip()}")

    def arm_start(self, arm: str) -> Path:
        """Return the folder of the model that an arm starts from."""
        run = self.folder
        student = run.repaired if self.recipe.student.repair.wanted else run.student
        folders = {"teacher": self.teacher, "cut": run.student, "repaired": run.repaired, "student": student}
        return {**folders, "own": run.start(arm)}[ARMS[arm].start]

    def arm_plan(self, arm: str) -> Path:
        """Return the plan file that maps an arm's layers to the teacher's."""
        return self.folder.control(arm) / "plan.json" if arm == "random_cut" else self.folder.plan

    def arm_folder(self, arm: str) -> Path:
        """Return the folder of an arm's finished model."""
        if ARMS[arm].terms is None:
            return self.arm_start(arm)
        return self.folder.distilled if arm == "distilled" else self.folder.control(arm) / "model"

    def train_folder(self, arm: str) -> Path:
        """Return the folder of a trained arm's checkpoints and metrics; of the student it is the run folder."""
        return self.folder.root if arm == "distilled" else self.folder.control(arm)

    def load(self, folder: Path, device: torch.device = CPU, *, int8: bool = False) -> Any:
        """Load a model with the task's head and all its weights to a device; in 8 bits, where that is asked."""
        code, say = self.remote_code, self.say_once
        return load_model(folder, self.head, remote_code=code, device=device, int8=int8, say=say)

    def config_of(self, folder: Path) -> Any:
        """Load the config of a model folder, as it is there."""
        return load_config(folder, ModelHead(""), self.remote_code)

    def load_to_fit(self, folder: Path, device: torch.device = CPU, *, random: bool = False) -> Any:
        """Load a model that is about to be fitted: its head, and embeddings of the task's tokens, are drawn if missing.

        Args:
            folder: Local folder.
            device: What the weights are read to, or drawn on.
            random: Draw all weights; only the config is read.
        """
        seed, shared = self.recipe.seed, dict[str, Any](remote_code=self.remote_code, device=device, say=self.say_once)
        if random:
            model = random_model(folder, self.head, seed, **shared)
        else:
            model = load_model(folder, self.head, allow_untrained_head=True, random_seed=seed, **shared)
        grow_embeddings(model, self.tokenizer, self.task.added_tokens, seed, self.say)
        return model

    def say_once(self, line: str) -> None:
        """Say a line that several stages would repeat."""
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def live_teacher(self, capture: Capture = NOTHING, *, whole: bool = False, member: int = 0) -> LiveTeacher:
        """Load the teacher, frozen, where `teacher.device` says and in `teacher.dtype`.

        Args:
            capture: Tensors that each of its forward passes hands on.
            whole: This rank alone uses it, or reads its weights. A sharded teacher then lies in main memory, and one
                in 8 bits keeps the dtype that it is stored in; a line says so.
            member: Number of the teacher among several.
        """
        (spec, folder), device = self.teachers[member], process_state().device
        on_cpu = spec.device == "cpu" or (whole and spec.device == "sharded")
        place, int8 = CPU if on_cpu else device, spec.dtype == "int8" and not whole
        if whole and (spec.device == "sharded" or spec.dtype in ("int8", "fp8")):
            memory = "main memory" if on_cpu else "the device"
            dtype = "its stored dtype" if spec.dtype in ("int8", "fp8", "stored") else spec.dtype
            self.say(f"  the whole teacher is needed here, not shards or 8 bits: it is in {memory}, in {dtype}")
        model = self.load(folder, self.near(place), int8=int8)
        if not int8:
            model.to(DTYPES.get(spec.dtype, model.dtype))
        if spec.device == "sharded" and not whole:
            model = shard_model(model.requires_grad_(False).to(device), layers_of(model))
        return LiveTeacher(model, capture, place, "fp32" if int8 else self.precision_of(spec))

    def near(self, device: torch.device) -> torch.device:
        """Choose where a model meant for a device is read or drawn: there, unless FSDP or DeepSpeed place it."""
        return CPU if shards_weights() else device

    def precision_of(self, spec: Teacher) -> str:
        """Return the autocast precision of a teacher: fp32 where it has a dtype of its own, else the training's."""
        return "fp32" if spec.dtype in DTYPES else self.recipe.training.precision

    def shares(self) -> tuple[int, int] | None:
        """Return this rank, and the number of ranks, among which forward passes of the whole teacher are shared out.

        Copies of a sharded teacher are too large to have one for each rank: the main rank alone runs the whole of it,
        and the others get None.
        """
        state = process_state()
        if self.recipe.teacher.device == "sharded":
            return (0, 1) if state.is_main_process else None
        return state.process_index, state.num_processes

    def teacher_inputs(self) -> dict[str, Any]:
        """Return the fingerprints and precisions of all teachers, on which every stage that runs them depends."""
        own: list[dict[str, Any]] = [
            {"weights": folder_fingerprint(folder), "dtype": one.dtype, **in_precision(self.precision_of(one))}
            for one, folder in self.teachers
        ]
        if len(own) == 1:
            return own[0]
        taught = [[one.weight, one.sources] for one in self.recipe.teachers]
        routes = {"routes": source_names(self.recipe.rows)} if self.recipe.routes else {}
        return {**own[0], "others": own[1:], "shares": taught, **routes}

    def teaching_inputs(self) -> dict[str, Any]:
        """Return `teacher_inputs` with the limit of fp8, by which a quantised teacher is accepted or refused."""
        spec = self.recipe.teacher
        return self.teacher_inputs() | ({"fp8_max_kl": spec.fp8_max_kl} if spec.dtype == "fp8" else {})


def in_precision(precision: str) -> dict[str, str]:
    """List a precision among the inputs of a stage; fp32, as everything was computed once, is none of them."""
    return {} if precision == "fp32" else {"precision": precision}
