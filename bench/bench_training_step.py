"""A training step of a Mamba-2 language model on a GPU: statescan.nn, beside the same model with mamba-ssm's op in its place.

``python -m statescan.bench.bench_training_step`` trains each in a process of its own on the bytes of the Python standard library,
from the same weights and under bfloat16 autocast, and prints milliseconds and tokens a second, the peak of the allocated memory,
the time of the first step, and how far the losses of the two are apart. ``--json`` keeps the losses. Needs torch and a GPU; the
peer needs mamba-ssm and causal-conv1d.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

OURS, PEER = "statescan", "mamba-ssm"
SIZES = {"d_model": 768, "layers": 24, "vocab": 50277, "batch": 8, "seqlen": 2048, "steps": 30}
SKIPPED = 3  # steps that are not timed: compilation, autotuning, the allocator's first blocks


def _mamba_ssm(zxbcdt: Any, conv_weight: Any, conv_bias: Any, dt_bias: Any, A: Any, **options: Any) -> Any:
    """statescan.torch.mamba2_scan as statescan.nn calls it in training, by mamba-ssm."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    nheads, D = A.shape[0], options["D"]
    headdim = (zxbcdt.shape[2] - conv_weight.shape[0] - nheads) // nheads
    return mamba_split_conv1d_scan_combined(
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, 256, rmsnorm_weight=options["norm_weight"], rmsnorm_eps=options["eps"],
        headdim=headdim, ngroups=options["ngroups"], norm_before_gate=options["norm_before_gate"],
    )  # fmt: skip


def _batches(batch: int, seqlen: int) -> Iterator[Any]:
    """[batch, seqlen + 1] int64 on the GPU, the same for every process."""
    import numpy as np
    import torch

    from ..demo import corpus

    train, _ = corpus.split()
    text = np.frombuffer(b"".join(corpus.load_bytes(train)), np.uint8)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(text) - seqlen - 1, batch)
        yield torch.from_numpy(np.stack([text[i : i + seqlen + 1] for i in starts])).cuda().long()


def _step(sizes: dict[str, int]) -> Callable[[], Any]:
    import torch
    import torch.nn.functional as F

    from ..nn import CausalLM, CausalLMConfig

    torch.manual_seed(0)
    with torch.device("cuda"):
        config = CausalLMConfig(sizes["d_model"], sizes["layers"], sizes["vocab"], ssm_cfg={"layer": "Mamba2"})
        model = CausalLM(config)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=3e-4, betas=(0.9, 0.95), fused=True)
    batches = _batches(sizes["batch"], sizes["seqlen"])

    def step() -> Any:
        tokens = next(batches)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _measure(implementation: str, sizes: dict[str, int]) -> dict[str, Any]:
    """In a process of its own."""
    import torch

    if implementation == PEER:
        from ..nn import mamba2

        mamba2.mamba2_scan = _mamba_ssm
    step = _step(sizes)
    losses, times = [], []
    for _ in range(SKIPPED + sizes["steps"]):
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "first_s": times[0],
        "median_s": statistics.median(times[SKIPPED:]),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "losses": [loss.item() for loss in losses],
        "device": torch.cuda.get_device_name(),
    }


def _in_a_process(implementation: str, sizes: dict[str, int]) -> dict[str, Any]:
    arguments = [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items()]
    command = [sys.executable, "-m", __spec__.name, "--one", implementation, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    from tabulate import tabulate

    parser = argparse.ArgumentParser(prog="python -m statescan.bench.bench_training_step", description=__doc__)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help="default %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write what was measured, every loss among it")
    parser.add_argument("--one", choices=(OURS, PEER), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in SIZES}
    if args.one:
        print(json.dumps(_measure(args.one, sizes)))
        return

    found = {OURS: _in_a_process(OURS, sizes)}
    if importlib.util.find_spec("mamba_ssm") and importlib.util.find_spec("causal_conv1d"):
        found[PEER] = _in_a_process(PEER, sizes)
    rows = []
    for name, row in found.items():
        apart = max(abs(one - other) / other for one, other in zip(row["losses"], found[OURS]["losses"]))
        rate = sizes["batch"] * sizes["seqlen"] / row["median_s"]
        rows.append((
            name, f"{row['median_s'] * 1e3:.1f}", f"{rate:,.0f}", f"{row['peak_bytes'] / 2**30:.2f}", f"{row['first_s']:.2f}",
            f"{row['losses'][-1]:.3f}", "" if name == OURS else f"{apart:.1e}",
        ))  # fmt: skip
    print(f"{sizes}; {found[OURS]['device']}")
    headers = ("training step", "ms", "tokens/s", "peak GiB", "first step, s", "last loss", "apart from us")
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"sizes": sizes, **found}, file, indent=1)


if __name__ == "__main__":
    main()
