"""The two tasks: what their sequences ask, models of equal size, and the command from training to plot."""

import json

import pytest
from statescan.__main__ import main

torch = pytest.importorskip("torch")
from statescan.bench.tasks import mqar, selective_copying, training


def generator():
    return torch.Generator().manual_seed(3)


def test_selective_copying_asks_for_the_data_in_order():
    inputs, targets = selective_copying.batch(50, generator())
    context, asked = inputs[:, : selective_copying.CONTEXT], targets[:, selective_copying.CONTEXT :]
    assert inputs.shape == targets.shape == (50, selective_copying.CONTEXT + selective_copying.COUNT)
    assert bool((targets[:, : selective_copying.CONTEXT] == -100).all())
    assert bool((inputs[:, selective_copying.CONTEXT :] == selective_copying.MARKER).all())
    for row, expected in zip(context, asked):
        assert torch.equal(row[row != selective_copying.NOISE], expected)
    assert len({tuple(row.nonzero()[:, 0].tolist()) for row in context}) == 50


def test_mqar_asks_for_the_value_of_each_key():
    inputs, targets = mqar.batch(50, generator())
    for row, asked in zip(inputs.tolist(), targets.tolist()):
        pairs = dict(zip(row[0 : 2 * mqar.PAIRS : 2], row[1 : 2 * mqar.PAIRS : 2]))
        assert len(pairs) == mqar.PAIRS
        answers = {row[i]: value for i, value in enumerate(asked) if value != -100}
        assert answers == pairs
        assert all(value == -100 for value in asked[: 2 * mqar.PAIRS])
    assert inputs.max() < mqar.VOCAB_SIZE


@pytest.mark.parametrize("task", (selective_copying, mqar), ids=lambda task: task.NAME)
def test_models_are_equal_in_size(task):
    sizes = [sum(p.numel() for p in training.build(name, task, training.Settings()).parameters()) for name in training.MODELS]
    assert max(sizes) < 1.02 * min(sizes)


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "runs.json", tmp_path / "curves.png"
    assert main(["tasks", "--task", "mqar", "--steps", "3", "--json", str(path), "--plot", str(picture)]) == 0
    runs = json.loads(path.read_text())
    assert [run["model"] for run in runs] == list(training.MODELS)
    assert all(point["step"] == i + 1 for run in runs for i, point in enumerate(run["curve"]))
    assert all(0 <= point["accuracy"] <= 1 and point["loss"] > 0 for run in runs for point in run["curve"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| mqar" in capsys.readouterr().out


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["tasks", "--steps", "1"]) == 2
    assert "torch is not installed: pip install torch" in capsys.readouterr().err
