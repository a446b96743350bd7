"""What both mixers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def dt_bias(size: int, dt_min: float, dt_max: float, floor: float, device: torch.device | str | None) -> Tensor:
    """A bias [size] float32 whose softplus is log-uniform in [dt_min, dt_max] and at least `floor`."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(size, device=device) * (high - low) + low).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # softplus inverted


def depthwise_conv1d(
    channels: int, width: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Conv1d:
    """Holds the weight [channels, 1, width] and bias of the convolution under the published names; never called."""
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias, device=device, dtype=dtype)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in what it has if that is wider: the dtype of A, D and the bias of dt, and of states."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
