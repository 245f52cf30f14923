"""What only a model that has learnt can show."""

import csv
import json
import os
import re
from functools import cache

import numpy as np
import pytest
import torch
from golden_arrays import GOLDENS
from PIL import Image
from support import REPO, TINY_DIGITS, call, environment, few_steps, rows, run_command

from masked_diffusion.programs import read_digits
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import open_trained
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.inpainting import Inpainting, SideInterpolation, open_photo, side_interpolation
from masked_diffusion.sampling.sampler_config import SamplerConfig

TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"
CURVE = GOLDENS / "loss_curve.json"


def test_a_short_loss_curve_is_frozen(monkeypatch, tmp_path):
    """Any change of data order, draws, model, loss or optimizer moves it. Refreeze on purpose: REFREEZE=1 pytest ..."""
    flags = [*TINY_DIGITS, "--max_steps", "20", "--log_interval", "5", "--lr", "1e-3", "--batch_size", "16"]
    assert call(monkeypatch, TRAIN, tmp_path, *flags, "--schedule_sampler", "loss-second-moment") == 0
    names = ("step", "loss", "mse", "vb", "m_loss", "m_mse", "m_vb", "grad_norm", "param_norm")
    curve = [{name: row[name] for name in names} for row in rows(tmp_path)]
    if os.environ.get("REFREEZE"):
        CURVE.write_text(json.dumps(curve, indent=1) + "\n")
    for row, frozen in zip(curve, json.loads(CURVE.read_text()), strict=True):
        for name, value in frozen.items():
            # Other releases of torch round otherwise, which these three show most.
            sensitive = name in ("vb", "m_vb", "grad_norm")
            assert row[name] == pytest.approx(value, rel=3e-2 if sensitive else 2e-3), (row["step"], name)


@pytest.fixture(scope="module")
def eight_digits(module_folder):
    """Eight pictures of digits, one of each class 0 ... 7, as a folder."""
    from sklearn.datasets import load_digits

    folder = module_folder("eight")
    digits = load_digits()
    pixels = []
    for label in range(8):
        image = np.rint(digits.images[np.flatnonzero(digits.target == label)[0]] * 255 / 16).astype(np.uint8)
        Image.fromarray(np.repeat(image[:, :, None], 3, axis=2)).save(folder / f"{label}_0.png")
        pixels.append(image)
    return folder, np.stack(pixels)


@pytest.fixture(scope="module")
def overfitted(module_folder, eight_digits):
    """A function of a model's name: the EMA file of a training that knows the eight by heart."""
    data, _ = eight_digits

    @cache
    def train(model):
        folder = module_folder(model)
        flags = [
            "--data_dir", data, "--vae_path", "none", "--image_size", "8", "--model", model, "--mask_ratio", "0.3",
            "--decode_layer", "2", "--batch_size", "16", "--lr", "2e-3", "--lr_anneal_steps", "400",
            "--ema_rate", "0.98", "--random_flip", "False", "--log_interval", "100", "--preview_samples", "0",
            "--predict_xstart", "True", "--learn_sigma", "False", "--sigma_small", "True", "--num_workers", "0",
            # Version 2's own weighting leaves the noisiest timesteps, where the class decides, for a longer training.
            "--opt", "adamw", "--min_snr_gamma", "None",
        ]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            assert call(patch, TRAIN, folder, *flags) == 0
        return folder / "ema_0.98_000400.pt"

    return train


def nearest(images, pixels, region=None):
    """Which of ``pixels`` (K, 8, 8) each of ``images`` (N, 8, 8, 3) is most like, in a region."""
    region = np.ones((8, 8), dtype=bool) if region is None else region
    difference = images[:, None, ..., 0].astype(float) - pixels[None].astype(float)
    return (difference[..., region] ** 2).mean(axis=2).argmin(axis=1)


def test_an_mdt_overfits_eight_digits_and_row_i_of_the_labels_is_row_i_of_the_pictures(
    monkeypatch, tmp_path, eight_digits, overfitted
):
    _, pixels = eight_digits
    path = overfitted("MDT_Ti_2")
    first, final = rows(path.parent)[0], rows(path.parent)[-1]
    assert final["loss"] < 0.05 and final["m_loss"] < 0.1, (first, final)
    sample = ["--model_path", path, "--num_samples", "19", "--batch_size", "4", *few_steps(30)]
    assert call(monkeypatch, SAMPLE, tmp_path, *sample, "--cfg_cond", "True", "--cfg_scale", "1.5") == 0
    with np.load(tmp_path / "samples_19x8x8x3.npz") as file:
        samples, labels = file["arr_0"], file["arr_1"]
    assert len(set(labels.tolist())) > 3
    assert (nearest(samples, pixels) == labels).all()


@pytest.mark.parametrize("mode", ["side", "plain"])
@pytest.mark.parametrize("name", ["MDT_Ti_2", "MDTv2_Ti_2"])
def test_a_filled_digit_is_of_the_class_asked_for_and_the_rest_is_untouched(
    eight_digits, overfitted, tmp_path, name, mode
):
    folder, pixels = eight_digits
    trained = open_trained(overfitted(name), Request(), "cpu", warn=pytest.fail)
    sampler = SamplerConfig(20, "ddim", cfg_cond=True, cfg_scale=1.5)
    make = ImageSampler(trained.model, trained.config, sampler, trained.first_stage, "cpu")
    hole = np.zeros((8, 8), dtype=bool)
    hole[:, 2:] = True
    Image.fromarray(hole).save(tmp_path / "mask.png")
    found = []
    for label in range(8):  # each filled as two digits that it is not
        photo = open_photo(folder / f"{label}_0.png", tmp_path / "mask.png", 8, grey=False)
        asked = [(label + 3) % 8, (label + 6) % 8]
        side = side_interpolation(trained.model, trained.config, mode)
        inpainting = photo.inpainting(trained.first_stage, side, "cpu")
        images = photo.paste_around(make(range(2), asked, inpainting))
        assert np.array_equal(images[:, ~hole, 0], np.broadcast_to(pixels[label][~hole], (2, 16)))
        found += (nearest(images, pixels, hole) == asked).tolist()
    assert np.mean(found) > 0.8  # 1/8 by chance


@pytest.fixture(scope="module")
def digit_folders(module_folder):
    """All embedded digits as pictures: 0 ... 7 in one folder, 8 and 9 in another. Also the pixels and labels of all."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folders = [module_folder(name) for name in ("zero_to_seven", "eight_and_nine")]
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        pixels = np.rint(image * 255 / 16).astype(np.uint8)
        Image.fromarray(np.repeat(pixels[:, :, None], 3, axis=2)).save(folders[int(label >= 8)] / f"{label}_{i}.png")
    return *folders, digits.data * 255 / 16, digits.target


def test_a_model_of_eight_digits_learns_the_other_two_in_a_fraction_of_the_steps(monkeypatch, tmp_path, digit_folders):
    from sklearn.neighbors import KNeighborsClassifier

    old, new, pixels, target = digit_folders
    common = [
        "--vae_path", "none", "--image_size", "8", "--model", "MDT_Ti_2", "--decode_layer", "2", "--batch_size", "32",
        "--ema_rate", "0.9", "--random_flip", "False", "--preview_samples", "0", "--lr", "2e-3", "--log_interval", "20",
        "--predict_xstart", "True", "--learn_sigma", "False", "--sigma_small", "True", "--num_workers", "0",
        "--save_interval", "40",
    ]  # fmt: skip
    two = ["--data_dir", new, "--lr_anneal_steps", "80"]
    runs = {
        "old": ["--data_dir", old, "--lr_anneal_steps", "240"],
        "scratch": [*two, "--max_steps", "40"],
        "tuned": [*two, "--init_from", tmp_path / "old" / "ema_0.9_000240.pt"],
    }
    for name, flags in runs.items():
        assert call(monkeypatch, TRAIN, tmp_path / name, *common, *flags) == 0
    tuned, scratch = ([row["loss"] for row in rows(tmp_path / name)] for name in ("tuned", "scratch"))
    # In its first 20 steps it is ahead of what a fresh model reaches in twice as many (measured: 0.19 against 0.26).
    assert tuned[0] < 0.85 * scratch[1], (tuned, scratch)
    classifier = KNeighborsClassifier(3).fit(pixels, target)

    def share_read(name, step):
        path, folder = tmp_path / name / f"ema_0.9_{step:06d}.pt", tmp_path / f"{name}_{step}"
        sample = ["--model_path", path, "--num_samples", "60", "--labels", "8,9", "--batch_size", "60"]
        flags = [*few_steps(20), "--cfg_cond", "True", "--cfg_scale", "2"]
        assert call(monkeypatch, SAMPLE, folder, *sample, *flags) == 0
        with np.load(folder / "samples_60x8x8x3.npz") as file:
            samples, labels = file["arr_0"][..., 0].reshape(60, -1), file["arr_1"]
        return (classifier.predict(samples) == labels + 8).mean()

    shares = share_read("scratch", 40), share_read("tuned", 40), share_read("tuned", 80)
    # After 40 steps a fresh model's digits are blobs, and a tuned one's can be read (measured: 0.38, 0.72, 0.85).
    assert shares[0] + 0.2 < shares[1] and shares[2] > 0.6, shares


@pytest.mark.e2e
def test_run_sh_tells_its_story_in_the_active_environment(tmp_path):
    """The whole script, with a training so short that the digits are noise: the numbers are checked in the slow set."""
    env = environment(tmp_path / "output_digits", STEPS=20, OPENAI_LOG_FORMAT="csv")
    done = run_command(["bash", "run.sh"], env, cwd=REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-back real digits read right" in done.stdout
    assert "read as the digit asked for" in done.stdout
    assert (tmp_path / "output_digits" / "samples_355x8x8x3.png").exists()
    with (tmp_path / "output_digits" / "progress.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["20"]


@pytest.mark.slow
@pytest.mark.e2e
def test_run_sh_draws_digits_that_are_read_as_asked_for(tmp_path):
    done = run_command(["bash", "run.sh"], environment(tmp_path / "output_digits"), cwd=REPO, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    [share] = re.findall(r"^samples: ([\d.]+)% of 355 read as the digit asked for", done.stdout, re.MULTILINE)
    [accuracy] = re.findall(r"^digit classifier: ([\d.]+)% of 355", done.stdout, re.MULTILINE)
    assert float(accuracy) > 95 and float(share) >= 90
    [fid] = re.findall(r"^FID: ([\d.]+)$", done.stdout, re.MULTILINE)
    assert float(fid) < 100  # 25 for real digits, thousands for noise
    check_filled_digits(tmp_path / "output_digits" / "ema_0.99_002000.pt")


@pytest.mark.slow
@pytest.mark.e2e
def test_run_sh_draws_shapes_that_are_read_as_asked_for(tmp_path):
    done = run_command(["bash", "run.sh", "--shapes"], environment(tmp_path / "output_shapes"), cwd=REPO, timeout=7200)
    assert done.returncode == 0, done.stdout + done.stderr
    [share] = re.findall(r"^samples: ([\d.]+)% of 500 read as the shape asked for", done.stdout, re.MULTILINE)
    assert float(share) >= 95


def check_filled_digits(path):
    """Held-back digits of which two columns are known become the digit after them, in both modes."""
    classifier = read_digits.train_classifier("digits")
    pixels, labels = (tensor[:50] for tensor in read_digits.embedded_images("digits-test"))
    trained = open_trained(path, Request(), "cpu", warn=pytest.fail)
    make = ImageSampler(
        trained.model,
        trained.config,
        SamplerConfig(15, "ddim", cfg_cond=True, cfg_scale=4.0),
        trained.first_stage,
        "cpu",
    )
    hole = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    hole[..., 2:] = True
    known = pixels.permute(0, 3, 1, 2)[:, :1].float() / 127.5 - 1
    asked = (labels + 1) % 10
    for side in (None, SideInterpolation.of(trained.model)):
        images = torch.from_numpy(make(range(50), asked.tolist(), Inpainting(known, hole, side)))
        assert (images[:, :, :2].int() - pixels[:, :, :2].int()).abs().max() <= 1  # truncation to uint8
        assert (read_digits.predict(classifier, images) == asked).float().mean() > 0.8  # 0.1 by chance
