import numpy as np
import pytest
import torch
from golden_arrays import SEED, assert_golden, golden_json, golden_npz

from masked_diffusion import create_diffusion, diffusion_defaults, model_and_diffusion_defaults
from masked_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType

GOLDEN = golden_npz("diffusion.npz")
PROCESSES = {
    "default": {},
    "predict_xstart": {"predict_xstart": True},
    "kl": {"use_kl": True},
    "rescaled": {"rescale_learned_sigmas": True},
    "cosine": {"noise_schedule": "squaredcos_cap_v2"},
    "fixed_small": {"learn_sigma": False, "sigma_small": True},
    "fixed_large": {"learn_sigma": False},
}
CASES = sorted({tuple(key.split("|")[:2]) for key in GOLDEN if "|" in key})
TABLES = [key.split("|")[2] for key in GOLDEN if key.startswith("default||") and GOLDEN[key].shape == (1000,)]


def network(x, t):
    t = t.view(-1, 1, 1, 1)
    return torch.cat([0.3 * x * torch.cos(t / 100), 0.1 * torch.sin(x) + t / 2000 - 0.2], dim=1)


def model_of(process):
    fixed = process.startswith("fixed")
    return lambda x, t: network(x, t)[:, : x.shape[1]] if fixed else network(x, t)


class Case:
    def __init__(self, process, respacing):
        self.prefix = f"{process}|{respacing}|"
        self.diffusion = create_diffusion(respacing, **PROCESSES[process])
        self.model = model_of(process)
        self.x_start, self.noise = torch.from_numpy(GOLDEN["x_start"]), torch.from_numpy(GOLDEN["noise"])
        self.t, self.x_t = torch.from_numpy(self["t"]), torch.from_numpy(self["x_t"])

    def __getitem__(self, name):
        return GOLDEN[self.prefix + name]

    def __contains__(self, name):
        return self.prefix + name in GOLDEN


@pytest.fixture(params=CASES, ids="|".join)
def case(request):
    return Case(*request.param)


def test_the_goldens_cover_every_process():
    assert {process for process, _ in CASES} == set(PROCESSES)
    assert len(TABLES) == 8


@pytest.mark.parametrize("process, respacing", [case for case in CASES if "|".join(case) + "|betas" in GOLDEN])
def test_tables_and_timesteps_equal_the_golden(process, respacing):
    case = Case(process, respacing)
    for name in TABLES:
        table = getattr(case.diffusion, name)
        np.testing.assert_allclose(table, case[name], rtol=1e-9, atol=1e-12, err_msg=name)
        assert name == "timestep_map" or table.dtype == np.float64


def test_q_sample_equals_the_golden(case):
    assert_golden(case.diffusion.q_sample(case.x_start, case.t, case.noise), case["x_t"])


@pytest.mark.parametrize("clip", [0, 1])
def test_p_mean_variance_equals_the_golden(case, clip):
    out = case.diffusion.p_mean_variance(case.model, case.x_t, case.t, clip_denoised=bool(clip))
    for name in ("mean", "variance", "log_variance", "pred_xstart"):
        assert_golden(out[name], case[f"pmv{clip}_{name}"])


def test_training_losses_equal_the_golden(case):
    terms = case.diffusion.training_losses(case.model, case.x_start, case.t, noise=case.noise)
    assert {f"train_{name}" for name in terms} == {
        key.removeprefix(case.prefix) for key in GOLDEN if key.startswith(case.prefix + "train_")
    }
    for name, value in terms.items():
        assert_golden(value, case[f"train_{name}"])


def test_single_steps_equal_the_golden(case):
    torch.manual_seed(SEED)
    assert_golden(case.diffusion.p_sample(case.model, case.x_t, case.t)["sample"], case["p_sample"])
    torch.manual_seed(SEED)
    assert_golden(case.diffusion.ddim_sample(case.model, case.x_t, case.t, eta=0.5)["sample"], case["ddim_sample"])
    assert_golden(case.diffusion.ddim_reverse_sample(case.model, case.x_t, case.t)["sample"], case["ddim_reverse"])


def test_bits_per_dim_equal_the_golden():
    torch.manual_seed(SEED)
    terms = create_diffusion("20").calc_bpd_loop(network, torch.from_numpy(GOLDEN["x_start"]))
    for name, value in terms.items():
        assert_golden(value, GOLDEN[f"bpd20_{name}"])
    assert len(terms) == sum(key.startswith("bpd20_") for key in GOLDEN)


def test_respacing_takes_the_published_timesteps():
    for respacing, steps in golden_json("respacing.json").items():
        assert create_diffusion(respacing).timestep_map == steps


def test_sampling_loops_yield_every_step_and_end_in_the_loops_result():
    diffusion = create_diffusion("7")
    noise = torch.randn(2, 3, 4, 4)
    for loop, progressive in (
        (diffusion.p_sample_loop, diffusion.p_sample_loop_progressive),
        (diffusion.ddim_sample_loop, diffusion.ddim_sample_loop_progressive),
    ):
        torch.manual_seed(3)
        states = list(progressive(network, noise.shape, noise=noise))
        torch.manual_seed(3)
        assert torch.equal(loop(network, noise.shape, noise=noise), states[-1]["sample"])
        assert len(states) == 7 and set(states[0]) == {"sample", "pred_xstart"}


def test_one_gaussian_draw_is_made_per_step_also_where_it_is_multiplied_by_zero():
    diffusion = create_diffusion("5")
    noise = torch.randn(2, 3, 4, 4)
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        torch.manual_seed(3)
        loop(network, noise.shape, noise=noise)
        after_loop = torch.rand(1)
        torch.manual_seed(3)
        for _ in range(5):
            torch.randn_like(noise)
        assert torch.equal(torch.rand(1), after_loop)


def test_a_process_of_one_step_can_be_sampled():
    diffusion = create_diffusion("1", noise_schedule="cosine", diffusion_steps=1)
    assert diffusion.p_sample_loop(network, (1, 1, 1, 1)).isfinite().all()
    assert diffusion.ddim_sample_loop(network, (1, 1, 1, 1)).isfinite().all()


def test_ddim_with_an_exact_denoiser_of_one_point_returns_that_point():
    point = torch.full((2, 1, 3, 3), 0.4)
    diffusion = create_diffusion("ddim20", predict_xstart=True, learn_sigma=False)
    torch.testing.assert_close(diffusion.ddim_sample_loop(lambda x, t: point, point.shape), point)


def test_reverse_ddim_is_undone_by_ddim():
    """With an exact denoiser of Gaussian data the ODE is linear, so only the discretisation separates the two."""
    diffusion = create_diffusion("")

    def exact_eps(x, t):  # data N(0, 1) stays N(0, 1): E[eps | x_t] = sqrt(1 - alpha_bar) x_t
        return diffusion._at("sqrt_one_minus_alphas_cumprod", t, x) * x

    diffusion.model_var_type = ModelVarType.FIXED_LARGE
    x = torch.randn(2, 1, 3, 3)
    out = x
    for i in range(999):
        t = torch.full((2,), i)
        out = diffusion.ddim_reverse_sample(exact_eps, out, t, clip_denoised=False)["sample"]
    back = out
    for i in reversed(range(1, 1000)):
        back = diffusion.ddim_sample(exact_eps, back, torch.full((2,), i), clip_denoised=False)["sample"]
    torch.testing.assert_close(back, x, rtol=2e-2, atol=2e-2)


def test_classifier_guidance_shifts_the_mean_by_variance_times_gradient():
    diffusion = create_diffusion("")
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([10, 500])
    out = diffusion.p_mean_variance(network, x, t)
    shifted = diffusion.condition_mean(lambda x, t: torch.full_like(x, 2.0), out, x, t)
    torch.testing.assert_close(shifted, out["mean"] + 2 * out["variance"])


def test_a_zero_score_condition_changes_nothing():
    diffusion = create_diffusion("")
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([10, 500])
    out = diffusion.p_mean_variance(network, x, t, clip_denoised=False)
    conditioned = diffusion.condition_score(lambda x, t: torch.zeros_like(x), out, x, t)
    torch.testing.assert_close(conditioned["pred_xstart"], out["pred_xstart"], rtol=1e-3, atol=1e-3)
    moved = diffusion.condition_score(lambda x, t: torch.ones_like(x), out, x, t)
    assert not torch.allclose(moved["pred_xstart"], out["pred_xstart"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("predict_xstart", [False, True])
def test_min_snr_weights_the_squared_error(predict_xstart):
    x, t, noise = torch.randn(3, 3, 4, 4), torch.tensor([0, 300, 999]), torch.randn(3, 3, 4, 4)
    kwargs = {"predict_xstart": predict_xstart}
    plain = create_diffusion("", **kwargs).training_losses(network, x, t, noise=noise)
    weighted = create_diffusion("", **kwargs, min_snr_gamma=5.0).training_losses(network, x, t, noise=noise)
    alpha_bar = torch.from_numpy(create_diffusion("").alphas_cumprod)[t]
    snr = alpha_bar / (1 - alpha_bar)
    expected = snr.clamp(max=5) if predict_xstart else snr.clamp(max=5) / snr
    torch.testing.assert_close(weighted["mse"] / plain["mse"], expected.float())
    torch.testing.assert_close(weighted["vb"], plain["vb"])


def test_a_model_with_the_wrong_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="returned 3 channels, this process needs 6: --learn_sigma"):
        create_diffusion("").training_losses(lambda x, t: x, torch.zeros(1, 3, 2, 2), torch.tensor([0]))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"timestep_respacing": "1001"}, "cannot take 1001 timesteps of a section of 1000"),
        ({"timestep_respacing": "0"}, "cannot take 0 timesteps"),
        ({"timestep_respacing": "ddim999"}, "cannot take exactly 999 of 1000"),
        ({"timestep_respacing": "fast"}, "expected counts such as"),
        ({"timestep_respacing": "", "noise_schedule": "sigmoid"}, "--noise_schedule sigmoid: unknown; choose one of"),
        ({"timestep_respacing": "", "diffusion_steps": 0}, "--diffusion_steps 0: must be at least 1"),
        (
            {"timestep_respacing": "", "diffusion_steps": 19},
            "--diffusion_steps 19: too few for --noise_schedule linear",
        ),
    ],
)
def test_nonsense_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_diffusion(**kwargs)


def test_betas_out_of_range_are_refused():
    for betas in ([], [0.0], [1.1], [[0.1]]):
        with pytest.raises(ValueError, match="betas"):
            GaussianDiffusion(
                betas=np.array(betas),
                model_mean_type=ModelMeanType.EPSILON,
                model_var_type=ModelVarType.FIXED_SMALL,
                loss_type=LossType.MSE,
            )


def test_the_defaults_are_the_contract():
    assert diffusion_defaults().items() <= model_and_diffusion_defaults().items()
    assert model_and_diffusion_defaults()["diffusion_steps"] == 1000
