"""What the peers' arguments become: activations by name, parameters in the dtype that statescan takes."""

from __future__ import annotations

import torch
from torch import Tensor


def activation_of(name: str, activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"{name}: activation={activation!r}; expected None, 'silu' or 'swish'")
    return "silu" if activation else None


def as_parameter(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """A, D and dt_bias are float32 (float64 with a float64 x); peers take any dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def as_weight(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """Weights of a convolution or a norm: the dtype of x or float32, whatever the peers' mixture."""
    return tensor if tensor is None or tensor.dtype == x.dtype else tensor.to(torch.float32)


def as_input(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """B, C and z have the dtype of x."""
    return tensor if tensor is None or tensor.dtype == x.dtype else tensor.to(x.dtype)
