"""A training step of Mamba-2 language models: statescan.nn, beside the same model with mamba-ssm's ops in the place of ours.

``python -m statescan.bench.bench_training_step`` trains each model with either, one after the other in one process, from the same
weights, on the same bytes of the Python standard library and, on a GPU, under bfloat16 autocast. It prints milliseconds and tokens a
second, the peak of the allocated memory, the first step's seconds, and how far the two's losses are apart. ``--json`` keeps every
loss, ``--plot`` draws them, ``--profile`` prints the kernels that the step's time goes to. The model "demo" is that of
`statescan demo`, on its own training script: states carried from window to window, dropout, and the optimiser of its weights.

Needs torch; the peer needs mamba-ssm and a GPU (mamba_ssm_block.py says what it runs).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import mamba_ssm_block

OURS, PEER = "statescan", "mamba-ssm"
MODELS: dict[str, dict[str, int]] = {
    "130M": {"d_model": 768, "n_layer": 24, "vocab": 50277},
    "780M": {"d_model": 1536, "n_layer": 48, "vocab": 50277},
    "tiny": {"d_model": 64, "n_layer": 2, "vocab": 256},
    "demo": {},
}
SKIPPED = 3  # steps that are not timed: compilation, autotuning, the allocator's first blocks
SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

Step = Callable[[], Any]  # trains on the next batch; the loss, on the device


# ---- what is trained -------------------------------------------------------------------------------------------------
def _batches(batch: int, seqlen: int, device: str) -> Iterator[Any]:
    """[batch, seqlen + 1] int64, the same for both."""
    import numpy as np
    import torch

    from ..demo import corpus

    train, _ = corpus.split()
    text = np.frombuffer(b"".join(corpus.load_bytes(train)), np.uint8)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(text) - seqlen - 1, batch)
        tokens = torch.from_numpy(np.stack([text[i : i + seqlen + 1] for i in starts]))
        # As loaders do: a copy from pageable memory would have the host wait for the step before.
        yield (tokens.pin_memory() if device == "cuda" else tokens).to(device, non_blocking=True).long()


def _language_model(sizes: Mapping[str, int], batch: int, seqlen: int, device: str) -> Step:
    import torch
    import torch.nn.functional as F

    from ..nn import CausalLM, CausalLMConfig

    torch.manual_seed(0)
    with torch.device(device):
        model = CausalLM(CausalLMConfig(sizes["d_model"], sizes["n_layer"], sizes["vocab"], ssm_cfg={"layer": "Mamba2"}))
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=3e-4, betas=(0.9, 0.95), fused=True)
    batches = _batches(batch, seqlen, device)

    def step() -> Any:
        tokens = next(batches)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _demo(steps: int, device: str) -> tuple[Step, int]:
    """The run that the weights in the package came from, cut short, and the tokens of its step."""
    import torch
    from safetensors import safe_open

    from ..demo import corpus, train
    from ..demo.model import WEIGHTS

    with safe_open(WEIGHTS, framework="pt") as file:
        shipped = {key: json.loads(file.metadata()[key]) for key in ("config", "settings")}
    settings = train.Settings(**shipped["settings"] | {"steps": steps})
    documents = corpus.load_bytes(corpus.split()[0])
    trainer = train.Trainer(train.Config(**shipped["config"]), settings, documents, torch.device(device))
    return trainer.train_step, settings.rows * settings.window


# ---- measuring -------------------------------------------------------------------------------------------------------
class _Clock:
    """Marks the ends of steps: on a GPU by events, so that nothing waits for a step's end."""

    def __init__(self, device: str) -> None:
        import torch

        self.cuda = torch.cuda if device == "cuda" else None
        self.marks: list[Any] = []

    def synchronise(self) -> None:
        if self.cuda:
            self.cuda.synchronize()

    def mark(self) -> None:
        if self.cuda:
            event = self.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between neighbouring marks."""
        self.synchronise()
        if self.cuda:
            return [one.elapsed_time(other) / 1e3 for one, other in zip(self.marks, self.marks[1:])]
        return [other - one for one, other in zip(self.marks, self.marks[1:])]


def _measure(name: str, implementation: str, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from tqdm import tqdm

    count, tokens = SKIPPED + args.steps, args.batch * args.seqlen
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with mamba_ssm_block.in_place_of_ours() if implementation == PEER else contextlib.nullcontext():
        if name == "demo":
            step, tokens = _demo(count, args.device)
        else:
            step = _language_model(MODELS[name], args.batch, args.seqlen, args.device)
        clock, losses = _Clock(args.device), []
        clock.synchronise()
        start = time.perf_counter()
        for i in tqdm(range(count), desc=f"{name}, {implementation}", disable=None):
            losses.append(step())
            clock.mark()
            if i == 0:
                clock.synchronise()
                first = time.perf_counter() - start
        median = statistics.median(clock.seconds()[SKIPPED - 1 :])
        if args.profile and args.device == "cuda":
            print(f"\n{name}, {implementation}: kernels of a step\n\n{_profile(step)}\n", flush=True)
    return {
        "model": name,
        "implementation": implementation,
        "first_s": first,
        "median_s": median,
        "tokens_per_s": tokens / median,
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device == "cuda" else None,
        "losses": [loss.item() for loss in losses],
    }


def _profile(step: Step, steps: int = 2, shown: int = 40) -> str:
    """The kernels of a step by the time they take on the GPU."""
    import torch
    from tabulate import tabulate
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    rows = [
        (event.key[:100], event.count // steps, event.self_device_time_total / steps / 1e3, event.self_device_time_total / total)
        for event in events[:shown]
    ]
    rows.append(("all", sum(event.count for event in events) // steps, total / steps / 1e3, 1.0))
    headers = ("kernel", "launches", "ms", "share")
    return tabulate(rows, headers=headers, tablefmt="github", floatfmt=("", "", ".3f", ".1%"))


# ---- what is shown ---------------------------------------------------------------------------------------------------
def _table(runs: list[dict[str, Any]]) -> str:
    from tabulate import tabulate

    ours = {run["model"]: run for run in runs if run["implementation"] == OURS}
    rows = []
    for run in runs:
        beside = ours[run["model"]]
        apart = max(abs(one - other) / other for one, other in zip(run["losses"], beside["losses"]))
        rows.append((
            run["model"], run["implementation"], f"{run['median_s'] * 1e3:.1f}", f"{run['tokens_per_s']:,.0f}",
            f"{run['median_s'] / beside['median_s']:.2f}", f"{run['peak_bytes'] / 2**30:.2f}" if run["peak_bytes"] else "",
            f"{run['first_s']:.2f}", f"{run['losses'][-1]:.4f}", "" if run is beside else f"{apart:.1e}",
        ))  # fmt: skip
    headers = ("model", "trained with", "ms", "tokens/s", "times ours", "peak GiB", "first step, s", "last loss", "losses apart")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _losses(runs: list[dict[str, Any]]) -> str:
    """Step for step, a column a run."""
    from tabulate import tabulate

    steps = [step for step in SHOWN if step <= len(runs[0]["losses"])]
    rows = [(step, *(f"{run['losses'][step - 1]:.4f}" for run in runs)) for step in steps]
    headers = ("loss at step", *(f"{run['model']}, {run['implementation']}" for run in runs))
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _plot(runs: list[dict[str, Any]], path: str) -> None:
    """A panel a model: the loss over steps, ours below the peer's dashes. Needs matplotlib."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run["model"] for run in runs))
    figure = Figure(figsize=(5.5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for run in runs:
            if run["model"] == name:
                style = {"linewidth": 3, "alpha": 0.5} if run["implementation"] == OURS else {"linestyle": "--"}
                label = f"{run['implementation']}, {run['tokens_per_s'] / 1e3:,.0f} K tokens/s"
                axes.plot(range(1, len(run["losses"]) + 1), run["losses"], label=label, **style)
        axes.set(title=f"Mamba-2, {name}", xlabel="steps of training", ylabel="loss, nats a byte")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m statescan.bench.bench_training_step", description=__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["130M"], help="default: 130M")
    parser.add_argument("--batch", type=int, default=8, help="default %(default)s; the demo's script has its own")
    parser.add_argument("--seqlen", type=int, default=2048, help="default %(default)s; likewise")
    parser.add_argument("--steps", type=int, default=30, help=f"default %(default)s, after {SKIPPED} that are not timed")
    parser.add_argument("--alone", action="store_true", help="leave mamba-ssm out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", metavar="FILE", help="write what was measured, every loss among it")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the losses (needs matplotlib)")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of a step")
    args = parser.parse_args(arguments)

    import torch

    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    implementations = [OURS] if args.alone or not mamba_ssm_block.installed() else [OURS, PEER]
    report: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "batch": args.batch, "seqlen": args.seqlen,
        "convolution of mamba-ssm's block": mamba_ssm_block.convolution(), "runs": [],
    }  # fmt: skip
    runs = report["runs"]
    for name in args.model:
        for implementation in implementations:
            runs.append(_measure(name, implementation, args))
            gc.collect()  # of the model, before the next one's
            if args.device == "cuda":
                torch.cuda.empty_cache()
            if args.json:
                with open(args.json, "w", encoding="utf-8") as file:
                    json.dump(report, file, indent=1)
    print(", ".join(f"{key}: {value}" for key, value in report.items() if key != "runs"))
    print(f"\n{_table(runs)}\n\n{_losses(runs)}")
    if args.plot:
        _plot(runs, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
