"""What a mixer carries from one token to the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """The state of one mixer. As an initial state, None stands for zeros.

    conv: [batch, channels, width - 1], the last inputs of the convolution, oldest first.
    ssm: [batch, dim, dstate] (Mamba) or [batch, nheads, headdim, dstate] (Mamba2), float32.
    """

    conv: Tensor | None
    ssm: Tensor | None
