"""The standard shapes: the layers of published models, by the names that the tables use."""

from __future__ import annotations

from .harness import Case

MAMBA1 = {"mamba-130m": {"dim": 1536, "dstate": 16}, "mamba-2.8b": {"dim": 5120, "dstate": 16}}
MAMBA2 = {
    "mamba2-130m": {"nheads": 24, "headdim": 64, "dstate": 128},
    "mamba2-2.7b": {"nheads": 80, "headdim": 64, "dstate": 128},
}


def prefill(models: dict[str, dict[str, int]], **more: int) -> tuple[Case, ...]:
    """One sequence of 2048 tokens through each model; on a GPU a batch of 8 as well."""
    cases = []
    for name, sizes in models.items():
        cases.append(Case(f"{name} b1 l2048", {"batch": 1, "seqlen": 2048, **sizes, **more}))
        cases.append(Case(f"{name} b8 l2048", {"batch": 8, "seqlen": 2048, **sizes, **more}, devices=("cuda",)))
    name, sizes = next(iter(models.items()))
    cases.append(Case(f"{name} b1 l128", {"batch": 1, "seqlen": 128, **sizes, **more}, quick=True))
    return tuple(cases)


def decode(models: dict[str, dict[str, int]], **more: int) -> tuple[Case, ...]:
    """One token for 1 and for 64 sequences."""
    cases = []
    for name, sizes in models.items():
        cases += [Case(f"{name} b{batch}", {"batch": batch, **sizes, **more}) for batch in (1, 64)]
    name, sizes = next(iter(models.items()))
    cases.append(Case(f"{name} b2", {"batch": 2, **sizes, **more}, quick=True))
    return tuple(cases)
