"""Random inputs of every op, and the ops as the shared tests see them."""

from dataclasses import dataclass, field
from typing import Callable

import numpy as np
import reference.causal_conv1d
import reference.causal_conv1d_update
import reference.mamba2_scan
import reference.mamba2_update
import reference.selective_scan
import reference.selective_state_update
import reference.ssd_scan
import reference.state_scan
import statescan
from support import DTYPES, NARROW, assert_accurate, copied, dithered, dtype_name, exact, rounded


def normal(rng, dtype, *shape):
    values = rng.standard_normal(shape)
    if np.dtype(DTYPES[dtype]).kind == "c":
        values = values + 1j * rng.standard_normal(shape)
    return values.astype(DTYPES[dtype])


def steps(rng, dtype, *shape):
    """dt as the projection gives it, for a softplus of about 0.01 to 1."""
    return (1.5 * rng.standard_normal(shape) - 2.5).astype(DTYPES[dtype])


def rates(rng, dtype, *shape):
    """A < 0, log-uniform in -16..-0.5."""
    return -np.exp(rng.uniform(np.log(0.5), np.log(16), shape)).astype(DTYPES[dtype])


def parameter_dtype(dtype):
    return "float64" if dtype == "float64" else "float32"


def without(inputs, omit):
    return {name: value for name, value in inputs.items() if name not in omit}


# Every size differs, so that a swapped axis shows. `omit` leaves optional tensors out; `sequences` is the number of states.
def state_scan(
    rng, dtype="float32", batch=2, seqlen=11, nheads=3, headdim=5, dstate=7, sequences=None, state_dtype=None, omit=()
):
    p = parameter_dtype(dtype)
    return without(
        dict(
            log_decay=-np.exp(rng.uniform(-6, 2, (batch, seqlen, nheads))).astype(DTYPES[p]),
            update=normal(rng, dtype, batch, seqlen, nheads, headdim, dstate),
            initial_state=normal(rng, state_dtype or p, batch if sequences is None else sequences, nheads, headdim, dstate),
        ),
        omit,
    )


def ssd_scan(
    rng,
    dtype="float32",
    batch=2,
    seqlen=67,
    nheads=6,
    headdim=5,
    ngroups=3,
    dstate=7,
    sequences=None,
    dt_dtype=None,
    state_dtype=None,
    omit=(),
):
    p = parameter_dtype(dtype)
    return without(
        dict(
            x=normal(rng, dtype, batch, seqlen, nheads, headdim),
            dt=steps(rng, dt_dtype or dtype, batch, seqlen, nheads),
            A=rates(rng, p, nheads),
            B=normal(rng, dtype, batch, seqlen, ngroups, dstate),
            C=normal(rng, dtype, batch, seqlen, ngroups, dstate),
            D=normal(rng, p, nheads),
            z=normal(rng, dtype, batch, seqlen, nheads, headdim),
            dt_bias=normal(rng, p, nheads),
            initial_state=normal(rng, state_dtype or p, batch if sequences is None else sequences, nheads, headdim, dstate),
        ),
        omit,
    )


def selective_scan(
    rng,
    dtype="float32",
    batch=2,
    seqlen=67,
    dim=12,
    ngroups=3,
    dstate=7,
    sequences=None,
    dt_dtype=None,
    state_dtype=None,
    complex_A=False,
    varying_B=True,
    varying_C=True,
    omit=(),
):
    p = parameter_dtype(dtype)
    a = ("complex128" if dtype == "float64" else "complex64") if complex_A else p
    A = rates(rng, p, dim, dstate)
    if complex_A:
        A = (A + 1j * rng.uniform(-8, 8, A.shape)).astype(DTYPES[a])

    def projection(varying):
        return normal(rng, a if complex_A else dtype, batch, seqlen, ngroups, dstate) if varying else normal(rng, a, dim, dstate)

    return without(
        dict(
            x=normal(rng, dtype, batch, seqlen, dim),
            dt=steps(rng, dt_dtype or dtype, batch, seqlen, dim),
            A=A,
            B=projection(varying_B),
            C=projection(varying_C),
            D=normal(rng, p, dim),
            z=normal(rng, dtype, batch, seqlen, dim),
            dt_bias=normal(rng, p, dim),
            initial_state=normal(
                rng, a if complex_A else state_dtype or p, batch if sequences is None else sequences, dim, dstate
            ),
        ),
        omit,
    )


def causal_conv1d(
    rng, dtype="float32", batch=2, seqlen=67, dim=13, width=4, sequences=None, weight_dtype=None, state_dtype=None, omit=()
):
    w = weight_dtype or parameter_dtype(dtype)
    return without(
        dict(
            x=normal(rng, dtype, batch, seqlen, dim),
            weight=normal(rng, w, dim, width),
            bias=normal(rng, w, dim),
            initial_state=normal(rng, state_dtype or dtype, batch if sequences is None else sequences, dim, width - 1),
        ),
        omit,
    )


def mamba2_scan(
    rng,
    dtype="float32",
    batch=2,
    seqlen=67,
    nheads=6,
    headdim=10,
    ngroups=3,
    dstate=7,
    width=4,
    sequences=None,
    weight_dtype=None,
    state_dtype=None,
    omit=(),
):
    p = parameter_dtype(dtype)
    w = weight_dtype or p
    d_inner, states = nheads * headdim, batch if sequences is None else sequences
    conv_dim = d_inner + 2 * ngroups * dstate
    return without(
        dict(
            zxbcdt=np.concatenate(
                [normal(rng, dtype, batch, seqlen, d_inner + conv_dim), steps(rng, dtype, batch, seqlen, nheads)], 2
            ),
            conv_weight=normal(rng, w, conv_dim, width),
            conv_bias=normal(rng, w, conv_dim),
            dt_bias=normal(rng, p, nheads),
            A=rates(rng, p, nheads),
            D=normal(rng, p, nheads),
            norm_weight=normal(rng, w, d_inner),
            initial_conv_state=normal(rng, dtype, states, conv_dim, width - 1),
            initial_state=normal(rng, state_dtype or p, states, nheads, headdim, dstate),
        ),
        omit,
    )


def reachable(op, scan, device, inputs, options):
    """What the oracle of an op comes to with the roundings that the backend has inside the op, three draws of them: on a GPU
    mamba2_scan keeps what lies between its parts in memory, in the dtype of its input. None for the others."""
    dtype = dtype_name(inputs[scan.main])
    if scan.name != "mamba2_scan" or device.name != "cuda" or dtype == "float32":
        return []
    rng = np.random.default_rng(1)
    stores = [lambda value: rounded(value, dtype), *[lambda value: dithered(value, dtype, rng)] * 2]
    return [op.expected(inputs, between=store, **options) for store in stores]


@dataclass(frozen=True)
class Scan:
    """An op that walks along the tokens of axis 1, from an initial state to a final state."""

    name: str
    inputs: Callable  # (rng, dtype, batch, seqlen, sequences, ..., omit) -> {name: array}
    per_token: frozenset  # the inputs with tokens on axis 1
    out: dict  # result -> its out= argument, in the order in which results come
    carried: dict  # result -> the input that takes it up again
    options: dict = field(default_factory=dict)  # of the base case
    want_all: dict = field(default_factory=dict)  # asks for every result

    def run(self, device, inputs, out=None, **options):
        """Every result, by name. `out`: arrays to be filled, by the name of the result."""
        given = {self.out[result]: device.put(array) for result, array in (out or {}).items()}
        arguments = {name: device.put(value) for name, value in (inputs | options).items()}
        results = device.call(getattr(statescan, self.name), **arguments, **given, **self.want_all)
        results = dict(zip(self.out, results, strict=True))
        for result in out or {}:
            assert results[result] is given[self.out[result]], f"{result} is not the array given as {self.out[result]}"
        return {result: device.get(array) for result, array in results.items()}

    def expected(self, inputs, **options):
        oracle = getattr(getattr(reference, self.name), self.name)
        options.pop("chunk_size", None)
        options.pop("batch_invariant", None)
        options.pop("ssd_mode", None)
        with np.errstate(over="ignore", invalid="ignore"):  # poison that no sequence visits
            results = oracle(**{name: exact(value) for name, value in inputs.items()}, **options)
        return dict(zip(self.out, results, strict=True))

    def check(self, device, inputs, out=None, **options):
        """Runs the op and holds every result against the oracle."""
        got, expected = self.run(device, inputs, out, **options), self.expected(inputs, **options)
        stored = reachable(self, self, device, inputs, options)
        # Tensor cores round what they weigh and multiply to the input's type, also on the way to a float32 state.
        coarser = dtype_name(inputs[self.main]) if device.name == "cuda" else None
        for name in self.out:
            assert_accurate(got[name], expected[name], name, coarser, [results[name] for results in stored])
        return got

    @property
    def main(self):
        return {"state_scan": "update", "mamba2_scan": "zxbcdt"}.get(self.name, "x")

    def has_tokens(self, name, value):
        return name in self.per_token and value.ndim > 2  # a B or C of [d,n] is time-invariant

    def has_rows(self, name, value):
        return name in self.carried.values() or self.has_tokens(name, value)

    def tokens(self, inputs, part):
        """The inputs of some of the tokens: `part` is a slice of axis 1."""
        return {name: value[:, part] if self.has_tokens(name, value) else value for name, value in inputs.items()}

    def rows(self, inputs, part):
        """The inputs of some of the batch rows."""
        return {name: value[part] if self.has_rows(name, value) else value for name, value in inputs.items()}


STATE_SCAN = Scan(
    "state_scan",
    state_scan,
    frozenset({"log_decay", "update"}),
    {"states": "out", "final_state": "final_state_out"},
    {"final_state": "initial_state"},
)
SSD_SCAN = Scan(
    "ssd_scan",
    ssd_scan,
    frozenset({"x", "dt", "B", "C", "z"}),
    {"y": "out", "final_state": "final_state_out"},
    {"final_state": "initial_state"},
    {"dt_softplus": True},
    {"return_final_state": True},
)
SELECTIVE_SCAN = Scan(
    "selective_scan",
    selective_scan,
    frozenset({"x", "dt", "B", "C", "z"}),
    {"y": "out", "final_state": "final_state_out"},
    {"final_state": "initial_state"},
    {"dt_softplus": True},
    {"return_final_state": True},
)
CAUSAL_CONV1D = Scan(
    "causal_conv1d",
    causal_conv1d,
    frozenset({"x"}),
    {"y": "out", "final_state": "final_state_out"},
    {"final_state": "initial_state"},
    {"activation": "silu"},
    {"return_final_state": True},
)
MAMBA2_SCAN = Scan(
    "mamba2_scan",
    mamba2_scan,
    frozenset({"zxbcdt"}),
    {"y": "out", "final_conv_state": "final_conv_state_out", "final_state": "final_state_out"},
    {"final_conv_state": "initial_conv_state", "final_state": "initial_state"},
    {"ngroups": 3},
    {"return_final_states": True},
)


@dataclass(frozen=True)
class Backward:
    """The backward of a scan: the inputs of the scan, dy and the gradients of its final states, to a gradient of each input."""

    scan: Scan
    gradients: tuple  # the inputs that are differentiated, in the order in which their gradients come

    @property
    def options(self):
        return self.scan.options

    @property
    def carried(self):
        """The gradient of a final state -> the initial state that it flows back to."""
        return {f"d{final}": initial for final, initial in self.scan.carried.items()}

    def inputs(self, rng, dtype="float32", omit=(), **sizes):
        inputs = self.scan.inputs(rng, dtype, **sizes)
        main = inputs[self.scan.main].shape
        width = inputs["norm_weight"].shape if "norm_weight" in inputs else main[2:]  # a block's y has its d_inner channels
        inputs["dy"] = normal(rng, dtype, *main[:2], *width)
        for name, initial in self.carried.items():
            inputs[name] = normal(rng, dtype_name(inputs[initial]), *inputs[initial].shape)
        return without(inputs, omit)

    def run(self, device, inputs, **options):
        """Every gradient, by name: d and the input's; None for what was not given."""
        given = {name: device.put(value) for name, value in (inputs | options).items()}
        results = device.call(getattr(statescan, f"{self.scan.name}_backward"), **given)
        return {f"d{name}": device.get(result) for name, result in zip(self.gradients, results, strict=True)}

    def expected(self, inputs, **options):
        oracle = getattr(getattr(reference, self.scan.name), f"{self.scan.name}_backward")
        for hint in ("chunk_size", "batch_invariant", "chunk_states"):
            options.pop(hint, None)
        with np.errstate(over="ignore", invalid="ignore"):  # poison that no sequence visits
            results = oracle(**{name: exact(value) for name, value in inputs.items()}, **options)
        return {f"d{name}": result for name, result in zip(self.gradients, results, strict=True)}

    def check(self, device, inputs, **options):
        """Runs the op and holds every gradient against the oracle."""
        got, expected = self.run(device, inputs, **options), self.expected(inputs, **options)
        stored = reachable(self, self.scan, device, inputs, options)
        keeps_narrow = dtype_name(options.get("chunk_states", np.float64(0))) in NARROW
        coarser = dtype_name(inputs[self.scan.main]) if device.name == "cuda" or keeps_narrow else None
        for name, value in expected.items():
            if value is None:
                assert got[name] is None, f"{name} of an input that was not given"
                continue
            assert got[name].dtype == inputs[name[1:]].dtype
            draws = [results[name] for results in stored]
            if coarser is not None and value.size < 64:  # a number a head or so: how far one rounding takes them is luck
                rng = np.random.default_rng(1)
                draws += [dithered(value, coarser, rng) for _ in range(3)]
            assert_accurate(got[name], value, name, coarser, draws)
        return got

    def has_tokens(self, name, value):
        return name == "dy" or self.scan.has_tokens(name, value)

    def has_rows(self, name, value):
        return name == "dy" or name in self.carried or self.scan.has_rows(name, value)

    def tokens(self, inputs, part):
        return {name: value[:, part] if self.has_tokens(name, value) else value for name, value in inputs.items()}

    def rows(self, inputs, part):
        return {name: value[part] if self.has_rows(name, value) else value for name, value in inputs.items()}


STRETCH = {"cpu": 256, "cuda": 128}  # tokens between the states that ssd_scan keeps
SSD_SCAN_BACKWARD = Backward(SSD_SCAN, ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"))
SELECTIVE_SCAN_BACKWARD = Backward(SELECTIVE_SCAN, ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"))
MAMBA2_SCAN_BACKWARD = Backward(
    MAMBA2_SCAN,
    ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight", "initial_conv_state", "initial_state"),
)
CAUSAL_CONV1D_BACKWARD = Backward(CAUSAL_CONV1D, ("x", "weight", "bias", "initial_state"))


# ---- one or a few new tokens ---------------------------------------------------------------------------------------------
def token_axes(batch, ntokens):
    return (batch,) if ntokens is None else (batch, ntokens)


def causal_conv1d_update(
    rng, dtype="float32", batch=3, ntokens=None, slots=None, dim=13, width=4, weight_dtype=None, state_dtype=None, omit=()
):
    w = weight_dtype or parameter_dtype(dtype)
    return without(
        dict(
            x=normal(rng, dtype, *token_axes(batch, ntokens), dim),
            state=normal(rng, state_dtype or dtype, batch if slots is None else slots, dim, width - 1),
            weight=normal(rng, w, dim, width),
            bias=normal(rng, w, dim),
        ),
        omit,
    )


def mamba2_state_update(
    rng,
    dtype="float32",
    batch=3,
    ntokens=None,
    slots=None,
    nheads=6,
    headdim=5,
    ngroups=2,
    dstate=7,
    dt_dtype=None,
    state_dtype=None,
    omit=(),
):
    p, tokens = parameter_dtype(dtype), token_axes(batch, ntokens)
    return without(
        dict(
            state=normal(rng, state_dtype or p, batch if slots is None else slots, nheads, headdim, dstate),
            x=normal(rng, dtype, *tokens, nheads, headdim),
            dt=steps(rng, dt_dtype or dtype, *tokens, nheads),
            A=rates(rng, p, nheads),
            B=normal(rng, dtype, *tokens, ngroups, dstate),
            C=normal(rng, dtype, *tokens, ngroups, dstate),
            D=normal(rng, p, nheads),
            z=normal(rng, dtype, *tokens, nheads, headdim),
            dt_bias=normal(rng, p, nheads),
        ),
        omit,
    )


def mamba1_state_update(
    rng,
    dtype="float32",
    batch=4,
    ntokens=None,
    slots=None,
    dim=12,
    ngroups=2,
    dstate=7,
    dt_dtype=None,
    state_dtype=None,
    complex_A=False,
    varying_B=True,
    varying_C=True,
    omit=(),
):
    p, tokens = parameter_dtype(dtype), token_axes(batch, ntokens)
    a = ("complex128" if dtype == "float64" else "complex64") if complex_A else p
    A = rates(rng, p, dim, dstate)
    if complex_A:
        A = (A + 1j * rng.uniform(-8, 8, A.shape)).astype(DTYPES[a])

    def projection(varying):
        return normal(rng, a if complex_A else dtype, *tokens, ngroups, dstate) if varying else normal(rng, a, dim, dstate)

    return without(
        dict(
            state=normal(rng, a if complex_A else state_dtype or p, batch if slots is None else slots, dim, dstate),
            x=normal(rng, dtype, *tokens, dim),
            dt=steps(rng, dt_dtype or dtype, *tokens, dim),
            A=A,
            B=projection(varying_B),
            C=projection(varying_C),
            D=normal(rng, p, dim),
            z=normal(rng, dtype, *tokens, dim),
            dt_bias=normal(rng, p, dim),
        ),
        omit,
    )


def mamba2_update(
    rng,
    dtype="float32",
    batch=3,
    ntokens=None,
    slots=None,
    nheads=6,
    headdim=10,
    ngroups=2,
    dstate=7,
    width=4,
    weight_dtype=None,
    state_dtype=None,
    conv_state_dtype=None,
    omit=(),
):
    p, tokens = parameter_dtype(dtype), token_axes(batch, ntokens)
    w, slots, d_inner = weight_dtype or p, batch if slots is None else slots, nheads * headdim
    conv_dim = d_inner + 2 * ngroups * dstate
    return without(
        dict(
            zxbcdt=np.concatenate([normal(rng, dtype, *tokens, d_inner + conv_dim), steps(rng, dtype, *tokens, nheads)], -1),
            conv_state=normal(rng, conv_state_dtype or dtype, slots, conv_dim, width - 1),
            state=normal(rng, state_dtype or p, slots, nheads, headdim, dstate),
            conv_weight=normal(rng, w, conv_dim, width),
            conv_bias=normal(rng, w, conv_dim),
            dt_bias=normal(rng, p, nheads),
            A=rates(rng, p, nheads),
            D=normal(rng, p, nheads),
            norm_weight=normal(rng, w, d_inner),
        ),
        omit,
    )


@dataclass(frozen=True)
class Update:
    """An op on one or a few new tokens of each row; its states, a cache of slots, are updated in place."""

    name: str
    inputs: Callable  # (rng, dtype, batch, ntokens, slots, ..., omit) -> {name: array}
    per_row: frozenset  # the inputs with rows on axis 0 and, with several tokens, tokens on axis 1
    states: dict  # the states -> the final state of the scan that they continue
    scan: Scan
    main: str
    options: dict = field(default_factory=dict)

    def run(self, device, inputs, out=None, **options):
        """y and the states afterwards. The caller's arrays stay as they are: every call works on copies of its states."""
        inputs = {name: copied(value) if name in self.states else value for name, value in inputs.items()}
        given = {name: device.put(value) for name, value in (inputs | options).items()}
        if out is not None:
            given["out"] = device.put(out)
        y = device.call(getattr(statescan, self.name), **given)
        assert out is None or y is given["out"]
        return {"y": device.get(y), **{name: device.get(given[name]) for name in self.states}}

    def expected(self, inputs, **options):
        oracle = getattr(getattr(reference, self.name), self.name)
        with np.errstate(over="ignore", invalid="ignore"):
            results = oracle(**{name: exact(value) for name, value in inputs.items()}, **options)
        return dict(zip(("y", *self.states), results, strict=True))

    def check(self, device, inputs, out=None, **options):
        got, expected = self.run(device, inputs, out, **options), self.expected(inputs, **options)
        for name in got:
            assert_accurate(got[name], expected[name], name)
        return got

    def has_rows(self, name, value):
        return name in self.per_row and (value.ndim > 2 or name not in ("B", "C"))  # a B or C of [d,n] is time-invariant

    def rows(self, inputs, part):
        return {name: value[part] if self.has_rows(name, value) else value for name, value in inputs.items()}

    def tokens(self, inputs, part):
        return {name: value[:, part] if self.has_rows(name, value) else value for name, value in inputs.items()}


CAUSAL_CONV1D_UPDATE = Update(
    "causal_conv1d_update",
    causal_conv1d_update,
    frozenset({"x"}),
    {"state": "final_state"},
    CAUSAL_CONV1D,
    "x",
    {"activation": "silu"},
)
MAMBA1_STATE_UPDATE = Update(
    "selective_state_update",
    mamba1_state_update,
    frozenset({"x", "dt", "B", "C", "z"}),
    {"state": "final_state"},
    SELECTIVE_SCAN,
    "x",
    {"dt_softplus": True},
)
MAMBA2_STATE_UPDATE = Update(
    "selective_state_update",
    mamba2_state_update,
    frozenset({"x", "dt", "B", "C", "z"}),
    {"state": "final_state"},
    SSD_SCAN,
    "x",
    {"dt_softplus": True},
)
MAMBA2_UPDATE = Update(
    "mamba2_update",
    mamba2_update,
    frozenset({"zxbcdt"}),
    {"conv_state": "final_conv_state", "state": "final_state"},
    MAMBA2_SCAN,
    "zxbcdt",
    {"ngroups": 2},
)
