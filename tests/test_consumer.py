"""A native program outside the repository finds the installed library with find_package and runs an op."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import statescan

SOURCE = Path(__file__).parent / "cpp" / "consumer"


def _run(*command):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def _cmake_dir():
    return _run(sys.executable, "-m", "statescan", "--cmake-dir").strip()


@pytest.fixture(scope="module")
def cmake():
    if not shutil.which("cmake") or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("needs cmake and a C++ compiler")
    return "cmake"


def _build_and_run(cmake, cmake_dir, folder):
    shutil.copytree(SOURCE, folder / "source")
    _run(cmake, "-S", folder / "source", "-B", folder / "build", f"-Dstatescan_DIR={cmake_dir}")
    _run(cmake, "--build", folder / "build")
    return _run(folder / "build" / "consumer")


def test_consumer_runs_on_the_installed_library(cmake, tmp_path):
    printed = _build_and_run(cmake, _cmake_dir(), tmp_path)
    assert f"statescan {statescan.__version__} on {statescan.cpu_isa()}" in printed
    assert "pointers and DLPack agree" in printed
    assert "ssd_scan: A has shape (1,); expected (nheads=2)" in printed


def test_package_can_be_moved(cmake, tmp_path):
    installed = Path(statescan.library()).parent.parent
    moved = tmp_path / "elsewhere" / "statescan"
    for part in ("lib", "include"):
        shutil.copytree(installed / part, moved / part)
    printed = _build_and_run(cmake, moved / "lib" / "cmake" / "statescan", tmp_path)
    assert "pointers and DLPack agree" in printed
