"""statescan.jax: eager and jit, gradient, vmap, on every device that JAX has, against the oracle and against lax.scan."""

import subprocess
import sys

import cases
import numpy as np
import pytest
import reference.state_scan
from support import NARROW, assert_accurate, assert_same_bits, exact, gate, relative_error

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import statescan  # noqa: E402
import statescan.jax  # noqa: E402


def _devices():
    try:
        return [*jax.devices("cpu"), *jax.devices("gpu")]
    except RuntimeError:
        return jax.devices("cpu")


@pytest.fixture(params=_devices(), ids=lambda device: device.platform)
def device(request):
    with jax.default_device(request.param):
        yield request.param


def inputs_of(rng, **sizes):
    made = cases.state_scan(rng, **sizes)
    return made, {name: jnp.asarray(value) for name, value in made.items()}


def lax_state_scan(log_decay, update, initial_state=None, reverse=False):
    """The recurrence in JAX's own words, for its derivatives."""
    if initial_state is None:
        initial_state = jnp.zeros((update.shape[0], *update.shape[2:]), jnp.float32)

    def step(state, chunk):
        decay, u = chunk
        return jnp.exp(decay)[..., None, None] * state + u.astype(jnp.float32), state

    final_state, states = jax.lax.scan(step, initial_state.astype(jnp.float32),
                                       (log_decay.swapaxes(0, 1), update.swapaxes(0, 1)), reverse=reverse)
    return states.swapaxes(0, 1).astype(update.dtype), final_state


@pytest.mark.parametrize("wrap", (lambda f: f, jax.jit), ids=("eager", "jit"))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("dtype", ("float32", *NARROW))
def test_forward(device, rng, dtype, reverse, wrap):
    made, inputs = inputs_of(rng, dtype=dtype)
    for omit in ((), ("initial_state",)):
        given, oracle = cases.without(inputs, omit), {k: exact(v) for k, v in cases.without(made, omit).items()}
        got = wrap(lambda kwargs: statescan.jax.state_scan(**kwargs, reverse=reverse))(given)
        for name, result, expected in zip(("states", "final_state"), got,
                                          reference.state_scan.state_scan(**oracle, reverse=reverse), strict=True):
            assert_accurate(np.asarray(result), expected, name)


@pytest.mark.parametrize("sizes", (
    dict(batch=0), dict(seqlen=0), dict(headdim=16, dstate=32), dict(state_dtype="bfloat16")), ids=str)
def test_sizes(device, rng, sizes):
    made, inputs = inputs_of(rng, **sizes)
    states, final_state = jax.jit(statescan.jax.state_scan)(inputs["log_decay"], inputs["update"],
                                                           initial_state=inputs["initial_state"])
    expected = reference.state_scan.state_scan(**{k: exact(v) for k, v in made.items()})
    assert_accurate(np.asarray(states), expected[0], "states")
    assert_accurate(np.asarray(final_state), expected[1], "final_state")


def scalar_loss(scan, weights, reverse):
    """Weighs every element of both results, so that both cotangents arrive."""
    def loss(inputs):
        results = scan(**inputs, reverse=reverse)
        return sum(jnp.vdot(w, r.astype(jnp.float32)) for w, r in zip(weights, results, strict=True))
    return loss


def assert_same_gradients(got, expected, dtype):
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == expected[name].dtype, name
        limit = max(1e-5, 3 * gate(exact(np.asarray(expected[name])), dtype))  # both sides round to the narrow type
        assert relative_error(np.asarray(got[name]), exact(np.asarray(expected[name]))) <= limit, name


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("omit", ((), ("initial_state",)))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_gradient(device, rng, dtype, omit, reverse):
    _, inputs = inputs_of(rng, dtype=dtype, omit=omit)
    results = lax_state_scan(**inputs)
    weights = [jnp.asarray(cases.normal(rng, "float32", *r.shape)) for r in results]
    got = jax.jit(jax.grad(scalar_loss(statescan.jax.state_scan, weights, reverse)))(inputs)
    assert_same_gradients(got, jax.grad(scalar_loss(lax_state_scan, weights, reverse))(inputs), dtype)


@pytest.mark.parametrize("used", (0, 1), ids=("states", "final_state"))
def test_gradient_of_one_result(device, rng, used):
    _, inputs = inputs_of(rng)
    got, expected = (jax.grad(lambda kwargs: jnp.sum(jnp.sin(scan(**kwargs)[used])))(inputs)
                     for scan in (statescan.jax.state_scan, lax_state_scan))
    assert_same_gradients(got, expected, "float32")


def test_gradient_of_a_narrow_initial_state(device, rng):
    _, inputs = inputs_of(rng, state_dtype="bfloat16")
    gradient = jax.grad(lambda state: jnp.sum(statescan.jax.state_scan(
        inputs["log_decay"], inputs["update"], initial_state=state)[1]))(inputs["initial_state"])
    assert gradient.dtype == jnp.bfloat16 and gradient.shape == inputs["initial_state"].shape


@pytest.mark.parametrize("in_axes", ((0, 0, 0), (0, None, 0), (None, 0, None), (2, 1, 3)), ids=str)
def test_vmap(device, rng, in_axes):
    examples = [inputs_of(rng)[1] for _ in range(3)]
    names = ("log_decay", "update", "initial_state")
    batched = [jnp.stack([e[name] for e in examples], axis) if axis is not None else examples[0][name]
               for name, axis in zip(names, in_axes)]
    scan = lambda log_decay, update, state: statescan.jax.state_scan(log_decay, update, initial_state=state)
    gradient = jax.grad(lambda *args: sum(jnp.sum(jnp.cos(r)) for r in scan(*args)), argnums=(0, 1, 2))
    for function in (scan, gradient):
        got = jax.jit(jax.vmap(function, in_axes=in_axes))(*batched)
        for i, example in enumerate(examples):
            alone = function(*(example[name] if axis is not None else examples[0][name] for name, axis in zip(names, in_axes)))
            for k, (one, many) in enumerate(zip(alone, got, strict=True)):
                assert relative_error(np.asarray(many[i]), exact(np.asarray(one))) <= 1e-6, f"result {k} of example {i}"


def test_vmap_twice(device, rng):
    _, inputs = inputs_of(rng, batch=4)
    scan = lambda log_decay, update: statescan.jax.state_scan(log_decay[None], update[None])
    plain = statescan.jax.state_scan(inputs["log_decay"], inputs["update"])
    split = lambda a: a.reshape(2, 2, *a.shape[1:])
    got = jax.vmap(jax.vmap(scan))(split(inputs["log_decay"]), split(inputs["update"]))
    for many, one in zip(got, plain, strict=True):
        assert_same_bits(np.asarray(many).reshape(one.shape), np.asarray(one), "vmap twice")


def test_inside_a_loop(device, rng):
    """As a layer of a scanned model: the call inside another XLA computation."""
    _, inputs = inputs_of(rng)
    body = lambda state, _: (statescan.jax.state_scan(inputs["log_decay"], inputs["update"], initial_state=state)[1], None)
    got, _ = jax.jit(lambda state: jax.lax.scan(body, state, None, length=3))(inputs["initial_state"])
    state = inputs["initial_state"]
    for _ in range(3):
        state = body(state, None)[0]
    assert_same_bits(np.asarray(got), np.asarray(state), "final_state")


def test_same_bits_every_run(device, rng):
    _, inputs = inputs_of(rng, batch=3, seqlen=31, headdim=16, dstate=32)
    gradient = jax.jit(jax.grad(lambda kwargs: jnp.sum(jnp.sin(statescan.jax.state_scan(**kwargs)[0]))))
    first = gradient(inputs)
    for _ in range(5):
        for name, value in gradient(inputs).items():
            assert_same_bits(np.asarray(value), np.asarray(first[name]), name)


def test_errors_while_tracing(device, rng):
    _, inputs = inputs_of(rng)
    with pytest.raises(ValueError, match=r"state_scan: log_decay has shape .*; expected \("):
        jax.jit(statescan.jax.state_scan)(inputs["log_decay"][:, :-1], inputs["update"])
    with pytest.raises(ValueError, match=r"state_scan: initial_state has shape"):
        statescan.jax.state_scan(inputs["log_decay"], inputs["update"], initial_state=inputs["initial_state"][..., :-1])
    with pytest.raises(TypeError, match=r"state_scan: log_decay is bfloat16; expected float32"):
        statescan.jax.state_scan(inputs["log_decay"].astype(jnp.bfloat16), inputs["update"])
    with pytest.raises(TypeError, match="uint8"):
        statescan.jax.state_scan(inputs["log_decay"], inputs["update"].astype(jnp.uint8))


def test_gpu_arrays_are_for_statescan_jax(device, rng):
    _, inputs = inputs_of(rng)
    if device.platform == "cpu":
        pytest.skip("JAX arrays on the CPU are inputs like any other")
    with pytest.raises(TypeError, match="state_scan: update is a JAX array on a GPU; use statescan.jax"):
        statescan.state_scan(inputs["log_decay"], inputs["update"])


def test_importing_statescan_imports_no_jax():
    subprocess.run([sys.executable, "-c", "import statescan, sys; sys.exit('jax' in sys.modules)"], check=True)
