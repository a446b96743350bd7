"""The sizes of a causal language model, and how published configurations say them."""

from __future__ import annotations

import dataclasses
from typing import Any

_MIXERS = ("Mamba1", "Mamba2")


@dataclasses.dataclass
class CausalLMConfig:
    """Sizes of a CausalLM, field by field those of mamba-ssm's configuration.

    d_model: channels of the residual stream.
    n_layer: blocks.
    vocab_size: tokens; the embedding is padded to a multiple of pad_vocab_size_multiple.
    ssm_cfg: "layer" is "Mamba1" (also when missing) or "Mamba2"; the rest is given to the mixer.
    rms_norm: RMSNorm before the mixers, else LayerNorm.
    norm_epsilon: of the norms before the mixers, and of the last.
    residual_in_fp32: keep the residual stream in float32.
    tie_embeddings: the output projection is the embedding.
    """

    d_model: int = 2560
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.layer not in _MIXERS:
            raise ValueError(f"config: ssm_cfg['layer'] is {self.layer!r}; expected one of {', '.join(_MIXERS)}")

    @property
    def layer(self) -> str:
        """Which mixer."""
        return self.ssm_cfg.get("layer", "Mamba1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @classmethod
    def from_published(cls, published: dict[str, Any]) -> CausalLMConfig:
        """The configuration that a config.json describes, mamba-ssm's or that of Hugging Face's Mamba and Mamba-2.

        Raises:
            NotImplementedError: it describes layers that there are none of here.
        """
        if "d_model" in published and "ssm_cfg" in published:
            return cls._from_mamba_ssm(published)
        kind = published.get("model_type")
        if kind == "mamba":
            return cls._from_hugging_face(published, _mamba_cfg(published))
        if kind == "mamba2":
            return cls._from_hugging_face(published, _mamba2_cfg(published))
        raise NotImplementedError(
            f"config: model_type is {kind!r}; what loads is a configuration of mamba-ssm (with d_model and ssm_cfg) and "
            "Hugging Face's 'mamba' and 'mamba2'"
        )

    @classmethod
    def _from_mamba_ssm(cls, published: dict[str, Any]) -> CausalLMConfig:
        for field in ("attn_layer_idx", "d_intermediate"):
            if published.get(field):
                raise NotImplementedError(f"config: {field}={published[field]}: attention and MLP layers are not supported")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in published.items() if name in known})

    @classmethod
    def _from_hugging_face(cls, published: dict[str, Any], ssm_cfg: dict[str, Any]) -> CausalLMConfig:
        if published.get("hidden_act", "silu") != "silu":
            raise NotImplementedError(f"config: hidden_act={published['hidden_act']!r}; supported is 'silu'")
        ssm_cfg |= {
            "d_state": published["state_size"],
            "d_conv": published.get("conv_kernel", 4),
            "expand": published.get("expand", 2),
            "bias": published.get("use_bias", False),
            "conv_bias": published.get("use_conv_bias", True),
        }
        return cls(
            d_model=published["hidden_size"],
            n_layer=published["num_hidden_layers"],
            vocab_size=published["vocab_size"],
            ssm_cfg=ssm_cfg,
            norm_epsilon=published.get("layer_norm_epsilon", 1e-5),
            residual_in_fp32=published.get("residual_in_fp32", True),
            pad_vocab_size_multiple=1,
            tie_embeddings=published.get("tie_word_embeddings", published["model_type"] == "mamba"),
        )


def _mamba_cfg(published: dict[str, Any]) -> dict[str, Any]:
    return {"layer": "Mamba1", "dt_rank": published.get("time_step_rank", "auto")}


def _mamba2_cfg(published: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer": "Mamba2",
        "headdim": published["head_dim"],
        "ngroups": published.get("n_groups", 8),
        "dt_limit": [_number(value) for value in published.get("time_step_limit") or (0.0, float("inf"))],
        "norm_eps": published.get("layer_norm_epsilon", 1e-5),
    }


def _number(value: Any) -> float:
    """A float, also as {"__float__": "Infinity"}, which is how JSON without infinities has it."""
    return float(value["__float__"] if isinstance(value, dict) else value)
