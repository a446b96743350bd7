"""ssd_scan: the Mamba-2 scan, as in a block without its gate."""

from __future__ import annotations

import numpy as np

from . import exact
from .harness import Benchmark, Case, Cost, Expected
from .shapes import MAMBA2, prefill

CHUNK = 64  # tokens of a chunk in the count of operations: what the CPU kernel takes


def _inputs(s, rng):
    b, l, h, p, n, g = (s[k] for k in ("batch", "seqlen", "nheads", "headdim", "dstate", "ngroups"))
    return {
        "x": rng.standard_normal((b, l, h, p), np.float32),
        "dt": rng.standard_normal((b, l, h), np.float32),
        "A": -np.exp(rng.random(h, np.float32) * 2.7),  # as Mamba-2 starts: uniform in 1..16
        "B": rng.standard_normal((b, l, g, n), np.float32),
        "C": rng.standard_normal((b, l, g, n), np.float32),
        "D": np.ones(h, np.float32),
        "dt_bias": rng.standard_normal(h, np.float32) - 4,
    }


def _arguments(a):
    keywords = {"D": a["D"], "dt_bias": a["dt_bias"], "dt_softplus": True, "return_final_state": True}
    return (a["x"], a["dt"], a["A"], a["B"], a["C"]), keywords


def _expected(a, s):
    rng = np.random.default_rng(0)
    b, h, p = (rng.integers(0, s[k], 16) for k in ("batch", "nheads", "headdim"))
    group = h // (s["nheads"] // s["ngroups"])
    x = a["x"][b, :, h, p].T
    dt = exact.softplus(a["dt"][b, :, h].T + a["dt_bias"][h])
    B, C = (np.swapaxes(a[k][b, :, group], 0, 1) for k in "BC")
    y, state = exact.scan(x, dt, a["A"][h][:, None], B, C)
    return [
        Expected("y", lambda v: v[b, :, h, p].T, y + a["D"][h] * x),
        Expected("final_state", lambda v: v[b, h, p], state),
    ]


def _cost(s, e):
    b, l, h, p, n, g = (s[k] for k in ("batch", "seqlen", "nheads", "headdim", "dstate", "ngroups"))
    chunk = min(CHUNK, l)
    moved = e * b * l * (2 * h * p + h + 2 * g * n) + 4 * b * h * p * n
    # The recurrence, and inside a chunk the lower triangles of C B^T (once a group) and of its product with x.
    return Cost(moved, b * l * (4 * n * p * h + chunk * (n * g + p * h)))


# Long sequences, many short ones, few heads, many heads, several groups: what fills a GPU in different ways.
_GPU = {
    "b1 l16384 h80": {"batch": 1, "seqlen": 16384, "nheads": 80},
    "b1 l8192 h8": {"batch": 1, "seqlen": 8192, "nheads": 8},
    "b1 l8192 h128": {"batch": 1, "seqlen": 8192, "nheads": 128},
    "b256 l128 h24": {"batch": 256, "seqlen": 128, "nheads": 24},
    "b8 l2048 h80 g8": {"batch": 8, "seqlen": 2048, "nheads": 80, "ngroups": 8},
}

BENCHMARK = Benchmark(
    op="ssd_scan",
    cases=prefill(MAMBA2, ngroups=1)
    + tuple(
        Case(name, {"headdim": 64, "dstate": 128, "ngroups": 1, **sizes}, devices=("cuda",)) for name, sizes in _GPU.items()
    ),
    inputs=_inputs,
    arguments=_arguments,
    cost=_cost,
    expected=_expected,
    outputs=("y", "final_state"),
    wide=frozenset({"A", "D", "dt_bias"}),
    updates=lambda s: s["batch"] * s["seqlen"] * s["nheads"] * s["headdim"] * s["dstate"],
)
