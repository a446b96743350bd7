"""gated_rms_norm for torch: RMSNorm with a SiLU gate, and its gradient."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from ._op import Op, Results


def _results(a: SimpleNamespace) -> Results:
    return {"y": (a.x.shape, a.x.dtype)}


_OP = Op(
    "gated_rms_norm",
    "Tensor x, Tensor? z, Tensor? weight, int group_size, float eps, bool norm_before_gate",
    results=_results,
    asked={"y": None},
    backward="x dy z weight group_size eps norm_before_gate",
    gradients="x z weight",
    narrow="x z",
    wide="weight",
)


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
) -> Tensor:
    """RMSNorm and gate: ``rms(x silu(z)) weight``, or ``rms(x) weight silu(z)`` with norm_before_gate.

    :func:`statescan.gated_rms_norm` with a gradient for x, z and weight; ``rms(v) = v / sqrt(mean(v²) + eps)``, the mean over
    each group of group_size channels.

    Args:
        x: [..., dim] float32, float16 or bfloat16 (float64 on the CPU), at most 5 leading axes.
        z: as x, the gate; None for RMSNorm alone.
        weight: [dim] dtype of x or float32; None for ones.
        group_size: divides dim; None for dim.
        eps: added to the mean of squares.
        norm_before_gate: which of the two comes first.

    Returns:
        y, shaped and typed as x.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`statescan.gated_rms_norm`; a second derivative is not implemented.

    Under autocast x and z take its dtype; weight is float32.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467); Dao & Gu 2024 (arXiv:2405.21060), section 7, for the gate.
    """
    return _OP.call((x, z, weight, group_size or 0, eps, norm_before_gate))
