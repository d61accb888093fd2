"""What teaches a run: its only teacher, or the mixture of several, which first have to go together."""

from __future__ import annotations

from typing import Any

from distill.models.forward import Capture
from distill.models.load import trained_labels
from distill.pipeline.compatible import check_same_classes
from distill.pipeline.fp8 import quantise_teacher
from distill.pipeline.session import NOTHING, Session
from distill.recipe.teachers import source_names, teaching_shares
from distill.release.export import without_folders
from distill.teacher import LiveTeacher, Mixture


def load_teaching(session: Session, capture: Capture = NOTHING, *, whole: bool = False) -> LiveTeacher | Mixture:
    """Load what teaches, in 8 bits in floating point where the recipe says so and it is not needed `whole`.

    The arguments are those of `Session.live_teacher`; layers are captured of the first one.

    Raises:
        InputError: 8 bits change the teacher by more than is allowed.
    """
    first = session.live_teacher(capture, whole=whole)
    if session.recipe.teacher.dtype == "fp8" and not whole:
        quantise_teacher(session, first.model)
    if not session.recipe.mixes:
        return first
    own, members = Capture(stop_at_head=capture.stop_at_head), session.recipe.teachers
    rest = [session.live_teacher(own, whole=whole, member=number) for number in range(1, len(members))]
    routes = source_names(session.recipe.data) if session.recipe.routes else [""]
    shares = teaching_shares(members, routes)
    return Mixture([first, *rest], shares, session.corpus.head, session.vocabulary)


def check_members(session: Session) -> None:
    """Refuse teachers with other classes than the first, or in another order. Raises InputError."""
    recipe, corpus = session.recipe, session.corpus
    if not recipe.mixes or not corpus.classes:
        return
    order = corpus.classes if recipe.teacher.fit else trained_labels(session.source)
    for number, (_, folder) in enumerate(session.teachers[1:], start=1):
        check_same_classes(trained_labels(folder), order, f"teachers.{number}.model", "the first teacher")


def describe_teachers(session: Session) -> list[dict[str, Any]]:
    """Name all teachers with their weights and sources, without folders of this machine; empty: there is one."""
    return [
        {
            "model": without_folders(one.model),
            "revision": one.revision,
            "sha256": one.sha256,
            "weight": one.weight,
            "sources": one.sources and [*map(without_folders, one.sources)],
        }
        for one in (session.recipe.teachers if session.recipe.mixes else ())
    ]
