"""info(), plan(), signatures, docstrings and the command line."""

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys

import cases
import numpy as np
import pytest
import statescan
from test_frameworks import ISAS, SCANS, UPDATES, python

OPS = (
    "state_scan",
    "ssd_scan",
    "selective_scan",
    "causal_conv1d",
    "gated_rms_norm",
    "mamba2_scan",
    "causal_conv1d_update",
    "selective_state_update",
    "mamba2_update",
)
BACKWARDS = tuple(f"{op}_backward" for op in OPS if not op.endswith("_update"))

# What comes by position; everything after it is keyword-only.
POSITIONAL = {
    "state_scan": "log_decay update",
    "state_scan_backward": "log_decay states dstates",
    "ssd_scan": "x dt A B C",
    "ssd_scan_backward": "x dt A B C dy",
    "selective_scan": "x dt A B C",
    "selective_scan_backward": "x dt A B C dy",
    "causal_conv1d": "x weight bias",
    "gated_rms_norm": "x z weight",
    "mamba2_scan": "zxbcdt conv_weight conv_bias dt_bias A",
    "causal_conv1d_update": "x state weight bias",
    "selective_state_update": "state x dt A B C",
    "mamba2_update": "zxbcdt conv_state state conv_weight conv_bias dt_bias A",
}


def test_info():
    info = statescan.info()
    assert info["version"] == statescan.__version__ == importlib.metadata.version("statescan")
    threads = statescan.num_threads()
    assert info["backends"]["cpu"] == f"{statescan.cpu_isa()}, {threads} thread{'s' if threads != 1 else ''}"
    assert re.fullmatch(r"on, \d+ devices?|off: .+", info["backends"]["cuda"])
    assert (info["cuda_devices"] > 0) == info["backends"]["cuda"].startswith("on")
    assert os.path.samefile(info["library"], statescan.library())
    assert info["python"] == sys.version.split()[0]
    if not info["cuda_architectures"]:
        assert info["backends"]["cuda"].startswith("off") and info["cuda_devices"] == 0


def test_paths():
    assert os.path.isfile(statescan.library())
    assert os.path.isfile(os.path.join(statescan.cmake_dir(), "statescanConfig.cmake"))
    for op in OPS:
        assert os.path.isfile(os.path.join(statescan.include_dir(), "statescan", f"{op}.h"))


def test_num_threads(threads):
    for count in (1, 2, 5):
        threads(count)
        assert statescan.num_threads() == count
        assert statescan.info()["backends"]["cpu"].endswith(f", {count} thread{'s' if count > 1 else ''}")
    for count in (0, -1, 257):
        with pytest.raises(ValueError, match=f"set_num_threads: {count} must lie in 1..256"):
            statescan.set_num_threads(count)
    assert statescan.num_threads() == 5


# ---- plan --------------------------------------------------------------------------------------------------------------
def plan_arguments(rng):
    """A call of every op with a kernel on the CPU."""
    calls = [(op.name, op.inputs(rng), op.options) for op in (*SCANS.values(), *UPDATES.values())]
    return [*calls, ("gated_rms_norm", dict(x=cases.normal(rng, "float32", 3, 8)), {})]


def test_plan_of_every_op(rng):
    planned = set()
    for name, inputs, options in plan_arguments(rng):
        before = {key: value.copy() for key, value in inputs.items()}
        plan = statescan.plan(name, **inputs, **options)
        assert isinstance(plan, statescan.Plan) and plan[3:] == (0, name == "ssd_scan_backward")
        assert plan.backend == "cpu" and plan.kernel == statescan.cpu_isa()
        assert isinstance(plan.workspace_bytes, int) and plan.workspace_bytes >= 0
        for key in inputs:
            np.testing.assert_array_equal(inputs[key], before[key])
        planned.add(name)
    assert planned == set(OPS)


def test_plan_takes_what_the_op_takes(rng):
    inputs = cases.ssd_scan(rng)
    positional = [inputs.pop(name) for name in ("x", "dt", "A", "B", "C")]
    plan = statescan.plan(
        "ssd_scan",
        *positional,
        **inputs,
        dt_softplus=True,
        dt_limit=(0.0, 1.0),
        chunk_size=64,
        batch_invariant=None,
        return_final_state=True,
        out=None,
        stream=None,
    )
    assert plan.backend == "cpu"
    assert (
        statescan.plan(
            "state_scan_backward",
            *(
                v
                for v in (
                    np.zeros((1, 2, 3), np.float32),
                    np.zeros((1, 2, 3, 4, 5), np.float32),
                    np.zeros((1, 2, 3, 4, 5), np.float32),
                )
            ),
        ).backend
        == "cpu"
    )


def test_plan_raises_what_the_op_raises(rng):
    inputs = cases.ssd_scan(rng)
    with pytest.raises(ValueError, match=r"ssd_scan: dt has shape"):
        statescan.plan("ssd_scan", **{**inputs, "dt": inputs["dt"][:, 1:]})
    with pytest.raises(TypeError, match=r"ssd_scan: x is int32"):
        statescan.plan("ssd_scan", **{**inputs, "x": inputs["x"].astype(np.int32)})
    with pytest.raises(ValueError, match=r"plan: no op is called 'flash_scan'; expected one of state_scan, ssd_scan"):
        statescan.plan("flash_scan")


@pytest.mark.parametrize("isa", ISAS)
def test_every_cpu_row_is_reachable(isa):
    best = python("import statescan; print(statescan.cpu_isa())", STATESCAN_ISA="")
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this machine has no {isa}")
    rows = python(
        """
        import numpy as np, statescan
        from test_package import plan_arguments
        print(*sorted({(name, statescan.plan(name, **inputs, **options).kernel)
                       for name, inputs, options in plan_arguments(np.random.default_rng(1))}))
    """,
        STATESCAN_ISA=isa,
    )
    for op in OPS:
        assert f"('{op}', '{isa}')" in rows


def test_batch_invariant_of_the_process(rng):
    inputs = cases.ssd_scan(rng)
    inputs["dt"] = abs(inputs["dt"])
    plain = statescan.ssd_scan(**inputs)
    statescan.set_batch_invariant(True)
    try:
        np.testing.assert_array_equal(statescan.ssd_scan(**inputs), plain)
        np.testing.assert_array_equal(statescan.ssd_scan(**inputs, batch_invariant=False), plain)
    finally:
        statescan.set_batch_invariant(False)


# ---- signatures and docstrings -------------------------------------------------------------------------------------------
def public_functions():
    return [
        name for name in statescan.__all__ if callable(getattr(statescan, name)) and not inspect.isclass(getattr(statescan, name))
    ]


def test_everything_public_exists():
    assert list(statescan.__all__) == sorted(statescan.__all__)
    for name in (*OPS, *BACKWARDS, "info", "plan", "set_num_threads", "num_threads", "cpu_isa"):
        assert name in statescan.__all__ and hasattr(statescan, name)


@pytest.mark.parametrize("name", (*OPS, *BACKWARDS))
def test_docstrings_speak_of_every_parameter(name):
    function = getattr(statescan, name)
    described = function.__doc__.split("Args:")[1].split("Returns:")[0]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", described), f"{name}'s docstring says nothing of {parameter}"
    assert "Returns:" in function.__doc__ and "Raises:" in function.__doc__


@pytest.mark.parametrize("name", (*OPS, *BACKWARDS))
def test_signatures(name):
    parameters = inspect.signature(getattr(statescan, name)).parameters
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if name in POSITIONAL:
        assert " ".join(p.name for p in positional) == POSITIONAL[name]
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters.values())
    assert list(parameters)[-1] == "stream"
    for parameter in parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert parameter.default is not inspect.Parameter.empty


def test_backwards_take_the_options_of_their_forward():
    outputs = {"out", "final_state_out", "final_conv_state_out", "return_final_state", "return_final_states"}
    # These say how the forward works, not what it computes.
    outputs |= {"state_positions", "position_states_out", "ssd_mode", "save_states", "chunk_states_out"}
    for name in BACKWARDS:
        forward, backward = (inspect.signature(getattr(statescan, n)).parameters for n in (name.removesuffix("_backward"), name))
        missing = forward.keys() - backward.keys() - outputs
        assert missing <= {"update"}, f"{name} lacks {sorted(missing)}"
        for parameter in forward.keys() & backward.keys():
            assert backward[parameter].default == forward[parameter].default or forward[parameter].default is None


# ---- command line ------------------------------------------------------------------------------------------------------
def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "statescan", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(statescan.__file__))},
    )
    return done.returncode, done.stdout, done.stderr


def test_command_line():
    assert command("--version") == (0, f"statescan {statescan.__version__}\n", "")
    assert command("--cmake-dir") == (0, f"{statescan.cmake_dir()}\n", "")
    assert command("--include-dir") == (0, f"{statescan.include_dir()}\n", "")
    code, text, _ = command("no-such-command")
    assert code == 2 and not text
