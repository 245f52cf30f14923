"""The recipes for 512 and for 64 pixels of docs/training.md, from images to samples, on tiny networks."""

import numpy as np
import pytest
from support import call, few_steps, make_colour_folder

from masked_diffusion.runs.config import read_config

TRAINING = [
    "--model", "MDT_Ti_2", "--mask_ratio", "0.3", "--decode_layer", "2", "--batch_size", "1", "--max_steps", "1",
    "--preview_samples", "0", "--num_workers", "0", "--device", "cpu",
]  # fmt: skip
SAMPLING = ["--num_samples", "1", "--batch_size", "1", *few_steps(1), "--device", "cpu"]


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Train a step, then sample. Returns the run's configuration and the samples."""

    def run(side, *flags):
        assert call(monkeypatch, "scripts/image_train.py", tmp_path / "run", *TRAINING, *flags) == 0
        model = ["--model_path", tmp_path / "run" / "ema_0.9999_000001.pt"]
        guided = ["--cfg_cond", "True", *SAMPLING]
        assert call(monkeypatch, "scripts/image_sample.py", tmp_path / "samples", *model, *guided) == 0
        with np.load(tmp_path / "samples" / f"samples_1x{side}x{side}x3.npz") as file:
            return read_config(tmp_path / "run").model, file["arr_0"]

    return run


def test_512_pixels_through_latents_encoded_once(chain, tmp_path, monkeypatch, tiny_vae):
    folder = make_colour_folder(tmp_path / "images", per_class=1, size=530)
    archive, latents = tmp_path / "images512.zip", tmp_path / "latents512"
    assert call(monkeypatch, "scripts/make_dataset.py", tmp_path, folder, archive, "--image_size", 512) == 0
    encoding = ["--data_dir", archive, "--out", latents, "--image_size", 512, "--vae_path", tiny_vae, "--dtype", "fp16"]
    assert (
        call(monkeypatch, "scripts/encode_latents.py", tmp_path, *encoding, "--num_workers", 0, "--device", "cpu") == 0
    )
    model, images = chain(
        512, "--data_dir", latents, "--image_size", 512, "--vae_path", tiny_vae, "--random_flip", "False"
    )
    assert model.latent_shape == (4, 64, 64) and model.num_classes == 3 and images.shape == (1, 512, 512, 3)


def test_64_pixels_without_an_autoencoder(chain, tmp_path):
    folder = make_colour_folder(tmp_path / "images", per_class=1, size=70)
    model, images = chain(64, "--data_dir", folder, "--image_size", 64, "--vae_path", "none")
    assert model.latent_shape == (3, 64, 64) and model.num_classes == 3 and images.shape == (1, 64, 64, 3)
