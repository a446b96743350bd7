"""The float64 recurrences that results are checked against, one token at a time, on rows that a benchmark samples.

They share nothing with the kernels and, unlike the tests' oracles, take flat rows: a row is one (batch, channel) of Mamba-1 or
one (batch, head, headdim) of Mamba-2.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def silu(v: np.ndarray) -> np.ndarray:
    return v * np.exp(-np.logaddexp(0.0, -v))


def softplus(v: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, v)


def scan(x, dt, A, B, C, state=None) -> tuple[np.ndarray, np.ndarray]:
    """h = exp(dt A) h + dt B x, y = C.h for k rows: x, dt [l,k]; A [k,n] or [k,1]; B, C [l,k,n]. Returns y [l,k], h [k,n]."""
    state = np.zeros(B.shape[1:]) if state is None else state.copy()
    y = np.empty_like(x)
    for t in range(len(x)):
        state *= np.exp(dt[t][:, None] * A)
        state += (dt[t] * x[t])[:, None] * B[t]
        y[t] = np.einsum("kn,kn->k", C[t], state)
    return y, state


def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
    """silu of the causal convolution of x [l,d] with weight [d,w], after the w-1 inputs of state [d,w-1]."""
    width = weight.shape[1]
    before = np.zeros((width - 1, x.shape[1])) if state is None else state.T
    window = np.concatenate([before, x])
    return silu(bias + sum(weight[:, k] * window[k : k + len(x)] for k in range(width)))


def gated_norm(x: np.ndarray, z: np.ndarray, weight: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """rms(x silu(z)) weight over the last axis."""
    v = x * silu(z)
    return v / np.sqrt(np.mean(v * v, axis=-1, keepdims=True) + eps) * weight


def mamba2_scanned(a: dict[str, np.ndarray], zxbcdt: np.ndarray, d: dict[str, int], conv_state: Any = None, state: Any = None):
    """A block up to its norm, on the tokens zxbcdt [l,m] of one sequence with one group: y [l,d_inner] and the state [h,p,n]."""
    heads, headdim, dstate = d["nheads"], d["headdim"], d["dstate"]
    inner = heads * headdim
    _, xbc, dt = np.split(zxbcdt, [inner, 2 * inner + 2 * dstate], axis=1)
    xbc = conv(xbc, a["conv_weight"], a["conv_bias"], conv_state)
    x, B, C = np.split(xbc, [inner, inner + dstate], axis=1)
    dt = softplus(dt + a["dt_bias"])
    rows = (len(x), inner, dstate)
    each = lambda v: np.repeat(v, headdim, axis=-1)
    y, state = scan(x, each(dt), each(a["A"])[:, None], np.broadcast_to(B[:, None], rows), np.broadcast_to(C[:, None], rows),
                    None if state is None else state.reshape(inner, dstate))  # fmt: skip
    return y + each(a["D"]) * x, state.reshape(heads, headdim, dstate)


def mamba2_block(a: dict[str, np.ndarray], zxbcdt: np.ndarray, d: dict[str, int], conv_state: Any = None, state: Any = None):
    """The whole block on the same: y [l,d_inner] and the state [h,p,n]."""
    y, state = mamba2_scanned(a, zxbcdt, d, conv_state, state)
    return gated_norm(y, zxbcdt[:, : y.shape[1]], a["norm_weight"]), state
