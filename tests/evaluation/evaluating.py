"""One process of an evaluation that a test launches: `evaluating.py RECIPE RUN [KEY=VALUE]...`. The models are there.

It prints how many forward passes of whole models it ran.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch.nn.modules.module import register_module_forward_hook
from transformers import BertForSequenceClassification

from distill.pipeline import RunDir, Session, data, evaluate, run_stages
from distill.ranks import process_state
from distill.recipe import load_recipe

passes = []
register_module_forward_hook(lambda module, *_: passes.extend([1] * isinstance(module, BertForSequenceClassification)))
recipe, run = map(Path, sys.argv[1:3])
rank = process_state().process_index
session = Session(load_recipe(recipe, sys.argv[3:]), recipe.parent, RunDir(run), say=lambda _text: None)
examined = {"split": "test", "examples": 1, "metrics": {}, "weakness": ""}  # what the stage `examine` leaves
(run / "teacher.json").write_text(json.dumps(examined))
run_stages(session, [data.STAGE, evaluate.STAGE])
(run / f"passes-{rank}").write_text(str(len(passes)))
