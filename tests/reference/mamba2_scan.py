import numpy as np

from .causal_conv1d import causal_conv1d
from .common import silu
from .gated_rms_norm import gated_rms_norm
from .ssd_scan import ssd_scan


def mamba2_scan(
    zxbcdt,
    conv_weight,
    conv_bias,
    dt_bias,
    A,
    *,
    D=None,
    norm_weight=None,
    ngroups=1,
    norm_group_size=None,
    eps=1e-5,
    norm_before_gate=False,
    dt_softplus=True,
    dt_limit=None,
    initial_conv_state=None,
    initial_state=None,
    cu_seqlens=None,
    reverse=False,
):
    """A Mamba-2 block between its projections, from the oracles of its parts. Returns y and both final states."""
    batch, seqlen, total = zxbcdt.shape
    nheads, conv_dim = A.shape[0], conv_weight.shape[0]
    d_inner = total - conv_dim - nheads
    z, xBC, dt = np.split(zxbcdt, [d_inner, d_inner + conv_dim], axis=2)
    xBC, final_conv_state = causal_conv1d(
        xBC, conv_weight, conv_bias, activation="silu", initial_state=initial_conv_state, cu_seqlens=cu_seqlens, reverse=reverse
    )
    x, B, C = np.split(xBC, [d_inner, (d_inner + conv_dim) // 2], axis=2)
    dstate = B.shape[2] // ngroups
    y, final_state = ssd_scan(
        x.reshape(batch, seqlen, nheads, d_inner // nheads),
        dt,
        A,
        B.reshape(batch, seqlen, ngroups, dstate),
        C.reshape(batch, seqlen, ngroups, dstate),
        D=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
    )
    y = y.reshape(batch, seqlen, d_inner)
    if norm_weight is None:
        y = y * silu(z)
    else:
        y = gated_rms_norm(
            y, z, norm_weight, group_size=norm_group_size or d_inner // ngroups, eps=eps, norm_before_gate=norm_before_gate
        )
    if cu_seqlens is not None:
        y[:, int(cu_seqlens[-1]) :] = 0  # whatever z holds past the last packed token
    return y, final_conv_state, final_state
