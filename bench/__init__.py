"""Benchmarks of every op, installed as statescan.bench: ``statescan bench --help``, or :func:`main` with parsed arguments.

Each op's result is checked against a float64 recurrence before it is timed. Importing this package imports neither torch nor
matplotlib.
"""

from .cli import add_arguments, main

__all__ = ["add_arguments", "main"]
