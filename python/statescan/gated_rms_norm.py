"""gated_rms_norm: RMSNorm with a SiLU gate before or after it."""

from __future__ import annotations

from typing import Any

from . import _C


def gated_rms_norm(
    x: Any,
    z: Any = None,
    weight: Any = None,
    *,
    group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """RMSNorm and gate: ``rms(x silu(z)) weight``, or ``rms(x) weight silu(z)`` with norm_before_gate.

    ``rms(v) = v / sqrt(mean(v²) + eps)``, the mean over each group of group_size channels.

    Args:
        x: [..., dim] float32, float16 or bfloat16 (float64 on the CPU), at most 5 leading axes.
        z: as x, the gate; None for RMSNorm alone.
        weight: [dim] dtype of x or float32; None for ones.
        group_size: divides dim; None for dim.
        eps: added to the mean of squares.
        norm_before_gate: which of the two comes first.
        out: array to write y to.
        stream: the CUDA stream, as an integer or an object with ``__cuda_stream__``; the framework's current one when None.

    Returns:
        y, shaped and typed as x.

    Raises:
        ValueError: a shape, stride, size, index or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.
        NotImplementedError: no kernel of this build serves the call.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467); Dao & Gu 2024 (arXiv:2405.21060), section 7, for the gate.
    """
    return _C.gated_rms_norm(x, z, weight, group_size or 0, eps, norm_before_gate, out, stream)


def gated_rms_norm_backward(
    x: Any,
    dy: Any,
    z: Any = None,
    weight: Any = None,
    *,
    group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    stream: Any = None,
) -> tuple[Any, ...]:
    """Gradients of :func:`gated_rms_norm`, given dy (shaped as y).

    Args:
        x, z, weight, group_size, eps, norm_before_gate, stream: as in the forward.
        dy: gradient of y, shaped and typed as x.

    Returns:
        (dx, dz, dweight), each shaped and typed as what it differentiates, None for what was not given.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`gated_rms_norm`.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467).
    """
    return _C.gated_rms_norm_backward(x, dy, z, weight, group_size or 0, eps, norm_before_gate, stream)
