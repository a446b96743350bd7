"""The command ``statescan tasks``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from typing import Any

TASKS = ("selective_copying", "mqar")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", nargs="+", choices=TASKS, metavar="TASK", help=f"only these: {', '.join(TASKS)}")
    parser.add_argument("--steps", type=_positive, default=1000, metavar="N", help="of training (default: 1000)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, metavar="RATE", help="the highest (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of data and initial values (default: 0)")
    parser.add_argument("--device", default="cpu", help="a torch device (default: cpu)")
    parser.add_argument("--json", metavar="FILE", help="write the curves")
    parser.add_argument("--plot", metavar="FILE.png", help="draw accuracy over steps (needs matplotlib)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def main(args: argparse.Namespace) -> int:
    """Run what :func:`add_arguments` parsed. Returns 0; 2 when something needed is missing."""
    needed = {"torch": "torch"} | ({"matplotlib": "'statescan[plot]'"} if args.plot else {})
    for package, install in needed.items():
        if importlib.util.find_spec(package) is None:
            print(f"statescan tasks: {package} is not installed: pip install {install}", file=sys.stderr)
            return 2
    runs = _train(args)
    print(_table(runs))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(runs, file, indent=1)
            file.write("\n")
    if args.plot:
        _plot(runs, args.plot)
    return 0


def _train(args: argparse.Namespace) -> list[dict[str, Any]]:
    import torch
    from tqdm import tqdm

    from . import training

    settings = training.Settings(steps=args.steps, learning_rate=args.learning_rate, seed=args.seed)
    runs = []
    for name in args.task or TASKS:
        task = importlib.import_module(f".{name}", __package__)
        for model in training.MODELS:
            with tqdm(total=settings.steps, desc=f"{name}, {model}", disable=None) as bar:

                def progress(loss: float, accuracy: float, bar: Any = bar) -> None:
                    bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
                    bar.update()

                runs.append(training.train(model, task, settings, torch.device(args.device), progress))
    return runs


def _table(runs: list[dict[str, Any]]) -> str:
    from tabulate import tabulate

    rows = [
        (run["task"], run["model"], run["parameters"], run["curve"][-1]["step"], f"{run['curve'][-1]['loss']:.3f}",
         f"{run['curve'][-1]['accuracy']:.1%}", f"{run['seconds']:.1f}")
        for run in runs
    ]  # fmt: skip
    headers = ("task", "model", "parameters", "steps", "loss", "accuracy", "seconds")
    return tabulate(rows, headers=headers, tablefmt="github", intfmt=",", disable_numparse=[4, 5, 6])


def _plot(runs: list[dict[str, Any]], path: str) -> None:
    """A panel a task: accuracy on unseen sequences over steps, a line a model. Needs matplotlib."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run["task"] for run in runs))
    figure = Figure(figsize=(5.5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for run in runs:
            if run["task"] == name:
                steps = [point["step"] for point in run["curve"]]
                accuracies = [100 * point["accuracy"] for point in run["curve"]]
                axes.plot(steps, accuracies, marker=".", label=f"{run['model']}, {run['parameters'] / 1000:.0f} K parameters")
        axes.set_title(importlib.import_module(f".{name}", __package__).TITLE)
        axes.set_xlabel("steps of training")
        axes.set_ylabel("accuracy on unseen sequences, %")
        axes.set_ylim(0, 102)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
