"""A causal language model of Mamba or Mamba-2 blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import pretrained
from ._parts import wide
from .config import CausalLMConfig
from .mamba import Mamba
from .mamba2 import Mamba2
from .norm import RMSNorm
from .state import State

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}


class Block(nn.Module):
    """``residual + mixer(norm(residual))``."""

    def __init__(self, config: CausalLMConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = _norm(config, device, dtype)
        options = {name: value for name, value in config.ssm_cfg.items() if name != "layer"}
        self.mixer = _MIXERS[config.layer](config.d_model, **options, device=device, dtype=dtype)

    def forward(self, residual: Tensor, **options: Any) -> tuple[Tensor, State | None]:
        """The residual stream behind the block, and the mixer's final state where `options` ask for it."""
        mixed = self.mixer(self._normalised(residual), **options)
        mixed, state = mixed if isinstance(mixed, tuple) else (mixed, None)
        return self._widened(residual) + mixed, state

    def step(self, residual: Tensor, state: State) -> Tensor:
        """The residual stream of one or a few new tokens; `state` is updated in place."""
        return self._widened(residual) + self.mixer.step(self._normalised(residual), state)

    def _normalised(self, residual: Tensor) -> Tensor:
        return self.norm(residual.to(self.norm.weight.dtype))

    def _widened(self, residual: Tensor) -> Tensor:
        return wide(residual) if self.residual_in_fp32 else residual


def _norm(config: CausalLMConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    kind = RMSNorm if config.rms_norm else nn.LayerNorm
    return kind(config.d_model, eps=config.norm_epsilon, device=device, dtype=dtype)


class CausalLM(nn.Module):
    """Embedding, blocks, norm, and a linear map to logits.

    Args:
        config: the sizes.
        device, dtype: of the parameters.

    Parameters: backbone.embedding, backbone.layers.N.norm, backbone.layers.N.mixer, backbone.norm_f, lm_head, as mamba-ssm's.
    The projections out of the mixers start smaller, by 1 / sqrt(n_layer), the embedding with standard deviation 0.02.

    Source: Gu & Dao 2023 (arXiv:2312.00752); Dao & Gu 2024 (arXiv:2405.21060).
    """

    def __init__(
        self,
        config: CausalLMConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        made = {"device": device, "dtype": dtype}
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **made)
        self.backbone.layers = nn.ModuleList(Block(config, device, dtype) for _ in range(config.n_layer))
        self.backbone.norm_f = _norm(config, device, dtype)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, **made)
        self._initialise()
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    @torch.no_grad()
    def _initialise(self) -> None:
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for block in self.backbone.layers:
            for module in block.mixer.modules():
                if isinstance(module, nn.Linear) and module.bias is not None and not hasattr(module.bias, "_no_reinit"):
                    nn.init.zeros_(module.bias)
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
            block.mixer.out_proj.weight /= math.sqrt(self.config.n_layer)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """For an optimiser: matrices, which are decayed, and A, D, biases and norms, which are not."""
        decayed, others = [], []
        for name, parameter in self.named_parameters():
            keep = parameter.ndim < 2 or name.endswith((".A_log", ".D"))
            (others if keep else decayed).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def zero_states(self, batch: int) -> list[State]:
        """The states of all layers before the first token of `batch` sequences."""
        return [block.mixer.zero_state(batch) for block in self.backbone.layers]

    def forward(
        self,
        input_ids: Tensor,
        *,
        initial_states: Sequence[State] | None = None,
        return_final_states: bool = False,
        cu_seqlens: Tensor | None = None,
        num_last_tokens: int | None = None,
    ) -> Tensor | tuple[Tensor, list[State]]:
        """Logits of whole sequences.

        Args:
            input_ids: [batch, seqlen] integers.
            initial_states: one State a layer, before the first token; gradients reach them.
            return_final_states: also return the states after the last token.
            cu_seqlens: [num_sequences + 1] int32 or int64, packed sequences in a batch of one, each with its own states.
            num_last_tokens: logits of only so many tokens at the end.

        Returns:
            [batch, seqlen, vocab] logits; with return_final_states the pair (logits, states).
        """
        hidden, states = self.hidden(
            input_ids, initial_states=initial_states, return_final_states=return_final_states, cu_seqlens=cu_seqlens
        )
        logits = self.lm_head(hidden if num_last_tokens is None else hidden[:, hidden.shape[1] - num_last_tokens :])
        return (logits, states) if return_final_states else logits

    def hidden(
        self,
        input_ids: Tensor,
        *,
        initial_states: Sequence[State] | None = None,
        return_final_states: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, list[State]]:
        """What lm_head takes, [batch, seqlen, d_model], and the final states (none unless asked for); arguments of forward."""
        layers = self.backbone.layers
        if initial_states is not None and len(initial_states) != len(layers):
            raise ValueError(
                f"CausalLM: initial_states has {len(initial_states)} entries; expected one for each of {len(layers)} layers"
            )
        residual, states = self.backbone.embedding(input_ids), []
        for i, block in enumerate(layers):
            residual, state = block(
                residual,
                initial_state=None if initial_states is None else initial_states[i],
                return_final_state=return_final_states,
                cu_seqlens=cu_seqlens,
            )
            if return_final_states:
                states.append(state)
        return self._normalised(residual), states

    def _normalised(self, residual: Tensor) -> Tensor:
        norm = self.backbone.norm_f
        return norm(residual.to(norm.weight.dtype))

    @torch.no_grad()
    def step(self, input_ids: Tensor, states: Sequence[State]) -> Tensor:
        """Logits after one or a few new tokens, without gradient; `states` are updated in place.

        Args:
            input_ids: [batch] or [batch, ntokens] integers.
            states: of zero_states, or what forward returned.

        Returns:
            [batch, vocab] or [batch, ntokens, vocab].
        """
        residual = self.backbone.embedding(input_ids)
        for block, state in zip(self.backbone.layers, states, strict=True):
            residual = block.step(residual, state)
        return self.lm_head(self._normalised(residual))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
        initial_states: Sequence[State] | None = None,
    ) -> Tensor:
        """Continues each row of input_ids: one scan over the prompt, then a step a token.

        Args:
            input_ids: [batch, seqlen] integers, seqlen at least 1.
            max_new_tokens: how many tokens to add.
            temperature: logits are divided by it; 0 takes the likeliest token.
            top_k: draw from the k likeliest tokens.
            top_p: draw from the likeliest tokens whose probabilities reach p together.
            eos_token_id: a row is over when it draws this; the rest is filled with it, and rows that are all over end the call.
            generator: of the random numbers.
            initial_states: one State a layer, before the prompt.

        Returns:
            [batch, seqlen + tokens added], the prompt first.
        """
        if input_ids.shape[1] < 1:
            raise ValueError("generate: input_ids must have at least one token in each row")
        logits, states = self(input_ids, initial_states=initial_states, return_final_states=True, num_last_tokens=1)
        logits, tokens = logits[:, -1], [input_ids]
        over = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for added in range(max_new_tokens):
            token = _draw(logits[:, : self.config.vocab_size].float(), temperature, top_k, top_p, generator)
            if eos_token_id is not None:
                token = token.masked_fill(over, eos_token_id)
                over = over | (token == eos_token_id)
            tokens.append(token[:, None].to(input_ids.dtype))
            if added + 1 == max_new_tokens or (eos_token_id is not None and bool(over.all())):
                break
            logits = self.step(token, states)
        return torch.cat(tokens, dim=1)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> CausalLM:
        """The model of a checkpoint: config.json with model.safetensors or pytorch_model.bin, whole or in shards.

        Args:
            name_or_path: a folder, or the name of a model on the Hugging Face hub (needs the package huggingface_hub).
            device, dtype: of the parameters; None for the CPU, and for the dtype that each has in the checkpoint.
            revision: of a model on the hub.

        Raises:
            FileNotFoundError: a file is missing from the folder.
            NotImplementedError: the checkpoint is of an architecture other than mamba-ssm's and Hugging Face's Mamba and Mamba-2.
            ImportError: a name is given and huggingface_hub is not installed.
            RuntimeError: a parameter is missing, superfluous or of another shape.
        """
        folder = pretrained.find(name_or_path, revision)
        config = CausalLMConfig.from_published(pretrained.read_config(folder))
        weights = pretrained.read_weights(folder)
        if config.tie_embeddings and "backbone.embedding.weight" in weights:
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        with torch.device("meta"):  # initial values would be thrown away
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.backbone.embedding.weight
        return model.to(device=device, dtype=dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, which from_pretrained reads."""
        pretrained.write(Path(folder), self.config, self.state_dict())


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token [batch] of logits [batch, vocab]."""
    if temperature == 0 or top_k == 1:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0  # the likeliest always stays
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
