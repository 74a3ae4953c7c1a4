"""A wheel, installed into an empty folder, runs the README's example of the ops from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, ops_example

COMPILED = ROOT / "build" / "temp" / "build.ninja"


@pytest.mark.skipif(not COMPILED.exists(), reason="no objects in build/temp: run make test, or pip install . first")
def test_the_example_runs_from_an_installed_wheel(tmp_path: Path) -> None:
    build = ("egg_info", "--egg-base", tmp_path, "build", "--build-lib", tmp_path / "lib")
    wheel = ("bdist_wheel", "--skip-build", "--bdist-dir", tmp_path / "bdist", "--dist-dir", tmp_path / "dist")
    environment = {**os.environ, "SMOOTHQUANT_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "-q", *build, *wheel], cwd=ROOT, env=environment, check=True)
    (built,) = (tmp_path / "dist").glob("smoothquant_ext-*-py3-none-*.whl")

    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    pip = (sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check")
    subprocess.run([*pip, "--no-index", "--no-deps", "--target", site, built], check=True)
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    program = f"{ops_example()}\nprint(smoothquant_ext.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    shape, home = done.stdout.splitlines()
    assert shape.startswith("(4, 32), relative error 0.0")
    assert Path(home).is_relative_to(site)
    record = json.loads(Path(home).with_name("_build.json").read_text())
    assert record["sentence"] == "built without CUDA kernels: SMOOTHQUANT_CUDA=0."
