"""One process of an evaluation that a test launches: `evaluating.py RECIPE RUN`. The run's models are there already.

It prints how many forward passes of whole models it ran.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch.nn.modules.module import register_module_forward_hook
from transformers import BertForSequenceClassification

from distill.pipeline import RunDir, Session, run_stages
from distill.pipeline.evaluate import STAGE
from distill.ranks import process_state
from distill.recipe import load_recipe

passes = []
register_module_forward_hook(lambda module, *_: passes.extend([1] * isinstance(module, BertForSequenceClassification)))
recipe, run = map(Path, sys.argv[1:])
rank = process_state().process_index
run_stages(Session(load_recipe(recipe), recipe.parent, RunDir(run), say=lambda _text: None), [STAGE])
(run / f"passes-{rank}").write_text(str(len(passes)))
