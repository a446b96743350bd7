"""Trains one small model on one task, and measures what it can do on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from statescan.nn import CausalLM, CausalLMConfig
from torch import Tensor

# The same width, depth and, by the size of the state, the same number of parameters within 1 in 100.
MODELS = {
    "Mamba": {"layer": "Mamba1", "d_state": 16},
    "Mamba-2": {"layer": "Mamba2", "d_state": 48, "headdim": 32},
}
EVALUATED = 512
"""Sequences that an accuracy is measured on."""


class Task(Protocol):
    """What a module of this folder offers."""

    NAME: str
    TITLE: str
    VOCAB_SIZE: int

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets; a target of -100 counts for nothing."""


@dataclass(frozen=True)
class Settings:
    """Of a run. Both models get the same batches."""

    steps: int = 1000
    rows: int = 32
    learning_rate: float = 1e-2  # Mamba learns to recall from 6e-3 on; at 3e-3 it stays at guessing among the sequence's values
    weight_decay: float = 0.01
    d_model: int = 64
    n_layer: int = 2
    evaluations: int = 20
    seed: int = 0


def build(model: str, task: Task, settings: Settings) -> CausalLM:
    """One of MODELS, with initial values of the seed."""
    torch.manual_seed(settings.seed)
    return CausalLM(
        CausalLMConfig(
            d_model=settings.d_model, n_layer=settings.n_layer, vocab_size=task.VOCAB_SIZE, ssm_cfg=dict(MODELS[model])
        )
    )


@torch.no_grad()
def accuracy(model: CausalLM, task: Task, seed: int, device: torch.device) -> float:
    """Of all targets, the share that has the highest logit, on sequences that training never saw."""
    inputs, targets = task.batch(EVALUATED, torch.Generator().manual_seed(seed))
    right = model(inputs.to(device)).argmax(dim=-1).cpu() == targets
    return right[targets >= 0].float().mean().item()


def train(
    name: str, task: Task, settings: Settings, device: torch.device, progress: Callable[[float, float], object]
) -> dict[str, Any]:
    """Trains a model; `progress` hears the loss of each step and the last accuracy.

    Returns:
        the model's name, parameters, seconds, and the curve: step, loss (the mean since the last point) and accuracy.
    """
    model = build(name, task, settings).to(device)
    optimizer = torch.optim.AdamW(model.parameter_groups(settings.weight_decay), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(settings.seed)
    interval = -(-settings.steps // settings.evaluations)
    curve: list[dict[str, float]] = []
    losses, seconds = [], 0.0
    for step in range(1, settings.steps + 1):
        inputs, targets = (tensor.to(device) for tensor in task.batch(settings.rows, generator))
        started = time.perf_counter()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds += time.perf_counter() - started
        if step % interval == 0 or step == settings.steps:
            right = accuracy(model, task, settings.seed + 1, device)
            curve.append({"step": step, "loss": sum(losses) / len(losses), "accuracy": right})
            losses = []
        progress(loss.item(), curve[-1]["accuracy"] if curve else 0.0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"task": task.NAME, "model": name, "parameters": parameters, "seconds": round(seconds, 2), "curve": curve}
