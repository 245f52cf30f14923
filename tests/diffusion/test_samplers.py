"""Samplers where the answer is known: of Gaussian data the best denoiser and the ODE's path have closed forms."""

import math

import numpy as np
import pytest
import torch

from masked_diffusion import create_diffusion
from masked_diffusion.diffusion import samplers
from masked_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from masked_diffusion.respace import SpacedDiffusion, space_timesteps

MEAN, STD = 0.3, 0.5
SOLVERS = ["dpmsolver++", "unipc", "heun"]


def marginal_std(alpha_bar):
    return (alpha_bar * STD**2 + 1 - alpha_bar) ** 0.5


def exact_denoiser(full_alphas_cumprod, predict_xstart=False):
    """``model(x, t)`` at original timesteps: E[eps | x_t] or E[x_0 | x_t] of x_0 ~ N(MEAN, STD^2) in float64, v = 0."""

    def model(x, t):
        alpha_bar = torch.from_numpy(full_alphas_cumprod)[t].view(-1, 1, 1, 1)
        scaled = (x - alpha_bar.sqrt() * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar)
        eps, x_0 = (1 - alpha_bar).sqrt() * scaled, MEAN + alpha_bar.sqrt() * STD**2 * scaled
        return torch.cat([x_0 if predict_xstart else eps, torch.zeros_like(eps)], dim=1)

    return model


def run(name, diffusion, alphas_cumprod, x_T):
    """States of a whole trajectory from ``x_T``."""
    model = exact_denoiser(alphas_cumprod, diffusion.model_mean_type is ModelMeanType.START_X)
    predict = diffusion.predictor(model, clip_denoised=False)
    step = samplers.SAMPLERS[name].starts["ddpm"](diffusion)
    return list(samplers.loop(step, predict, x_T, range(diffusion.num_timesteps - 1, -1, -1)))


def uniform_log_snr_process(num_steps):
    """Steps of equal length in log-SNR, where the solvers' orders show from few steps on."""
    half_log_snr = np.linspace(3.0, -3.0, 961)
    alphas_cumprod = 1 / (1 + np.exp(-2 * half_log_snr))
    betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    kinds = {
        "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.LEARNED_RANGE,
        "loss_type": LossType.MSE,
    }
    return SpacedDiffusion(space_timesteps(961, [num_steps + 1]), betas=betas, **kinds), alphas_cumprod


def path_error(name, num_steps):
    """Distance from the ODE's path at t = 0, after ``num_steps`` steps from the noisiest."""
    diffusion, alphas_cumprod = uniform_log_snr_process(num_steps)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    noisy, clean = alphas_cumprod[-1], alphas_cumprod[0]
    x_T = math.sqrt(noisy) * MEAN + marginal_std(noisy) * noise
    exact = math.sqrt(clean) * MEAN + marginal_std(clean) * noise
    reached = run(name, diffusion, alphas_cumprod, x_T)[-2].sample
    return (reached - exact).abs().max().item()


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpmsolver++", 2), ("unipc", 3), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_method(name, order):
    """UniPC's predictor is of second order, its corrector adds one."""
    coarse, fine = path_error(name, 32), path_error(name, 64)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def spread(name, num_steps, **process):
    """Mean and standard deviation of many samples over those of the data, on the trained process respaced."""
    full = create_diffusion("", **process).alphas_cumprod
    x_T = torch.randn(8192, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    samples = run(name, create_diffusion(str(num_steps), **process), full, x_T)[-1].sample
    return samples.mean().item() - MEAN, samples.std().item() / STD


@pytest.mark.parametrize(
    "name, schedule, tolerance",
    [
        *((name, "linear", 0.012) for name in SOLVERS),
        *((name, "squaredcos_cap_v2", 0.012) for name in SOLVERS),
    ],
)
def test_the_solvers_samples_have_the_datas_mean_and_spread(name, schedule, tolerance):
    offset, ratio = spread(name, 50, noise_schedule=schedule)
    assert abs(offset) < 0.01 and ratio == pytest.approx(1, abs=tolerance)


# Largest relative error of the spread at 10 steps. A linear process's last step of 10 is long; Heun alone takes it in
# second order, see ``multistep_step``. That of 100 steps is 3% for all.
AT_TEN_STEPS = {
    "linear": {"ddpm": 0.22, "ddim": 0.29, "dpmsolver++": 0.22, "unipc": 0.22, "heun": 0.12},
    "cosine": {"ddpm": 0.12, "ddim": 0.17, "dpmsolver++": 0.12, "unipc": 0.12, "heun": 0.12},
}


@pytest.mark.parametrize("predict_xstart", [False, True], ids=["eps", "x0"])
@pytest.mark.parametrize("schedule", AT_TEN_STEPS)
@pytest.mark.parametrize("name", AT_TEN_STEPS["linear"])
def test_few_steps_come_near_the_datas_spread_and_more_come_nearer(name, schedule, predict_xstart):
    torch.manual_seed(0)
    process = {"noise_schedule": schedule, "predict_xstart": predict_xstart}
    errors = [max(0.004, abs(spread(name, num_steps, **process)[1] - 1)) for num_steps in (10, 15, 25, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < AT_TEN_STEPS[schedule][name] and errors[3] < 0.03


@pytest.mark.parametrize("num_steps", [10, 20, 50])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_solvers_are_nearer_to_the_data_than_ddim_in_as_many_steps(name, num_steps):
    assert abs(spread(name, num_steps)[1] - 1) < abs(spread("ddim", num_steps)[1] - 1)


@pytest.mark.parametrize("name", AT_TEN_STEPS["linear"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_processes_can_be_sampled(name, num_steps):
    assert np.isfinite(spread(name, num_steps)).all()


@pytest.mark.parametrize("name", AT_TEN_STEPS["linear"])
def test_every_step_yields_the_state_at_its_own_noise_level(name):
    """The states lie on the path, also between the two halves of a step of Heun's."""
    diffusion, alphas_cumprod = uniform_log_snr_process(40)
    x_T = marginal_std(alphas_cumprod[-1]) * torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    states = run(name, diffusion, alphas_cumprod, x_T)
    assert len(states) == diffusion.num_timesteps
    for i in (5, 20, 35):
        alpha_bar = diffusion.alphas_cumprod_prev[diffusion.num_timesteps - 1 - i]
        assert states[i].sample.std().item() == pytest.approx(marginal_std(alpha_bar), rel=0.05)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_draws_no_noise(name):
    def randn_like(x):
        raise AssertionError("noise was drawn")

    diffusion, alphas_cumprod = uniform_log_snr_process(4)
    predict = diffusion.predictor(exact_denoiser(alphas_cumprod), clip_denoised=False)
    samplers.last(
        samplers.loop(
            samplers.SAMPLERS[name].starts["ddpm"](diffusion), predict, torch.ones(1, 1, 1, 1), [2, 1, 0], randn_like
        )
    )
