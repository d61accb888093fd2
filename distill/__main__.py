"""`python -m distill` is the same command line."""

from distill.cli import entry

entry()
