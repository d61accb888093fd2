"""Load the teacher of a run, or the mixture of several; in fp8 where that hardly changes its predictions."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from distill.errors import InputError
from distill.losses import Objective
from distill.models.forward import Capture, forward, to_device
from distill.models.fp8 import quantise_layers
from distill.pipeline.session import NOTHING, Session
from distill.recipe.schema import Teacher, Term
from distill.recipe.teachers import source_names, teaching_shares
from distill.release.export import without_folders
from distill.teacher import LiveTeacher, Mixture

LICENCE = ("license", "license_name", "license_link")
"""Keys of the head of a model card; name and link are those of a licence that is `other`."""
LARGEST_CARD = 2**20
COMPARED = 16
"""Training examples that both are compared on."""


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
    routes = source_names(session.recipe.rows) if session.recipe.routes else [""]
    shares = teaching_shares(members, routes)
    return Mixture([first, *rest], shares, session.corpus.head, session.vocabulary)


@torch.no_grad()
def quantise_teacher(session: Session, model: Any) -> Any:
    """Quantise a teacher in place, say by how much its predictions change, and refuse it where that is too much.

    Args:
        session: The recipe at work.
        model: The teacher with its stored weights, frozen, on its device.

    Raises:
        InputError: KL(stored || fp8) on training examples is above `teacher.fp8_max_kl`.
    """
    corpus, limit = session.corpus, session.recipe.teacher.fp8_max_kl
    batch = to_device(session.first_examples(COMPARED), model.device)
    objective = Objective((Term(match="logits"),), corpus.head, None, session.vocabulary)
    stored = forward(model, batch, objective.teacher)
    stored = replace(stored, head=copy.deepcopy(stored.head))  # it shares the model's weights
    done, left = quantise_layers(model.to(torch.bfloat16))
    counts = objective.counts([batch])
    kl = float(objective(forward(model, batch, objective.student), stored, batch, counts)[1] / counts)
    rest = f", {left} other weights of its layers in bf16" if left else ""
    session.say(
        f"  the teacher in fp8: {done} linear maps{rest}; KL from its stored weights {kl:.3g} nats on "
        f"{int(counts)} positions"
    )
    if not kl <= limit:
        raise InputError(
            f"{session.teacher_key}.dtype: fp8 changes the teacher's predictions by {kl:.3g} nats (KL from its stored "
            f"weights on {int(counts)} positions), more than fp8_max_kl: {limit:g}; use bf16, or raise fp8_max_kl"
        )
    return model


def describe_model(model: Teacher) -> dict[str, Any]:
    """Name a model that a recipe names, without folders of this machine."""
    return {"model": without_folders(model.model), "revision": model.revision, "sha256": model.sha256}


def describe_teachers(session: Session) -> list[dict[str, Any]]:
    """Name all teachers with their weights and sources; empty: there is one."""
    return [
        {**describe_model(one), "weight": one.weight, "sources": one.sources and [*map(without_folders, one.sources)]}
        for one in (session.recipe.teachers if session.recipe.mixes else ())
    ]


def read_licences(session: Session) -> dict[str, dict[str, str]]:
    """Read under which licence, by the card in its folder, each model is that the recipe names."""
    found = {}
    for key, model in session.recipe.models.items():
        card = session.folder_of(key) / "README.md"
        try:
            text = (
                card.read_text(encoding="utf-8-sig") if card.is_file() and card.stat().st_size <= LARGEST_CARD else ""
            )
            block = re.match(r"---\n(.*?)\n---\s", text, re.DOTALL)
            head = YAML(typ="safe", pure=True).load(block[1]) if block else None
        except (OSError, ValueError, YAMLError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            session.say_once(f"  {key}: no licence is read from its README.md, whose head is no YAML: {reason}")
            continue
        stated = head if isinstance(head, dict) else {}
        own = {name: stated[name] for name in LICENCE if isinstance(stated.get(name), str)}
        if "license" in own:
            found[without_folders(model.model)] = own
    return found
