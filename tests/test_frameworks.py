"""Arrays of any framework in and out, and what is refused; processes, forks and threads around the library."""

import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import cases
import numpy as np
import pytest
import statescan
from support import DTYPES, NARROW, Cpu, assert_same_bits, copied, laid_out, poison

SCANS = {op.name: op for op in (cases.STATE_SCAN, cases.SSD_SCAN, cases.SELECTIVE_SCAN, cases.CAUSAL_CONV1D, cases.MAMBA2_SCAN)}
UPDATES = {
    "causal_conv1d_update": cases.CAUSAL_CONV1D_UPDATE,
    "mamba1_state_update": cases.MAMBA1_STATE_UPDATE,
    "mamba2_state_update": cases.MAMBA2_STATE_UPDATE,
    "mamba2_update": cases.MAMBA2_UPDATE,
}
every_scan = pytest.mark.parametrize("op", SCANS.values(), ids=SCANS)
every_update = pytest.mark.parametrize("op", UPDATES.values(), ids=UPDATES)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def to_torch(a):
    """The same memory as a torch tensor, strides and all."""
    import torch

    if not isinstance(a, np.ndarray):
        return a
    return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == DTYPES["bfloat16"] else torch.from_numpy(a)


def to_numpy(t):
    import torch

    return t.view(torch.int16).numpy().view(DTYPES["bfloat16"]) if t.dtype == torch.bfloat16 else t.numpy()


def as_torch(arguments):
    return {name: to_torch(value) for name, value in arguments.items()}


# ---- NumPy -------------------------------------------------------------------------------------------------------------
CONV_STATES = {("causal_conv1d", "final_state"), ("mamba2_scan", "final_conv_state")}  # they hold inputs, in the inputs' type


@every_scan
@pytest.mark.parametrize("dtype", ("float32", "float64", *NARROW))
def test_numpy_in_numpy_out(rng, op, dtype):
    for name, value in op.run(Cpu(), op.inputs(rng, dtype), **op.options).items():
        assert type(value) is np.ndarray
        holds_inputs = name not in op.carried or (op.name, name) in CONV_STATES
        assert value.dtype == DTYPES[dtype if holds_inputs else cases.parameter_dtype(dtype)]
        assert value.flags.c_contiguous and value.flags.writeable and value.flags.aligned


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_large_numpy_results_begin_with_a_cache_line(rng, dtype):
    x = rng.standard_normal((3, 900, 101)).astype(DTYPES[dtype])
    for y in [statescan.gated_rms_norm(x) for _ in range(3)]:
        assert y.ctypes.data % 64 == 0 and y.shape == x.shape and y.dtype == x.dtype
        assert y.flags.c_contiguous and y.flags.writeable


def test_numpy_arrays_whose_bytes_mean_something_else(rng):
    """Byte-swapped elements, and strides that are no multiple of the element: refused, or read rightly; never misread."""
    inputs = cases.causal_conv1d(rng)
    plain = statescan.causal_conv1d(**inputs)
    packed = np.zeros(inputs["x"].shape, np.dtype([("value", np.float32), ("tag", np.uint8)]))
    packed["value"] = inputs["x"]
    for x in (inputs["x"].astype(">f4"), packed["value"]):
        try:
            y = statescan.causal_conv1d(**{**inputs, "x": x})
        except (TypeError, ValueError) as refusal:
            assert "causal_conv1d: x" in str(refusal)
        else:
            assert_same_bits(y, plain, "y")


@pytest.mark.parametrize(
    "x",
    (
        [[[1.0, 2.0]]],
        3.0,
        "x",
        object(),
        np.zeros((2, 5, 3), object),
        np.zeros((2, 5, 3), np.longdouble),
        np.zeros((2, 5, 3), "U4"),
        np.zeros((2, 5, 3), bool),
        np.zeros((2, 5, 3), np.uint8),
        np.zeros((2, 5, 3), np.int64),
        np.zeros((2, 5, 3), np.complex64),
    ),
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}",
)
def test_what_is_no_float_array(x):
    with pytest.raises(TypeError, match="causal_conv1d: x"):
        statescan.causal_conv1d(x, np.zeros((3, 4), np.float32))


def test_subclasses_of_ndarray(rng):
    class Named(np.ndarray):
        pass

    inputs = cases.causal_conv1d(rng)
    y = statescan.causal_conv1d(**{**inputs, "x": inputs["x"].view(Named)})
    assert_same_bits(np.asarray(y), statescan.causal_conv1d(**inputs), "y")


# ---- anything with __dlpack__ --------------------------------------------------------------------------------------------
class Wrapped:
    """The least that DLPack asks for."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@every_scan
def test_dlpack_inputs(rng, op):
    inputs = op.inputs(rng)
    plain = op.run(Cpu(), inputs, **op.options)
    results = getattr(statescan, op.name)(**{k: Wrapped(v) for k, v in inputs.items()}, **op.options, **op.want_all)
    for name, value in zip(op.out, results, strict=True):
        assert_same_bits(np.asarray(value), plain[name], name)


def test_dlpack_output(rng):
    inputs = cases.causal_conv1d(rng)
    out = Wrapped(poison(inputs["x"].shape, np.float32))
    assert statescan.causal_conv1d(**inputs, out=out) is out
    assert_same_bits(out.array, statescan.causal_conv1d(**inputs), "y")


def test_mixed_frameworks(rng, torch):
    """Parameters of one framework, activations of another: results come in that of the activations."""
    inputs = cases.ssd_scan(rng)
    inputs["dt"] = abs(inputs["dt"])
    plain = statescan.ssd_scan(**inputs)
    y = statescan.ssd_scan(**{**inputs, "x": to_torch(inputs["x"])})
    assert isinstance(y, torch.Tensor)
    assert_same_bits(y.numpy(), plain, "y")
    y = statescan.ssd_scan(**{**inputs, "A": to_torch(inputs["A"]), "B": Wrapped(inputs["B"])})
    assert isinstance(y, np.ndarray)
    assert_same_bits(y, plain, "y")


# ---- torch -------------------------------------------------------------------------------------------------------------
@every_scan
@pytest.mark.parametrize("dtype", ("float32", "float64", *NARROW))
def test_torch_in_torch_out(rng, torch, op, dtype):
    inputs = op.inputs(rng, dtype)
    plain = op.run(Cpu(), inputs, **op.options)
    results = getattr(statescan, op.name)(**as_torch(inputs), **op.options, **op.want_all)
    for name, value in zip(op.out, results, strict=True):
        assert type(value) is torch.Tensor and value.device.type == "cpu" and value.is_contiguous()
        assert_same_bits(to_numpy(value), plain[name], name)


@every_update
@pytest.mark.parametrize("dtype", ("float32", "float64", *NARROW))
def test_torch_states_are_updated_in_place(rng, torch, op, dtype):
    inputs = op.inputs(rng, dtype, batch=3, slots=5)
    table = np.array([4, -1, 0])
    expected = op.run(Cpu(), inputs, state_indices=table, **op.options)
    given = as_torch({name: copied(value) for name, value in inputs.items()})
    addresses = {name: value.data_ptr() for name, value in given.items()}
    y = getattr(statescan, op.name)(**given, state_indices=torch.from_numpy(table), **op.options)
    assert_same_bits(to_numpy(y), expected["y"], "y")
    for name in op.states:
        assert given[name].data_ptr() == addresses[name]
        assert_same_bits(to_numpy(given[name]), expected[name], name)


@every_scan
def test_torch_views_and_outputs(rng, torch, op):
    inputs = op.inputs(rng)
    plain = op.run(Cpu(), inputs, **op.options)
    views = as_torch({name: laid_out(value, "transposed") for name, value in inputs.items()})
    out = {op.out[name]: to_torch(laid_out(poison(value.shape, value.dtype), "channels_first")) for name, value in plain.items()}
    addresses = {name: value.data_ptr() for name, value in out.items()}
    results = getattr(statescan, op.name)(**views, **out, **op.options)
    for name, value in zip(op.out, results, strict=True):
        assert value is out[op.out[name]] and value.data_ptr() == addresses[op.out[name]]
        assert_same_bits(to_numpy(value), plain[name], name)


def test_torch_gated_rms_norm(rng, torch):
    x, z = cases.normal(rng, "bfloat16", 2, 5, 24)[None].repeat(2, axis=0)
    y = statescan.gated_rms_norm(to_torch(x), to_torch(z))
    assert y.dtype == torch.bfloat16
    assert_same_bits(to_numpy(y), statescan.gated_rms_norm(x, z), "y")


def test_torch_expanded_and_sliced(rng, torch):
    inputs = as_torch(cases.ssd_scan(rng))
    wide = torch.randn(2, 67, 100)
    wide[:, :, 10:40] = inputs["x"].reshape(2, 67, 30)
    views = {
        **inputs,
        "x": wide[:, :, 10:40].unflatten(2, (6, 5)),
        "A": inputs["A"][:1].expand(6),
        "dt": inputs["dt"][:, :, :1].expand(-1, -1, 6),
    }
    dense = {name: value.contiguous() for name, value in views.items()}
    assert torch.equal(statescan.ssd_scan(**views, dt_softplus=True), statescan.ssd_scan(**dense, dt_softplus=True))


def test_torch_outputs_outlive_the_call(rng, torch):
    inputs = as_torch(cases.causal_conv1d(rng, dim=300))
    expected = statescan.causal_conv1d(**inputs)
    kept = [statescan.causal_conv1d(**inputs) for _ in range(50)]
    torch.randn(100, 40000).sum()
    assert all(torch.equal(y, expected) for y in kept)
    assert len({y.data_ptr() for y in kept}) == 50


# ---- refusals ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ("x", "dt", "A", "D", "initial_state"))
def test_tensors_that_require_grad(rng, torch, name):
    inputs = as_torch(cases.ssd_scan(rng))
    inputs["dt"] = abs(inputs["dt"])
    plain = statescan.ssd_scan(**inputs)
    inputs[name].requires_grad_()
    with pytest.raises(TypeError, match=rf"ssd_scan: {name} requires grad.*{name}\.detach\(\)"):
        statescan.ssd_scan(**inputs)
    with torch.no_grad():
        assert torch.equal(statescan.ssd_scan(**inputs), plain)
    with torch.inference_mode():
        assert torch.equal(statescan.ssd_scan(**inputs), plain)
    assert torch.equal(statescan.ssd_scan(**{**inputs, name: inputs[name].detach()}), plain)


def test_parameters_require_grad(rng, torch):
    inputs = as_torch(cases.causal_conv1d(rng))
    with pytest.raises(TypeError, match=r"causal_conv1d: weight requires grad"):
        statescan.causal_conv1d(**{**inputs, "weight": torch.nn.Parameter(inputs["weight"])})


def test_lazy_conjugates_and_negatives(rng, torch):
    """Their memory holds other values than they show; resolved, they are taken."""
    inputs = as_torch(cases.selective_scan(rng, complex_A=True))
    for name in ("A", "B", "C", "initial_state"):
        lazy = inputs[name].conj()
        with pytest.raises(TypeError, match=rf"selective_scan: {name} is a lazy negative or conjugate view.*resolve_conj"):
            statescan.selective_scan(**{**inputs, name: lazy})
        statescan.selective_scan(**{**inputs, name: lazy.resolve_conj()})
    negative = torch.complex(inputs["x"], inputs["x"]).conj().imag
    assert negative.is_neg()
    for view in (negative, negative.transpose(0, 0)):
        with pytest.raises(TypeError, match=r"selective_scan: x is a lazy negative"):
            statescan.selective_scan(**{**inputs, "x": view})
    resolved = statescan.selective_scan(**{**inputs, "x": negative.resolve_neg()}, dt_softplus=True)
    assert torch.equal(resolved, statescan.selective_scan(**{**inputs, "x": -inputs["x"]}, dt_softplus=True))


def test_tensors_without_memory(rng, torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = as_torch(cases.ssd_scan(rng))
    with pytest.raises((TypeError, ValueError), match=r"ssd_scan: x"):
        statescan.ssd_scan(**{**inputs, "x": inputs["x"].to("meta")})
    with pytest.raises((TypeError, ValueError), match=r"ssd_scan: B"):
        statescan.ssd_scan(**{**inputs, "B": inputs["B"].to("meta")})
    mode = FakeTensorMode()
    with pytest.raises((TypeError, ValueError), match=r"ssd_scan: x"):
        statescan.ssd_scan(**{**inputs, "x": mode.from_tensor(inputs["x"])})
    with pytest.raises((TypeError, ValueError), match=r"ssd_scan: out|ssd_scan: y"):
        statescan.ssd_scan(**inputs, out=mode.from_tensor(inputs["x"]))


@pytest.mark.parametrize("dtype", ("int32", "int64", "uint8", "bool", "complex64"))
def test_torch_dtypes_that_no_op_takes(rng, torch, dtype):
    inputs = as_torch(cases.ssd_scan(rng))
    with pytest.raises(TypeError, match=r"ssd_scan: x"):
        statescan.ssd_scan(**{**inputs, "x": inputs["x"].to(getattr(torch, dtype))})


def test_sparse_tensors(rng, torch):
    inputs = as_torch(cases.ssd_scan(rng))
    with pytest.raises((TypeError, ValueError), match=r"ssd_scan: x"):
        statescan.ssd_scan(**{**inputs, "x": inputs["x"].to_sparse()})


def test_jax_arrays_are_no_outputs(rng):
    jax = pytest.importorskip("jax")
    inputs = cases.causal_conv1d(rng)
    with jax.default_device(jax.devices("cpu")[0]):
        x, out = jax.numpy.asarray(inputs["x"]), jax.numpy.zeros(inputs["x"].shape)
    with pytest.raises(TypeError, match=r"causal_conv1d: out is a JAX array, which is immutable"):
        statescan.causal_conv1d(**inputs, out=out)
    y = statescan.causal_conv1d(**{**inputs, "x": x})
    assert_same_bits(np.asarray(y), statescan.causal_conv1d(**inputs), "y")


# ---- references --------------------------------------------------------------------------------------------------------
def test_no_references_leak(rng):
    inputs = cases.ssd_scan(rng, seqlen=3)
    out = np.zeros_like(inputs["x"])
    objects = [*inputs.values(), out]
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(20):
        statescan.ssd_scan(**inputs, dt_softplus=True, out=out, return_final_state=True)
        with pytest.raises(ValueError):
            statescan.ssd_scan(**{**inputs, "B": inputs["C"][:, :1]}, out=out)
    assert [sys.getrefcount(o) for o in objects] == before


def test_no_torch_references_leak(rng, torch):
    inputs = as_torch(cases.ssd_scan(rng, seqlen=3))
    before = [sys.getrefcount(o) for o in inputs.values()]
    for _ in range(20):
        statescan.ssd_scan(**inputs, return_final_state=True)
        with pytest.raises(ValueError):
            statescan.ssd_scan(**{**inputs, "B": inputs["C"][:, :1]})
    assert [sys.getrefcount(o) for o in inputs.values()] == before


# ---- processes and threads ---------------------------------------------------------------------------------------------
def python(code, **environment):
    """Runs a script in a fresh interpreter that finds what this one finds; returns what it prints."""
    path = os.pathsep.join(p for p in (os.path.dirname(os.path.dirname(statescan.__file__)), os.path.dirname(__file__)) if p)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")]), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_brings_in_no_framework():
    loaded = python("""
        import sys
        import numpy as np
        import statescan
        statescan.causal_conv1d(np.zeros((1, 5, 3), np.float32), np.zeros((3, 4), np.float32))
        statescan.info()
        print(*sorted({"torch", "jax", "jaxlib", "cupy", "ml_dtypes", "tabulate", "safetensors", "tqdm"} & set(sys.modules)))
    """)
    assert loaded == ""


def test_pickles():
    for name in {*SCANS, *(op.name for op in UPDATES.values()), "gated_rms_norm", "info", "plan", "Plan"}:
        public = getattr(statescan, name)
        assert pickle.loads(pickle.dumps(public)) is public
    plan = statescan.plan("causal_conv1d", np.zeros((1, 5, 3), np.float32), np.zeros((3, 4), np.float32))
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_children():
    """known_bugs 42: a child inherits a pool whose threads it does not have."""
    assert (
        python("""
        import os, signal, sys
        import cases, numpy as np, statescan
        statescan.set_num_threads(2)
        inputs = cases.ssd_scan(np.random.default_rng(1), batch=4, seqlen=131)
        before = statescan.ssd_scan(**inputs, dt_softplus=True)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            same = np.array_equal(statescan.ssd_scan(**inputs, dt_softplus=True), before)
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if np.array_equal(statescan.ssd_scan(**inputs, dt_softplus=True), before) else 3)
            os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 2)
        _, status = os.waitpid(child, 0)
        assert np.array_equal(statescan.ssd_scan(**inputs, dt_softplus=True), before)
        print(status)
    """)
        == "0"
    )


@pytest.mark.parametrize("method", ("spawn", "fork", "forkserver"))
def test_multiprocessing(method):
    assert (
        python(f"""
        import multiprocessing, statescan, numpy as np
        if __name__ == "__main__":
            rng = np.random.default_rng(1)
            x, weight = rng.standard_normal((4, 50, 16)).astype(np.float32), rng.standard_normal((16, 4)).astype(np.float32)
            expected = statescan.causal_conv1d(x, weight)
            with multiprocessing.get_context("{method}").Pool(2) as pool:
                results = pool.starmap_async(statescan.causal_conv1d, [(x, weight)] * 4).get(timeout=60)
            print(all(np.array_equal(y, expected) for y in results))
    """)
        == "True"
    )


def test_python_threads(rng):
    """The GIL is released while an op runs; calls from many threads do not disturb each other."""
    work = [(op, op.inputs(np.random.default_rng(seed), batch=2, seqlen=100)) for seed in range(3) for op in SCANS.values()]
    alone = [op.run(Cpu(), inputs, **op.options) for op, inputs in work]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            together = list(pool.map(lambda item: item[0].run(Cpu(), item[1], **item[0].options), work))
            for got, expected in zip(together, alone):
                for name in got:
                    assert_same_bits(got[name], expected[name], name)


ISAS = ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    """Each op in each dtype within its gate, also on machines that have less than this one."""
    if ISAS.index(isa) > ISAS.index(python("import statescan; print(statescan.cpu_isa())", STATESCAN_ISA="")):
        pytest.skip(f"this machine has no {isa}")
    assert (
        python(
            """
        import itertools
        import cases, numpy as np, statescan
        import reference.gated_rms_norm
        from support import Cpu, assert_accurate, exact
        from test_frameworks import SCANS, UPDATES
        for op, dtype in itertools.product((*SCANS.values(), *UPDATES.values()), ("float32", "float64", "float16", "bfloat16")):
            rng = np.random.default_rng(1)
            op.check(Cpu(), op.inputs(rng, dtype, batch=2), **op.options)
            if op is cases.SELECTIVE_SCAN or op is cases.MAMBA1_STATE_UPDATE:
                op.check(Cpu(), op.inputs(rng, dtype, complex_A=True), **op.options)
            if op is cases.SSD_SCAN:
                op.check(Cpu(), op.inputs(rng, dtype, seqlen=200, nheads=2, ngroups=1, headdim=64, dstate=128), **op.options)
        for dtype in ("float32", "float64", "float16", "bfloat16"):
            x, z = cases.normal(rng, dtype, 2, 7, 130)
            y = statescan.gated_rms_norm(x, z, group_size=65)
            assert_accurate(y, reference.gated_rms_norm.gated_rms_norm(exact(x), exact(z), group_size=65), "y")
        print(statescan.cpu_isa())
    """,
            STATESCAN_ISA=isa,
        )
        == isa
    )


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_numerics_and_properties_on_lesser_instruction_sets(isa):
    if ISAS.index(isa) >= ISAS.index(statescan.cpu_isa()):
        pytest.skip(f"{isa} is not below what this run tests anyway")
    folder = os.path.dirname(__file__)
    code = python(
        f"""
        import pytest
        folder = {folder!r}
        print(int(pytest.main(["-q", "-p", "no:cacheprovider", f"{{folder}}/test_numerics.py", f"{{folder}}/test_properties.py"])))
    """,
        STATESCAN_ISA=isa,
    )
    assert code.endswith("\n0"), code


def test_threads_from_the_environment():
    assert python("import statescan; print(statescan.num_threads())", STATESCAN_NUM_THREADS="3") == "3"
    for nonsense in ("0", "-2", "many", ""):
        assert int(python("import statescan; print(statescan.num_threads())", STATESCAN_NUM_THREADS=nonsense)) >= 1
