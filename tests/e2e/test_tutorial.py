"""docs/tutorial.md and the notebook of it, command by command, in one folder, with few images and steps."""

import itertools
import re
import shlex
import subprocess

import numpy as np
import pytest
from PIL import Image
from support import REPO, TIMEOUT, call, environment

from masked_diffusion.data.shapes import CLASSES, draw_shape

PAGE = (REPO / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [
    " ".join(line.split())
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
# What is done elsewhere, and where.
ELSEWHERE = {
    "pip install": "tests/run.sh installs the package and its extras",
    "tensorboard --logdir": "test_run_log.py and others read what a training writes for it",
    "scripts/read_digits.py": "test_latent_path.py trains the classifier, and scores with it",
    "evaluations/evaluator.py": "test_latent_path.py",
}
FEWER = {
    "scripts/train_autoencoder.py": "--steps 3 --num_workers 0 --device cpu",
    "scripts/encode_latents.py": "--num_workers 0 --device cpu",
    "scripts/check_data.py": "--num_workers 0",
    "scripts/make_dataset.py": "--num_workers 0",
    "infer_mdt.py": "--num_sampling_steps 2 --device cpu",
    "scripts/image_sample.py": "--num_sampling_steps 2 --few_steps True --num_samples 4",
}
TRAINING = "--max_steps {} --num_workers 0 --preview_steps 2 --log_interval 1"
PICTURES = ("mine.png", "weights.png", "denoising.gif", "filled.png", "curve.png")


@pytest.fixture(scope="module")
def images(module_folder):
    """In place of builtin:shapes, four pictures of each thing."""
    root = module_folder("shapes")
    for index in range(40):
        folder = root / list(CLASSES)[index % 10]
        folder.mkdir(exist_ok=True)
        draw_shape(0, index).save(folder / f"{index:06d}.png")
    return root


def fewer(command, images):
    """A command with few images and steps."""
    settings, python, rest = command.rpartition("python ")
    if not rest.startswith(("scripts/", "infer_mdt.py")):
        return command
    rest = rest.replace("002000.pt", "000002.pt").replace("builtin:shapes", shlex.quote(str(images)))
    program = rest.split()[0]
    steps = 2 if "output_mine" in settings else 1
    flags = TRAINING.format(steps) if program == "scripts/image_train.py" else FEWER.get(program, "")
    return f"{settings}{python}{rest} {flags}"


@pytest.mark.e2e
def test_the_tutorial_goes_from_images_to_a_shared_model(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = []
    for command in COMMANDS:
        if any(name in command for name in ELSEWHERE):
            continue
        settings, _, rest = fewer(command, images).rpartition("python ")
        if not rest.startswith(("scripts/", "infer_mdt.py")):
            subprocess.run(command, shell=True, check=True)
            continue
        program, *flags = shlex.split(rest)
        variables = dict(setting.split("=") for setting in settings.split())
        folder, sinks = variables.get("OPENAI_LOGDIR", "output"), variables.get("OPENAI_LOG_FORMAT", "csv")
        assert call(monkeypatch, program, folder, *flags, sinks=sinks) in (0, None), command
        done.append(program)
    assert len(done) == 13
    assert all(Image.open(tmp_path / name).size[0] > 32 for name in PICTURES)
    with np.load(tmp_path / "output_mine" / "samples_4x32x32x3.npz") as samples:
        assert samples["arr_0"].shape == (4, 32, 32, 3)
    assert (tmp_path / "output_pets" / "ema_0.99_000001.pt").exists()
    assert (tmp_path / "my_pipeline" / "model_index.json").exists()


@pytest.fixture
def execute(images, tmp_path):
    """Run the notebook's cells until the first of which something is true, as Jupyter does. Returns the cells."""
    reason = "the extra test brings nbclient and ipykernel, which run notebooks"
    nbformat, nbclient = (pytest.importorskip(name, reason=reason) for name in ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel", reason=reason)
    for name in ("scripts", "infer_mdt.py", "masked_diffusion"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "docs").mkdir()

    def run(until=lambda cell: False):
        notebook = nbformat.read(REPO / "docs" / "tutorial.ipynb", as_version=4)
        nbformat.validate(notebook)
        cells = []
        for cell in itertools.takewhile(lambda cell: not until(cell), notebook.cells):
            if cell.cell_type == "markdown" or any(name in cell.source for name in ELSEWHERE):
                continue
            _, bash, command = cell.source.partition("%%bash\n")
            if bash:
                cell.source = bash + fewer(" ".join(command.replace("\\\n", " ").split()), images)
            cells.append(cell)
        notebook.cells = cells
        client = nbclient.NotebookClient(
            notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(tmp_path / "docs")}}
        )
        client.execute(env=environment(tmp_path / "output"))
        return cells

    return run


@pytest.mark.e2e
def test_the_notebook_starts_as_the_tutorial_does(execute, tmp_path):
    cells = execute(until=lambda cell: "train_autoencoder.py" in cell.source)
    assert len(list((tmp_path / "my_images").glob("*/*.png"))) == 40
    assert "40" in str(cells[-1].outputs)


@pytest.mark.slow
@pytest.mark.e2e
def test_the_notebook_goes_from_images_to_a_shared_model_and_shows_its_pictures(execute, tmp_path):
    shown = [cell for cell in execute() if "Image(" in cell.source and not cell.source.startswith("%%")]
    assert len(shown) == len(PICTURES) and all("image/" in str(cell.outputs) for cell in shown)
    assert (tmp_path / "my_pipeline" / "model_index.json").exists()


def test_what_the_tutorial_leaves_to_other_tests_is_in_it():
    assert all(any(name in command for command in COMMANDS) for name in ELSEWHERE)
