"""ssd_scan forward and backward on the CPU, beside torch's autograd: see training.py."""

from __future__ import annotations

import sys

from .bench_ssd_scan import BENCHMARK
from .training import Training, main

TRAINING = Training(
    benchmark=BENCHMARK,
    sizes={"batch": 1, "seqlen": 2048, "nheads": 24, "headdim": 64, "ngroups": 1, "dstate": 128},
    peers={f"torch, chunks of {chunk}": ("chunked_ssd", (chunk,)) for chunk in (64, 128, 256)},
    forms={"states kept": {"save_states": "chunk_states"}},
)

if __name__ == "__main__":
    sys.exit(main(TRAINING, __spec__.name))
