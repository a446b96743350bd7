"""Checkpoints on disk and on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import CausalLMConfig

CONFIG = "config.json"
# In the order in which they are looked for; of a checkpoint in shards there is <name>.index.json.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def find(name_or_path: str | Path, revision: str | None) -> Path:
    """The folder of a checkpoint; a name that is no folder is fetched from the hub."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"from_pretrained: {name_or_path} is no folder, and fetching it by name needs huggingface_hub: "
            "pip install 'statescan[hub]'"
        ) from error
    folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=[CONFIG, "model*.safetensors*"]))
    if not list(folder.glob("model*.safetensors")):
        folder = Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=[CONFIG, "pytorch_model*.bin*"]))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads(_existing(folder, (CONFIG,)).read_text(encoding="utf-8"))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint, on the CPU, under the names of CausalLM."""
    found = _existing(folder, [file for name in WEIGHTS for file in (name, f"{name}.index.json")])
    files = [found]
    if found.suffix == ".json":
        shards = json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()
        files = [_existing(folder, (shard,)) for shard in sorted(set(shards))]
    return {_renamed(name): tensor for file in files for name, tensor in _tensors(file)}


def write(folder: Path, config: CausalLMConfig, weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    if config.tie_embeddings:
        weights = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS[0], metadata={"format": "pt"})


def _existing(folder: Path, names: tuple[str, ...] | list[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"from_pretrained: {folder} has none of {', '.join(names)}")


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        yield from load_file(file).items()
    else:
        yield from torch.load(file, map_location="cpu", weights_only=True).items()


def _renamed(name: str) -> str:
    """Hugging Face's models call the embedding otherwise, and nothing else."""
    return name.replace("backbone.embeddings.", "backbone.embedding.")
