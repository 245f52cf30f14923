"""What version 0.1.0 began goes on, and comes out as 0.1.0 itself would have ended it.

``goldens/run_0_1_0.tar.xz`` holds a training of 0.1.0 that stopped after four steps, a sampling of its weights that
stopped after one of two batches, and what 0.1.0 made of four more steps and of the second batch.
"""

import csv
import json
import tarfile
from functools import partial

import numpy as np
import pytest
from golden_arrays import GOLDENS
from PIL import Image
from support import REPO, call, few_steps, rows, script, weights

from masked_diffusion import choices
from masked_diffusion.models import MDT, MODELS, SIZES
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.training import training_eval

TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"
TINY = {"depth": 3, "hidden_size": 16, "num_heads": 2}
TRAINING = [
    "--data_dir", "builtin:digits", "--vae_path", "none", "--image_size", "8", "--model", "MDT_tiny_2",
    "--mask_ratio", "0.3", "--decode_layer", "1", "--batch_size", "8", "--log_interval", "1", "--lr", "1e-2",
    "--ema_rate", "0.5", "--schedule_sampler", "loss-second-moment", "--preview_samples", "4", "--preview_steps", "3",
    "--num_workers", "0", "--device", "cpu", "--max_steps", "8",
]  # fmt: skip
SAMPLING = ["--num_samples", "8", "--batch_size", "4", *few_steps(5), "--device", "cpu"]


@pytest.fixture
def former(tmp_path, monkeypatch):
    """The folder with everything, and a model small enough for it."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(choices, "MODELS", [*choices.MODELS, "MDT_tiny_2"])
    monkeypatch.setitem(MODELS, "MDT_tiny_2", partial(MDT, patch_size=2, **TINY))
    with tarfile.open(GOLDENS / "run_0_1_0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def expected(former):
    with np.load(former / "expected" / "arrays.npz", allow_pickle=False) as file:
        return dict(file)


def values_of(state, names):
    return np.concatenate([state[name].numpy().ravel() for name in names])


def assert_same_pixels(actual, made_by_0_1_0):
    """Another version of torch may round a pixel the other way."""
    assert actual.shape == made_by_0_1_0.shape and actual.std() > 10
    assert np.mean(np.abs(actual.astype(int) - made_by_0_1_0) <= 1) > 0.99


def test_a_training_of_0_1_0_goes_on_to_what_0_1_0_would_have_made_of_it(former, monkeypatch):
    run, known = former / "run", expected(former)
    assert call(monkeypatch, TRAIN, run, *TRAINING) == 0
    state, config = weights(run, 8, "state"), json.loads((run / "config.json").read_text())
    assert state["stream"] == config["stream"] == 1 and state["position"] == known["position"] == 64
    for kind, name in (("model", "model"), ("ema_0.5_", "ema")):
        made = values_of(weights(run, 8, kind), known["order"])
        # Adam moves a weight by the sign of a gradient that rounding alone decides: of few weights it may.
        assert np.mean(np.abs(made - known[name]) < 1e-4) > 0.99
    with (former / "expected" / "progress.csv").open(newline="") as file:
        for actual, row in zip(rows(run), csv.DictReader(file), strict=True):
            assert actual["step"] == int(row["step"]) and actual["samples"] == int(row["samples"])
            assert actual["loss"] == pytest.approx(float(row["loss"]), rel=1e-3)
            assert actual["m_loss"] == pytest.approx(float(row["m_loss"]), rel=1e-3)
    with Image.open(run / "preview_000008.png") as preview:
        assert_same_pixels(np.asarray(preview), known["preview"])


def test_a_sampling_of_0_1_0_goes_on_to_what_0_1_0_would_have_made_of_it(former, monkeypatch):
    known, folder = expected(former), former / "samples"
    flags = ["--model_path", former / "run" / "ema_0.5_000004.pt", *SAMPLING]
    assert call(monkeypatch, SAMPLE, folder, *flags) == 0
    with np.load(folder / "samples_8x8x8x3.npz") as made:
        assert np.array_equal(made["arr_0"][:4], known["samples"][:4])  # the batch that was there
        assert_same_pixels(made["arr_0"][4:], known["samples"][4:])
        assert np.array_equal(made["arr_1"], known["labels"])
    assert "stream" not in json.loads((folder / "manifest.json").read_text())["settings"]
    assert not list(folder.glob("*_1*"))  # nothing was moved aside

    assert call(monkeypatch, SAMPLE, former / "anew", *flags) == 0
    assert json.loads((former / "anew" / "manifest.json").read_text())["settings"]["stream"] == 2
    with np.load(former / "anew" / "samples_8x8x8x3.npz") as made:
        assert np.mean(made["arr_0"] != known["samples"]) > 0.5


def test_an_evaluation_in_a_training_of_0_1_0_draws_from_its_stream_and_compares_with_its_samples(former, monkeypatch):
    monkeypatch.setattr(script(TRAIN), "EVALUATOR", REPO / "tests" / "stand_in_evaluator.py")
    streams = []

    class Spy(ImageSampler):
        def __init__(self, *args, stream, **settings):
            streams.append(stream)
            super().__init__(*args, stream=stream, **settings)

    monkeypatch.setattr(training_eval, "ImageSampler", Spy)
    np.savez(former / "reference.npz", arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    flags = ["--eval_interval", "6", "--eval_ref", former / "reference.npz", "--eval_num_samples", "2"]
    assert call(monkeypatch, TRAIN, former / "run", *TRAINING, *flags, "--eval_sampling_steps", "2") == 0
    record = json.loads((former / "run" / "evaluation" / "000006" / "manifest.json").read_text())
    assert set(streams) == {1} and "stream" not in record["settings"]
    fields_0_1_0 = {"model", "image_size", "downsample", "in_channels", "num_classes", "mask_ratio", "decode_layer"}
    assert set(record["settings"]["model"]) == fields_0_1_0 | {"learn_sigma", "class_dropout_prob"}
    assert not {name for name in record["settings"]["sampler"] if name.startswith("guide_") or name == "sampler_steps"}
