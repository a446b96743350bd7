"""ssd_scan_backward: every gradient of the Mamba-2 scan, from its inputs and dy."""

from __future__ import annotations

import dataclasses

import numpy as np

from . import bench_ssd_scan as forward
from . import exact
from .harness import Cost, Expected


def _inputs(s, rng):
    a = forward._inputs(s, rng)
    return a | {"dy": rng.standard_normal(a["x"].shape, np.float32)}


def _expected(a, s):
    """dx of a few channels: the scan of dy from the last token to the first, with B and C exchanged."""
    rng = np.random.default_rng(0)
    b, h, p = (rng.integers(0, s[k], 16) for k in ("batch", "nheads", "headdim"))
    group = h // (s["nheads"] // s["ngroups"])
    dy = a["dy"][b, :, h, p].T
    dt = exact.softplus(a["dt"][b, :, h].T + a["dt_bias"][h])
    B, C = (np.swapaxes(a[k][b, :, group], 0, 1) for k in "BC")
    through, adjoint = np.empty_like(dy), np.zeros(B.shape[1:])
    for t in reversed(range(len(dy))):
        adjoint += dy[t][:, None] * C[t]
        through[t] = np.einsum("kn,kn->k", B[t], adjoint)
        adjoint *= np.exp(dt[t] * a["A"][h])[:, None]
    return [Expected("dx", lambda v: v[b, :, h, p].T, dt * through + a["D"][h] * dy)]


def _cost(s, e):
    b, l, h, p, n, g = (s[k] for k in ("batch", "seqlen", "nheads", "headdim", "dstate", "ngroups"))
    chunk = min(forward.CHUNK, l)
    # x and dy read, dx written; dt, B and C read, their gradients written.
    moved = e * b * l * (3 * h * p + 2 * h + 4 * g * n)
    # States and adjoints, and what each gives to two gradients; in a chunk C B^T, the weights into dB and dC, g x^T, scores g.
    return Cost(moved, b * l * (10 * n * p * h + chunk * (3 * n * g + 2 * p * h)))


BENCHMARK = dataclasses.replace(
    forward.BENCHMARK,
    op="ssd_scan_backward",
    inputs=_inputs,
    arguments=lambda a: (
        (a["x"], a["dt"], a["A"], a["B"], a["C"], a["dy"]),
        {"D": a["D"], "dt_bias": a["dt_bias"], "dt_softplus": True},
    ),
    cost=_cost,
    expected=_expected,
    outputs=("dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dinitial_state"),
    takes_outputs=False,
)
