"""gated_rms_norm: the norm that ends a Mamba-2 block, over 2048 tokens."""

from __future__ import annotations

import numpy as np

from . import exact
from .harness import Benchmark, Case, Cost, Expected


def _inputs(s, rng):
    shape = (s["rows"], s["dim"])
    return {
        "x": rng.standard_normal(shape, np.float32),
        "z": rng.standard_normal(shape, np.float32),
        "weight": rng.standard_normal(s["dim"], np.float32),
    }


def _expected(a, s):
    rows = np.unique(np.linspace(0, s["rows"] - 1, 64).astype(int))
    return [Expected("y", lambda v: v[rows], exact.gated_norm(a["x"][rows], a["z"][rows], a["weight"]))]


BENCHMARK = Benchmark(
    op="gated_rms_norm",
    cases=(
        Case("mamba2-130m 2048 rows", {"rows": 2048, "dim": 1536}),
        Case("mamba2-2.7b 2048 rows", {"rows": 2048, "dim": 5120}),
        Case("mamba2-2.7b 16384 rows", {"rows": 16384, "dim": 5120}, devices=("cuda",)),
        Case("mamba2-130m 128 rows", {"rows": 128, "dim": 1536}, quick=True),
    ),
    inputs=_inputs,
    arguments=lambda a: ((a["x"], a["z"], a["weight"]), {}),
    cost=lambda s, e: Cost(3 * e * s["rows"] * s["dim"], 9 * s["rows"] * s["dim"]),  # SiLU counted as four
    expected=_expected,
    wide=frozenset({"weight"}),
)
