"""Selective copying: data tokens lie scattered among noise; at the end they are to be repeated in order.

What must be kept depends on what is read, not on where it stands, which a time-invariant model cannot learn. Source: Gu & Dao
2023, Mamba (arXiv:2312.00752), section 4.1.1, after Jing et al. 2019 (arXiv:1706.02761).
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "selective_copying"
TITLE = "Selective copying"

DATA_TOKENS = 8  # numbered from 2
NOISE, MARKER = 0, 1
VOCAB_SIZE = 2 + DATA_TOKENS
COUNT = 4
"""Data tokens a sequence."""
CONTEXT = 32
"""Tokens among which they lie."""


def batch(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, CONTEXT + COUNT] int64; a target of -100 counts for nothing."""
    data = torch.randint(2, VOCAB_SIZE, (rows, COUNT), generator=generator)
    order = torch.rand(rows, CONTEXT, generator=generator).argsort(dim=1)
    places = order[:, :COUNT].sort(dim=1).values
    inputs = torch.full((rows, CONTEXT + COUNT), NOISE)
    inputs.scatter_(1, places, data)
    inputs[:, CONTEXT:] = MARKER
    targets = torch.full_like(inputs, -100)
    targets[:, CONTEXT:] = data
    return inputs, targets
