"""What the recurrences share: the scalar functions, and the order in which a scan visits tokens."""

import numpy as np


def sigmoid(v):
    return np.exp(-np.logaddexp(0.0, -v))


def silu(v):
    return v * sigmoid(v)


def dsilu(v):
    """The slope of silu."""
    return sigmoid(v) * (1 + v * sigmoid(-v))


def softplus(v):
    return np.logaddexp(0.0, v)


def discretise(dt, dt_bias=None, dt_softplus=False, dt_limit=None):
    """The step of a token from its raw value: bias, softplus, limit, in this order."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    if dt_limit is not None:
        dt = np.clip(dt, *dt_limit)
    return dt


def discretise_backward(dt, dstep, dt_bias=None, dt_softplus=False, dt_limit=None):
    """The gradient of the raw value, and of the bias before it is summed: none where the limit holds the step."""
    if dt_bias is not None:
        dt = dt + dt_bias
    step = softplus(dt) if dt_softplus else dt
    ddt = dstep * sigmoid(dt) if dt_softplus else dstep
    if dt_limit is not None:
        ddt = np.where((step < dt_limit[0]) | (step > dt_limit[1]), 0.0, ddt)
    return ddt


def walks(batch, seqlen, cu_seqlens=None, reverse=False):
    """For every sequence: its batch row, and its tokens in the order in which the scan meets them."""
    if cu_seqlens is None:
        spans = [(row, 0, seqlen) for row in range(batch)]
    else:
        spans = [(0, int(first), int(last)) for first, last in zip(cu_seqlens[:-1], cu_seqlens[1:])]
    return [(row, range(first, last)[::-1] if reverse else range(first, last)) for row, first, last in spans]
