"""The demo's byte-level Mamba-2 language model on statescan's ops and NumPy: a parallel scan to read, single steps to write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

import statescan

from .config import Config

WEIGHTS = Path(__file__).with_name("model.safetensors")


@dataclasses.dataclass
class Layer:
    """The float32 weights of one block, matrices as [inputs, outputs]."""

    norm: np.ndarray
    in_proj: np.ndarray
    conv_weight: np.ndarray
    conv_bias: np.ndarray
    dt_bias: np.ndarray
    A: np.ndarray
    D: np.ndarray
    gate_norm: np.ndarray
    out_proj: np.ndarray


@dataclasses.dataclass
class State:
    """What one layer carries from token to token: [1, conv_dim, width - 1] and [1, nheads, headdim, dstate]."""

    conv: np.ndarray
    ssm: np.ndarray


class LanguageModel:
    """Pre-norm residual blocks of Mamba-2 mixers over bytes, input and output embedding tied.

    Args:
        path: a safetensors file that statescan.demo.train wrote.
    """

    def __init__(self, path: Path = WEIGHTS) -> None:
        with safe_open(path, framework="numpy") as file:
            self.metadata: dict[str, Any] = {key: _parsed(value) for key, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        self.config = Config(**self.metadata["config"])
        self.embedding = _dequantised(tensors, "backbone.embedding.weight")
        self.norm_f = _dequantised(tensors, "backbone.norm_f.weight")
        self.layers = [self._layer(tensors, f"backbone.layers.{i}.") for i in range(self.config.n_layer)]
        self.parameters = sum(tensor.size for name, tensor in tensors.items() if not name.endswith("_scale"))

    @staticmethod
    def _layer(tensors: dict[str, np.ndarray], prefix: str) -> Layer:
        def get(name: str) -> np.ndarray:
            return _dequantised(tensors, prefix + name)

        return Layer(
            norm=get("norm.weight"),
            in_proj=np.ascontiguousarray(get("mixer.in_proj.weight").T),
            conv_weight=get("mixer.conv1d.weight")[:, 0],
            conv_bias=get("mixer.conv1d.bias"),
            dt_bias=get("mixer.dt_bias"),
            A=-np.exp(get("mixer.A_log")),
            D=get("mixer.D"),
            gate_norm=get("mixer.norm.weight"),
            out_proj=np.ascontiguousarray(get("mixer.out_proj.weight").T),
        )

    def initial_states(self) -> list[State]:
        """The states before the first token: zero."""
        c = self.config
        return [
            State(
                np.zeros((1, c.conv_dim, c.conv_width - 1), np.float32),
                np.zeros((1, c.nheads, c.headdim, c.dstate), np.float32),
            )
            for _ in self.layers
        ]

    def read(
        self, tokens: np.ndarray, states: Sequence[State], progress: Callable[[int], object] = lambda layers: None
    ) -> tuple[np.ndarray, list[State]]:
        """All tokens in one parallel scan a layer.

        Args:
            tokens: [seqlen] bytes.
            states: of the layers before the first token.
            progress: called with 1 after each layer.

        Returns:
            (hidden, states): [seqlen, d_model] after the last norm, and the states after the last token.
        """
        hidden = self.embedding[tokens]
        after = []
        for layer, state in zip(self.layers, states):
            zxbcdt = statescan.gated_rms_norm(hidden, weight=layer.norm, eps=self.config.eps) @ layer.in_proj
            y, conv, ssm = statescan.mamba2_scan(
                zxbcdt[None],
                layer.conv_weight,
                layer.conv_bias,
                layer.dt_bias,
                layer.A,
                D=layer.D,
                norm_weight=layer.gate_norm,
                ngroups=self.config.ngroups,
                eps=self.config.eps,
                initial_conv_state=state.conv,
                initial_state=state.ssm,
                return_final_states=True,
            )
            hidden = hidden + y[0] @ layer.out_proj
            after.append(State(conv, ssm))
            progress(1)
        return statescan.gated_rms_norm(hidden, weight=self.norm_f, eps=self.config.eps), after

    def step(self, token: int, states: Sequence[State]) -> np.ndarray:
        """One token through the decode ops; the states are updated in place. Returns hidden [d_model] after the last norm."""
        hidden = self.embedding[token][None]
        for layer, state in zip(self.layers, states):
            zxbcdt = statescan.gated_rms_norm(hidden, weight=layer.norm, eps=self.config.eps) @ layer.in_proj
            y = statescan.mamba2_update(
                zxbcdt,
                state.conv,
                state.ssm,
                layer.conv_weight,
                layer.conv_bias,
                layer.dt_bias,
                layer.A,
                D=layer.D,
                norm_weight=layer.gate_norm,
                ngroups=self.config.ngroups,
                eps=self.config.eps,
            )
            hidden = hidden + y @ layer.out_proj
        return statescan.gated_rms_norm(hidden, weight=self.norm_f, eps=self.config.eps)[0]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """[..., d_model] -> [..., vocab_size]."""
        return hidden @ self.embedding.T


def bits(logits: np.ndarray, targets: np.ndarray) -> float:
    """The code length of targets [l] under logits [l, vocab_size]: the sum of -log2 softmax(logits)[target]."""
    logits = logits.astype(np.float64)
    peak = logits.max(axis=-1)
    normaliser = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=-1))
    return float((normaliser - logits[np.arange(len(targets)), targets]).sum() / np.log(2.0))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _dequantised(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The float32 values of a weight; an int8 one has a float16 scale a row beside it."""
    weight = tensors[name].astype(np.float32)
    scale = tensors.get(f"{name}_scale")
    return weight if scale is None else weight * scale.astype(np.float32)[:, None]
