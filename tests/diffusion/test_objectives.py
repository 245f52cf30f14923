"""What an objective says of levels, losses and predictions."""

import re

import pytest
import torch

from masked_diffusion import create_diffusion
from masked_diffusion.diffusion.objectives import DDPM, OBJECTIVES, ObjectiveConfig
from masked_diffusion.diffusion.samplers import SAMPLERS, check_serves
from masked_diffusion.gaussian_diffusion import mean_flat


def small_net(x, t, y=None):
    """Not zero, and different at every place, timestep and channel."""
    scale = (1 + t / 1000).view(-1, 1, 1, 1).float()
    return torch.cat([torch.tanh(x * scale) + 0.1, 0.3 * torch.cos(x)], dim=1)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(6, 3, 4, 4, generator=generator) for _ in range(2))
    return x_start, noise, torch.tensor([0, 1, 249, 250, 500, 999])


def ddpm(**process):
    return DDPM(ObjectiveConfig(), lambda: create_diffusion("", **process))


@pytest.mark.parametrize("process", [{}, {"min_snr_gamma": 5.0}, {"use_kl": True}, {"rescale_learned_sigmas": True}])
def test_ddpm_is_the_process_to_the_bit(batch, process):
    x_start, noise, t = batch
    objective = ddpm(**process)
    losses = objective.training_losses(small_net, x_start, t, noise=noise)
    expected = create_diffusion("", **process).training_losses(small_net, x_start, t, noise=noise)
    assert sorted(losses) == sorted(objective.loss_names) == sorted(expected)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_counts_decides_which_errors_count(batch):
    """A reduction over half of the places sees the squared error of every place."""
    x_start, noise, t = batch
    whole = ddpm().training_losses(small_net, x_start, t, noise=noise)
    halves = [
        ddpm().training_losses(small_net, x_start, t, noise=noise, counts=lambda e, part=part: mean_flat(e[:, :, part]))
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close((halves[0]["mse"] + halves[1]["mse"]) / 2, whole["mse"])
    assert not torch.equal(halves[0]["mse"], whole["mse"])
    assert torch.equal(halves[0]["vb"], whole["vb"])
    torch.testing.assert_close(halves[0]["loss"], halves[0]["mse"] + halves[0]["vb"])


@pytest.mark.parametrize("num_steps", [1, 3, 10, 250, 1000])
def test_quartiles_of_the_share_are_those_of_the_timesteps(num_steps):
    t = torch.arange(num_steps)
    share = DDPM(ObjectiveConfig(), lambda: create_diffusion(str(num_steps))).share(t)
    assert torch.equal((4 * share).floor().long(), t * 4 // num_steps)


def test_the_grid_runs_from_the_noisiest_timestep_to_the_last():
    objective = DDPM(ObjectiveConfig(), lambda: create_diffusion("5"))
    assert list(objective.grid()) == [4, 3, 2, 1, 0]
    assert objective.timesteps(torch.tensor(objective.grid())).tolist() == [999, 749, 500, 250, 0]


def test_every_sampler_says_which_objectives_it_serves():
    for sampler in SAMPLERS.values():
        assert sampler.serves and set(sampler.serves) <= set(OBJECTIVES)


def test_a_sampler_that_does_not_serve_an_objective_is_refused_with_those_that_do(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "other", SAMPLERS["ddpm"]._replace(serves=("something",)))
    monkeypatch.setitem(SAMPLERS, "third", SAMPLERS["ddpm"]._replace(serves=("something", "ddpm")))
    sentence = "--eval_sampler ddpm: it does not serve --objective something; choose one of other, third"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_serves("ddpm", "something", "--eval_sampler")
    check_serves("third", "ddpm")
