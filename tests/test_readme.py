"""Every recipe of the README runs as pasted."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


# Packages that statescan does without: a recipe that imports one which is not installed is left out.
OPTIONAL = ("torch", "transformers")


def test_python_recipes_run_in_order():
    recipes = blocks("python")
    assert len(recipes) >= 4
    names = {}
    for recipe in recipes:
        try:
            exec(compile(recipe, "README.md", "exec"), names)
        except ModuleNotFoundError as missing:
            if missing.name not in OPTIONAL:
                raise


def test_cpp_recipe_builds_and_runs(tmp_path):
    if not shutil.which("cmake") or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("needs cmake and a C++ compiler")
    (cmake_lines,) = blocks("cmake")
    (source,) = blocks("cpp")
    (tmp_path / "main.cpp").write_text(source)
    find, link = (line.split("#")[0].strip() for line in cmake_lines.splitlines())
    (tmp_path / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.25)\nproject(program CXX)\n{find}\nadd_executable(program main.cpp)\n{link}\n"
    )
    cmake_dir = subprocess.run(
        [sys.executable, "-m", "statescan", "--cmake-dir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    subprocess.run(["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-Dstatescan_DIR={cmake_dir}"], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)
    printed = subprocess.run([tmp_path / "build" / "program"], check=True, capture_output=True, text=True).stdout
    assert float(printed) == pytest.approx(3 + 2 * 0.60653066 + 0.36787944, abs=1e-4)
