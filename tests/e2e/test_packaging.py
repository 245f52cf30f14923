"""What pip installs is the package, all of it."""

import os
import shutil
import sys
import zipfile

import pytest
from support import REPO, environment, run_command

pytestmark = pytest.mark.e2e


def test_the_wheel_ships_every_module(tmp_path):
    source = tmp_path / "source"  # building leaves folders behind
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    shutil.copytree(
        REPO / "masked_diffusion", source / "masked_diffusion", ignore=shutil.ignore_patterns("__pycache__")
    )
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    done = run_command([os.fspath(part) for part in build], environment(tmp_path))
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("masked_diffusion-*.whl")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert shipped == {path.relative_to(REPO).as_posix() for path in (REPO / "masked_diffusion").rglob("*.py")}
