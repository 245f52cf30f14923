"""A small autoencoder of one's own: trained, standardised, written whole, and never over anything."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import script

from masked_diffusion.data.data_config import DataConfig
from masked_diffusion.data.data_statistics import spread_images
from masked_diffusion.first_stage import load_first_stage
from masked_diffusion.image_datasets import SourceDataset, load_data
from masked_diffusion.training.autoencoder_training import (
    AutoencoderConfig,
    latent_statistics,
    learning_rate,
    psnr,
    random_squares,
    standardise,
    train_autoencoder,
)

TRAIN = "scripts/train_autoencoder.py"
SIDE = 16
TINY = ["--image_size", SIDE, "--crop", SIDE, "--channels", 8, "--batch_size", 4, "--num_workers", 0, "--device", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(colour_folder):
    return SourceDataset(str(colour_folder), DataConfig(class_cond=False), image_size=SIDE)


def run(data_dir, out, *flags):
    arguments = ["--data_dir", data_dir, "--out", out, *TINY, *flags]
    return script(TRAIN).main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(colour_folder, module_folder):
    """The folder of an autoencoder after a few steps; not to be changed."""
    out = module_folder("autoencoder") / "colours"
    assert run(colour_folder, out, "--steps", 6) == 0
    return out


def train(images, **settings):
    config = AutoencoderConfig(crop=SIDE, channels=8, batch_size=8, **settings)
    vae = config.build(SIDE)
    batches = load_data(data_dir="", dataset=images, batch_size=8, image_size=SIDE, seed=config.seed)
    losses = []
    train_autoencoder(vae, batches, config, CPU, lambda step, values: losses.append(values))
    return vae, losses


def test_it_learns_to_reconstruct(images):
    fresh = AutoencoderConfig(crop=SIDE, channels=8).build(SIDE).eval()
    vae, losses = train(images, steps=40, lr=2e-2)
    assert losses[-1]["l1"] < 0.75 * losses[0]["l1"]
    assert psnr(vae, spread_images(images, 8), CPU) > psnr(fresh, spread_images(images, 8), CPU) + 2


def test_the_weight_of_the_divergence_widens_the_posterior(images):
    kl = [train(images, steps=30, lr=1e-2, kl_weight=weight)[1][-1]["kl"] for weight in (0.0, 1.0)]
    assert kl[1] < 0.2 * kl[0]


def test_the_latents_have_mean_0_and_deviation_1_in_each_channel_the_posteriors_variance_included(trained, images):
    first_stage = load_first_stage(str(trained), "cpu")
    assert first_stage.description["scaling_factor"] == 1.0 and first_stage.downsample == 2
    pictures = torch.cat(list(spread_images(images, 24)))
    moments = first_stage.moments(pictures)
    latents = first_stage.encode(pictures)
    assert latents.mean((0, 2, 3)).abs().max() < 0.05 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.05
    means = moments[:, : len(moments[0]) // 2]
    assert (means.std((0, 2, 3)) < 0.9).all(), "without the variance of the posterior, another scale would be right"


def test_standardising_changes_the_latents_and_not_the_images(images):
    vae, _ = train(images, steps=3)
    picture = next(spread_images(images, 1))
    with torch.no_grad():
        before = vae.encode(picture).latent_dist
        decoded = vae.decode(before.mean).sample
        mean, deviation = latent_statistics(vae, spread_images(images, 24), CPU)
        standardise(vae, mean + 0.5, deviation * 3)
        after = vae.encode(picture).latent_dist
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded, rtol=1e-3, atol=1e-4)
    view = (1, -1, 1, 1)
    expected = (before.mean - (mean + 0.5).float().view(view)) / (3 * deviation).float().view(view)
    torch.testing.assert_close(after.mean, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.std, before.std / (3 * deviation).float().view(view), rtol=1e-3, atol=1e-4)


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    config = AutoencoderConfig(steps=1000, lr=1.0)
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.04) and rates[11] == pytest.approx(0.48, abs=0.01)
    assert rates[500] == pytest.approx(0.5) and 0 < rates[999] < 1e-5
    assert max(rates) == pytest.approx(rates[25], abs=0.01)


def test_a_step_sees_the_same_square_of_its_images_and_another_step_another():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    squares = [random_squares(images, 4, seed=0, step=step) for step in range(40)]
    assert all(square.shape == (2, 3, 4, 4) for square in squares)
    corners = {square[0, 0, 0, 0].item() for square in squares}
    assert len(corners) > 12 and {corner % 8 for corner in corners} == {corner // 8 for corner in corners} == set(
        range(5)
    )
    assert all(torch.equal(square[1] - square[0], torch.full((3, 4, 4), 192)) for square in squares)
    assert torch.equal(squares[7], random_squares(images, 4, seed=0, step=7))
    assert random_squares(images, 8, seed=0, step=0) is images


# The program


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(colour_folder, trained, tmp_path):
    for name, flags in (("again", []), ("seed", ["--seed", 1]), ("unflipped", ["--random_flip", "False"])):
        assert run(colour_folder, tmp_path / name, "--steps", 6, *flags) == 0
    weights = "diffusion_pytorch_model.safetensors"
    bytes_of = {name: (tmp_path / name / weights).read_bytes() for name in ("again", "seed", "unflipped")}
    expected = (trained / weights).read_bytes()
    assert bytes_of["again"] == expected and expected not in (bytes_of["seed"], bytes_of["unflipped"])


@pytest.mark.parametrize(
    "flag, value, downsample, channels, width",
    [("--downsample", 4, 4, 4, 8), ("--latent_channels", 2, 2, 2, 8), ("--channels", 16, 2, 4, 16)],
)
def test_the_flags_shape_the_autoencoder(colour_folder, tmp_path, flag, value, downsample, channels, width):
    assert run(colour_folder, tmp_path / "out", "--steps", 1, flag, value) == 0
    first_stage = load_first_stage(str(tmp_path / "out"), "cpu")
    assert (first_stage.downsample, first_stage.latent_channels) == (downsample, channels)
    assert first_stage.vae.config.block_out_channels[0] == width


def test_a_complete_autoencoder_is_left_alone_and_said_to_be_done(colour_folder, trained, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    assert run(colour_folder, trained, "--steps", 6) == 0
    out, err = capsys.readouterr()
    assert "this autoencoder is already complete" in err and out == f"{trained}\n"
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before
    assert json.loads((trained / "training.json").read_text())["settings"]["steps"] == 6
    with Image.open(trained / "reconstructions.png") as picture:
        assert np.asarray(picture).std() > 10


@pytest.mark.parametrize(
    "flags", [["--steps", 7], ["--steps", 6, "--kl_weight", "0.5"], ["--steps", 6, "--lr", "1e-4"]]
)
def test_an_autoencoder_of_other_settings_is_not_overwritten(colour_folder, trained, capsys, flags):
    before = (trained / "config.json").read_bytes()
    assert run(colour_folder, trained, *flags) == 2
    assert "something else is there already; give a new folder" in capsys.readouterr().err
    assert (trained / "config.json").read_bytes() == before


def test_a_file_or_someone_elses_folder_is_not_overwritten(colour_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "training.json").write_text("[]")
    for name in ("file", "folder"):
        assert run(colour_folder, tmp_path / name, "--steps", 1) == 2
        assert f"--out {tmp_path / name}: something else is there already" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and len(list((tmp_path / "folder").iterdir())) == 1


def test_a_training_that_fails_leaves_nothing_behind(colour_folder, tmp_path):
    with pytest.raises(FloatingPointError, match="the loss is not finite; use a smaller --lr than 1e\\+20"):
        run(colour_folder, tmp_path / "out", "--steps", 40, "--lr", "1e20")
    assert list(tmp_path.iterdir()) == []


def test_an_autoencoder_that_cannot_be_written_leaves_nothing_behind(colour_folder, tmp_path, monkeypatch):
    def fail(picture, path):
        raise OSError("no space left on device")

    monkeypatch.setattr("masked_diffusion.training.autoencoder_training.save_picture", fail)
    with pytest.raises(OSError, match="no space left"):
        run(colour_folder, tmp_path / "out", "--steps", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--downsample", 3], "--downsample 3: choose 2, 4 or 8"),
        (["--channels", 12], "--channels 12: must be a multiple of 8"),
        (["--latent_channels", 0], "--latent_channels 0: must be at least 1"),
        (["--steps", 0], "--steps 0: must be at least 1"),
        (["--batch_size", 0], "--batch_size 0: must be at least 1"),
        (["--crop", 15], "--crop 15: must be a multiple of --downsample 2"),
        (["--lr", 0], "--lr 0.0: must be positive"),
        (["--kl_weight", -1], "--kl_weight -1.0: must be 0 or more"),
        (["--image_size", 17], "--image_size 17: must be a multiple of --downsample 2"),
        (["--data_dir", "builtin:digits"], "--data_dir builtin:digits: give colour images"),
        (["--out", ""], "--out: give a new folder for the autoencoder"),
        (["--num_workers", -2], "--num_workers -2: must be 0"),
        (["--data_dir", "/nowhere/at/all"], "--data_dir /nowhere/at/all"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(colour_folder, tmp_path, capsys, flags, message):
    assert run(colour_folder, tmp_path / "out", "--steps", 1, *flags) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_cannot_be_read_costs_no_training(colour_folder, tmp_path):
    shutil.copytree(colour_folder, tmp_path / "images")
    first = sorted((tmp_path / "images").glob("*/*"))[0]
    first.write_bytes(b"broken")
    assert run(tmp_path / "images", tmp_path / "out", "--steps", 2) == 0
    assert (tmp_path / "out" / "config.json").is_file()
