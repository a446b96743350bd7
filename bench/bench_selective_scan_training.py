"""selective_scan forward and backward on the CPU, beside torch's autograd: see training.py."""

from __future__ import annotations

import sys

from .bench_selective_scan import BENCHMARK
from .training import Training, main

TRAINING = Training(
    benchmark=BENCHMARK,
    sizes={"batch": 1, "seqlen": 2048, "dim": 1536, "dstate": 16},
    peers={
        "torch, the published loop": ("selective_scan_discretised", ()),
        "torch, a leaner loop": ("selective_scan_loop", ()),
    },
)

if __name__ == "__main__":
    sys.exit(main(TRAINING, __spec__.name))
