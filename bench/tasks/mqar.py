"""Multi-query associative recall: pairs of key and value, then keys again, each to be answered by its value.

How many pairs a model can recall is set by the size of its state. Source: Arora et al. 2023, Zoology (arXiv:2312.04927), section
3 and appendix E; queries lie at distances that follow a power law, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "mqar"
TITLE = "Multi-query associative recall"

KEYS = 8  # numbered from 1
VALUES = 8
VOCAB_SIZE = 1 + KEYS + VALUES
PAIRS = 4
LENGTH = 16
POWER = 0.1
"""A query lies i slots behind the pairs with a probability of i ** (POWER - 1)."""


def batch(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, LENGTH] int64; a target of -100 counts for nothing."""
    keys = 1 + _distinct(rows, KEYS, PAIRS, generator)
    values = 1 + KEYS + _distinct(rows, VALUES, PAIRS, generator)
    inputs = torch.zeros(rows, LENGTH, dtype=torch.int64)
    inputs[:, 0 : 2 * PAIRS : 2] = keys
    inputs[:, 1 : 2 * PAIRS : 2] = values
    weights = torch.arange(1, LENGTH - 2 * PAIRS + 1, dtype=torch.float32) ** (POWER - 1)
    places = 2 * PAIRS + torch.multinomial(weights.expand(rows, -1), PAIRS, generator=generator)
    inputs.scatter_(1, places, keys)
    targets = torch.full_like(inputs, -100)
    targets.scatter_(1, places, values)
    return inputs, targets


def _distinct(rows: int, size: int, count: int, generator: torch.Generator) -> Tensor:
    """[rows, count] of distinct numbers below `size` in each row."""
    return torch.rand(rows, size, generator=generator).argsort(dim=1)[:, :count]
