"""What pip installs is the package, all of it."""

import os
import shutil
import sys
import zipfile

import pytest
from support import REPO, environment, run_command

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def wheel(module_folder):
    """The wheel, unpacked into a folder."""
    folder = module_folder("wheel")
    source = folder / "source"  # building leaves folders behind
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "infer_mdt.py"):
        shutil.copy(REPO / name, source)
    for name in ("masked_diffusion", "scripts", "evaluations", "docs/recipes"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    done = run_command([os.fspath(part) for part in build], environment(folder))
    assert done.returncode == 0, done.stderr
    [packed] = folder.glob("masked_diffusion-*.whl")
    zipfile.ZipFile(packed).extractall(folder / "unpacked")
    return folder / "unpacked"


def below(folder, *patterns):
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}


def test_the_wheel_ships_every_module_and_the_scripts(wheel):
    beside = wheel / "masked_diffusion" / "beside"
    programs = ("infer_mdt.py", "scripts/**/*.py", "evaluations/*.py", "docs/recipes/*.json")
    assert below(beside, "**/*.*") == below(REPO, *programs)
    assert below(wheel, "**/*.py") - {f"masked_diffusion/beside/{name}" for name in below(beside, "**/*.py")} == below(
        REPO, "masked_diffusion/**/*.py"
    )


def test_the_wheel_has_the_command_mdt_and_it_runs_the_scripts(wheel, tmp_path):
    [entries] = wheel.glob("*.dist-info/entry_points.txt")
    assert "mdt = masked_diffusion.commands:main" in entries.read_text()
    start = "import sys\nfrom masked_diffusion.commands import main\nsys.exit(main())"

    def mdt(*arguments):
        variables = environment(tmp_path, PYTHONPATH=wheel)
        return run_command([sys.executable, "-P", "-c", start, *arguments], variables, cwd=tmp_path)

    assert mdt("train", "--lr", "0").stderr == "image_train.py: error: --lr 0.0: must be positive\n"
    evaluated = mdt("evaluate", "no.npz", "no.npz")  # finds its helpers, too
    assert evaluated.returncode == 2 and "no.npz" in evaluated.stderr, evaluated.stderr
