import dataclasses
import hashlib
import json
import math
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_arrays import set_golden_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import one_of

from masked_diffusion import create_diffusion
from masked_diffusion.diffusion import samplers
from masked_diffusion.diffusion.guidance import Guidance
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.first_stage import PixelSpace
from masked_diffusion.processes import resumable_parts
from masked_diffusion.processes.resumable_parts import make_parts
from masked_diffusion.runs.config import DiffusionConfig, ModelConfig, RunConfig
from masked_diffusion.sampling.image_sampler import ImageSampler, labels_for
from masked_diffusion.sampling.sample_set import SampleSet, generate
from masked_diffusion.sampling.sampler_config import SamplerConfig

NUM_CLASSES = 7


def run_config(**process):
    return RunConfig(
        model=ModelConfig("MDT_Ti_2", image_size=8, downsample=1, in_channels=3, num_classes=NUM_CLASSES),
        diffusion=DiffusionConfig(**process),
        first_stage=PixelSpace(3).description,
    )


@pytest.fixture(scope="module")
def model():
    """A real model of random weights, added to the exact denoiser of normal data, so that samples fill the range."""
    mdt = set_golden_weights(run_config().model.build()).eval()
    with torch.no_grad():
        for parameter in mdt.final_layer.linear.parameters():
            parameter.mul_(0.2)
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).float()

    def denoiser(x, t, y):
        out, alpha_bar = mdt(x, t, y), alphas_cumprod[t].view(-1, 1, 1, 1)
        eps = (1 - alpha_bar).sqrt() * x + alpha_bar.sqrt() * out[:, :3]
        return torch.cat([eps, out[:, 3:]], dim=1)

    return denoiser


MODES = {
    "unguided": {},
    "guided": {"cfg_cond": True, "cfg_scale": 3.8, "scale_pow": 0.5},
    "ddim": {"sampler": "ddim"},
    "guided ddim, clipped": {"cfg_cond": True, "sampler": "ddim", "clip_denoised": True},
    "dpmsolver++": {"sampler": "dpmsolver++"},
    "guided unipc": {"sampler": "unipc", "cfg_cond": True, "guidance": "interval", "cfg_interval": [100, 800]},
    "heun": {"sampler": "heun"},
}


def sampler_of(model, num_sampling_steps=4, **sampler):
    return ImageSampler(model, run_config(), SamplerConfig(num_sampling_steps, **sampler), PixelSpace(3), "cpu")


@pytest.fixture(params=MODES)
def make(request, model):
    return sampler_of(model, **MODES[request.param])


LABELS = [0, 3, 6, 3, NUM_CLASSES, 1]


# -- the sampler -------------------------------------------------------------------------------------------------------


def test_the_test_samples_are_neither_flat_nor_saturated(make):
    images = make(range(6), LABELS)
    assert images.shape == (6, 8, 8, 3) and images.dtype == np.uint8
    assert np.mean((images > 0) & (images < 255)) > 0.25
    assert len(np.unique(images)) > 30


@pytest.mark.parametrize("batches", [[[0], [1], [2], [3], [4], [5]], [[5, 0], [4, 1, 3], [2]], [[3, 2, 1, 0, 5, 4]]])
def test_a_sample_does_not_depend_on_its_batch(make, batches):
    expected = make(range(6), LABELS)
    actual = np.zeros_like(expected)
    for indices in batches:
        actual[indices] = make(indices, [LABELS[i] for i in indices])
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert np.mean(difference <= 1) >= 0.999


def test_the_same_batch_is_the_same_bytes_whatever_was_drawn_before(make):
    expected = make(range(2), LABELS[:2])
    torch.manual_seed(77)
    torch.randn(5)
    before = torch.get_rng_state()
    assert np.array_equal(make(range(2), LABELS[:2]), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_depend_on_index_and_seed(model):
    images = sampler_of(model, seed=0)(range(2), [1, 1])
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images, sampler_of(model, seed=1)(range(2), [1, 1]))
    # Neighbouring seeds share no image under another number.
    assert not np.array_equal(images[1], sampler_of(model, seed=1)([0], [1])[0])


@pytest.mark.parametrize("mode", MODES)
def test_samples_depend_on_the_label(model, mode):
    make = sampler_of(model, **MODES[mode])
    assert not np.array_equal(make([0], [1]), make([0], [2]))


@pytest.mark.parametrize(
    "change",
    [
        {"cfg_cond": True},
        {"sampler": "ddim"},
        {"clip_denoised": True},
        {"num_sampling_steps": 5},
        {"cfg_cond": True, "cfg_scale": 6.0},
        {"cfg_cond": True, "scale_pow": 0.01},
        {"cfg_cond": True, "cfg_skip_tol": 1.0},
        {"cfg_cond": True, "guidance": "constant"},
        {"cfg_cond": True, "guidance": "interval", "cfg_interval": [300, 700]},
        {"sampler": "dpmsolver++"},
        {"sampler": "unipc"},
        {"sampler": "heun"},
    ],
)
def test_every_setting_of_the_sampler_changes_the_samples(model, change):
    without = sampler_of(model, cfg_cond=change.get("cfg_cond", False) and len(change) > 1)(range(4), LABELS[:4])
    assert not np.array_equal(sampler_of(model, **change)(range(4), LABELS[:4]), without)


def test_of_a_family_are_its_published_settings_but_for_those_that_are_given():
    def settings(model, **given):
        sampler = SamplerConfig.of_family(model, **given)
        return sampler.guidance, sampler.cfg_scale

    assert settings("MDT_XL_2") == settings("MDTv2_S_2") == ("power_cosine", 3.8)
    assert settings("DiT_B_4") == ("constant", 1.5)
    assert settings("DiT_B_4", cfg_scale=4.0) == ("constant", 4.0)


def test_three_channels_are_guided_or_all_that_there_are():
    def model(x, t, y):
        return torch.cat([x + y.view(-1, 1, 1, 1), x], dim=1)

    t, y = torch.tensor([500]), torch.tensor([2])
    for cfg_channels in (3, 4):
        sampler = SamplerConfig(cfg_cond=True, guidance="constant", cfg_scale=2.0, cfg_channels=cfg_channels)
        uncond, cond = NUM_CLASSES, 2.0
        guided = uncond + 2 * (cond - uncond)
        for channels in (4, 16):
            out = sampler.build_guidance(NUM_CLASSES, 1000).lead(model)(torch.zeros(1, channels, 2, 2), t, y)
            count = 3 if cfg_channels == 3 and channels == 4 else channels  # the published slip is of four
            assert out[0, :channels, 0, 0].tolist() == [guided] * count + [cond] * (channels - count)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"sampler": "rk4"}, "--sampler rk4: unknown; choose one of ddpm, ddim, dpmsolver"),
        ({"guidance": "cosine"}, "--guidance cosine: unknown; choose one of power_cosine, constant, interval"),
        ({"guidance": "interval"}, "--guidance interval: give the timesteps"),
        ({"cfg_channels": 2}, "--cfg_channels 2: choose 3"),
        ({"cfg_skip_tol": -0.1}, "--cfg_skip_tol -0.1: must be 0 or more"),
        ({"cfg_skip_tol": float("nan")}, "--cfg_skip_tol nan: must be 0 or more"),
    ],
)
def test_unknown_samplers_and_guidance_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplerConfig(**settings)


def test_an_interval_outside_the_process_is_refused():
    sampler = SamplerConfig(cfg_cond=True, guidance="interval", cfg_interval=[5, 50])
    with pytest.raises(ValueError, match="--cfg_interval 5-50: timesteps are 0 ... 49"):
        sampler.build_guidance(NUM_CLASSES, 50)
    shares = dataclasses.replace(sampler, cfg_interval=[0.1, 0.5])
    with pytest.raises(ValueError, match="--cfg_interval 0.1-0.5: timesteps are 0 ... 49"):
        shares.build_guidance(NUM_CLASSES, 50)
    with pytest.raises(ValueError, match="--cfg_interval 5-50: of this --objective it is a share of noise, from 0"):
        sampler.build_guidance(NUM_CLASSES, None)


@pytest.mark.parametrize("objective", ["flow", "edm"])
def test_continuous_levels_are_guided_between_two_shares_of_noise(objective):
    """Flow's share is its time; EDM's is sigma / (sigma + sigma_data), which is 1/2 where both are equal."""
    config = dataclasses.replace(run_config(), objective=ObjectiveConfig(objective, sigma_data=0.5))
    sizes, asked = {}, SamplerConfig(12, "euler", cfg_cond=True, guidance="interval", cfg_interval=[0.3, 0.7])

    def net(x, t, y):
        sizes[t[0].item()] = len(x)
        return torch.zeros_like(x)

    list(ImageSampler(net, config, asked, PixelSpace(3), "cpu").states(range(2), [0, 1]))
    guided = {t for t, size in sizes.items() if size == 4}
    share = {t: t / 1000 if objective == "flow" else (s := math.exp(4 * t)) / (s + 0.5) for t in sizes}
    assert guided == {t for t in sizes if 0.3 <= share[t] <= 0.7} and 1 < len(guided) < 11


def test_the_record_of_the_guidance_has_the_schedules_own_settings():
    def record(**settings):
        return SamplerConfig(cfg_cond=True, cfg_scale=2.0, **settings).guidance_record()

    assert SamplerConfig().guidance_record() is None
    shared = {"cfg_scale": 2.0, "cfg_channels": 3, "cfg_skip_tol": 0.0}
    assert record() == {"schedule": "power_cosine", "scale_pow": 4.0, **shared}
    assert record(guidance="constant", cfg_channels=4) == {"schedule": "constant", **shared, "cfg_channels": 4}
    assert record(cfg_skip_tol=0.01)["cfg_skip_tol"] == 0.01
    assert record(guidance="interval", cfg_interval=[1, 9])["cfg_interval"] == [1, 9]


def test_without_guidance_no_unconditional_half_is_computed(model):
    calls = []

    def counting(x, t, y):
        calls.append((len(x), y.tolist()))
        return model(x, t, y)

    sampler_of(counting)(range(2), [1, 2])
    assert calls == [(2, [1, 2])] * 4
    calls.clear()
    sampler_of(counting, cfg_cond=True, guidance="constant")(range(2), [1, 2])
    assert calls == [(4, [1, 2, NUM_CLASSES, NUM_CLASSES])] * 4


CONSTANT = {"guidance": "constant", "cfg_scale": 1.01}
INTERVAL = {"guidance": "interval", "cfg_interval": [100, 700], "cfg_scale": 2.0}


@pytest.mark.parametrize(
    "settings, guided_at",
    [
        ({}, [666, 333, 0]),  # the schedule's weight at 999 is 1 in float32
        ({"cfg_skip_tol": 0.1}, [333, 0]),  # 1.04 at 666, 1.9 at 333
        ({"cfg_skip_tol": 9.0}, []),
        ({"cfg_scale": 1.0}, []),
        ({"guidance": "constant", "cfg_scale": 1.0}, []),
        (CONSTANT, [999, 666, 333, 0]),
        ({**CONSTANT, "cfg_skip_tol": 0.005}, [999, 666, 333, 0]),
        ({**CONSTANT, "cfg_skip_tol": 0.011}, []),
        (INTERVAL, [666, 333]),
        # Of Heun's four steps the first two are Euler's, and the third looks a second time at 0, whose weight is 1.
        ({**INTERVAL, "sampler": "heun"}, [666, 333]),
    ],
)
def test_the_unconditional_half_is_left_out_where_the_weight_is_one_within_the_tolerance(model, settings, guided_at):
    batches = []

    def watching(x, t, y):
        batches.append((int(t[0]), y.tolist()))
        return model(x, t, y)

    sampler_of(watching, cfg_cond=True, **settings)(range(2), [1, 2])
    assert all(y[:2] == [1, 2] and y[2:] in ([], [NUM_CLASSES] * 2) for _, y in batches)
    assert [t for t, y in batches if len(y) == 4] == guided_at


def test_of_the_published_250_steps_24_are_not_guided_and_110_within_a_hundredth():
    def count(**settings):
        guidance = SamplerConfig(250, cfg_cond=True, cfg_scale=3.8, **settings).build_guidance(NUM_CLASSES, 1000)
        return guidance.is_idle(torch.tensor(create_diffusion("250").timestep_map)).sum()

    assert (count(), count(cfg_skip_tol=1e-2)) == (24, 110)


@pytest.mark.parametrize("settings", [{}, {"cfg_channels": 4}, INTERVAL])
def test_leaving_out_the_half_of_weight_one_changes_the_last_bits_alone(monkeypatch, model, settings):
    """uncond + 1 (cond - uncond) is cond but for rounding."""
    make = sampler_of(model, num_sampling_steps=30, cfg_cond=True, **settings)
    skipping = samplers.last(make.states(range(4), LABELS[:4]))
    monkeypatch.setattr(Guidance, "is_idle", lambda self, t: torch.zeros(30, dtype=torch.bool))
    everywhere = sampler_of(model, num_sampling_steps=30, cfg_cond=True, **settings)
    torch.testing.assert_close(skipping, samplers.last(everywhere.states(range(4), LABELS[:4])), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "unipc", "heun"])
def test_whether_a_step_is_guided_is_decided_without_looking_at_the_device(name):
    """Tensors on the meta device have no values, and reading one raises."""

    def shapes(x, t, y):
        assert x.is_meta and t.is_meta and y.is_meta
        return torch.cat([x, x], dim=1)

    sampler = SamplerConfig(4, name, cfg_cond=True)
    make = ImageSampler(shapes, run_config(), sampler, PixelSpace(3), "meta")
    assert samplers.last(make.states(range(2), [1, 2])).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_the_model_sees_timesteps_of_the_trained_process_in_falling_order(model, name):
    seen = []

    def watching(x, t, y):
        seen.append(t.tolist())
        return model(x, t, y)

    sampler_of(watching, sampler=name)(range(1), [0])
    assert seen == [[999], [666], [333], [0]]


def test_the_respacing_of_the_training_is_replaced():
    def grid(num_steps, **process):
        return list(SamplerConfig(num_steps).build_objective(run_config(**process)).grid())

    assert grid(5, timestep_respacing="20") == [4, 3, 2, 1, 0]
    assert len(grid(1000)) == 1000 and grid(1) == [0]


def test_impossible_numbers_of_steps_are_refused_naming_the_flag():
    with pytest.raises(ValueError, match="--num_sampling_steps 0: must be at least 1"):
        SamplerConfig(0)
    with pytest.raises(ValueError, match="--num_sampling_steps 51: the process has 50"):
        SamplerConfig(51).build_objective(run_config(diffusion_steps=50))


def test_latents_are_decoded_by_the_first_stage(model):
    class Negative(PixelSpace):
        def decode(self, latents):
            return -latents

    plain = sampler_of(model)(range(2), [0, 1])
    negative = ImageSampler(model, run_config(), SamplerConfig(4), Negative(3), "cpu")(range(2), [0, 1])
    assert np.all(np.abs(plain.astype(int) + negative - 255) <= 1)


# -- labels ------------------------------------------------------------------------------------------------------------

THREE_CLASSES = dataclasses.replace(
    run_config(),
    model=dataclasses.replace(run_config().model, num_classes=3),
    class_names=["cat", "dog", "owl"],
)


def labels_of(text, num_samples=7, seed=0):
    labels = labels_for(THREE_CLASSES, text, num_samples, seed)
    assert labels.dtype == np.int64 and labels.shape == (num_samples,)
    return labels.tolist()


def test_balanced_labels_go_round():
    assert labels_of("balanced") == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    "text, expected", [("2", [2] * 7), ("owl,0", [2, 0, 2, 0, 2, 0, 2]), ("0,1,2,0,1,2,0,1,2", [0, 1, 2, 0, 1, 2, 0])]
)
def test_a_list_of_labels_and_names_is_repeated_as_often_as_needed(text, expected):
    assert labels_of(text) == expected


@pytest.mark.parametrize("text", ["3", "-1", "bird", ""])
def test_labels_the_model_does_not_have_are_refused(text):
    with pytest.raises(ValueError, match="--labels"):
        labels_of(text)


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(0, 30))
def test_random_labels_belong_to_seed_and_sample_not_to_their_number(seed, num_samples, more):
    assert labels_of("random", num_samples + more, seed)[:num_samples] == labels_of("random", num_samples, seed)


def test_random_labels_are_uniform_and_differ_between_seeds():
    labels = labels_of("random", 3000)
    assert min(np.bincount(labels, minlength=3)) > 900 and set(labels) == {0, 1, 2}
    assert labels != labels_of("random", 3000, seed=1)


@pytest.mark.parametrize("text", ["random", "balanced", "owl,0"])
def test_without_classes_every_label_is_the_null_label(text):
    without = dataclasses.replace(THREE_CLASSES, class_cond=False)
    for labels in (labels_for(without, text, 5), labels_for(THREE_CLASSES, text, 5, class_cond=False)):
        assert labels.dtype == np.int64 and labels.tolist() == [3] * 5


# -- sets of samples ---------------------------------------------------------------------------------------------------

SETTINGS = {"seed": 0, "cfg_scale": 3.8, "sample_indices": [0, 9], "guidance": None}
CIRCUMSTANCES = {"processes": 2, "device": "cpu"}
SIZE = 4


def sample_set(folder, num_samples=10, batch_size=4, **changes):
    return SampleSet(folder, num_samples, SIZE, batch_size, {**SETTINGS, **changes})


def fake_images(indices, labels=None, salt=0):
    """Images that tell their sample number and label."""
    rows = [np.random.default_rng((salt, i)).integers(0, 256, (SIZE, SIZE, 3)) for i in indices]
    images = np.stack(rows).astype(np.uint8)
    images[:, 0, 0, 0] = list(indices)
    if labels is not None:
        images[:, 0, 0, 1] = labels
    return images


def complete(samples, salt=0, labels=None):
    """Make all of a set. Returns what opening it moved aside."""
    moved = samples.open(CIRCUMSTANCES)
    for batch in range(samples.num_batches):
        samples.write_part(batch, fake_images(samples.indices(batch), salt=salt))
    samples.assemble(np.arange(samples.num_samples) % 3 if labels is None else labels)
    return moved


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@given(num_samples=st.integers(1, 200), batch_size=st.integers(1, 70))
def test_batches_cover_every_sample_once_in_order(num_samples, batch_size):
    samples = SampleSet(Path("nowhere"), num_samples, SIZE, batch_size, {})
    batches = [samples.indices(batch) for batch in range(samples.num_batches)]
    assert [i for batch in batches for i in batch] == list(range(num_samples))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= batch_size


def test_the_file_has_the_published_name_arrays_and_types(tmp_path):
    samples = sample_set(tmp_path)
    complete(samples)
    assert samples.path == tmp_path / "samples_10x4x4x3.npz"
    arrays = load(samples.path)
    assert list(arrays) == ["arr_0", "arr_1"]
    assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].dtype == np.int64
    assert np.array_equal(arrays["arr_0"], fake_images(range(10)))
    assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert zipfile.ZipFile(samples.path).testzip() is None


def test_without_labels_there_is_no_second_array(tmp_path):
    samples = sample_set(tmp_path)
    samples.open({})
    generate(samples, fake_images, np.zeros(10, dtype=np.int64), one_of(0, 1))
    samples.assemble(None)
    assert list(load(samples.path)) == ["arr_0"]


def test_a_complete_set_is_the_npz_its_grid_and_its_manifest(tmp_path):
    samples = sample_set(tmp_path / "new" / "folder")
    assert complete(samples) == []
    assert names(samples.folder) == ["manifest.json", "samples_10x4x4x3.npz", "samples_10x4x4x3.png"]
    manifest = json.loads((samples.folder / "manifest.json").read_text())
    assert manifest == {"samples": "samples_10x4x4x3.npz", "settings": SETTINGS, **CIRCUMSTANCES}
    assert Image.open(samples.path.with_suffix(".png")).size == (4 * 68 + 4, 3 * 68 + 4)


def test_the_grid_shows_the_first_64_samples(tmp_path):
    samples = sample_set(tmp_path, num_samples=100, batch_size=7)
    complete(samples)
    assert Image.open(samples.path.with_suffix(".png")).size == (8 * 68 + 4, 8 * 68 + 4)


@pytest.mark.parametrize("num_samples, batch_size", [(1, 1), (1, 16), (3, 1), (5, 5)])
def test_the_smallest_sets(tmp_path, num_samples, batch_size):
    samples = sample_set(tmp_path, num_samples, batch_size)
    complete(samples)
    assert np.array_equal(load(samples.path)["arr_0"], fake_images(range(num_samples)))


def test_the_same_samples_are_the_same_bytes_on_another_day(tmp_path, monkeypatch):
    hashes = []
    for name in ("a", "b"):
        samples = sample_set(tmp_path / name)
        complete(samples)
        hashes.append(hashlib.sha256(samples.path.read_bytes()).hexdigest())
        later = time.time() + 1e6
        monkeypatch.setattr(time, "time", lambda later=later: later)
    assert hashes[0] == hashes[1]


def test_parts_are_streamed_into_the_file(tmp_path):
    side, batch_size, num_batches = 32, 64, 24
    samples = SampleSet(tmp_path, batch_size * num_batches, side, batch_size, {})
    samples.open({})
    for batch in range(num_batches):
        samples.write_part(batch, np.full((batch_size, side, side, 3), batch, dtype=np.uint8))
    part = batch_size * side * side * 3
    tracemalloc.start()
    try:
        samples.assemble(np.zeros(samples.num_samples, dtype=np.int64))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * part  # of 24
    assert [image[0, 0, 0] for image in load(samples.path)["arr_0"][::batch_size]] == list(range(num_batches))


def test_a_failed_assembly_leaves_no_half_file_and_keeps_the_parts(tmp_path):
    samples = sample_set(tmp_path)
    samples.open({})
    for batch in (0, 1):  # the third is missing
        samples.write_part(batch, fake_images(samples.indices(batch)))
    with pytest.raises(FileNotFoundError):
        samples.assemble(None)
    assert not samples.path.exists() and not samples.is_complete()
    assert samples.has_part(0) and samples.has_part(1)
    assert not list(tmp_path.glob(".*"))


# -- resuming ----------------------------------------------------------------------------------------------------------


def generate_counted(samples, rank=0, world_size=1):
    made = []

    def make(indices, labels):
        made.append(list(indices))
        return fake_images(indices, labels)

    generate(samples, make, np.arange(samples.num_samples) % 3, one_of(rank, world_size))
    return made


def test_every_image_is_made_of_its_own_number_and_label(tmp_path):
    samples = sample_set(tmp_path)
    samples.open({})
    assert generate_counted(samples) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    samples.assemble(np.arange(10) % 3)
    arrays = load(samples.path)
    assert arrays["arr_0"][:, 0, 0, 0].tolist() == list(range(10))
    assert np.array_equal(arrays["arr_0"][:, 0, 0, 1], arrays["arr_1"])


def test_batches_that_are_there_are_not_made_again(tmp_path):
    interrupted = sample_set(tmp_path)
    interrupted.open({})
    interrupted.write_part(1, fake_images(range(4, 8), np.arange(4, 8) % 3))
    resumed = sample_set(tmp_path)
    assert not resumed.is_complete()
    assert resumed.open({}) == []
    assert generate_counted(resumed) == [[0, 1, 2, 3], [8, 9]]
    resumed.assemble(None)
    assert np.array_equal(load(resumed.path)["arr_0"], fake_images(range(10), np.arange(10) % 3))


def test_what_a_killed_sampling_left_half_written_is_removed(tmp_path):
    samples = sample_set(tmp_path)
    samples.open({})
    parts = next(tmp_path.glob("parts_*"))
    left = [parts / ".000001.npy.12.tmp", tmp_path / f".{samples.path.name}.12.tmp"]
    others = tmp_path / ".model000010.pt.12.tmp"  # of a training in the same folder, perhaps running
    for path in [*left, others]:
        path.touch()
    sample_set(tmp_path).open({})
    assert not any(path.exists() for path in left) and others.exists()


@pytest.mark.parametrize("harm", ["torn", "torn in its header", "empty", "garbage", "another shape", "another type"])
def test_a_torn_batch_is_made_again(tmp_path, harm):
    samples = sample_set(tmp_path)
    samples.open({})
    generate_counted(samples)
    part = next(tmp_path.glob("parts_*")) / "000001.npy"
    content = part.read_bytes()
    if harm == "another shape":
        np.save(part, fake_images(range(3)))
    elif harm == "another type":
        np.save(part, fake_images(range(4)).astype(np.int64))
    else:
        part.write_bytes(
            {"torn": content[:-1], "torn in its header": content[:20], "empty": b"", "garbage": b"x" * 300}[harm]
        )
    assert generate_counted(samples) == [[4, 5, 6, 7]]
    assert part.read_bytes() == content


def test_a_batch_is_written_atomically(tmp_path, monkeypatch):
    samples = sample_set(tmp_path)
    samples.open({})

    def fail(file, images):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        samples.write_part(0, fake_images(range(4)))
    assert not samples.has_part(0) and names(next(tmp_path.glob("parts_*"))) == []


@settings(max_examples=25, deadline=None)
@given(world_size=st.integers(1, 5), num_samples=st.integers(1, 20), batch_size=st.integers(1, 6))
def test_the_ranks_share_out_the_batches_in_turn(tmp_path_factory, world_size, num_samples, batch_size):
    samples = sample_set(tmp_path_factory.mktemp("set"), num_samples, batch_size)
    samples.open({})
    made = {rank: generate_counted(samples, rank, world_size) for rank in reversed(range(world_size))}
    for rank in range(world_size):
        expected = range(rank, samples.num_batches, world_size)
        assert made[rank] == [list(samples.indices(batch)) for batch in expected]


def test_rank_0_waits_until_the_batches_of_the_others_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable_parts, "POLL_SECONDS", 0.01)
    samples = sample_set(tmp_path)
    samples.open({})
    rank_0 = threading.Thread(target=generate_counted, args=(samples, 0, 2), daemon=True)
    rank_0.start()
    rank_0.join(0.3)
    assert rank_0.is_alive()
    assert generate_counted(samples, 1, 2) == [[4, 5, 6, 7]]  # waits for nobody
    rank_0.join(10)
    assert not rank_0.is_alive()


# -- sets beside sets --------------------------------------------------------------------------------------------------


def test_a_complete_set_of_the_same_settings_is_done(tmp_path):
    complete(sample_set(tmp_path))
    assert sample_set(tmp_path).is_complete()


@pytest.mark.parametrize("change", [{"seed": 1}, {"guidance": {"cfg_scale": 3.8}}, {"new": None}])
def test_a_set_of_other_settings_is_not_done(tmp_path, change):
    complete(sample_set(tmp_path))
    assert not sample_set(tmp_path, **change).is_complete()


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_damaged_manifest_makes_nothing_done(tmp_path, text):
    samples = sample_set(tmp_path)
    complete(samples)
    (tmp_path / "manifest.json").write_text(text)
    assert not samples.is_complete()
    samples.open({})
    assert len(list(tmp_path.glob("samples_10x4x4x3_1.npz"))) == 1


def test_a_set_of_other_settings_is_moved_aside_with_its_manifest_and_grid(tmp_path):
    complete(sample_set(tmp_path, cfg_scale=3.8), salt=1)
    before = {path.suffix: path.read_bytes() for path in tmp_path.iterdir()}
    moved = complete(sample_set(tmp_path, cfg_scale=1.0), salt=2)
    assert sorted(path.name for path in moved) == [
        "manifest_1.json",
        "samples_10x4x4x3_1.npz",
        "samples_10x4x4x3_1.png",
    ]
    assert (tmp_path / "samples_10x4x4x3_1.npz").read_bytes() == before[".npz"]
    assert (tmp_path / "samples_10x4x4x3_1.png").read_bytes() == before[".png"]
    old, new = (json.loads((tmp_path / name).read_text()) for name in ("manifest_1.json", "manifest.json"))
    assert old == {**json.loads(before[".json"]), "samples": "samples_10x4x4x3_1.npz"}
    assert new["samples"] == "samples_10x4x4x3.npz" and new["settings"]["cfg_scale"] == 1.0
    assert np.array_equal(load(tmp_path / "samples_10x4x4x3.npz")["arr_0"], fake_images(range(10), salt=2))


def test_many_sets_in_one_folder_lose_nothing_and_every_manifest_names_its_own(tmp_path):
    for seed in range(4):
        complete(sample_set(tmp_path, num_samples=10 + seed % 2, seed=seed), salt=seed)
    found = {}
    for path in tmp_path.glob("manifest*.json"):
        manifest = json.loads(path.read_text())
        found[manifest["settings"]["seed"]] = manifest["samples"]
    assert (
        len(found)
        == 4
        == len(set(found.values()))
        == len(list(tmp_path.glob("*.npz")))
        == len(list(tmp_path.glob("*.png")))
    )
    for seed, name in found.items():
        assert np.array_equal(load(tmp_path / name)["arr_0"], fake_images(range(10 + seed % 2), salt=seed))


def test_an_npz_of_another_program_is_moved_aside(tmp_path):
    samples = sample_set(tmp_path)
    samples.path.write_bytes(b"precious")
    assert not samples.is_complete()
    assert complete(samples) == [tmp_path / "samples_10x4x4x3_1.npz"]
    assert (tmp_path / "samples_10x4x4x3_1.npz").read_bytes() == b"precious"


def test_an_interrupted_set_does_not_lose_its_batches_to_one_of_other_settings(tmp_path):
    first = sample_set(tmp_path, seed=1)
    first.open({})
    first.write_part(0, fake_images(range(4)))
    complete(sample_set(tmp_path, seed=2), salt=2)
    assert first.has_part(0)
    again = sample_set(tmp_path, seed=1)
    again.open({})
    assert generate_counted(again) == [[4, 5, 6, 7], [8, 9]]


def test_the_manifest_of_an_interrupted_set_does_not_name_the_samples_of_another(tmp_path):
    sample_set(tmp_path, seed=1).open({})
    complete(sample_set(tmp_path, seed=2), salt=2)
    naming = [path for path in tmp_path.glob("manifest*.json") if "samples_10x4x4x3.npz" in path.read_text()]
    assert [path.name for path in naming] == ["manifest.json"]


def test_a_manifest_that_names_a_path_outside_moves_nothing_there(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "outside.npz").write_bytes(b"precious")
    (folder / "manifest.json").write_text(json.dumps({"samples": "../outside.npz", "settings": {}}))
    complete(sample_set(folder))
    assert (tmp_path / "outside.npz").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["", "..", "/", 3, None])
def test_a_manifest_that_names_no_file_stops_nobody(tmp_path, name):
    (tmp_path / "manifest.json").write_text(json.dumps({"samples": name, "settings": {}}))
    complete(sample_set(tmp_path))
    assert sample_set(tmp_path).is_complete()


def test_a_complete_set_that_was_moved_aside_comes_back_instead_of_being_made_again(tmp_path):
    sets = [SampleSet(tmp_path, 3, 4, 2, {"guidance": scale}) for scale in (1.0, 2.0)]
    contents = []
    for number, samples in enumerate(sets):
        samples.open({})
        for batch in range(samples.num_batches):
            samples.write_part(batch, np.full((len(samples.indices(batch)), 4, 4, 3), number, np.uint8))
        samples.assemble(None)
        contents.append(samples.path.read_bytes())
    assert sets[1].is_complete() and not sets[0].is_complete()
    assert sets[0].restore() and sets[0].is_complete() and sets[0].path.read_bytes() == contents[0]
    assert sets[1].restore() and sets[1].path.read_bytes() == contents[1]
    assert not SampleSet(tmp_path, 3, 4, 2, {"guidance": 3.0}).restore()
    assert len(list(tmp_path.glob("*.npz"))) == len(list(tmp_path.glob("manifest*.json"))) == 2


def test_rank_0_does_not_wait_for_a_rank_that_failed(tmp_path):
    samples = SampleSet(tmp_path, 4, 4, 2, {})
    samples.open({})

    def fail(indices, labels):
        raise RuntimeError("out of memory")

    labels = np.zeros(4, dtype=np.int64)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(samples, fail, labels, one_of(1, 2))
    with pytest.raises(RuntimeError, match="1 batches of other ranks are missing, and rank1 failed"):
        generate(samples, lambda i, y: np.zeros((len(i), 4, 4, 3), np.uint8), labels, one_of(0, 2))
    assert samples.has_part(0)


def test_a_rank_left_behind_by_its_torchrun_ends_and_does_not_fail_the_run_that_was_started_again(
    tmp_path, monkeypatch
):
    samples = SampleSet(tmp_path, 4, 4, 2, {})
    samples.open({})
    monkeypatch.setattr("masked_diffusion.processes.resumable_parts.Launcher.has_ended", lambda self: True)
    with pytest.raises(RuntimeError, match="torchrun has ended"):
        generate(samples, pytest.fail, np.zeros(4, dtype=np.int64), one_of(1, 2))
    assert samples.failed() == []


def test_batches_are_made_in_the_order_that_was_prepared_whatever_another_process_adds_meanwhile(tmp_path):
    samples = SampleSet(tmp_path, 6, 4, 2, {})
    samples.open({})
    prepared, made = samples.missing(0, 1), []
    samples.write_part(0, np.zeros((2, 4, 4, 3), np.uint8))

    def make(batch, tell):
        made.append(batch)
        samples.write_part(batch, np.zeros((2, 4, 4, 3), np.uint8))

    make_parts(samples, make, one_of(0, 1), prepared)
    assert made == prepared == [0, 1, 2]


def test_a_part_of_another_size_is_refused(tmp_path):
    samples = SampleSet(tmp_path, 2, 4, 2, {})
    samples.open({})
    with pytest.raises(ValueError, match="expected uint8 images"):
        samples.write_part(0, np.zeros((2, 2, 2, 3), np.uint8))


def test_a_continuous_objective_is_not_sampled_on_a_device_without_float64():
    config = dataclasses.replace(run_config(), objective=ObjectiveConfig(objective="flow"))
    with pytest.raises(ValueError, match="--device mps: samplers of --objective flow compute in float64"):
        ImageSampler(None, config, SamplerConfig(2, "euler"), None, "mps")
