"""A recipe at work in a run folder: tokenizer, data and teacher, each loaded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distill.data import Corpus, Texts, read_texts, tokenise
from distill.errors import InputError
from distill.evaluation.arms import AGAINST_TEACHER
from distill.models.load import ModelHead, load_model, load_tokenizer, teacher_path, trained_labels
from distill.pipeline.folder import RunDir
from distill.recipe.schema import Recipe

PATIENCE = timedelta(days=30)
"""How long processes wait for the main one. The launcher ends them when it dies."""


@dataclass(frozen=True)
class Session:
    """One recipe at work in one run folder, with what several stages need loaded once."""

    recipe: Recipe
    base: Path
    """Folder that the recipe's relative paths start from."""
    run: RunDir
    say: Callable[[str], None]
    remote_code: bool = False
    continue_changed: bool = False
    """Continue trainings from checkpoints that were made from other inputs as well."""

    @cached_property
    def source(self) -> Path:
        """Local folder of the teacher as the recipe names it."""
        return teacher_path(self.recipe.teacher, self.base, self.remote_code)

    @property
    def teacher(self) -> Path:
        """Local folder of the teacher that distils: fitted, or as the recipe names it."""
        return self.run.teacher if self.recipe.teacher.fit else self.source

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer."""
        return load_tokenizer(self.source, self.remote_code)

    @cached_property
    def texts(self) -> Texts:
        """The split texts."""
        texts = read_texts(self.recipe.data, self.recipe.seed, self.base)
        if self.recipe.teacher.fit or not texts.classes:
            return texts
        # A teacher that is already trained keeps its own order of classes.
        order = trained_labels(self.source)
        unknown = sorted(set(texts.classes) - set(order))
        if unknown:
            raise InputError(
                f"the data has the classes {', '.join(unknown)}, the teacher knows {', '.join(order)}: rename them, "
                f"or add `fit` under `teacher:` to train it on these classes"
            )
        return replace(texts, classes=tuple(order))

    @cached_property
    def corpus(self) -> Corpus:
        """The split token ids."""
        return tokenise(self.texts, self.recipe.data, self.tokenizer)

    @cached_property
    def head(self) -> ModelHead:
        """The task's model class and class names."""
        return ModelHead(self.corpus.task.auto_class, self.corpus.classes, self.corpus.padding)

    @property
    def metrics(self) -> list[str]:
        """Metrics of every arm, the headline first."""
        asked = self.recipe.evaluation.metrics or self.corpus.task.metrics
        return list(dict.fromkeys([*asked, *AGAINST_TEACHER]))

    @property
    def vocabulary(self) -> int | None:
        """Entries of the vocabulary that are tokens; heads are often padded beyond. None for class heads."""
        return len(self.tokenizer) if self.corpus.task.head == "next_token" else None

    @property
    def start(self) -> Path:
        """The model that training starts from: the student as cut, or repaired where the recipe asks for it."""
        return self.run.repaired if self.recipe.student.repair.wanted else self.run.student

    @property
    def arms(self) -> list[str]:
        """The arms that this recipe makes, of those that it measures."""
        wanted = self.recipe.student.repair.wanted
        return [arm for arm in self.recipe.evaluation.arms if arm != "repaired" or wanted]

    def arm_folder(self, arm: str) -> Path:
        """The model of one arm of the evaluation."""
        own = {
            "teacher": self.teacher,
            "cut": self.run.student,
            "repaired": self.run.repaired,
            "distilled": self.run.distilled,
        }
        return own[arm] if arm in own else self.run.control_model(arm)

    def load(self, folder: Path, int8_on: torch.device | None = None) -> Any:
        """A model with the task's head and all its weights; in 8 bits, on a device, where that is given."""
        return load_model(folder, self.head, remote_code=self.remote_code, int8_on=int8_on)
