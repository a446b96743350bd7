"""Trains the demo's byte-level Mamba-2 language model and writes it as an int8 safetensors file.

    python -m statescan.demo.train --minutes 5 --output model.safetensors
    python -m statescan.demo.train --evaluate model.safetensors

The model reads bytes and predicts the next one. Its training set is the Python standard library and, with --further,
other folders of Python sources (`corpus.py`); its score is bits per byte on whole held-out modules of the library, each
read as one sequence from an empty state. The model is statescan.nn.CausalLM, so that its layers run on statescan.torch,
on the CPU or on CUDA. The header of a weight file holds the settings, the names of the folders and what it scored.

Architecture and state-space duality: T. Dao and A. Gu, "Transformers are SSMs", 2024 (arXiv:2405.21060).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import gzip
import json
import lzma
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from statescan.demo import corpus
from statescan.demo.config import Config
from statescan.nn import CausalLM, CausalLMConfig, State

FORMAT = "statescan.mamba2_lm.v1"
QUANTISATION = "name: int8 [rows, columns]; name_scale: float16 [rows]; weight = name * name_scale[:, None]"

# --- model ------------------------------------------------------------------------------------------------------------


def build(config: Config) -> CausalLM:
    """The model of these sizes, with the published initial values."""
    mixer = {
        "layer": "Mamba2",
        "d_state": config.dstate,
        "d_conv": config.conv_width,
        "expand": config.expand,
        "headdim": config.headdim,
        "ngroups": config.ngroups,
        "norm_eps": config.eps,
    }
    return CausalLM(
        CausalLMConfig(
            d_model=config.d_model,
            n_layer=config.n_layer,
            vocab_size=config.vocab_size,
            ssm_cfg=mixer,
            norm_epsilon=config.eps,
            pad_vocab_size_multiple=1,
        )
    )


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """In nats, of targets [b,l] given logits [b,l,vocab_size]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(dtype), targets.flatten(), reduction=reduction)


# --- weight files -----------------------------------------------------------------------------------------------------


def quantised_names(tensors: dict[str, Tensor]) -> list[str]:
    """The matrices that are stored as int8: every 2-D tensor."""
    return [name for name, tensor in tensors.items() if tensor.ndim == 2]


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and one float16 scale a row: scale = max|row| / 127, value = round(weight / scale).

    The scale is rounded to float16 first, so that value * scale is the nearest that the stored scale allows.
    """
    scale = (weight.detach().abs().amax(1) / 127).to(torch.float16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # an all-zero row
    values = (weight.detach() / scale[:, None].to(weight.dtype)).round().clamp(-127, 127)
    return values.to(torch.int8), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """float32 weights: values * scale, one scale a row."""
    return values.to(torch.float32) * scale[:, None].to(torch.float32)


def quantised_model(model: CausalLM) -> CausalLM:
    """A copy of the model whose matrices have been through int8."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(dequantise(*quantise(parameter)))
    return model


def save(path: Path, model: CausalLM, config: Config, metadata: dict[str, Any], int8: bool = True) -> None:
    """Writes the weights as safetensors; `metadata` values are stored as JSON beside the format and the config."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]  # the embedding again
    if int8:
        for name in quantised_names(tensors):
            tensors[name], tensors[f"{name}_scale"] = quantise(tensors[name])
    header = {"format": FORMAT, "config": json.dumps(dataclasses.asdict(config))}
    if int8:
        header["quantisation"] = QUANTISATION
    header.update({key: json.dumps(value) for key, value in metadata.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=header)
    os.replace(partial, path)


def load(path: Path) -> tuple[CausalLM, dict[str, Any]]:
    """The float32 model of a weight file, and its metadata with JSON values decoded."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header.get("format") != FORMAT:
        raise ValueError(f"load: {path} must have format {FORMAT!r}; found {header.get('format')!r}")
    model = build(Config(**json.loads(header["config"])))
    weights = {}
    for name, tensor in tensors.items():
        if f"{name}_scale" in tensors:
            weights[name] = dequantise(tensor, tensors[f"{name}_scale"])
        elif not name.endswith("_scale"):
            weights[name] = tensor.to(torch.float32)
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    model.load_state_dict(weights)
    plain = ("format", "config", "quantisation")
    return model, {key: json.loads(value) for key, value in header.items() if key not in plain}


# --- data -------------------------------------------------------------------------------------------------------------


class Stream:
    """Endless batches: an epoch shuffles the documents, joins them and cuts the result into `rows` parallel readers.

    A reader goes through its part window by window and takes its state along (truncated backpropagation through time),
    so that states of long histories are trained on. Now and then a reader forgets: it goes on from the zero state, with
    which every reader starts an epoch. A batch depends on the seed and the step alone.
    """

    def __init__(
        self,
        documents: Sequence[bytes],
        rows: int,
        window: int,
        reset_probability: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self._documents = [np.frombuffer(bytes([corpus.SEPARATOR]) + document, np.uint8) for document in documents]
        self._rows, self._window = rows, window
        self._reset_probability, self._seed, self._device = reset_probability, seed, device
        self._row_length = sum(map(len, self._documents)) // rows
        self.steps_per_epoch = (self._row_length - 1) // window
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"stream: rows={rows} readers of window={window} bytes need {rows * (window + 1)} bytes; the documents "
                f"and their separators hold {sum(map(len, self._documents))}"
            )
        self._epoch = -1

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets [rows, window] int64, and keep [rows] float32: 0 where a row's state must be forgotten."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._shuffle(epoch)
        window = self._bytes[:, index * self._window : (index + 1) * self._window + 1].long()
        return window[:, :-1], window[:, 1:], self._keep[index]

    def _shuffle(self, epoch: int) -> None:
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(len(self._documents))
        joined = np.concatenate([self._documents[i] for i in order])[: self._rows * self._row_length]
        keep = generator.random((self.steps_per_epoch, self._rows)) >= self._reset_probability
        keep[0] = False
        self._bytes = torch.from_numpy(joined.reshape(self._rows, -1)).to(self._device)
        self._keep = torch.from_numpy(keep.astype(np.float32)).to(self._device)
        self._epoch = epoch


# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def document_bits(model: CausalLM, document: bytes, segment: int = 1 << 15) -> float:
    """Bits that the model needs for the document read as one sequence after a separator, from the zero state.

    The sequence goes through in segments that hand their states on: the same sum, in bounded memory.
    """
    device = model.backbone.embedding.weight.device
    tokens = torch.frombuffer(bytearray([corpus.SEPARATOR]) + document, dtype=torch.uint8).to(device).long()
    states = model.zero_states(1)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(document), segment):
        targets = tokens[None, start + 1 : start + 1 + segment]
        inputs = tokens[None, start : start + targets.shape[1]]
        logits, states = model(inputs, initial_states=states, return_final_states=True)
        nats += cross_entropy(logits, targets, "none").double().sum()
    return nats.item() / math.log(2)


def bits_per_byte(model: CausalLM, documents: Sequence[bytes]) -> float:
    """Total bits over total bytes."""
    return sum(document_bits(model, document) for document in documents) / sum(map(len, documents))


@dataclasses.dataclass(frozen=True)
class Row:
    """Sizes of one held-out file: bytes, and bits per byte under each method."""

    name: str
    size: int
    gzip: float
    xz: float
    model_float: float
    model_int8: float


def score_files(names: Sequence[str], documents: Sequence[bytes], model: CausalLM) -> list[Row]:
    """One row a document, and the total last. A model that came from an int8 file is scored once for both columns."""
    int8_model = quantised_model(model)
    is_int8 = all(map(torch.equal, model.parameters(), int8_model.parameters()))
    rows = []
    for name, document in zip(names, documents, strict=True):
        model_bits = document_bits(model, document)
        bits = (
            8 * len(gzip.compress(document, 9)),
            8 * len(lzma.compress(document, preset=9 | lzma.PRESET_EXTREME)),
            model_bits,
            model_bits if is_int8 else document_bits(int8_model, document),
        )
        rows.append(Row(name, len(document), *(value / len(document) for value in bits)))
    size = sum(row.size for row in rows)
    columns = ("gzip", "xz", "model_float", "model_int8")
    totals = (sum(getattr(row, column) * row.size for row in rows) / size for column in columns)
    return [*rows, Row("total", size, *totals)]


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text, bits per byte."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'file':{width}} {'bytes':>8} {'gzip -9':>8} {'xz -9e':>8} {'float':>8} {'int8':>8}"]
    for row in rows:
        scores = " ".join(f"{value:8.4f}" for value in (row.gzip, row.xz, row.model_float, row.model_int8))
        lines.append(f"{row.name:{width}} {row.size:8d} {scores}")
    return "\n".join(lines)


# --- training ---------------------------------------------------------------------------------------------------------


def drop_output(probability: float, mixer: nn.Module, _: Any, output: tuple[Tensor, State]) -> tuple[Tensor, State]:
    """A forward hook of a mixer: while training, dropout of what it adds to the residual stream. Its state stays whole."""
    y, state = output
    return F.dropout(y, probability, mixer.training), state


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of the run, then a cosine down to 0; `progress` in [0, 1]."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


@contextlib.contextmanager
def fake_quantised(parameters: Sequence[nn.Parameter], enabled: bool) -> Iterator[None]:
    """Inside, the matrices hold what int8 storage would leave of them; outside, their float values.

    Forward and backward run inside and the optimiser step outside: the straight-through estimator, which treats the
    rounding as the identity in the backward pass.
    """
    if not enabled:
        yield
        return
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    with torch.no_grad():
        exact = [matrix.clone() for matrix in matrices]
        for matrix in matrices:
            matrix.copy_(dequantise(*quantise(matrix)))
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix, value in zip(matrices, exact, strict=True):
                matrix.copy_(value)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a run, stored as JSON in the weight file. The schedule follows `steps` if set, else time.

    With `muon_learning_rate` the projections are trained by Muon (torch 2.9 or newer) and the rest by AdamW; without, all by AdamW.
    An epoch goes `repeat` times through the library, and once through further sources.
    """

    minutes: float = 7.0
    steps: int | None = None
    rows: int = 16
    window: int = 4096
    repeat: int = 1
    reset_probability: float = 0.125
    learning_rate: float = 3e-3
    muon_learning_rate: float = 0.0
    warmup: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    dropout: float = 0.0
    fake_quantise_from: float = 0.9
    evaluations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.minutes <= 0 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"settings: minutes={self.minutes} and steps={self.steps} must be positive")
        if not 0 < self.warmup < 1:
            raise ValueError(f"settings: warmup={self.warmup} must lie between 0 and 1")


def optimizers(model: CausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon beside it. The schedule scales each group's `peak_lr`; matrices alone are decayed.

    Muon: K. Jordan et al., 2024, with its step scaled to the size of AdamW's (Liu et al., 2025, arXiv:2502.16982).
    """
    named = dict(model.named_parameters())
    projections = [p for name, p in named.items() if settings.muon_learning_rate > 0 and name.endswith("_proj.weight")]
    rest = [p for p in named.values() if not any(p is other for other in projections)]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0},
    ]
    peak, betas = settings.learning_rate, (settings.beta1, settings.beta2)
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=peak, betas=betas, fused=rest[0].is_cuda)]
    if projections:
        peak, decay = settings.muon_learning_rate, settings.weight_decay
        found.append(torch.optim.Muon(projections, lr=peak, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return found


class Trainer:
    """A run that can stop and go on: model, optimiser, the readers' states, steps done and seconds spent.

    With `Settings.steps` a run is a function of its settings and the corpus (on a GPU, up to the order of sums); with a
    time budget the number of steps depends on the machine. A run resumed from a checkpoint repeats what an
    uninterrupted one would have done.
    """

    def __init__(self, config: Config, settings: Settings, documents: Sequence[bytes], device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.config, self.settings, self.device = config, settings, device
        self.model = build(config).to(device).eval()
        if settings.dropout > 0:
            for layer in self.model.backbone.layers:
                layer.mixer.register_forward_hook(functools.partial(drop_output, settings.dropout))
        self.stream = Stream(documents, settings.rows, settings.window, settings.reset_probability, settings.seed, device)
        self.optimizers = optimizers(self.model, settings)
        self.states = self.model.zero_states(settings.rows)
        self.step = 0
        self.seconds = 0.0

    def progress(self) -> float:
        """How much of the run is done, 0 to 1."""
        if self.settings.steps is not None:
            return min(1.0, self.step / self.settings.steps)
        return min(1.0, self.seconds / (60 * self.settings.minutes))

    def train_step(self) -> Tensor:
        """One update; the mean loss of the batch in nats, still on the device."""
        progress = self.progress()
        factor = learning_rate_factor(progress, self.settings.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        inputs, targets, keep = self.stream.batch(self.step)
        states = [State(conv * keep[:, None, None], ssm * keep[:, None, None, None]) for conv, ssm in self.states]
        parameters = list(self.model.parameters())
        self.model.train()
        torch.manual_seed(self.settings.seed + self.step)  # for dropout: a resumed run drops what the whole one would have
        with fake_quantised(parameters, progress >= self.settings.fake_quantise_from):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                logits, states = self.model(inputs, initial_states=states, return_final_states=True)
                loss = cross_entropy(logits, targets)
            loss.backward()
        self.model.eval()
        nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.states = [State(conv.detach(), ssm.detach()) for conv, ssm in states]
        self.step += 1
        return loss.detach()

    def save_checkpoint(self, path: Path) -> None:
        """Writes all that `load_checkpoint` needs; the file at `path` is replaced in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        content = {
            "config": dataclasses.asdict(self.config),
            "settings": dataclasses.asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "states": [tuple(state) for state in self.states],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(content, partial)
        os.replace(partial, path)

    def load_checkpoint(self, path: Path) -> None:
        """Goes on where `path` stopped. The sizes and settings must be those of the checkpoint."""
        content = torch.load(path, map_location=self.device, weights_only=True)
        mine = {"config": dataclasses.asdict(self.config), "settings": dataclasses.asdict(self.settings)}
        for part, values in mine.items():
            for key, value in values.items():
                if content[part][key] != value:
                    raise ValueError(f"resume: {key}={value!r} must be {content[part][key]!r}, as in {path}")
        self.model.load_state_dict(content["model"])
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.states = [State(*state) for state in content["states"]]
        self.step, self.seconds = content["step"], content["seconds"]

    def run(self, heldout: Sequence[bytes], checkpoint: Path | None = None, report: Callable[[str], None] = tqdm.write) -> None:
        """Trains to the end; scores the held-out documents and writes the checkpoint `evaluations` times on the way.

        The clock skips scoring, and the first step, which warms the device up.
        """
        settings = self.settings
        tokens_per_step = settings.rows * settings.window
        next_report = math.floor(self.progress() * settings.evaluations) + 1
        sum_loss, sum_steps, seconds_reported = torch.zeros((), device=self.device), 0, self.seconds
        clock: float | None = None
        bar_format = "{percentage:5.1f}% {elapsed} {postfix}"
        bar = tqdm(total=1.0, initial=self.progress(), mininterval=10, bar_format=bar_format)
        while self.progress() < 1:
            loss = self.train_step()
            sum_loss += loss
            sum_steps += 1
            if clock is None:
                self._synchronise()
            else:
                self.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            if self.step % 50 == 0:
                bar.set_postfix(step=self.step, bits_per_byte=f"{loss.item() / math.log(2):.4f}", refresh=False)
            bar.update(self.progress() - bar.n)
            if self.progress() * settings.evaluations < next_report:
                continue
            next_report += 1
            self._synchronise()
            self.seconds += time.perf_counter() - clock
            train_bits = sum_loss.item() / sum_steps / math.log(2)
            if not math.isfinite(train_bits):
                raise FloatingPointError(f"training diverged before step {self.step}: the mean loss is {train_bits}")
            rate = sum_steps * tokens_per_step / max(self.seconds - seconds_reported, 1e-9)
            report(
                f"step {self.step} ({self.progress():.0%}, {self.seconds:.0f} s, "
                f"epoch {self.step / self.stream.steps_per_epoch:.2f}): train {train_bits:.4f}, "
                f"held out {bits_per_byte(self.model, heldout):.4f} bits per byte, {rate:,.0f} bytes/s"
            )
            if checkpoint is not None:
                self.save_checkpoint(checkpoint)
            sum_loss.zero_()
            sum_steps, seconds_reported = 0, self.seconds
            clock = time.perf_counter()
        bar.close()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# --- command line -----------------------------------------------------------------------------------------------------


def add_fields(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """One option for each field of a dataclass of numbers."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(cls):
        kind = float if "float" in str(field.type) else int
        option = "--" + field.name.replace("_", "-")
        group.add_argument(option, type=kind, default=field.default, help="default %(default)s")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stdlib", type=Path, default=None, help="folder of the library; default: this interpreter's")
    parser.add_argument("--further", type=Path, nargs="+", default=[], help="folders of other sources, to train on as well")
    parser.add_argument("--stdlib-version", default=None, help="its Python version, recorded with the weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("model.safetensors"), help="the int8 weight file to write")
    parser.add_argument("--float-output", type=Path, default=None, help="write the float32 weights here as well")
    parser.add_argument("--checkpoint", type=Path, default=None, help="where to save, and with --resume load, the run")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--evaluate", type=Path, default=None, help="only score this weight file")
    add_fields(parser, Settings, "training")
    add_fields(parser, Config, "model")
    options = parser.parse_args(arguments)
    if options.resume and options.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    if options.stdlib_version is None and options.stdlib is None:
        options.stdlib_version = platform.python_version()
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    root = corpus.default_root() if options.stdlib is None else options.stdlib
    train_files, heldout_files = corpus.split(root)
    heldout = corpus.load_bytes(heldout_files)
    names = [path.relative_to(root).as_posix() for path in heldout_files]
    if options.evaluate is not None:
        model, _ = load(options.evaluate)
        print(format_table(score_files(names, heldout, model.to(device))))
        return

    config, settings = (
        cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}) for cls in (Config, Settings)
    )
    library = corpus.load_bytes(train_files)
    further = corpus.further(options.further, library, heldout)
    documents = library + further
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    print(
        f"{len(documents)} files, {sum(map(len, documents)):,} bytes; held out {len(heldout)} files, "
        f"{sum(map(len, heldout)):,} bytes; {hardware}, torch {torch.__version__}",
        flush=True,
    )
    trainer = Trainer(config, settings, library * settings.repeat + further, device)
    if options.resume:
        trainer.load_checkpoint(options.checkpoint)
    trainer.run(heldout, options.checkpoint)

    rows = score_files(names, heldout, trainer.model)
    print(format_table(rows))
    bytes_read = trainer.step * settings.rows * settings.window
    metadata = {
        "settings": dataclasses.asdict(settings),
        "corpus": {
            "name": "CPython standard library",
            "version": options.stdlib_version,
            "further": {"folders": [path.name for path in options.further], "files": len(further)},
            "train": {"files": len(documents), "bytes": sum(map(len, documents)), "sha256": corpus.digest(documents)},
            "heldout": {"files": len(heldout), "bytes": sum(map(len, heldout)), "sha256": corpus.digest(heldout)},
        },
        "run": {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "hardware": hardware,
            "torch": torch.__version__,
            "steps": trainer.step,
            "bytes": bytes_read,
            "seconds": round(trainer.seconds, 1),
        },
        "heldout_bits_per_byte": [dataclasses.asdict(row) for row in rows],
    }
    save(options.output, trainer.model, config, metadata)
    if options.float_output is not None:
        save(options.float_output, trainer.model, config, metadata, int8=False)
    stored = bits_per_byte(load(options.output)[0].to(device), heldout)
    print(
        f"{options.output}: {options.output.stat().st_size:,} bytes, {stored:.4f} bits per byte read back; "
        f"{trainer.step} steps, {bytes_read:,} bytes in {trainer.seconds:.1f} s, "
        f"{bytes_read / max(trainer.seconds, 1e-9):,.0f} bytes/s"
    )


if __name__ == "__main__":
    main()
