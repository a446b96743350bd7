"""statescan.torch: the plain ops' results, gradients against the plain backwards and finite differences, and every way in which
torch runs an op: eager, autocast, checkpointed, compiled, exported, captured."""

import contextlib
import importlib
import shutil

import cases
import numpy as np
import pytest
import statescan
import support

torch = pytest.importorskip("torch")
import statescan.torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint


def norm_inputs(rng, dtype="float32", seqlen=67):
    x, z = (cases.normal(rng, dtype, 2, seqlen, 24) for _ in range(2))
    return {"x": x, "z": z, "weight": cases.normal(rng, cases.parameter_dtype(dtype), 24)}


NORM = cases.Scan("gated_rms_norm", norm_inputs, frozenset(), {"y": "out"}, {}, {"group_size": 8, "norm_before_gate": True})
OPS = {
    op.name: op for op in (cases.STATE_SCAN, cases.SSD_SCAN, cases.SELECTIVE_SCAN, cases.CAUSAL_CONV1D, cases.MAMBA2_SCAN, NORM)
}
SCANS = [name for name in OPS if name not in ("state_scan", "gated_rms_norm")]
UPDATES = {
    "causal_conv1d_update": cases.CAUSAL_CONV1D_UPDATE,
    "mamba1_state_update": cases.MAMBA1_STATE_UPDATE,
    "mamba2_state_update": cases.MAMBA2_STATE_UPDATE,
    "mamba2_update": cases.MAMBA2_UPDATE,
}
cpu = support.Cpu()
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_update = pytest.mark.parametrize("op", UPDATES.values(), ids=UPDATES)
every_scan = pytest.mark.parametrize("op", [OPS[name] for name in SCANS], ids=SCANS)


def tensor(array, device):
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device.name)
    return torch.from_numpy(array.copy()).to(device.name)


def tensors(arrays, device, requires_grad=False):
    made = {name: tensor(value, device) for name, value in arrays.items()}
    for value in made.values():
        value.requires_grad_(requires_grad)
    return made


def function(op):
    return getattr(statescan.torch, op.name)


def call(op, inputs, run=None, **options):
    """Every result, as a tuple. Skips where CUDA has no such kernel yet."""
    with implemented():
        results = (run or function(op))(**inputs, **{**op.options, **op.want_all, **options})
    return results if isinstance(results, tuple) else (results,)


@contextlib.contextmanager
def implemented():
    try:
        yield
    except (NotImplementedError, TypeError) as missing:
        if "no CUDA kernel" not in str(missing) and "float64 runs on the CPU" not in str(missing):
            raise
        pytest.skip(str(missing))


def scalar(results):
    """A loss in which every element of every result counts differently; the weights are the same in every call."""
    generator = torch.Generator().manual_seed(7)
    total = 0
    for result in results:
        real = torch.view_as_real(result) if result.is_complex() else result
        weights = torch.randn(real.shape, generator=generator).to(real.device)
        total = total + (weights * real.to(torch.promote_types(real.dtype, torch.float32))).sum()
    return total


def gradients(op, inputs, results):
    with implemented():
        return dict(zip(inputs, torch.autograd.grad(scalar(results), list(inputs.values()))))


def positional(op, inputs, options):
    """The arguments of the dispatcher's operator, in its order."""
    given = {**inputs, **options}
    schema = getattr(torch.ops.statescan, op.name).default._schema
    zero = {"int": 0, "bool": False, "float": 1e-5}
    return tuple(given.get(a.name, zero.get(str(a.type))) for a in schema.arguments)


def assert_same(got, expected, name=""):
    assert got.dtype == expected.dtype and got.device == expected.device, name
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}")


@pytest.fixture
def dynamo():
    import torch._dynamo

    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


# ---- results and gradients ---------------------------------------------------------------------------------------------------
@every_op
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_results_are_those_of_the_plain_op(rng, device, op, dtype):
    inputs = tensors(op.inputs(rng, dtype), device)
    expected = call(op, inputs, getattr(statescan, op.name))
    for got in (call(op, inputs), call(op, {n: v.clone().requires_grad_() for n, v in inputs.items()})):
        for result, value, name in zip(got, expected, op.out, strict=True):
            assert_same(result.detach(), value, name)


@every_op
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_gradients_are_those_of_the_plain_backward(rng, device, op, dtype):
    inputs = tensors(op.inputs(rng, dtype), device, requires_grad=True)
    results = call(op, inputs)
    got = gradients(op, inputs, results)
    cotangents = torch.autograd.grad(scalar(results), results)
    given = {n: v.detach() for n, v in inputs.items()}
    if op.name == "state_scan":
        first = {"log_decay": given["log_decay"], "states": results[0].detach(), "initial_state": given["initial_state"]}
        names = ["log_decay", "update", "initial_state"]
    else:
        first, names = given, list(inputs)
    # The plain backward takes dy after the required inputs, by name here.
    named = {f"d{name}": cotangent for name, cotangent in zip(op.out, cotangents)}
    expected = getattr(statescan, f"{op.name}_backward")(**first, **named, **op.options)
    order = GRADIENT_ORDER.get(op.name, names)
    for name, value in zip(order, expected, strict=True):
        assert_same(got[name], value, name)


GRADIENT_ORDER = {
    "mamba2_scan": [
        "zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight", "initial_conv_state", "initial_state",
    ],
}  # fmt: skip


@every_op
@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "reverse"))
def test_gradients_by_finite_differences(rng, device, op, reverse):
    inputs = tensors(op.inputs(rng, "float64", seqlen=6), device, requires_grad=True)
    options = {} if op is NORM else {"reverse": reverse}
    with implemented():
        assert torch.autograd.gradcheck(
            lambda *values: call(op, dict(zip(inputs, values)), **options), tuple(inputs.values()), fast_mode=True
        )


@pytest.mark.parametrize("varying", (True, False), ids=("varying", "constant"))
def test_complex_gradients_by_finite_differences(rng, device, varying):
    op = cases.SELECTIVE_SCAN
    inputs = tensors(
        op.inputs(rng, "float64", seqlen=6, complex_A=True, varying_B=varying, varying_C=varying), device, requires_grad=True
    )
    with implemented():
        assert torch.autograd.gradcheck(
            lambda *values: call(op, dict(zip(inputs, values))), tuple(inputs.values()), fast_mode=True
        )


@every_op
def test_only_the_gradients_that_are_asked_for(rng, device, op):
    """Each alone has the bits that it has among all, and nothing else is made."""
    arrays = op.inputs(rng)
    inputs = tensors(arrays, device, requires_grad=True)
    every = gradients(op, inputs, call(op, inputs))
    for name in inputs:
        inputs = tensors(arrays, device)
        inputs[name].requires_grad_()
        results = call(op, inputs)
        with implemented():
            scalar(results).backward()
        assert_same(inputs[name].grad, every[name], name)
        assert all(value.grad is None for other, value in inputs.items() if other != name)


@pytest.mark.parametrize("packed", (False, True), ids=("one sequence", "packed"))
@pytest.mark.parametrize("dstate", (24, 32, 80))
def test_gradients_that_hold_other_things_meanwhile(rng, device, dstate, packed):
    """dx, dB and dC have the bits that they have without the others, in whose memory states and sums may lie until they are made."""
    options = {"reverse": packed, "cu_seqlens": tensor(np.array([0, 70, 70, 300]), device) if packed else None}
    sizes = dict(batch=1 if packed else 2, seqlen=301, nheads=16, ngroups=1, headdim=40, dstate=dstate)
    arrays = OPS["ssd_scan"].inputs(rng, **sizes, **({"sequences": 3} if packed else {}))
    inputs = tensors(arrays, device, requires_grad=True)
    every = gradients(OPS["ssd_scan"], inputs, call(OPS["ssd_scan"], inputs, **options))
    for name in ("x", "dt", "B", "C"):
        inputs = tensors(arrays, device)
        inputs[name].requires_grad_()
        scalar(call(OPS["ssd_scan"], inputs, **options)).backward()
        assert_same(inputs[name].grad, every[name], name)


@every_scan
def test_a_loss_on_one_result_alone(rng, device, op):
    """A final state that no loss looks at costs nothing; a loss on it alone needs no gradient of y."""
    inputs = tensors(op.inputs(rng), device, requires_grad=True)
    both = call(op, inputs)
    with implemented():
        of_y = torch.autograd.grad(scalar(both[:1]), list(inputs.values()), retain_graph=True)
        of_states = torch.autograd.grad(sum(state.sum() for state in both[1:]), list(inputs.values()))
    without = {name: False for name in op.want_all}
    alone = torch.autograd.grad(scalar(call(op, inputs, **without)), list(inputs.values()))
    for name, one, other in zip(inputs, of_y, alone):
        assert_same(one, other, name)
    assert all(torch.isfinite(torch.view_as_real(g) if g.is_complex() else g).all() for g in of_states)
    assert of_states[list(inputs).index(next(iter(inputs)))].abs().max() > 0


@every_scan
def test_packed_sequences(rng, device, op):
    """Gradients of packed sequences are those of each alone, initial states included."""
    lengths = (5, 0, 21, 11)
    arrays = op.inputs(rng, "float64", batch=1, seqlen=sum(lengths) + 3, sequences=len(lengths))
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), device=device.name)
    inputs = tensors(arrays, device, requires_grad=True)
    packed = gradients(op, inputs, [r.tanh() for r in call(op, inputs, cu_seqlens=cu_seqlens)])
    singles = [call(op, _sequence(op, inputs, i, start, stop)) for i, (start, stop) in enumerate(_spans(lengths))]
    joined = [torch.cat([s[0] for s in singles] + [torch.zeros_like(singles[0][0][:, :0])], 1)]
    joined[0] = torch.nn.functional.pad(joined[0], (0, 0) * (joined[0].ndim - 2) + (0, 3))
    joined += [torch.cat([s[k] for s in singles]) for k in range(1, len(singles[0]))]
    alone = gradients(op, inputs, [r.tanh() for r in joined])
    for name in inputs:
        torch.testing.assert_close(packed[name], alone[name], rtol=1e-9, atol=1e-11)


def _spans(lengths):
    ends = np.cumsum(lengths)
    return [(int(end - length), int(end)) for end, length in zip(ends, lengths)]


def _sequence(op, inputs, i, start, stop):
    carried = set(op.carried.values())
    return {
        name: value[i : i + 1] if name in carried else value[:, start:stop] if op.has_tokens(name, value) else value
        for name, value in inputs.items()
    }


def test_lazy_conjugate_gradients(rng, device):
    """Autograd hands over conjugates and negatives that are not in memory yet."""
    op = cases.SELECTIVE_SCAN
    arrays = op.inputs(rng, "float64", seqlen=9, complex_A=True)

    def grads(conjugate, imaginary):
        inputs = tensors(arrays, device, requires_grad=True)
        y, state = call(op, inputs)
        with implemented():
            (conjugate(state).real.sum() + imaginary(torch.complex(y, y).conj()).sum()).backward()
        return [v.grad for v in inputs.values()]

    lazy = grads(lambda s: s.conj() * 1j, lambda c: c.imag)
    plain = grads(lambda s: s.conj().resolve_conj() * 1j, lambda c: -torch.view_as_real(c.resolve_conj().conj_physical())[..., 1])
    for one, other in zip(lazy, plain):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ("ssd_scan", "selective_scan"))
def test_states_at_positions(rng, device, name, dynamo):
    """They come last, eager and compiled. They have no gradient, which is said, not dropped."""
    op = OPS[name]
    inputs = tensors(op.inputs(rng), device)
    inputs["state_positions"] = torch.tensor([[0, 9, 67], [5, 5, -1]], device=device.name)
    expected = call(op, inputs, getattr(statescan, name))
    compiled = torch.compile(function(op), backend="aot_eager", fullgraph=True)
    for run in (function(op), compiled):
        for one, other in zip(call(op, inputs, run), expected, strict=True):
            assert_same(one, other)
    inputs["x"].requires_grad_()
    for run in (function(op), compiled):
        with pytest.raises(Exception, match=f"{name}: position_states have no gradient; ask for state_positions under"):
            call(op, inputs, run)
    with torch.no_grad():
        assert_same(call(op, inputs)[-1], expected[-1])


KEEPING = {
    "eager": lambda run: run,
    "checkpointed": lambda run: lambda *values: checkpoint(run, *values, use_reentrant=False),
    "reentrant": lambda run: lambda *values: checkpoint(run, *values, use_reentrant=True),
    "compiled": lambda run: torch.compile(run, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("way", KEEPING.values(), ids=KEEPING)
@pytest.mark.parametrize("packed", (False, True), ids=("batch", "packed"))
def test_kept_states(rng, device, way, packed, dynamo):
    """They go from the forward to the backward, unseen."""
    op, options = OPS["ssd_scan"], dict(return_final_state=True, dt_softplus=True)
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 300, 300, 690], device=device.name)
    arrays = op.inputs(rng, "bfloat16", seqlen=700, **(dict(batch=1, sequences=3) if packed else {}))
    inputs = tensors(arrays, device, requires_grad=True)
    run = way(lambda *values: statescan.torch.ssd_scan(**dict(zip(inputs, values)), **options, save_states=True))
    with implemented():
        results = run(*inputs.values())
        scalar(results).backward()
    *plain, states = statescan.ssd_scan(**tensors(arrays, device), **options, save_states=True)
    for one, other in zip(results, plain, strict=True):
        assert_same(one.detach(), other)
    del options["return_final_state"]
    cotangents = [result.detach().requires_grad_() for result in results]
    dy, dfinal_state = torch.autograd.grad(scalar(cotangents), cotangents)
    expected = statescan.ssd_scan_backward(
        **tensors(arrays, device), dy=dy, dfinal_state=dfinal_state, **options, chunk_states=states
    )
    for (name, given), value in zip(inputs.items(), expected, strict=True):
        assert_same(given.grad, value, name)


def test_states_are_kept_for_a_gradient_alone(rng, device):
    """Without one, the call makes nothing but its results: the memory of the states would show."""
    inputs = tensors(OPS["ssd_scan"].inputs(rng), device)
    y = statescan.torch.ssd_scan(**inputs)
    assert_same(statescan.torch.ssd_scan(**inputs, save_states=True), y)
    inputs["A"].requires_grad_()
    with torch.no_grad():
        assert_same(statescan.torch.ssd_scan(**inputs, save_states=True), y)
    saved = []
    with implemented(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        assert_same(statescan.torch.ssd_scan(**inputs, save_states=True).detach(), y)
    assert saved[-1] == (2, 1, *inputs["initial_state"].shape[1:])


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("given", ("float32", "bfloat16", "autocast"))
def test_states_are_kept_for_a_backward_that_reads_them(rng, device, given, reverse):
    """In reverse a GPU's fused backward makes them again all the same."""
    sizes = dict(seqlen=300, headdim=16, dstate=24)
    arrays = OPS["ssd_scan"].inputs(rng, "bfloat16" if given == "bfloat16" else "float32", **sizes)
    inputs = {name: tensor for name, tensor in tensors(arrays, device, requires_grad=True).items() if name != "z"}
    dtype = torch.float32 if given == "float32" else torch.bfloat16
    planned = {name: t.detach().to(dtype) if name in ("x", "B", "C") else t.detach() for name, t in inputs.items()}
    plan = statescan.plan("ssd_scan_backward", **planned, dy=planned["x"], reverse=reverse)
    assert plan.reads_kept_states == (not reverse or not plan.kernel.startswith("fused"))
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t)
    with implemented(), hooks, torch.autocast(device.name, torch.bfloat16, enabled=given == "autocast"):
        y = statescan.torch.ssd_scan(**inputs, dt_softplus=True, reverse=reverse, save_states=True)
    stretches = -(-300 // cases.STRETCH[device.name])
    assert ((2, stretches, *inputs["initial_state"].shape[1:]) in saved) == plan.reads_kept_states
    scalar([y]).backward()
    assert inputs["x"].grad.isfinite().all()


def test_whether_states_are_read_is_asked_of_the_library(rng, device, monkeypatch):
    asked, op = [], importlib.import_module("statescan.torch.ssd_scan")._OP
    kernel = op._backward_kernel
    monkeypatch.setattr(op, "_backward_kernel", lambda *args: asked.append(kernel(*args)) or (*asked[-1][:-1], False))
    inputs = tensors(OPS["ssd_scan"].inputs(rng), device, requires_grad=True)
    saved = []
    with implemented(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        statescan.torch.ssd_scan(**inputs, save_states=True)
    assert statescan.Plan(*asked[0]).reads_kept_states  # in float32 everywhere
    assert (2, 1, *inputs["initial_state"].shape[1:]) not in saved
    with pytest.raises(ValueError, match="^ssd_scan: "):
        statescan.torch.ssd_scan(**{**inputs, "A": inputs["A"][1:]}, save_states=True)


@pytest.mark.parametrize("asked", ((), ("final_state",), ("final_state", "position_states")), ids=lambda a: f"with {len(a)}")
def test_opcheck_of_kept_states(rng, device, asked):
    op = OPS["ssd_scan"]
    inputs = tensors(op.inputs(rng, seqlen=300), device, requires_grad="position_states" not in asked)
    options = {"dt_softplus": True, "save_states": True, "return_final_state": "final_state" in asked}
    if "position_states" in asked:
        options["state_positions"] = torch.tensor([[0, 9], [5, -1]], device=device.name)
    with implemented():
        results = torch.ops.statescan.ssd_scan(*positional(op, inputs, options))
    assert results[-1].shape == (2, -(-300 // cases.STRETCH[device.name]), *inputs["initial_state"].shape[1:])
    opcheck(torch.ops.statescan.ssd_scan.default, positional(op, inputs, options))


# ---- what is refused ---------------------------------------------------------------------------------------------------------
@every_op
def test_second_derivatives_are_refused(rng, device, op):
    inputs = tensors(op.inputs(rng), device, requires_grad=True)
    first = next(iter(inputs.values()))
    with implemented():
        (gradient,) = torch.autograd.grad(scalar(call(op, inputs)), first, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op.name}: second derivatives are not available"):
        gradient.sum().backward()


def test_forward_mode_is_refused(rng):
    inputs = tensors(NORM.inputs(rng), cpu)
    x, tangent = inputs["x"], torch.ones_like(inputs["x"])
    with pytest.raises(NotImplementedError, match="gated_rms_norm: x has a tangent"):
        torch.func.jvp(lambda x: statescan.torch.gated_rms_norm(x), (x,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        with pytest.raises(NotImplementedError, match="gated_rms_norm: z has a tangent"):
            statescan.torch.gated_rms_norm(x, dual)
        statescan.torch.gated_rms_norm(x)


def test_errors_of_the_contract_come_through(rng):
    inputs = {n: torch.from_numpy(v) for n, v in cases.ssd_scan(rng).items()}
    for requires_grad in (False, True):
        wrong = {**inputs, "B": inputs["B"][:, :, :, :3].clone().requires_grad_(requires_grad)}
        with pytest.raises(ValueError, match=r"ssd_scan: C has shape"):
            statescan.torch.ssd_scan(**wrong)
        with pytest.raises(TypeError, match=r"ssd_scan: B is float64; expected float32"):
            statescan.torch.ssd_scan(**{**inputs, "B": inputs["B"].double().requires_grad_(requires_grad)})
    with pytest.raises(ValueError, match=r"causal_conv1d: activation"):
        statescan.torch.causal_conv1d(torch.zeros(1, 3, 2), torch.zeros(2, 4), activation="gelu")
    with pytest.raises(RuntimeError, match="Tensor"):
        statescan.torch.gated_rms_norm(np.zeros((2, 3), np.float32))


def test_a_saved_tensor_that_changed_is_an_error(rng, device):
    inputs = tensors(NORM.inputs(rng), device, requires_grad=True)
    (y,) = call(NORM, inputs)
    with torch.no_grad():
        inputs["z"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_update
def test_decode_steps_have_no_gradient(rng, device, op):
    inputs = tensors(op.inputs(rng), device)
    name = next(name for name in inputs if name not in op.states)
    inputs[name].requires_grad_()
    with pytest.raises(TypeError, match=rf"{op.name}: {name} requires grad.*no_grad"):
        function(op)(**inputs, **op.options)
    with pytest.raises(TypeError, match=rf"{op.name}: {name} requires grad.*no_grad"):
        getattr(torch.ops.statescan, op.name)(*positional(op, inputs, op.options))


# ---- the dispatcher ------------------------------------------------------------------------------------------------------------
@every_op
@pytest.mark.parametrize("all_results", (True, False), ids=("all", "y"))
def test_opcheck(rng, device, op, all_results):
    inputs = tensors(op.inputs(rng, seqlen=9), device, requires_grad=True)
    defaults = {"dt_softplus": True, "eps": 1e-5} | op.options | (op.want_all if all_results else {})
    with implemented():
        scalar(call(op, inputs)).backward()  # skips here where CUDA has no backward yet
    opcheck(getattr(torch.ops.statescan, op.name).default, positional(op, inputs, defaults))


@every_update
def test_opcheck_of_decode_steps(rng, device, op):
    defaults = {"dt_softplus": True, "eps": 1e-5} | op.options
    inputs = tensors(op.inputs(rng), device)
    opcheck(getattr(torch.ops.statescan, op.name).default, positional(op, inputs, defaults))


@every_op
@pytest.mark.parametrize("dtype", ("float32", "float64", "bfloat16"))
def test_fake_results_are_like_real_ones(rng, device, op, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = tensors(op.inputs(rng, dtype), device)
    variants = [{}] if op is NORM or op.name == "state_scan" else [{}, {name: False for name in op.want_all}]
    for options in variants:
        real = call(op, inputs, **options)
        mode = FakeTensorMode()
        with mode:
            fake = call(op, {name: mode.from_tensor(value) for name, value in inputs.items()}, **options)
        for one, other in zip(fake, real, strict=True):
            assert (one.shape, one.dtype, one.stride(), one.device) == (other.shape, other.dtype, other.stride(), other.device)


@pytest.mark.parametrize("op", (cases.CAUSAL_CONV1D, cases.SELECTIVE_SCAN), ids=lambda op: op.name)
def test_channels_first_stays_channels_first(rng, device, op):
    """What comes out is laid out as what it follows, and torch.compile is told so."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = tensors(op.inputs(rng), device)
    for name in {"x", "dt", "z"} & inputs.keys():
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    y = call(op, inputs)[0]
    mode = FakeTensorMode()
    with mode:
        fake = call(op, {name: mode.from_tensor(value) for name, value in inputs.items()})[0]
    assert y.stride() == fake.stride() == inputs["x"].stride()
    inputs = {name: value.requires_grad_() if value.is_floating_point() else value for name, value in inputs.items()}
    with implemented():
        call(op, inputs)[0].sum().backward()
    for name in {"x", "dt", "z"} & inputs.keys():
        assert inputs[name].grad.stride() == inputs[name].stride()
    opcheck(getattr(torch.ops.statescan, op.name).default, positional(op, inputs, {"dt_softplus": True} | op.options))


@pytest.mark.parametrize("options", ({"complex_A": True}, {"sequences": 4, "batch": 1}), ids=("complex", "packed"))
def test_fake_states_of_selective_scan(rng, device, options):
    from torch._subclasses.fake_tensor import FakeTensorMode

    op = cases.SELECTIVE_SCAN
    inputs = tensors(op.inputs(rng, **options), device)
    if "sequences" in options:
        inputs["cu_seqlens"] = torch.tensor([0, 5, 5, 30, 67], device=device.name)
    real = call(op, inputs)
    mode = FakeTensorMode()
    with mode:
        fake = call(op, {name: mode.from_tensor(value) for name, value in inputs.items()})
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


# ---- compiled, exported --------------------------------------------------------------------------------------------------------
@every_op
def test_compiled_with_gradient(rng, device, op, dynamo):
    def model(**inputs):
        main = next(iter(inputs))
        return call_raw(op, {**inputs, main: inputs[main] * 1.5})

    arrays = op.inputs(rng)
    eager_inputs = tensors(arrays, device, requires_grad=True)
    eager = model(**eager_inputs)
    expected = gradients(op, eager_inputs, eager)
    inputs = tensors(arrays, device, requires_grad=True)
    results = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)
    for name, one, other in zip(op.out, results, eager, strict=True):
        assert_same(one.detach(), other.detach(), name)
    for name, value in gradients(op, inputs, results).items():
        assert_same(value, expected[name], name)


def call_raw(op, inputs):
    results = function(op)(**inputs, **op.options, **op.want_all)
    return results if isinstance(results, tuple) else (results,)


@every_scan
def test_lengths_share_one_graph(rng, device, op, dynamo):
    """After the second length nothing is compiled again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **inputs: call_raw(op, inputs), backend=counter, fullgraph=True)
    for seqlen in (16, 24, 31, 40, 57):
        inputs = tensors(op.inputs(rng, seqlen=seqlen), device)
        for one, other in zip(compiled(**inputs), call_raw(op, inputs), strict=True):
            assert_same(one, other)
    assert counter.frame_count <= 2


def test_narrow_initial_state(rng, device, dynamo):
    """Its gradient has its dtype, eager and compiled, whatever the library computes in."""
    op = cases.STATE_SCAN
    arrays = op.inputs(rng, state_dtype="bfloat16")
    got = []
    for run in (function(op), torch.compile(function(op), backend="aot_eager", fullgraph=True)):
        inputs = tensors(arrays, device, requires_grad=True)
        got.append(gradients(op, inputs, call(op, inputs, run)))
    assert got[0]["initial_state"].dtype == torch.bfloat16
    for name in got[0]:
        assert_same(got[1][name], got[0][name], name)


def test_inductor(rng, device, dynamo):
    """The default backend, around two ops with a gradient."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")

    def model(x, z, weight, log_decay, update):
        y = statescan.torch.gated_rms_norm(x.sin(), z * 2, weight)
        states, final = statescan.torch.state_scan(log_decay, update * y.mean())
        return y.cos(), states, final

    arrays = [*NORM.inputs(rng, seqlen=5).values(), *list(cases.state_scan(rng).values())[:2]]
    got, expected = [], []
    for run, kept in ((torch.compile(model, fullgraph=True), got), (model, expected)):
        inputs = [tensor(a, device).requires_grad_() for a in arrays]
        results = run(*inputs)
        scalar(results).backward()
        kept += [*(r.detach() for r in results), *(i.grad for i in inputs)]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_update
def test_compiled_decode_step(rng, device, op, dynamo):
    arrays = op.inputs(rng)

    def run(step):
        inputs = tensors(arrays, device)
        outputs = [step(inputs) for _ in range(3)]
        return [*outputs, *(inputs[name] for name in op.states)]

    def step(inputs):
        return function(op)(**inputs, **op.options) * 2

    for one, other in zip(run(torch.compile(step, backend="aot_eager", fullgraph=True)), run(step), strict=True):
        assert_same(one, other)


class Module(torch.nn.Module):
    """An op as torch.export wants it."""

    def __init__(self, op, names):
        super().__init__()
        self.op, self.names = op, names

    def forward(self, *values):
        return call_raw(self.op, dict(zip(self.names, values)))


@every_scan
@pytest.mark.parametrize("strict", (True, False), ids=("strict", "nonstrict"))
def test_exported(rng, device, op, strict):
    arrays = op.inputs(rng, seqlen=16)
    inputs = tensors(arrays, device)
    length = torch.export.Dim("seqlen", min=2, max=4096)
    dynamic = [{1: length} if op.has_tokens(name, value) else None for name, value in arrays.items()]
    program = torch.export.export(
        Module(op, list(inputs)), tuple(inputs.values()), dynamic_shapes=(tuple(dynamic),), strict=strict
    )
    assert f"statescan.{op.name}" in str(program.graph)
    longer = tensors(op.inputs(rng, seqlen=41), device)
    for one, other in zip(program.module()(*longer.values()), call_raw(op, longer), strict=True):
        assert_same(one, other)


# ---- checkpointing and autocast --------------------------------------------------------------------------------------------------
@every_op
@pytest.mark.parametrize("use_reentrant", (True, False))
def test_activation_checkpointing(rng, device, op, use_reentrant):
    arrays = op.inputs(rng)
    inputs = tensors(arrays, device, requires_grad=True)
    expected = gradients(op, inputs, call(op, inputs))
    inputs = tensors(arrays, device, requires_grad=True)
    results = checkpoint(lambda *values: call_raw(op, dict(zip(inputs, values))), *inputs.values(), use_reentrant=use_reentrant)
    scalar(results).backward()
    for name, value in inputs.items():
        assert_same(value.grad, expected[name], name)


@every_op
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_autocast(rng, device, op, compiled, dynamo):
    """Under autocast float32 activations are rounded to its dtype, parameters stay float32, and gradients come in float32."""
    arrays = op.inputs(rng)
    inputs = tensors(arrays, device, requires_grad=True)
    run = torch.compile(lambda i: call_raw(op, i), backend="aot_eager", fullgraph=True) if compiled else lambda i: call(op, i)
    with torch.autocast(device.name, torch.bfloat16):
        results = run(inputs)
    assert results[0].dtype == torch.bfloat16
    for name, value in gradients(op, inputs, results).items():
        assert value.dtype == torch.float32, name
    narrow = {"x", "B", "C", "z", "update", "zxbcdt"}
    rounded = {n: v.detach().to(torch.bfloat16) if n in narrow else v.detach() for n, v in inputs.items()}
    for one, other in zip(results, call(op, rounded), strict=True):
        assert_same(one.detach(), other)
    with torch.autocast(device.name, torch.bfloat16, enabled=False):
        assert call(op, inputs)[0].dtype == torch.float32


@every_update
def test_autocast_of_decode_steps(rng, device, op):
    inputs = tensors(op.inputs(rng), device)
    with torch.autocast(device.name, torch.bfloat16):
        y = function(op)(**inputs, **op.options)
    assert y.dtype == torch.bfloat16


def test_autocast_keeps_constant_projections_wide(rng, device):
    """B and C of [dim, dstate] are parameters, as A is."""
    inputs = tensors(cases.selective_scan(rng, varying_B=False, varying_C=False), device)
    with torch.autocast(device.name, torch.bfloat16):
        y = statescan.torch.selective_scan(**inputs, dt_softplus=True)
    assert y.dtype == torch.bfloat16


def test_autocast_leaves_float64_alone(rng):
    inputs = tensors(NORM.inputs(rng, "float64"), cpu)
    with torch.autocast("cpu", torch.bfloat16):
        assert statescan.torch.gated_rms_norm(**inputs).dtype == torch.float64


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------------------
@every_op
def test_captured_in_a_cuda_graph(rng, device, op):
    """Forward and backward captured, replayed on other data."""
    if device.name != "cuda":
        pytest.skip("needs a GPU")
    first, second = op.inputs(rng), op.inputs(rng)
    static = tensors(first, device, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(op, static, call(op, static))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call_raw(op, static)
        weights = [torch.ones_like(r) for r in results]
        captured = torch.autograd.grad(results, list(static.values()), weights)
    fresh = tensors(second, device, requires_grad=True)
    with torch.no_grad():
        for name, value in fresh.items():
            static[name].copy_(value)
    graph.replay()
    expected = call_raw(op, fresh)
    for one, other in zip(results, expected, strict=True):
        assert_same(one.detach(), other.detach())
    for one, other in zip(captured, torch.autograd.grad(expected, list(fresh.values()), weights), strict=True):
        assert_same(one, other)
