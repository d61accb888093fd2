"""Train the student of a recipe on one or many processes; the same as `distill train`.

accelerate launch scripts/train.py recipes/quickstart/recipe.yaml
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        scripts/train.py recipes/quickstart/recipe.yaml training.lr=1e-4
"""

import sys

from distill.cli import entry

if __name__ == "__main__":
    entry(["train", *sys.argv[1:]])
