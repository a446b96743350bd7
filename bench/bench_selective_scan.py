"""selective_scan: the Mamba-1 scan with its gate, as in a Mamba-1 block."""

from __future__ import annotations

import numpy as np

from . import exact
from .harness import Benchmark, Cost, Expected
from .shapes import MAMBA1, prefill


def _inputs(s, rng):
    b, l, d, n = (s[k] for k in ("batch", "seqlen", "dim", "dstate"))
    return {
        "x": rng.standard_normal((b, l, d), np.float32),
        "dt": rng.standard_normal((b, l, d), np.float32),
        "A": -np.tile(np.arange(1, n + 1, dtype=np.float32), (d, 1)),  # as Mamba-1 starts
        "B": rng.standard_normal((b, l, 1, n), np.float32),
        "C": rng.standard_normal((b, l, 1, n), np.float32),
        "D": np.ones(d, np.float32),
        "z": rng.standard_normal((b, l, d), np.float32),
        "dt_bias": rng.standard_normal(d, np.float32) - 4,
    }


def _arguments(a):
    keywords = {"D": a["D"], "z": a["z"], "dt_bias": a["dt_bias"], "dt_softplus": True, "return_final_state": True}
    return (a["x"], a["dt"], a["A"], a["B"], a["C"]), keywords


def _expected(a, s):
    rng = np.random.default_rng(0)
    b, d = rng.integers(0, s["batch"], 32), rng.integers(0, s["dim"], 32)
    x = a["x"][b, :, d].T
    dt = exact.softplus(a["dt"][b, :, d].T + a["dt_bias"][d])
    B, C = (np.swapaxes(a[k][b, :, 0], 0, 1) for k in "BC")
    y, state = exact.scan(x, dt, a["A"][d], B, C)
    y = (y + a["D"][d] * x) * exact.silu(a["z"][b, :, d].T)
    return [Expected("y", lambda v: v[b, :, d].T, y), Expected("final_state", lambda v: v[b, d], state)]


def _cost(s, e):
    b, l, d, n = (s[k] for k in ("batch", "seqlen", "dim", "dstate"))
    # A state takes dt A, its exp (counted as one), h decay + dtx B, and C h: seven operations with the two additions.
    return Cost(e * b * l * (4 * d + 2 * n) + 4 * d * n * (1 + b), 7 * b * l * d * n)


BENCHMARK = Benchmark(
    op="selective_scan",
    cases=prefill(MAMBA1),
    inputs=_inputs,
    arguments=_arguments,
    cost=_cost,
    expected=_expected,
    outputs=("y", "final_state"),
    wide=frozenset({"A", "D", "dt_bias"}),
    updates=lambda s: s["batch"] * s["seqlen"] * s["dim"] * s["dstate"],
)
