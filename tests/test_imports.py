"""What importing the package brings, in interpreters of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import smoothquant_ext

PACKAGE = Path(smoothquant_ext.__file__).parent
OP = "print(torch.ops.sq.w8a8_gemm.default._schema.name, 'transformers' in sys.modules)"


def output(code: str, path: Path = PACKAGE.parent) -> str:
    """What a program prints that finds the package in ``path``."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package in it, without its compiled libraries."""
    folder = tmp_path_factory.mktemp("uncompiled")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.mark.parametrize("order", ["smoothquant_ext, torch", "torch, smoothquant_ext"])
def test_importing_the_package_registers_the_ops(order: str) -> None:
    assert output(f"import sys, {order}\n{OP}") == "sq::w8a8_gemm False"


def test_help_does_not_import_transformers() -> None:
    code = (
        "import sys; from smoothquant_ext.cli import app; sys.argv = ['smoothquant', 'quantize', '--help']\n"
        "app(standalone_mode=False); print('transformers' in sys.modules)"
    )
    assert output(code).endswith("False")


def test_probing_needs_no_compiled_library(uncompiled: Path) -> None:
    modules = [f"smoothquant_ext.probing.{path.stem}" for path in (PACKAGE / "probing").glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}\nprint('smoothquant_ext.ops' in sys.modules)"
    assert output(code, uncompiled) == "False"


def test_without_the_compiled_library_importing_says_how_to_build_it(uncompiled: Path) -> None:
    code = "import warnings\nwith warnings.catch_warnings(record=True) as seen: import smoothquant_ext\nprint(*seen)"
    assert "run 'pip install .' in its source folder" in output(code, uncompiled)


def test_checkpoints_do_not_import_the_calibration_pipeline() -> None:
    modules = [f"smoothquant_ext.checkpoint.{path.stem}" for path in (PACKAGE / "checkpoint").glob("[a-z]*.py")]
    code = f"import sys, {', '.join(modules)}\nprint('smoothquant_ext.quantization' in sys.modules)"
    assert output(code) == "False"
