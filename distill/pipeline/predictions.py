"""Run every arm over every split; predictions are kept, one row per example."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from safetensors.numpy import save_file

from distill.data import evaluation_batches, observe_batch
from distill.evaluation.arms import ARMS, measured_arms
from distill.evaluation.chance import most_frequent
from distill.evaluation.predict import Ask, Rows, merge_rows, predict
from distill.evaluation.recorded_teacher import HOST_BYTES, record_teacher
from distill.files import write_json
from distill.pipeline.session import Session
from distill.student.masks import mask_untrained
from distill.teacher import LiveTeacher, Mixture

COUNTED = 20_000
"""Training examples, at most, whose labels are counted for the most frequent one."""


def save_rows(columns: Rows, path: Path, fingerprint: str) -> None:
    """Write the predictions of an arm: numbers as safetensors, texts as JSON."""
    numbers = {name: values for name, values in columns.items() if values.dtype.kind != "U"}
    save_file(numbers, f"{path}.safetensors", {"data": fingerprint})
    if texts := {name: values.tolist() for name, values in columns.items() if name not in numbers}:
        write_json(path.with_name(f"{path.name}.json"), texts)


def predict_arms(
    session: Session, teacher: LiveTeacher | Mixture, steps: int, rank: int, ranks: int
) -> dict[str, dict[str, Rows]]:
    """Predict the test split, and those of `evaluation.sets`, with every arm; every rank gets all rows.

    Args:
        session: The recipe at work.
        teacher: Runs once over each split, for all arms.
        steps: Length of the training, which decides how an untrained arm is masked.
        rank: Of those that take part, among which batches are shared out.
        ranks: Number of those that take part.

    Returns:
        Split -> arm -> rows.
    """
    corpus, recipe = session.corpus, session.recipe
    splits = [name for name in corpus.splits if name not in ("train", "validation")]
    rows: dict[str, dict[str, Rows]] = {split: {} for split in splits}
    with ExitStack() as stack:
        folders = {split: session.folder.root / f".teacher-{split}-{rank}" for split in splits}
        share = HOST_BYTES // len(splits)
        recordings = {split: stack.enter_context(record_teacher(teacher, folders[split], share)) for split in splits}
        for arm in measured_arms(recipe):
            constant = majority(session) if ARMS[arm].start == "none" else None
            model = teacher.model if constant else load_arm(session, arm, teacher, steps)
            precision = recipe.training.precision
            for split, recording in recordings.items():
                examples = corpus.splits[split]
                batches = evaluation_batches(corpus, examples, recipe.evaluation.batch_size, rank, ranks)
                taught = arm == ("teachers" if recipe.mixes else "teacher")
                ask = recording if taught else constant
                observe = partial(observe_batch, corpus, examples)
                own = [predict(model, batches, corpus.head, recording, session.vocabulary, observe, ask, precision)]
                found = merge_rows(gather_object(own) if ranks > 1 else own)
                rows[split][arm] = dict(corpus.task.finish(found, corpus.settled))
                if corpus.task.packed:  # a long one fills several rows, which are not independent of each other
                    rows[split][arm]["document"] = np.array(examples.take(found["example"])["row"])
    return rows


def load_arm(session: Session, arm: str, teacher: LiveTeacher | Mixture, steps: int) -> Any:
    """Load the finished model of an arm beside the teacher, which is one of them."""
    if ARMS[arm].start == "teacher":
        return teacher.model
    device = teacher.model.device
    model = session.load(session.arm_folder(arm), session.near(device)).to(device)
    if ARMS[arm].terms is None:
        mask_untrained(session.recipe, model, steps)
    return model


def majority(session: Session) -> Ask:
    """Make what answers every example with the most frequent label of the training examples."""
    corpus, size = session.corpus, session.recipe.evaluation.batch_size
    pool = corpus.labelled
    step = -(-len(pool) // COUNTED)
    if step > 1:
        session.say(f"  majority: of {len(pool):,} labelled training examples one in {step} is counted")
    batches = evaluation_batches(corpus, corpus.train, size, pool=pool[::step])
    return most_frequent(batches, corpus.head, session.vocabulary or len(corpus.classes))
