"""``--normalize channel`` of a training in pixel space: measured, recorded, kept by a resume, undone by samples."""

import json

import numpy as np
import pytest
import torch
from support import TINY_DIGITS, call, few_steps

from masked_diffusion.data.data_statistics import NORMALISING_IMAGES, pixel_statistics, spread_groups, spread_images
from masked_diffusion.first_stage import ChannelStatistics, PixelSpace
from masked_diffusion.image_datasets import open_dataset
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import open_trained

TRAIN = "scripts/image_train.py"
NORMALIZED = [*TINY_DIGITS, "--normalize", "channel"]


def first_stage_of(folder):
    return json.loads((folder / "config.json").read_text())["first_stage"]


def test_pixels_in_pixel_space_become_mean_0_and_deviation_1_and_return():
    images = torch.randn(64, 2, 8, 8) * torch.tensor([0.5, 3.0]).view(2, 1, 1) + torch.tensor([2.0, -1.0]).view(2, 1, 1)
    pixels = PixelSpace(2)
    pixels.normalise(ChannelStatistics((2.0, -1.0), (0.5, 3.0)))
    encoded = pixels.encode(images)
    torch.testing.assert_close(encoded.mean(dim=(0, 2, 3)), torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(encoded.std(dim=(0, 2, 3)), torch.ones(2), atol=0.05, rtol=0)
    torch.testing.assert_close(pixels.decode(encoded), images)
    with pytest.raises(ValueError, match="has 2 channels, the recorded channel_mean has 1"):
        pixels.normalise(ChannelStatistics((0.0,), (1.0,)))


def test_statistics_are_those_of_all_pixels_of_the_embedded_digits():
    dataset = open_dataset("builtin:digits", image_size=8)
    assert len(dataset) <= NORMALISING_IMAGES
    images = np.stack([dataset.load(index) for index in range(len(dataset))]).astype(np.float64)
    mean, std = pixel_statistics(dataset)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, images.std(axis=(0, 2, 3)), rtol=1e-5)


def test_images_of_one_colour_are_only_shifted():
    class OneColour:
        def __len__(self):
            return 3

        def load(self, index):
            return np.full((1, 4, 4), 0.25, np.float32)

        def name_of(self, index):
            return str(index)

    assert pixel_statistics(OneColour()) == ChannelStatistics((0.25,), (1.0,))


def test_images_to_measure_are_spread_over_the_data():
    dataset = open_dataset("builtin:digits", image_size=8)
    found = torch.cat(list(spread_images(dataset, 3))).numpy()
    last = len(dataset) - 1
    np.testing.assert_array_equal(found, [dataset.load(index) for index in (0, last // 2, last)])


@pytest.fixture(scope="module")
def normalized(tmp_path_factory):
    """A training of two steps on standardised digits."""
    folder = tmp_path_factory.mktemp("normalized")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(monkeypatch, TRAIN, folder, *NORMALIZED) == 0
    return folder


def test_a_training_records_what_it_measured_and_samples_undo_it(normalized, monkeypatch):
    recorded = first_stage_of(normalized)
    expected = pixel_statistics(open_dataset("builtin:digits", image_size=8)).record()
    assert {name: recorded[name] for name in expected} == expected
    trained = open_trained(normalized / "model000002.pt", Request(), "cpu", lambda text: None)
    black = trained.first_stage.decode(torch.zeros(1, 1, 8, 8))
    torch.testing.assert_close(black[0, :, 0, 0], torch.tensor(expected["channel_mean"]))
    flags = ["--model_path", normalized / "model000002.pt", "--num_samples", 2, "--batch_size", 2, "--device", "cpu"]
    assert call(monkeypatch, "scripts/image_sample.py", normalized / "samples", *flags, *few_steps(2)) == 0


def test_a_resume_goes_on_with_the_numbers_it_began_with(normalized, monkeypatch, capsys):
    config = normalized / "config.json"
    text = json.loads(config.read_text())
    text["first_stage"]["channel_mean"] = [0.5]  # as if it were measured on other images
    config.write_text(json.dumps(text))
    assert call(monkeypatch, TRAIN, normalized, *NORMALIZED, "--max_steps", 3) == 0
    assert first_stage_of(normalized)["channel_mean"] == [0.5]
    capsys.readouterr()
    assert call(monkeypatch, TRAIN, normalized, *TINY_DIGITS, "--max_steps", 4) == 2
    assert "the run to resume has --normalize channel, this one none; resume with the same" in capsys.readouterr().err


def test_weights_of_normalised_pixels_go_on_with_their_numbers_or_a_warning(normalized, tmp_path, monkeypatch):
    warning = "were trained on other latents: --normalize channel, this one none"
    for name, flags in (("same", NORMALIZED), ("other", TINY_DIGITS)):
        start = [*flags, "--init_from", normalized / "model000002.pt"]
        assert call(monkeypatch, TRAIN, tmp_path / name, *start, sinks="log") == 0
        assert (warning in (tmp_path / name / "log.txt").read_text()) == (name == "other")
    assert first_stage_of(tmp_path / "same")["channel_mean"] == first_stage_of(normalized)["channel_mean"] == [0.5]


def test_estimates_of_normalised_pixels_are_not_clamped(normalized, tmp_path, monkeypatch, capsys):
    flags = ["--model_path", normalized / "model000002.pt", "--num_samples", 2, "--batch_size", 2, "--device", "cpu"]
    clamped = [*flags, *few_steps(2), "--clip_denoised", "True"]
    assert call(monkeypatch, "scripts/image_sample.py", tmp_path, *clamped) == 2
    assert "--clip_denoised True: it clamps to [-1, 1], and this model's channels" in capsys.readouterr().err


def test_images_to_normalise_by_are_groups_of_neighbours_all_over_the_data():
    assert spread_groups(5, 10, 2) == [0, 1, 2, 3, 4]
    assert spread_groups(101, 6, 2) == [0, 1, 50, 51, 99, 100]


def test_what_cannot_be_normalised_is_refused(tmp_path, monkeypatch, capsys, tiny_vae):
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, "--normalize", "pixel") == 2
    assert "--normalize pixel: choose none or channel" in capsys.readouterr().err
    assert call(monkeypatch, TRAIN, tmp_path, *NORMALIZED, "--vae_path", tiny_vae) == 2
    assert (
        "--normalize channel: it is for pixels (--vae_path none); for an autoencoder, encode" in capsys.readouterr().err
    )
