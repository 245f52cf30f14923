"""What an objective says of levels, losses and predictions."""

import dataclasses
import math
import re

import pytest
import torch

from masked_diffusion import choices, create_diffusion
from masked_diffusion.diffusion.objectives import DDPM, OBJECTIVES, ObjectiveConfig
from masked_diffusion.diffusion.samplers import SAMPLERS, Prediction, last, loop
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
    assert objective.time(torch.tensor(objective.grid())).tolist() == [999, 749, 500, 250, 0]


def test_every_sampler_says_which_objectives_it_serves():
    for sampler in SAMPLERS.values():
        assert sampler.starts and sampler.starts.keys() <= OBJECTIVES.keys()


def test_a_sampler_that_does_not_serve_an_objective_is_refused_with_those_that_do(monkeypatch):
    monkeypatch.setitem(choices.SAMPLERS, "other", ("something",))
    monkeypatch.setitem(choices.SAMPLERS, "third", ("something", "ddpm"))
    sentence = "--eval_sampler ddpm: it does not serve --objective something; choose one of other, third"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        choices.check_serves("ddpm", "something", "--eval_sampler")
    choices.check_serves("third", "ddpm")


# -- all objectives, where the answers are known -----------------------------------------------------------------------

NAMES = list(OBJECTIVES)
PAIRS = [(name, sampler) for sampler, entry in SAMPLERS.items() for name in entry.starts]
MEAN, STD = 0.3, 0.6


def make(name, num_steps=None, **settings):
    config = ObjectiveConfig(objective=name, **({"sigma_data": 1.0} | settings if name == "edm" else settings))

    def process(**changes):
        return create_diffusion(str(num_steps or ""), **{"learn_sigma": False, **changes})

    return OBJECTIVES[name](config, process, num_steps)


def some_levels(objective, count=64):
    return objective.levels("uniform").from_uniform((torch.arange(count, dtype=torch.float64) + 0.5) / count, "cpu")[0]


def scales(objective, level):
    """alpha, sigma of the path at levels, in float64."""
    one = torch.ones(len(level), 1, 1, 1, dtype=torch.float64)
    return tuple(objective.q_sample(a * one, level, (1 - a) * one).flatten().double() for a in (1, 0))


def exact(objective, mean=MEAN, std=STD):
    """What the best network returns for x_0 ~ N(mean, std^2), by the papers' formulas and none of the objective's."""
    name = objective.config.objective

    def net(x, time, **_):
        if name == "edm":
            level = (4 * time.double()).exp().view(-1, 1, 1, 1)
            x = x.double() * (level**2 + objective.sigma_data**2).sqrt()
            alpha, sigma = 1.0, level
        elif name == "flow":
            sigma = (time.double() / 1000).view(-1, 1, 1, 1)
            alpha = 1 - sigma
        else:
            bar = torch.from_numpy(create_diffusion("").alphas_cumprod)[time].view(-1, 1, 1, 1)
            alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        scaled = (x.double() - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x_0, eps = mean + alpha * std**2 * scaled, sigma * scaled
        if name == "edm":
            d = objective.sigma_data
            c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
            return (x_0 - c_skip * x) / c_out
        return {"ddpm": eps, "x0": x_0, "v": alpha * eps - sigma * x_0, "flow": eps - x_0}[name]

    return net


@pytest.mark.parametrize("name, loss", [("flow", 2.0), ("v", 1.0), ("x0", 1.0), ("ddpm", 1.0), ("edm", 1.0)])
def test_the_first_loss_of_a_network_that_returns_zero_is_known(name, loss):
    objective = make(name)
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(64, 2, 32, 32, generator=generator) for _ in range(2))
    terms = objective.training_losses(lambda x, t: torch.zeros_like(x), x_start, some_levels(objective), noise=noise)
    assert terms["loss"].mean().item() == pytest.approx(loss, rel=0.02)
    assert terms["loss"].dtype == torch.float32 and sorted(terms) == sorted(objective.loss_names)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_returns_the_target_has_no_loss_and_is_read_as_the_clean_data(name):
    """corrupt, target, denoised: every conversion is an identity."""
    objective = make(name)
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(16, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    level = some_levels(objective, 16)
    targets = []

    def zero(x, t):
        return torch.zeros(x.shape)

    def counts(error):
        targets.append(error)
        return mean_flat(error)

    objective.training_losses(zero, x_start, level, noise=noise, counts=counts)
    # The error of 1 less that of 0 tells the sign of the target, too.
    objective.training_losses(lambda x, t: torch.ones(x.shape), x_start, level, noise=noise, counts=counts)
    target = (targets[0] - targets[1] + 1) / 2
    x = objective.q_sample(x_start, level, noise)
    prediction = objective.predictor(lambda x, t: target.float(), False)(x, level)
    alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in scales(objective, level))
    near = sigma < 20 * alpha  # elsewhere an x_0 read from float32 noise is lost
    for found, expected, part in ((prediction.pred_xstart, x_start, near), (prediction.eps, noise, sigma > 0.05)):
        part = part.expand_as(found)
        torch.testing.assert_close(found[part].double(), expected[part], rtol=0, atol=2e-4)
    torch.testing.assert_close(
        alpha * prediction.pred_xstart.double() + sigma * prediction.eps.double(), x.double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_target_and_denoised_are_inverse_in_float64(name):
    objective = make(name, sigma_data=0.5) if name == "edm" else make(name)
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(64, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    level = some_levels(objective).double().view(-1, 1, 1, 1)
    x = objective.alpha(level) * x_start + objective.sigma(level) * noise
    target = objective.target(x_start, noise, x, level)
    denoised = objective.denoised(target, x, level)
    torch.testing.assert_close(denoised, x_start, rtol=1e-10, atol=1e-10)
    prediction = Prediction(x_start, noise)
    step = 1e-6
    moved = objective.alpha(level + step) * x_start + objective.sigma(level + step) * noise
    torch.testing.assert_close(objective.slope(prediction), (moved - x) / step, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_error_of_the_clean_data_with_the_weight_of_the_papers(name):
    """One estimate of x_0, told in what each network predicts."""
    objective = make(name)
    level = some_levels(objective)[4:60:8]
    generator = torch.Generator().manual_seed(0)
    x_start, noise, error = (torch.randn(len(level), 1, 8, 8, generator=generator) for _ in range(3))
    alpha, sigma = (scale.view(-1, 1, 1, 1) for scale in scales(objective, level))
    estimate = x_start.double() + 0.1 * error.double()
    eps = (alpha * x_start + sigma * noise - alpha * estimate) / sigma
    x = alpha * x_start + sigma * noise
    told = {
        "ddpm": eps,
        "x0": estimate,
        "v": alpha * eps - sigma * estimate,
        "flow": eps - estimate,
        "edm": (estimate - x / (sigma**2 + 1)) * (sigma**2 + 1).sqrt() / sigma,
    }[name]
    losses = objective.training_losses(lambda x, t: told.float(), x_start, level, noise=noise)["mse"].double()
    snr = (alpha / sigma) ** 2
    weight = {"ddpm": snr, "x0": snr * 0 + 1, "v": snr + 1, "flow": 1 / sigma**2, "edm": 1 / sigma**2 + 1}[name]
    expected = weight.flatten() * mean_flat((estimate - x_start) ** 2)
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("name, s", [("flow", 0.6), ("v", 0.6), ("x0", 0.6), ("ddpm", 0.6), ("edm", 0.6), ("edm", 1.0)])
def test_the_best_network_has_the_bayes_loss(name, s):
    objective = make(name)
    level = some_levels(objective)[8::16]
    generator = torch.Generator().manual_seed(0)
    x_start = MEAN + s * torch.randn(len(level), 1, 100, 100, generator=generator)
    noise = torch.randn(x_start.shape, generator=generator)
    found = objective.training_losses(exact(objective, std=s), x_start, level, noise=noise)["mse"].double()
    alpha, sigma = scales(objective, level)
    total = alpha**2 * s**2 + sigma**2
    bayes = {
        "flow": s**2 / total,
        "v": s**2 / total,
        "x0": s**2 * sigma**2 / total,
        "ddpm": s**2 * alpha**2 / total,
        "edm": (sigma**2 + 1) * s**2 / total,
    }[name]
    torch.testing.assert_close(found, bayes, rtol=0.06, atol=1e-6)


def sample(name, sampler, num_steps, x_T, net=None, randn_like=None):
    objective = make(name, num_steps)
    entry = SAMPLERS[sampler]
    grid = objective.grid(entry.last_level)
    assert len(grid) == num_steps
    predict = objective.predictor(net or exact(objective), clip_denoised=False)
    step = entry.starts[name](objective.path(grid))
    return last(loop(step, predict, objective.prior(x_T), grid, randn_like or torch.randn_like))


@pytest.mark.parametrize("name, sampler", PAIRS)
def test_samples_have_the_datas_mean_and_spread(name, sampler):
    x_T = torch.randn(8192, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    samples = sample(name, sampler, 60, x_T)
    first_order = sampler in ("ddpm", "ddim", "euler", "euler_maruyama")
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert samples.std().item() == pytest.approx(STD, rel=0.06 if first_order else 0.012)


@pytest.mark.parametrize("name, sampler", PAIRS)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_samplings_can_be_made(name, sampler, num_steps):
    assert sample(name, sampler, num_steps, torch.randn(4, 1, 2, 2)).isfinite().all()


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmsolver++", 2)])
def test_on_flow_the_error_falls_with_the_order_of_the_method(sampler, order):
    """The ODE leads from x_T to mean + std x_T. DPM-Solver++ takes the last step, to no noise, in first order."""
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    errors = [(sample("flow", sampler, n, x_T) - (MEAN + STD * x_T)).abs().max().item() for n in (16, 32, 64, 128)]
    for coarse, fine in zip(errors[1:], errors[2:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.45 if sampler == "dpmsolver++" else 0.2)


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_on_edm_the_error_of_a_method_of_first_order_halves(sampler):
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    exact_end = MEAN + STD * (80 * x_T - MEAN) / math.sqrt(STD**2 + 80**2)
    errors = [(sample("edm", sampler, n, x_T) - exact_end).abs().max().item() for n in (64, 128, 256)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.2)


def test_edm_with_heun_on_its_grid_follows_the_exact_path():
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    exact_end = MEAN + STD * (80 * x_T - MEAN) / math.sqrt(STD**2 + 80**2)
    errors = [(sample("edm", "heun", n, x_T) - exact_end).abs().max().item() for n in (18, 36, 72)]
    assert errors[0] < 0.1 and errors[0] > 3.5 * errors[1] > 12 * errors[2]
    grid = make("edm", 18).grid()
    assert (grid[0], grid[-1]) == pytest.approx((80, 0.002)) and grid[9] == pytest.approx(1.92, rel=0.02)


@pytest.mark.parametrize("name", ["flow", "edm", "v"])
def test_of_two_components_heun_keeps_the_weights(name):
    """A mixture of N(-2, 0.1^2) and N(1, 0.1^2) with weights 0.3 and 0.7: an exact case that is not linear."""
    weights, centres = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([-2.0, 1.0], dtype=torch.float64)
    bars = torch.from_numpy(create_diffusion("").alphas_cumprod)

    def net(x, time):
        x, time = x.double(), time.view(-1, 1, 1, 1)
        if name == "edm":
            alpha, sigma = torch.ones(1, dtype=torch.float64), (4 * time.double()).exp()
            x = x * (sigma**2 + 1).sqrt()
        elif name == "flow":
            alpha, sigma = 1 - time.double() / 1000, time.double() / 1000
        else:
            alpha, sigma = bars[time].sqrt(), (1 - bars[time]).sqrt()
        offset = x[..., None] - alpha[..., None] * centres
        total = (alpha**2 * 0.01 + sigma**2)[..., None]
        share = (weights.log() - offset**2 / (2 * total)).softmax(dim=-1)
        x_0 = (share * (centres + alpha[..., None] * 0.01 * offset / total)).sum(dim=-1)
        eps = (x - alpha * x_0) / sigma
        if name == "edm":
            return (x_0 - x / (sigma**2 + 1)) * (sigma**2 + 1).sqrt() / sigma
        return eps - x_0 if name == "flow" else alpha * eps - sigma * x_0

    x_T = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    samples = sample(name, "heun", 50, x_T, net).flatten()
    assert (samples < -0.5).double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert ((samples + 2).abs() < 0.5).sum() + ((samples - 1).abs() < 0.5).sum() > 19900


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_predictions_are_of_full_precision_whatever_the_network_computes_in(name, batch):
    objective, (x_start, noise, _) = make(name), batch
    level = some_levels(objective, 6)

    def half(x, time):
        return torch.tanh(x).bfloat16()

    assert objective.training_losses(half, x_start, level, noise=noise)["loss"].dtype == torch.float32
    prediction = objective.predictor(half, False)(x_start, level)
    assert {prediction.pred_xstart.dtype, prediction.eps.dtype} <= {torch.float32, torch.float64}


def test_euler_maruyama_takes_its_last_step_from_0_04_without_noise():
    drawn = []

    def randn_like(x):
        drawn.append(1)
        return torch.zeros_like(x)

    sample("flow", "euler_maruyama", 10, torch.randn(2, 1, 2, 2), randn_like=randn_like)
    assert len(drawn) == 9
    grid = make("flow", 10).grid(0.04)
    assert (grid[0], grid[-1]) == pytest.approx((1, 0.04))


def test_the_shift_moves_training_levels_and_the_sampling_grid_alike():
    plain, moved = make("flow", 4), make("flow", 4, time_shift=3.0)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    t, shifted_t = (objective.levels("uniform").from_uniform(u, "cpu")[0] for objective in (plain, moved))
    torch.testing.assert_close(t.logit() + math.log(3), shifted_t.logit())
    grids = [torch.tensor(objective.grid()) for objective in (plain, moved)]
    torch.testing.assert_close(grids[0][1:].logit() + math.log(3), grids[1][1:].logit())


def test_the_laws_of_levels_have_their_medians_and_spreads():
    u = torch.tensor([0.15865525, 0.5, 0.84134475], dtype=torch.float64)  # one deviation to either side
    flow = make("flow", level_law="logit_normal", level_mean=-0.5, level_std=2.0)
    torch.testing.assert_close(
        flow.levels("uniform").from_uniform(u, "cpu")[0].logit(), torch.tensor([-2.5, -0.5, 1.5])
    )
    edm = make("edm", p_mean=-1.0, p_std=0.5)
    torch.testing.assert_close(edm.levels("uniform").from_uniform(u, "cpu")[0].log(), torch.tensor([-1.5, -1.0, -0.5]))
    torch.testing.assert_close(make("flow").levels("uniform").from_uniform(u, "cpu")[0], u.float())


@pytest.mark.parametrize("name", NAMES)
def test_the_share_of_noise_rises_over_four_quartiles_and_guidance_sees_timesteps(name):
    objective = make(name)
    level = some_levels(objective, 400)
    share = objective.share(level)
    assert share.min() >= 0 and share.max() < 1 and (share.diff() >= 0).all()
    timesteps = objective.timesteps(objective.time(level)).double()
    assert (timesteps.diff() >= 0).all() and timesteps.min() >= 0 and timesteps.max() <= 1000
    assert (timesteps / 1000 - share).abs().max() < 2e-3


def test_levels_without_number_take_the_uniform_sampler_alone():
    for name in ("flow", "edm"):
        with pytest.raises(
            ValueError, match=f"--schedule_sampler loss-second-moment: --objective {name} has no numbered timesteps"
        ):
            make(name).levels("loss-second-moment")


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"objective": "flows"}, "--objective flows: unknown; choose one of ddpm, x0, v, flow, edm"),
        ({"level_law": "normal"}, "--level_law normal: unknown; choose one of uniform, logit_normal"),
        ({"sigma_data": 0.0}, "--sigma_data 0.0: must be positive"),
        ({"time_shift": -1.0}, "--time_shift -1.0: must be positive"),
        ({"level_std": 0.0}, "--level_std 0.0: must be positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ObjectiveConfig(**settings)


def test_min_snr_weighting_caps_v_and_x0(batch):
    x_start, noise, t = batch
    alpha_bar = torch.from_numpy(create_diffusion("").alphas_cumprod)[t].float()
    snr = alpha_bar / (1 - alpha_bar)
    for name, expected in (("x0", snr.clamp(max=5)), ("v", snr.clamp(max=5) / (snr + 1))):
        plain, capped = make(name), make(name)
        capped.process.min_snr_gamma = 5.0
        losses = [
            o.training_losses(lambda x, t: torch.tanh(x), x_start, t, noise=noise)["mse"] for o in (plain, capped)
        ]
        torch.testing.assert_close(losses[1] / losses[0], expected)


def test_a_network_with_a_variance_is_refused_by_continuous_objectives(batch):
    x_start, noise, _ = batch
    with pytest.raises(ValueError, match="the model returned 6 channels, --objective flow needs 3"):
        make("flow").training_losses(small_net, x_start, torch.rand(6), noise=noise)


def test_ddpm_alone_leaves_no_entry_in_a_manifest():
    assert ObjectiveConfig().record() == {}
    assert ObjectiveConfig(objective="v").record()["objective"]["objective"] == "v"
    assert dataclasses.replace(ObjectiveConfig(), objective="flow").default_sampler == "euler"
