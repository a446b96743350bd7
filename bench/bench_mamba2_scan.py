"""mamba2_scan: a whole Mamba-2 block between its two projections."""

from __future__ import annotations

import numpy as np

from . import bench_ssd_scan, exact
from .harness import Benchmark, Cost, Expected
from .shapes import MAMBA2, prefill

WIDTH = 4
CHECKED_TOKENS = 96  # of the last sequence: the recurrence of a whole block in NumPy takes milliseconds a token


def parameters(s, rng):
    """What a block holds beside its projections; mamba2_update shares it."""
    heads, inner = s["nheads"], s["nheads"] * s["headdim"]
    conv_dim = inner + 2 * s["dstate"]
    return {
        "conv_weight": rng.standard_normal((conv_dim, WIDTH), np.float32) / 2,
        "conv_bias": rng.standard_normal(conv_dim, np.float32) / 4,
        "dt_bias": rng.standard_normal(heads, np.float32) - 4,
        "A": -1 - 15 * rng.random(heads, np.float32),
        "D": np.ones(heads, np.float32),
        "norm_weight": rng.standard_normal(inner, np.float32),
    }


PARAMETERS = frozenset({"conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight"})


def projected(s):
    """The width of in_proj's output."""
    return 2 * s["nheads"] * s["headdim"] + 2 * s["dstate"] + s["nheads"]


def _inputs(s, rng):
    return {"zxbcdt": rng.standard_normal((s["batch"], s["seqlen"], projected(s)), np.float32), **parameters(s, rng)}


def _arguments(a):
    return (a["zxbcdt"], a["conv_weight"], a["conv_bias"], a["dt_bias"], a["A"]), {"D": a["D"], "norm_weight": a["norm_weight"]}


def _expected(a, s):
    tokens = min(CHECKED_TOKENS, s["seqlen"])
    y, _ = exact.mamba2_block(a, a["zxbcdt"][-1, :tokens], s)
    return [Expected("y", lambda v: v[-1, :tokens], y)]


def _cost(s, e):
    tokens, inner = s["batch"] * s["seqlen"], s["nheads"] * s["headdim"]
    scan = bench_ssd_scan.BENCHMARK.cost({**s, "ngroups": 1}, e).flops
    conv = (2 * WIDTH + 4) * tokens * (inner + 2 * s["dstate"])
    return Cost(e * tokens * (projected(s) + inner), scan + conv + 9 * tokens * inner)


BENCHMARK = Benchmark(
    op="mamba2_scan",
    cases=prefill(MAMBA2),
    inputs=_inputs,
    arguments=_arguments,
    cost=_cost,
    expected=_expected,
    wide=PARAMETERS,
    stored=1.6,  # xBC, and y before the norm
    updates=lambda s: s["batch"] * s["seqlen"] * s["nheads"] * s["headdim"] * s["dstate"],
)
