"""The command line: demo on good and bad input, info, and the paths for native builds."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import statescan
from statescan.__main__ import main
from statescan.demo import cli, corpus
from statescan.demo.model import WEIGHTS, LanguageModel, bits

HELD_OUT_FILE = corpus.default_root() / "bisect.py"


@pytest.fixture(scope="module")
def model():
    return LanguageModel()


def test_demo_reads_scores_and_continues(capsys):
    assert main(["demo", str(HELD_OUT_FILE), "--bytes", "40"]) == 0
    printed = capsys.readouterr().out
    table = {line.split("  ")[0]: line.split()[-1] for line in printed.splitlines() if line.startswith(("gzip", "xz", "this"))}
    assert float(table["this model"]) < 0.6 * float(table["xz -9e"])
    assert "parallel scan and recurrent steps agree" in printed
    assert "continued, 40 bytes at" in printed


def test_demo_default_file_is_held_out():
    path, content = cli.load(None)
    assert path.relative_to(corpus.default_root()).as_posix() in corpus.HELD_OUT
    assert content


def test_blocks_give_the_bits_of_one_scan(model, monkeypatch):
    content = HELD_OUT_FILE.read_bytes()[:1500]
    whole, states, _ = cli.read(model, content)
    monkeypatch.setattr(cli, "BLOCK", 400)
    blocked, carried, _ = cli.read(model, content)
    assert blocked == pytest.approx(whole, rel=1e-5)
    np.testing.assert_allclose(carried[0].ssm, states[0].ssm, atol=1e-4 * np.abs(states[0].ssm).max())


def test_recurrent_path_agrees_with_the_scan(model):
    content = HELD_OUT_FILE.read_bytes()
    _, _, first = cli.read(model, content[:300])
    assert cli.disagreement(model, content, first) < 1e-4


def test_disagreement_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(cli, "disagreement", lambda *_: 1.0)
    assert main(["demo", str(HELD_OUT_FILE), "--bytes", "0"]) == 1
    assert "DISAGREE" in capsys.readouterr().out


def test_continuation_is_reproducible_and_text(model):
    def continued(seed):
        _, states, _ = cli.read(model, b"import os\n\n\ndef ")
        return cli.write(model, ord(" "), states, 30, 0.7, seed)

    assert continued(1) == continued(1)
    assert continued(1) != continued(2)
    assert 0 not in continued(3)


def test_bits_of_a_uniform_distribution():
    assert bits(np.zeros((5, 256), np.float32), np.arange(5)) == pytest.approx(40)


def test_weights_are_small_and_say_where_they_come_from(model):
    assert WEIGHTS.stat().st_size <= 4 << 20
    assert model.metadata["format"] == "statescan.mamba2_lm.v1"
    assert model.metadata["corpus"]["heldout"]["files"] == len(corpus.HELD_OUT)
    assert {"date", "hardware", "torch", "seconds"} <= set(model.metadata["run"])


def test_weights_score_what_they_say(model):
    """On the GPU that trained them whole held-out files were scored; the shorter ones are read again here."""
    rows = {row["name"]: row for row in model.metadata["heldout_bits_per_byte"]}
    assert rows["total"]["model_int8"] < 0.5 * rows["total"]["xz"]
    for name in ("bisect.py", "colorsys.py", "sched.py", "getopt.py"):
        content = (corpus.default_root() / name).read_bytes()
        total, _, _ = cli.read(model, content)
        same_file = len(content) == rows[name]["size"]  # other versions of Python have others
        assert total / len(content) == pytest.approx(rows[name]["model_int8"], rel=0.01 if same_file else 0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing.txt", "does not exist"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: _written(folder / "empty.txt", b""), "is empty"),
        (lambda folder: _written(folder / "image.bin", b"\x89PNG\x00\x01"), "is binary (byte 0 at offset 4)"),
    ],
    ids=["missing", "folder", "empty", "binary"],
)
def test_bad_input_is_explained(tmp_path, capsys, make, message):
    assert main(["demo", str(make(tmp_path))]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def _written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("arguments", [["--bytes", "-1"], ["--temperature", "nan"], ["--bytes", "many"]])
def test_bad_options_exit_with_2(arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", *arguments])


def test_info_command(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in (statescan.__version__, "backends.cpu", "backends.cuda", statescan.cpu_isa()):
        assert text in printed


def test_module_prints_the_paths_of_native_builds():
    printed = subprocess.run(
        [sys.executable, "-m", "statescan", "--cmake-dir", "--include-dir"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert (Path(printed[0]) / "statescanConfig.cmake").is_file()
    assert (Path(printed[1]) / "statescan" / "ssd_scan.h").is_file()


def test_no_command_prints_help(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out
