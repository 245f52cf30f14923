import contextlib
import importlib
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

sys.path.insert(0, str(Path(__file__).parent))
import support  # noqa: E402  (tests import their helpers from this folder)

with contextlib.suppress(ImportError):  # the tests of a GPU run without hypothesis, too
    from hypothesis import settings

    # No example has a time limit: a busy machine makes some slow, and what is slow is no failure.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _one_thread_and_a_known_global_generator():
    # Two test processes with two threads each crawl on a small machine.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    """Make a folder by its name, which goes with the module's last test: runs leave gigabytes of checkpoints."""
    made = []

    def make(name):
        made.append(tmp_path_factory.mktemp(name))
        return made[-1]

    yield make
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory):
    """A real diffusers autoencoder on disk, with a scale that is not the default."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae") / "tiny"
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.3,
    )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def no_home(monkeypatch):
    """A user without HOME and without an entry in the list of users, as in many containers."""

    def unknown(number):
        raise KeyError(f"uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory):
    return support.make_colour_folder(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def tf():
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    importlib.import_module("torch._dynamo")  # loads triton, whose library crashes when it comes after TensorFlow
    return pytest.importorskip("tensorflow", reason="features are computed by TensorFlow")


@pytest.fixture
def counter(monkeypatch):
    """Compile as far as graphs, which needs no compiler of C++, and count them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


@pytest.fixture
def mean_colours(monkeypatch):
    """The evaluator with a network that a test can check: mean colours in place of Inception's features."""
    from test_evaluator_folders import MeanColours, evaluator

    monkeypatch.setattr(evaluator, "load_backend", lambda options, script: MeanColours())


@pytest.fixture
def pair(tmp_path):
    """A reference of 60 images and 40 samples, with labels of three classes."""
    from test_evaluator_folders import images

    for name, count, seed in (("ref", 60, 0), ("gen", 40, 1)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images(count, seed=seed), arr_1=np.arange(count) % 3)
    return tmp_path / "ref.npz", tmp_path / "gen.npz"
