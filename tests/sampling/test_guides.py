import json
from functools import partial

import numpy as np
import pytest
import torch
from support import TINY_DIGITS, call

from masked_diffusion import create_diffusion
from masked_diffusion.diffusion import samplers
from masked_diffusion.diffusion.guidance import Guidance, MaskedView, OtherModel, beta_weight, constant_weight
from masked_diffusion.models.tokens import Draw, KeptTokens
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import open_trained
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.sampler_config import SamplerConfig

SAMPLE = "scripts/image_sample.py"
CHECKPOINT = "ema_0.3_000002.pt"


@pytest.fixture(scope="module")
def runs(module_folder):
    """A training, a weaker one of another model, and ones that do not fit beside it."""
    root = module_folder("guides")
    kinds = {
        "strong": [],
        "weak": ["--model", "DiT_Ti_2", "--seed", 1],
        "cosine": ["--noise_schedule", "cosine", "--max_steps", 2],
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, flags in kinds.items():
            flags = [*TINY_DIGITS, "--ema_rate", "0.3", "--lr", "1e-2", *flags]
            assert call(patch, "scripts/image_train.py", root / name, *flags) == 0
    return root


@pytest.fixture
def sample(monkeypatch, runs, tmp_path):
    def run(name, *flags, model="strong", batch_size=4, status=0):
        common = ["--num_samples", 4, "--batch_size", batch_size, "--num_sampling_steps", 5, "--device", "cpu"]
        folder = tmp_path / name
        path = runs / model / CHECKPOINT
        assert call(monkeypatch, SAMPLE, folder, "--model_path", path, *common, *flags) == status
        if status:
            return None
        return np.load(folder / "samples_4x8x8x3.npz")["arr_0"], json.loads((folder / "manifest.json").read_text())

    return run


def guided(*flags, scale=3, guidance="constant"):
    return ["--cfg_cond", "True", "--cfg_scale", scale, "--guidance", guidance, *flags]


def autoguided(runs, *flags, **settings):
    weak = ["--guide_from", "checkpoint", "--guide_path", runs / "weak" / CHECKPOINT]
    return guided(*weak, *flags, **settings)


MASKED = ["--guide_from", "masked"]


def test_each_kind_of_guidance_draws_other_samples(runs, sample):
    kinds = {
        "null": guided(),
        "checkpoint": autoguided(runs),
        "combined": autoguided(runs, "--guide_labels", "null"),
        "masked": guided(*MASKED),
        "more masked": guided(*MASKED, "--guide_ratio", 0.6),
        "linear": autoguided(runs, guidance="linear"),
        "beta": autoguided(runs, guidance="beta:2,4"),
    }
    images = [sample(name, *flags)[0] for name, flags in kinds.items()]
    assert all(not np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize("kind", ["checkpoint", "masked"])
def test_a_weight_of_one_is_no_guidance_to_the_byte_and_costs_nothing(runs, sample, kind):
    plain, manifest = sample("plain")
    flags = autoguided(runs, scale=1) if kind == "checkpoint" else guided(*MASKED, scale=1)
    images, with_guidance = sample("guided", *flags)
    assert np.array_equal(images, plain)
    assert manifest["passes_per_image"] == with_guidance["passes_per_image"] == 5


def test_a_model_that_guides_itself_changes_nothing(runs, sample):
    itself = ["--guide_from", "checkpoint", "--guide_path", runs / "strong" / CHECKPOINT]
    assert np.abs(sample("itself", *guided(*itself))[0].astype(int) - sample("plain")[0]).max() <= 1


def test_the_manifest_has_both_identities_and_the_cost(runs, sample, capsys):
    _, manifest = sample("checkpoint", *autoguided(runs))
    guidance = manifest["settings"]["guidance"]
    assert guidance["from"] == "checkpoint" and guidance["labels"] == "same"
    assert guidance["weights"]["sha256"] != manifest["settings"]["weights"]["sha256"]
    assert manifest["passes_per_image"] == 10
    assert "cost: 10 passes of the model per image" in capsys.readouterr().err
    _, manifest = sample("masked", *guided(*MASKED, "--guide_ratio", 0.5))
    assert manifest["settings"]["guidance"]["from"] == "masked" and manifest["settings"]["guidance"]["ratio"] == 0.5
    assert 5 < manifest["passes_per_image"] <= 11


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "unipc", "heun"])
def test_the_passes_are_those_that_are_made(runs, name):
    trained = open_trained(runs / "strong" / CHECKPOINT, Request(), "cpu", lambda text: None)
    rows = []

    def counting(x, t, y, **view):
        rows.append(len(x))
        return trained.model(x, t, y, **view)

    config = SamplerConfig(9, name, cfg_cond=True, guidance="interval", cfg_interval=[100, 700])
    make = ImageSampler(counting, trained.config, config, trained.first_stage, "cpu")
    make(range(2), [1, 2])
    assert make.passes() == sum(rows) / 2 > 9


@pytest.mark.parametrize("kind", ["checkpoint", "masked"])
def test_guided_samples_do_not_depend_on_their_batch(runs, sample, kind):
    flags = autoguided(runs) if kind == "checkpoint" else guided(*MASKED)
    together, alone = (sample(str(size), *flags, batch_size=size)[0].astype(int) for size in (4, 1))
    assert np.abs(together - alone).max() <= 1


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--guide_from", "checkpoint"], "--guide_from checkpoint and --guide_path: give both"),
        (["--guide_path", "weak.pt"], "--guide_from checkpoint and --guide_path: give both"),
        (["--guide_from", "checkpoint", "--guide_path", "nowhere.pt"], "--guide_path nowhere.pt: no such file"),
        (["--guide_from", "checkpoint", "--guide_path", "COSINE"], "--noise_schedule is cosine instead of linear"),
        (["--guide_labels", "null"], "--guide_labels null: needs --guide_from checkpoint"),
        (["--guide_labels", "none"], "--guide_labels none: choose same or null"),
        (["--guide_ratio", "0.5"], "--guide_ratio 0.5: needs --guide_from masked"),
        ([*MASKED, "--guide_ratio", "1"], "--guide_ratio 1.0: must be between 0 and 1"),
        (["--cfg_scale", "-1"], "--cfg_scale -1.0: must be 0 or more"),
        (["--guidance", "beta:0,4"], "--guidance beta:0,4: expected beta:A,B"),
        (["--guidance", "linear:2"], "--guidance linear:2: unknown"),
    ],
)
def test_what_does_not_go_together_is_refused(runs, sample, capsys, flags, sentence):
    flags = [runs / "cosine" / CHECKPOINT if flag == "COSINE" else flag for flag in flags]
    sample("refused", "--cfg_cond", "True", *flags, status=2)
    assert sentence in capsys.readouterr().err


def test_a_model_without_a_masked_view_is_refused(sample, capsys):
    sample("refused", *guided(*MASKED), model="weak", status=2)
    assert "was trained without masking; choose --guide_from null_label" in capsys.readouterr().err


def test_a_beta_schedule_peaks_at_its_mode_with_the_scale():
    weights = beta_weight(torch.arange(1001), 3.0, 1000, (2.0, 4.0))
    assert weights.dtype == torch.float32 and weights[0] == weights[1000] == 1
    assert weights.argmax() == 250 and weights.max() == pytest.approx(3.0)


def test_equal_tokens_in_both_views_leave_nothing_to_guide():
    kept = Draw(KeptTokens.from_noise(torch.rand(2, 16), 10))

    def model(x, t, y, draw):
        return x + draw.kept.dropped.float().sum()

    away = MaskedView(lambda: {"draw": kept}, cost=2.0)
    x, t, y = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    guidance = Guidance(away, partial(constant_weight, cfg_scale=5.0))
    assert torch.equal(guidance.lead(model)(x, t, y, draw=kept), model(x, t, y, kept))


@pytest.mark.parametrize("weight", [1.0, 1.5, 3.0])
def test_guided_normal_data_has_the_mean_and_the_spread_of_the_closed_form(weight):
    """Away from a normal of mean b, one of mean a and the same spread becomes one of mean b + w (a - b)."""
    spread, a, b = 0.3, 0.5, 0.2
    process = create_diffusion("100", learn_sigma=False)
    alphas = torch.from_numpy(create_diffusion("").alphas_cumprod).float()

    def exact(mean):
        def model(x, t, y):
            alpha = alphas[t].view(-1, 1, 1, 1)
            return (x - alpha.sqrt() * mean) * (1 - alpha).sqrt() / (1 - alpha + alpha * spread**2)

        return model

    guidance = Guidance(OtherModel(exact(b)), partial(constant_weight, cfg_scale=weight))
    noise = torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    predict = process.predictor(guidance.lead(exact(a)), False, model_kwargs={"y": torch.zeros(2000)})
    step = samplers.SAMPLERS["heun"].starts["ddpm"](process)
    final = samplers.last(samplers.loop(step, predict, noise, range(99, -1, -1)))
    assert final.mean() == pytest.approx(b + weight * (a - b), rel=0.01)
    assert final.std() == pytest.approx(spread, rel=0.01)
