import numpy as np

from .causal_conv1d import causal_conv1d, causal_conv1d_backward
from .common import silu
from .gated_rms_norm import gated_rms_norm, gated_rms_norm_backward
from .ssd_scan import ssd_scan, ssd_scan_backward


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
    between=lambda value: value,
):
    """A Mamba-2 block between its projections, from the oracles of its parts. Returns y and both final states. `between` is
    what becomes of a value on its way from one part to the next: a backend that stores them may round them."""
    batch, seqlen, total = zxbcdt.shape
    nheads, conv_dim = A.shape[0], conv_weight.shape[0]
    d_inner = total - conv_dim - nheads
    z, xBC, dt = np.split(zxbcdt, [d_inner, d_inner + conv_dim], axis=2)
    xBC, final_conv_state = causal_conv1d(
        xBC, conv_weight, conv_bias, activation="silu", initial_state=initial_conv_state, cu_seqlens=cu_seqlens, reverse=reverse
    )
    x, B, C = np.split(between(xBC), [d_inner, (d_inner + conv_dim) // 2], axis=2)
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
            between(y), z, norm_weight, group_size=norm_group_size or d_inner // ngroups, eps=eps, norm_before_gate=norm_before_gate
        )
    if cu_seqlens is not None:
        y[:, int(cu_seqlens[-1]) :] = 0  # whatever z holds past the last packed token
    return y, final_conv_state, final_state


def mamba2_scan_backward(
    zxbcdt,
    conv_weight,
    conv_bias,
    dt_bias,
    A,
    dy,
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
    dfinal_conv_state=None,
    dfinal_state=None,
    between=lambda value: value,
):
    """Backwards through the block, from the oracles of its parts. Returns the gradients in the order of the inputs, D and
    norm_weight after A, then those of the initial states; None for what is absent. `between` as in mamba2_scan."""
    batch, seqlen, total = zxbcdt.shape
    nheads, conv_dim = A.shape[0], conv_weight.shape[0]
    d_inner = total - conv_dim - nheads
    z, xBC, dt = np.split(zxbcdt, [d_inner, d_inner + conv_dim], axis=2)
    packing = dict(cu_seqlens=cu_seqlens, reverse=reverse)
    conv = dict(activation="silu", initial_state=initial_conv_state, **packing)
    after_conv, _ = causal_conv1d(xBC, conv_weight, conv_bias, **conv)
    x, B, C = np.split(between(after_conv), [d_inner, (d_inner + conv_dim) // 2], axis=2)
    heads = lambda v, count: v.reshape(batch, seqlen, count, v.shape[2] // count)
    scanned = (heads(x, nheads), dt, A, heads(B, ngroups), heads(C, ngroups))
    scan = dict(D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, initial_state=initial_state, **packing)
    dz, dnorm_weight = np.zeros(z.shape), None
    if norm_weight is None:
        scan["z"] = heads(z, nheads)
    else:
        y = between(ssd_scan(*scanned, **scan)[0])
        last = seqlen if cu_seqlens is None else int(cu_seqlens[-1])  # past it y is zero, whatever z holds
        norm = dict(group_size=norm_group_size or d_inner // ngroups, eps=eps, norm_before_gate=norm_before_gate)
        y, gate, given = (v.reshape(batch, seqlen, d_inner)[:, :last] for v in (y, z, dy))
        dy = np.zeros(dy.shape)
        dy[:, :last], dz[:, :last], dnorm_weight = gated_rms_norm_backward(y, given, gate, norm_weight, **norm)
        dy = between(dy)
    dx, ddt, dA, dB, dC, dD, dz_of_heads, ddt_bias, dinitial_state = ssd_scan_backward(
        *scanned, heads(dy, nheads), dfinal_state=dfinal_state, **scan
    )
    if norm_weight is None:
        dz = dz_of_heads.reshape(z.shape)
    dafter_conv = np.concatenate([v.reshape(batch, seqlen, v.shape[2] * v.shape[3]) for v in (dx, dB, dC)], axis=2)
    dxBC, dconv_weight, dconv_bias, dinitial_conv_state = causal_conv1d_backward(
        xBC, conv_weight, between(dafter_conv), conv_bias, dfinal_state=dfinal_conv_state, **conv
    )
    dzxbcdt = np.concatenate([dz, dxBC, ddt], axis=2)
    return dzxbcdt, dconv_weight, dconv_bias, ddt_bias, dA, dD, dnorm_weight, dinitial_conv_state, dinitial_state
