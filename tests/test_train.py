"""The demo's training: statescan's ops learn, step for step as plain torch does, and a run can be interrupted."""

import dataclasses
import math

import pytest
from statescan.demo import corpus
from statescan.demo.config import Config

torch = pytest.importorskip("torch")
import plain_torch
from statescan.demo import train
from statescan.demo.model import WEIGHTS
from statescan.demo.model import LanguageModel as NumpyModel

CONFIG = Config(d_model=32, n_layer=2, headdim=16, dstate=16, ngroups=2)
SETTINGS = train.Settings(steps=20, rows=2, window=64, learning_rate=1e-2, warmup=0.1, evaluations=2, fake_quantise_from=0.8)
DOCUMENTS = corpus.load_bytes(corpus.default_root() / name for name in ("bisect.py", "colorsys.py", "sched.py"))
MUON = [{"muon_learning_rate": 1e-2}] if hasattr(torch.optim, "Muon") else []  # torch 2.9 and newer


def trainer(settings=SETTINGS):
    return train.Trainer(CONFIG, settings, DOCUMENTS, torch.device("cpu"))


def losses(run, steps):
    return [run.train_step().item() for _ in range(steps)]


def test_the_model_is_the_demo_s():
    """Torch modules and NumPy on the shipped weights: the same logits."""
    model, metadata = train.load(WEIGHTS)
    assert metadata["corpus"]["heldout"]["files"] > 0
    document = DOCUMENTS[0][:300]
    numpy_model = NumpyModel()
    tokens = torch.frombuffer(bytearray(document), dtype=torch.uint8)
    hidden, _ = numpy_model.read(tokens.numpy(), numpy_model.initial_states())
    with torch.no_grad():
        logits = model(tokens.long()[None])[0]
    torch.testing.assert_close(logits, torch.from_numpy(numpy_model.logits(hidden)), rtol=1e-3, atol=1e-3)


def test_it_learns_step_for_step_as_plain_torch_does(monkeypatch):
    ours = losses(trainer(), 20)
    monkeypatch.setattr("statescan.nn.mamba2.mamba2_scan", plain_torch.mamba2_scan)
    monkeypatch.setattr("statescan.nn.norm.gated_rms_norm", plain_torch.gated_rms_norm)
    plain = losses(trainer(), 20)
    assert ours == pytest.approx(plain, rel=1e-3)
    assert sum(ours[-5:]) < 0.75 * sum(ours[:5]), ours
    assert math.log(256) == pytest.approx(ours[0], rel=0.05)


@pytest.mark.parametrize("options", ({}, {"dropout": 0.2}, *MUON), ids=str)
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path, options):
    settings = dataclasses.replace(SETTINGS, **options)
    whole = trainer(settings)
    expected = losses(whole, 6)
    first = trainer(settings)
    losses(first, 3)
    first.save_checkpoint(tmp_path / "run.pt")
    resumed = trainer(settings)
    resumed.load_checkpoint(tmp_path / "run.pt")
    assert losses(resumed, 3) == expected[3:]
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="resume: rows=5 must be 2"):
        trainer(dataclasses.replace(SETTINGS, rows=5)).load_checkpoint(tmp_path / "run.pt")


@pytest.mark.parametrize("options", MUON)
def test_muon_takes_the_projections_and_adamw_the_rest(options):
    run = trainer(dataclasses.replace(SETTINGS, **options))
    first, second = ([p for group in o.param_groups for p in group["params"]] for o in run.optimizers)
    assert len(second) == 2 * CONFIG.n_layer
    assert len(first) + len(second) == len(list(run.model.parameters()))
    got = losses(run, 20)
    assert sum(got[-5:]) < 0.75 * sum(got[:5]), got


def test_dropout_is_for_training_alone():
    with_dropout, without = trainer(dataclasses.replace(SETTINGS, dropout=0.5)), trainer()
    assert train.bits_per_byte(with_dropout.model, DOCUMENTS[:1]) == train.bits_per_byte(without.model, DOCUMENTS[:1])
    assert losses(with_dropout, 1) != losses(without, 1)
    assert len(train.quantised_model(with_dropout.model).backbone.layers) == CONFIG.n_layer  # a copy, hooks and all


def test_further_sources_are_new_and_hold_nothing_back(tmp_path):
    """Of another version of the library: no held-out module by name or by content, nothing that is known for the most part."""
    known, secret = DOCUMENTS[1], DOCUMENTS[0]
    new = b"".join(b"a_line_of_its_own_number_%d = %d\n" % (i, i * i) for i in range(40))
    files = {"a.py": new, "bisect.py": new, "copy.py": known, "near.py": known + b"# and a line of more than 30 characters\n"}
    files |= {"quotes.py": new.replace(b"own", b"new") + secret[:1000], "second.py": new, "empty.py": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert corpus.further([tmp_path], [known], [secret]) == [new]


def test_command_line(tmp_path, capsys, monkeypatch):
    """A short run with its bar, the checkpoint, the weight file that the demo reads, and going on to the end."""
    library = tmp_path / "library"
    for name in ("bisect.py", "colorsys.py", "sched.py", "keyword.py", "stat.py", "this.py"):
        library.mkdir(exist_ok=True)
        (library / name).write_bytes((corpus.default_root() / name).read_bytes())
    output, checkpoint = tmp_path / "model.safetensors", tmp_path / "run.pt"
    arguments = ["--stdlib", library, "--device", "cpu", "--output", output, "--checkpoint", checkpoint, "--steps", 4]
    arguments += ["--rows", 2, "--window", 64, "--evaluations", 2, "--d-model", 32, "--n-layer", 1, "--headdim", 16]
    arguments = [str(argument) for argument in [*arguments, "--dstate", 16]]
    train.main(arguments)
    printed = capsys.readouterr()
    assert "step 4 (100%" in printed.out and "bits per byte read back; 4 steps" in printed.out
    assert "%" in printed.err  # the bar
    assert checkpoint.is_file()
    assert len(NumpyModel(output).layers) == 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "new.py").write_bytes(b"a_name_that_the_others_have_not = 1\n" * 3)
    train.main([*arguments, "--further", str(other)])
    capsys.readouterr()
    _, metadata = train.load(output)
    assert metadata["corpus"]["further"] == {"folders": ["other"], "files": 1}
    train.main([*arguments, "--resume"])
    assert "4 steps" in capsys.readouterr().out
    train.main(["--stdlib", str(library), "--device", "cpu", "--evaluate", str(output)])
    assert "total" in capsys.readouterr().out
