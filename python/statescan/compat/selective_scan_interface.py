"""mamba_ssm.ops.selective_scan_interface: the Mamba-1 scan and block, channels first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import torch as ops
from ._arguments import as_input, as_parameter, as_weight

__all__ = ["mamba_inner_fn", "selective_scan_fn"]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1 scan, by :func:`statescan.selective_scan`.

    Args:
        u, delta, z: [batch, dim, seqlen], any strides.
        A: [dim, dstate] real or complex.
        B, C: [dim, dstate]; or [batch, dstate, seqlen] or [batch, ngroups, dstate, seqlen], with a complex A twice as long,
            real and imaginary parts in turn.
        D, delta_bias: [dim].
        return_last_state: also return the state after the last token.

    Returns:
        out [batch, dim, seqlen] in the dtype of u, its memory channels last; or (out, last_state), the state
        [batch, dim, dstate] in float32 or complex64.

    Differs from mamba-ssm: the gradient of last_state is not dropped.
    """
    complex_A = A.is_complex()
    result = ops.selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A if complex_A else as_parameter(A, u),
        _tokens_first(B, u, A),
        _tokens_first(C, u, A),
        D=as_parameter(D, u),
        z=None if z is None else as_input(z, u).transpose(1, 2),
        dt_bias=as_parameter(delta_bias, u),
        dt_softplus=bool(delta_softplus),
        return_final_state=return_last_state,
    )
    if return_last_state:
        return result[0].transpose(1, 2), result[1]
    return result.transpose(1, 2)


def _tokens_first(B: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """B or C as [batch, seqlen, ngroups, dstate], or [dim, dstate] when it is the same for all tokens."""
    if B.dim() == 2:
        return B.to(A.dtype if A.is_complex() else as_parameter(A, u).dtype)
    B = torch.view_as_complex(B.float().unflatten(-1, (-1, 2)).contiguous()) if A.is_complex() else as_input(B, u)
    if B.dim() == 3:
        B = B[:, None]
    return B.permute(0, 3, 1, 2)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba-1 block after in_proj: convolution, SiLU, x_proj, dt_proj, scan, gate, out_proj.

    Args:
        xz: [batch, 2 dim, seqlen], x and the gate z.
        conv1d_weight: [dim, 1, width]; conv1d_bias: [dim].
        x_proj_weight: [dt_rank + 2 dstate, dim]; delta_proj_weight: [dim, dt_rank].
        out_proj_weight: [dim_out, dim]; out_proj_bias: [dim_out].
        A, D, delta_bias: as in selective_scan_fn. B, C: as there; None to take them from x_proj.
        B_proj_bias, C_proj_bias: [dstate], added to what x_proj gives.
        checkpoint_lvl: 0 or 1. mamba-ssm trades memory for time by it; here it changes nothing.
        b_rms_weight, c_rms_weight: [dstate], weights of an RMSNorm of B and C.
        dt_rms_weight: [dim], the weight of an RMSNorm of the step, after delta_proj (as in mamba-ssm; FalconMamba's and
            Jamba's own definition has it before).

    Returns:
        [batch, seqlen, dim_out].

    Differs from mamba-ssm: b_rms_weight, c_rms_weight and dt_rms_weight get their gradients, and B, C and the step get
    them through the norms.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"mamba_inner_fn: checkpoint_lvl={checkpoint_lvl}; expected 0 or 1")
    complex_A, rank = A.is_complex(), delta_proj_weight.shape[1]
    dstate = A.shape[1] * (2 if complex_A else 1)
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    conv_weight = as_weight(conv1d_weight.squeeze(1), x)
    conv_bias = None if conv1d_bias is None else conv1d_bias.to(conv_weight.dtype)
    x = ops.causal_conv1d(x, conv_weight, conv_bias, activation="silu")
    projected = F.linear(x, x_proj_weight)
    dt = _normed(F.linear(projected[..., :rank], delta_proj_weight), dt_rms_weight, b_c_dt_rms_eps)

    def from_projection(given, part, bias, rms_weight):
        if given is not None:
            return _tokens_first(given, x, A)
        part = part if bias is None else part + bias.to(part.dtype)
        part = _normed(part, rms_weight, b_c_dt_rms_eps)
        part = torch.view_as_complex(part.float().unflatten(-1, (-1, 2)).contiguous()) if complex_A else as_input(part, x)
        return part[:, :, None]

    y = ops.selective_scan(
        x,
        dt,
        A if complex_A else as_parameter(A, x),
        from_projection(B, projected[..., rank : rank + dstate], B_proj_bias, b_rms_weight),
        from_projection(C, projected[..., projected.shape[-1] - dstate :], C_proj_bias, c_rms_weight),
        D=as_parameter(D, x),
        z=z,
        dt_bias=as_parameter(delta_bias, x),
        dt_softplus=bool(delta_softplus),
    )
    return F.linear(y, out_proj_weight, None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype))


def _normed(values: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return values if weight is None else ops.gated_rms_norm(values, None, as_weight(weight, values), eps=eps)
