"""Torch modules of Mamba and Mamba-2 on statescan.torch: ``import statescan.nn``.

Parameters are named, shaped and initialised as the published models' are, so that their checkpoints load: ``CausalLM.from_pretrained``
takes a folder, or the name of a model on the Hugging Face hub. Everything runs on the CPU and on CUDA.
"""

from .causal_lm import CausalLM
from .config import CausalLMConfig
from .mamba import Mamba
from .mamba2 import Mamba2
from .norm import RMSNorm, RMSNormGated
from .state import State

__all__ = ["CausalLM", "CausalLMConfig", "Mamba", "Mamba2", "RMSNorm", "RMSNormGated", "State"]
