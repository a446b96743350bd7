"""Models of Hugging Face transformers, statescan.compat beside their own torch code, on the CPU or a GPU.

``python -m statescan.bench.bench_transformers`` builds each architecture with random weights, compares logits, gradients and a
greedy continuation, and times a forward, a training step and a decode step. Needs torch and transformers 5.15 or newer.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable
from typing import Any

MODELS = (
    "mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "zamba2", "falcon_h1", "nemotron_h", "granitemoehybrid",
)  # fmt: skip
MAMBA1 = ("mamba", "falcon_mamba", "jamba")
# mamba-ssm's mamba_inner_fn, which transformers trains this one with, normalises dt after dt_proj; the model itself before.
TRAINED_OTHERWISE = ("falcon_mamba",)


def configuration(model: str, hidden_size: int = 64, num_layers: int = 2, dstate: int = 16, head_dim: int = 16) -> Any:
    """A small configuration of an architecture; that of a hybrid has attention in its last layer."""
    import transformers

    heads, ngroups, mlp = 2 * hidden_size // head_dim, 2, 2 * hidden_size
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": mlp}
    hybrid = {"mamba_n_heads": heads, "mamba_d_head": head_dim, "mamba_n_groups": ngroups, "mamba_d_state": dstate, **attention}
    layers = ["mamba"] * (num_layers - 1)
    options: dict[str, dict[str, Any]] = {
        "mamba": {"state_size": dstate},
        "falcon_mamba": {"state_size": dstate},
        "mamba2": {"state_size": dstate, "num_heads": heads, "head_dim": head_dim, "n_groups": ngroups},
        "jamba": {
            "mamba_d_state": dstate, "attn_layer_period": num_layers, "attn_layer_offset": num_layers - 1, "num_experts": 1,
            "num_experts_per_tok": 1, **attention,
        },
        "bamba": {"attn_layer_indices": [num_layers - 1], **hybrid},
        "zamba2": {
            "layers_block_type": [*layers, "hybrid"], "mamba_d_state": dstate, "n_mamba_heads": heads, "mamba_ngroups": ngroups,
            "adapter_rank": 8, **attention,
        },
        "falcon_h1": {"mamba_d_ssm": 2 * hidden_size, **hybrid},
        "nemotron_h": {
            "layers_block_type": [*layers, "attention"], "ssm_state_size": dstate, "mamba_num_heads": heads,
            "mamba_head_dim": head_dim, "n_groups": ngroups, "head_dim": hidden_size // 4, **attention,
        },
        "granitemoehybrid": {
            "layer_types": [*layers, "attention"], "num_local_experts": 0, "shared_intermediate_size": mlp, **hybrid,
        },
    }  # fmt: skip
    size = {"hidden_size": hidden_size, "num_hidden_layers": num_layers, "vocab_size": 512}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.AutoConfig.for_model(model, **size, **tokens, **options[model])


def build(model: str, **size: int) -> Any:
    """The model, with weights so large that every layer shows in the logits."""
    import torch
    import transformers

    torch.manual_seed(0)
    built = transformers.AutoModelForCausalLM.from_config(configuration(model, **size))
    with torch.no_grad():
        for module in built.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d)):
                module.weight.normal_(0, module.weight[0].numel() ** -0.5)
            elif "RMSNorm" in type(module).__name__:
                module.weight.normal_(1, 0.1)
    return built.eval()


def cache_name(model: Any) -> str:
    """What the model calls the cache that it takes and returns."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def both_ways(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What `run` gives with statescan's functions, and with the models' own code."""
    from statescan import compat

    compat.install(force=True)
    try:
        ours = run()
    finally:
        compat.uninstall()
    return ours, run()


def difference(ours: Any, theirs: Any) -> float:
    """Root mean square of the difference, in units of that of `theirs`."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def gradients(model: Any, ids: Any) -> dict[str, Any]:
    """The gradient of every parameter, of the loss of a language model."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    assert ours.keys() == theirs.keys()
    return max(difference(ours[name], theirs[name]) for name in theirs)


def _best(run: Callable[[], Any], rounds: int) -> float:
    """Milliseconds of the quickest of a few calls; on one thread of the CPU its processor time, whoever else is on the machine."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    clock = time.perf_counter if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.process_time
    times = []
    for _ in range(rounds + 1):
        synchronize()
        start = clock()
        run()
        synchronize()
        times.append(clock() - start)
    return 1e3 * min(times[1:])


def measure(name: str, seqlen: int, hidden_size: int, num_layers: int, rounds: int, device: str) -> list[str]:
    """A row of the table; what has no kernel on the device is left empty."""
    import torch

    dstate, head_dim = (16, 64) if name in MAMBA1 else (128, 64)
    model = build(name, hidden_size=hidden_size, num_layers=num_layers, dstate=dstate, head_dim=head_dim).to(device)
    ids = torch.randint(3, 512, (1, seqlen)).to(device)
    prompt = ids[:, :32]

    @torch.no_grad()
    def forward() -> Any:
        return model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def tokens() -> Any:
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, min_new_tokens=24, do_sample=False
        )

    @torch.no_grad()
    def step() -> float:
        out = model(input_ids=prompt, use_cache=True)
        cache = {cache_name(model): getattr(out, cache_name(model))}
        return _best(lambda: model(input_ids=prompt[:, :1], use_cache=True, **cache), 8 * rounds)

    def train() -> Any:
        model.train(name not in TRAINED_OTHERWISE)
        found = gradients(model, ids)
        model.eval()
        return found

    def served(run: Callable[[], Any]) -> bool:
        try:
            both_ways(run)
        except NotImplementedError:
            return False
        return True

    if not served(forward):
        return [name]
    trains = served(train)
    columns = [
        name,
        f"{difference(*both_ways(forward)):.1e}",
        f"{largest_difference(*both_ways(train)):.1e}" if trains else "",
        "same" if torch.equal(*both_ways(tokens)) else "differs",
    ]
    for time_it in (lambda: _best(forward, rounds), (lambda: _best(train, rounds)) if trains else None, step):
        if time_it is None:
            columns += ["", ""]
        else:
            ours, theirs = both_ways(time_it)
            columns += [f"{theirs:.3g} -> {ours:.3g}", f"{theirs / ours:.1f}"]
    return columns


def main() -> None:
    import torch
    import transformers
    from tabulate import tabulate
    from tqdm import tqdm

    import statescan

    parser = argparse.ArgumentParser(prog="python -m statescan.bench.bench_transformers", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="calls of which the quickest counts")
    parser.add_argument("--threads", type=int, default=statescan.num_threads(), help="of statescan and of torch")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    statescan.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    rows = [
        measure(name, args.seqlen, args.hidden_size, args.layers, args.rounds, args.device)
        for name in tqdm(args.models, disable=None, leave=False)
    ]
    place = torch.cuda.get_device_name() if args.device == "cuda" else f"{statescan.cpu_isa()}, {args.threads} threads"
    print(
        f"{place}; batch 1, {args.seqlen} tokens, hidden size {args.hidden_size}, {args.layers} layers, float32; "
        f"statescan {statescan.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    headers = (
        "model", "logits", "gradients", "generation", "forward ms", "times", "training step ms", "times", "decode step ms", "times",
    )  # fmt: skip
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
