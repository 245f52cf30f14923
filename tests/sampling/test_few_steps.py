"""A sampler that its few steps lead far off is said, with how far, measured on Gaussian data."""

import re

import pytest
from support import TINY_DIGITS, call

from masked_diffusion.choices import SAMPLERS
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.runs.config import ModelConfig, RunConfig
from masked_diffusion.sampling.few_steps import check_few_steps, few_steps_warning, width_error
from masked_diffusion.sampling.sampler_config import SamplerConfig

MODEL = ModelConfig(model="MDT_Ti_2", image_size=8, downsample=1, in_channels=1, num_classes=10)


def config_of(objective="ddpm", **process):
    process = DiffusionConfig(learn_sigma=objective == "ddpm", **process)
    edm = {"sigma_data": 0.5} if objective == "edm" else {}
    return RunConfig(MODEL, process, {}, objective=ObjectiveConfig(objective=objective, **edm))


def warned(config, sampler, steps):
    return few_steps_warning(config, SamplerConfig(sampler=sampler, num_sampling_steps=steps))


# As in tests/diffusion/test_samplers.py, where a network's own output goes through the whole process.
@pytest.mark.parametrize(
    "schedule, errors",
    [
        ("linear", {"ddpm": -0.21, "ddim": -0.28, "dpmsolver++": -0.21, "unipc": -0.21, "heun": 0.09}),
        ("cosine", {"ddpm": -0.12, "ddim": -0.16, "dpmsolver++": -0.06, "unipc": -0.05, "heun": 0.03}),
    ],
)
def test_the_width_after_ten_steps_is_that_of_the_published_spacing(schedule, errors):
    config = config_of(noise_schedule=schedule)
    for name, error in errors.items():
        sampler = SamplerConfig(sampler=name, num_sampling_steps=10)
        assert width_error(config, sampler) == pytest.approx(error, abs=0.015), name


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_ten_steps_of_a_linear_process_are_warned_of_with_what_more_would_do(name):
    text = warned(config_of(), name, 10)
    assert text.startswith(
        f"--sampler {name} --num_sampling_steps 10: samples of Gaussian data of deviation 0.5 come out 2"
    )
    assert "% too narrow, because steps are long where little noise is left; with 25 steps it is " in text
    assert warned(config_of(), name, 25) is None


@pytest.mark.parametrize(
    "config, name, steps",
    [
        (config_of(), "heun", 10),
        (config_of(noise_schedule="cosine"), "unipc", 10),
        (config_of(), "ddpm", 250),
        (config_of("flow"), "heun", 10),
    ],
)
def test_what_comes_near_is_not_warned_of(config, name, steps):
    assert warned(config, name, steps) is None


def test_no_more_steps_are_proposed_than_the_process_has():
    assert warned(config_of(diffusion_steps=20, noise_schedule="cosine"), "ddim", 5).endswith("is left")


@pytest.mark.parametrize("objective", ["ddpm", "x0", "v", "flow", "edm"])
def test_every_sampler_can_be_measured_from_the_first_step_on(objective):
    config = config_of(objective)
    for name in SAMPLERS:
        if objective in SAMPLERS[name]:
            for steps in (1, 2, 3):
                error = width_error(config, SamplerConfig(sampler=name, num_sampling_steps=steps))
                assert error >= -1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("predict_xstart", [False, True], ids=["eps", "x0"])
def test_what_is_not_refused_is_within_12_percent_and_at_100_steps_nothing_is_refused(schedule, predict_xstart):
    config = config_of(noise_schedule=schedule, predict_xstart=predict_xstart)
    for name in ("ddpm", "ddim", "dpmsolver++", "unipc", "heun"):
        for steps in (10, 15, 25):
            sampler = SamplerConfig(sampler=name, num_sampling_steps=steps)
            if abs(width_error(config, sampler)) <= 0.12:
                assert check_few_steps(config, sampler, allowed=False) is None
            else:
                with pytest.raises(ValueError, match=f"--sampler {re.escape(name)} --num_sampling_steps {steps}: "):
                    check_few_steps(config, sampler, allowed=False)
        assert check_few_steps(config, SamplerConfig(sampler=name, num_sampling_steps=100), allowed=False) is None


@pytest.mark.parametrize(
    "config, name, steps, remedy",
    [
        (config_of(), "unipc", 10, "; with 25 steps it is 2%; with --sampler heun it is 9%; give --few_steps True to "),
        (config_of("flow"), "euler", 10, "; with 25 steps it is 6%; with --sampler unipc it is 1%; give --few_steps "),
        (config_of(diffusion_steps=2, noise_schedule="cosine"), "ddim", 1, "is left; give --few_steps True to make "),
    ],
)
def test_a_refusal_names_what_comes_near_and_the_flag_that_allows_it(config, name, steps, remedy):
    sampler = SamplerConfig(sampler=name, num_sampling_steps=steps)
    with pytest.raises(ValueError, match=re.escape(remedy)):
        check_few_steps(config, sampler, allowed=False)
    assert check_few_steps(config, sampler, allowed=True) == few_steps_warning(config, sampler)


def test_sample_sets_of_few_steps_are_asked_for_and_pictures_and_trainings_warn(monkeypatch, tmp_path, capsys):
    previews = ["--preview_samples", 1, "--preview_steps", 3, "--max_steps", 1]
    assert call(monkeypatch, "scripts/image_train.py", tmp_path, *TINY_DIGITS, *previews, sinks="stdout") == 0
    assert "warning: --preview_steps 3: samples of Gaussian data of deviation 0.5 come out" in capsys.readouterr().out
    flags = ["--model_path", tmp_path / "ema_0.9999_000001.pt", "--sampler", "ddim", "--num_sampling_steps", 4]
    samples = tmp_path / "samples"
    assert call(monkeypatch, "scripts/image_sample.py", samples, *flags, "--num_samples", 1) == 2
    assert "; give --few_steps True to make images with 4 steps all the same" in capsys.readouterr().err
    assert not samples.exists()
    assert call(monkeypatch, "scripts/image_sample.py", samples, *flags, "--num_samples", 1, "--few_steps", True) == 0
    picture = ["--out", tmp_path / "a.png", "--sweep", "cfg_scale=1,2", "--labels", 1]
    assert call(monkeypatch, "infer_mdt.py", tmp_path, *flags, *picture) == 0
    assert capsys.readouterr().err.count("warning: --sampler ddim --num_sampling_steps 4: samples of Gaussian") == 2
