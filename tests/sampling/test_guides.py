import dataclasses
import json
import unicodedata
from functools import partial

import numpy as np
import pytest
import torch
from support import GUIDED, TINY_DIGITS, call, few_steps, one_of

from masked_diffusion import create_diffusion
from masked_diffusion.diffusion import samplers
from masked_diffusion.diffusion.guidance import (
    Guidance,
    NullLabel,
    OtherModel,
    PathDrop,
    SparserSelf,
    beta_weight,
    constant_weight,
)
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.first_stage import PixelSpace
from masked_diffusion.models.layers import Block
from masked_diffusion.models.mdt import MDT
from masked_diffusion.models.tokens import Draw, KeptTokens
from masked_diffusion.randomness import SampleNoise
from masked_diffusion.runs.config import ModelConfig, RunConfig
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import open_trained
from masked_diffusion.sampling import guides
from masked_diffusion.sampling.guides import open_away, with_fitting_views
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.inpainting import Inpainting, SideInterpolation
from masked_diffusion.sampling.sample_set import SampleSet, generate
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
        "cosine": ["--noise_schedule", "cosine"],
        "sprint": ["--model", "DiT_Ti_2", "--policy", "sprint", "--mask_ratio", 0.5],
        "no_path_drop": ["--model", "DiT_Ti_2", "--policy", "sprint", "--mask_ratio", 0.5, "--path_drop", 0],
        "deferred": ["--model", "DiT_Ti_2", "--policy", "deferred", "--learn_sigma", "False"],
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, flags in kinds.items():
            flags = [*TINY_DIGITS, "--ema_rate", "0.3", "--lr", "1e-2", *flags]
            assert call(patch, "scripts/image_train.py", root / name, *flags) == 0
    return root


@pytest.fixture
def sample(monkeypatch, runs, tmp_path):
    def run(name, *flags, model="strong", batch_size=4, status=0):
        common = ["--num_samples", 4, "--batch_size", batch_size, *few_steps(5), "--device", "cpu"]
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
ROUTED = ["--guide_from", "routed", "--guide_strong_ratio", 0.2, "--guide_ratio", 0.6]


def test_each_kind_of_guidance_draws_other_samples(runs, sample):
    kinds = {
        "null": guided(),
        "checkpoint": autoguided(runs),
        "combined": autoguided(runs, "--guide_labels", "null"),
        "masked": guided(*MASKED),
        "more masked": guided(*MASKED, "--guide_ratio", 0.6),
        "routed": guided(*ROUTED),
        "less routed": guided(*ROUTED, "--guide_strong_ratio", 0.4),
        "linear": autoguided(runs, guidance="linear"),
        "beta": autoguided(runs, guidance="beta:2,4"),
    }
    images = [sample(name, *flags)[0] for name, flags in kinds.items()]
    images += [sample(name, *guided(*flags), model="sprint")[0] for name, flags in ROUTE_KINDS.items()]
    assert all(not np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])


ROUTE_KINDS = {"sprint null": [], "path drop": ["--guide_from", "path_drop"], "sprint routed": ROUTED}


@pytest.mark.parametrize("kind", ["checkpoint", "path_drop", "masked", "routed"])
def test_a_weight_of_one_is_no_guidance_to_the_byte_and_costs_nothing(runs, sample, kind):
    model = "sprint" if kind == "path_drop" else "strong"
    plain, manifest = sample("plain", model=model)
    flags = autoguided(runs, scale=1) if kind == "checkpoint" else guided("--guide_from", kind, scale=1)
    images, with_guidance = sample("guided", *flags, model=model)
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
    _, manifest = sample("routed", *guided(*ROUTED))
    settings = manifest["settings"]["guidance"]
    assert (settings["from"], settings["strong_ratio"], settings["ratio"]) == ("routed", 0.2, 0.6)
    _, manifest = sample("path drop", *guided("--guide_from", "path_drop"), model="sprint")
    assert manifest["settings"]["guidance"]["from"] == "path_drop"
    assert manifest["passes_per_image"] == 5 * 1.5  # two of the four blocks are on the route


def opened(runs, name):
    return open_trained(runs / name / CHECKPOINT, Request(), "cpu", lambda text: None)


def away_of(trained, config):
    return open_away(config, trained.model, trained.config, "it", Request(), "cpu")[0]


KINDS = {
    "null_label": ("strong", {}),
    "path_drop": ("sprint", {}),
    "masked": ("strong", {}),
    "routed": ("strong", {"guide_strong_ratio": 0.2, "guide_ratio": 0.5}),
}


@pytest.mark.parametrize(
    "name, kind",
    [*((name, "null_label") for name in ("ddpm", "ddim", "dpmsolver++", "unipc", "heun")),
     *(("heun", kind) for kind in ("path_drop", "masked", "routed"))],
)  # fmt: skip
def test_the_passes_are_those_that_are_made(runs, name, kind):
    """Counted in tokens that the blocks see; of steps that need no weak prediction, those of the strong one."""
    model, settings = KINDS[kind]
    trained, tokens = opened(runs, model), []
    for block in trained.model.modules():
        if isinstance(block, Block):
            block.register_forward_hook(lambda block, inputs, output: tokens.append(inputs[0][..., 0].numel()))
    config = SamplerConfig(
        9, name, cfg_cond=True, guidance="interval", cfg_interval=[100, 700], guide_from=kind, **settings
    )
    make = ImageSampler(
        trained.model, trained.config, config, trained.first_stage, "cpu", new_away=away_of(trained, config)
    )
    make(range(2), [1, 2])
    of_a_pass = 2 * 16 * len(trained.model.stack)
    assert make.passes() == pytest.approx(sum(tokens) / of_a_pass) and make.passes() > 9


@pytest.mark.parametrize("kind", ["checkpoint", "path_drop", "masked", "routed"])
def test_guided_samples_do_not_depend_on_their_batch(runs, sample, kind):
    flags = autoguided(runs) if kind == "checkpoint" else guided("--guide_from", kind)
    model = "sprint" if kind == "path_drop" else "strong"
    together, alone = (sample(str(size), *flags, batch_size=size, model=model)[0].astype(int) for size in (4, 1))
    assert np.abs(together - alone).max() <= 1


@pytest.mark.parametrize("kind", GUIDED)
def test_guided_samples_are_the_same_bytes_from_one_and_two_processes(runs, tmp_path, kind):
    """Each rank opens the models for itself, and its own generators stand elsewhere."""
    path = {"guide_path": str(runs / "weak" / CHECKPOINT)} if kind == "checkpoint" else {}
    config, labels = SamplerConfig(5, cfg_cond=True, guidance="constant", guide_from=kind, **path), np.arange(7)

    def sampled(name, world_size):
        samples = SampleSet(tmp_path / name, 7, 8, 2, {})
        samples.open({})
        for rank in reversed(range(world_size)):  # rank 0 waits for the others
            torch.manual_seed(10 * world_size + rank)
            trained = opened(runs, "sprint" if kind == "path_drop" else "strong")
            away = away_of(trained, config)
            make = ImageSampler(trained.model, trained.config, config, trained.first_stage, "cpu", new_away=away)
            generate(samples, make, labels, one_of(rank, world_size))
        samples.assemble(labels)
        return samples.path.read_bytes()

    assert sampled("one", 1) == sampled("two", 2)


def test_a_dropped_path_is_what_the_training_drops(runs):
    """The weak prediction has the null label and no way through the route, though half of the rows go there."""
    trained = opened(runs, "sprint")
    model = trained.model
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([3, 400, 900]), torch.tensor([1, 2, 3])
    away = away_of(trained, SamplerConfig(cfg_cond=True, guide_from="path_drop"))(SampleNoise(0, []))
    strong, weak = away.both(model, x, t, y)
    dropped = model(x, t, torch.full_like(y, 10), draw=Draw(path_drop=torch.ones(3, dtype=torch.bool)))
    torch.testing.assert_close(weak, dropped)
    torch.testing.assert_close(strong, model(x, t, y))
    assert not torch.allclose(weak, model(x, t, torch.full_like(y, 10)))


@pytest.mark.parametrize(
    "kind, side",
    [*((kind, side) for kind in ("checkpoint", "masked", "routed") for side in (True, False)), ("path_drop", False)],
)
def test_a_photo_is_filled_with_each_kind(runs, kind, side):
    """Whatever guides, the known region is kept, and the sizes fit. What drops paths has no side-interpolater."""
    trained = opened(runs, "sprint" if kind == "path_drop" else "strong")
    path = {"guide_path": str(runs / "weak" / CHECKPOINT)} if kind == "checkpoint" else {}
    config = SamplerConfig(3, cfg_cond=True, guidance="constant", guide_from=kind, **path)
    away = away_of(trained, config)
    make = ImageSampler(trained.model, trained.config, config, PixelSpace(1), "cpu", new_away=away)
    known, hole = torch.full((1, 1, 8, 8), 0.5), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    hole[..., 2:6, 2:6] = True
    inpainting = Inpainting(known, hole, SideInterpolation.of(trained.model) if side else None)
    together, alone = make(range(2), [1, 2], inpainting), make([1], [2], inpainting)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    assert (together[:, ~hole[0, 0].numpy()] == 191).all()


def test_a_weaker_model_of_other_tokens_sees_them_all_where_a_photo_is_filled():
    settings = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3, "in_channels": 1}
    settings |= {"decode_layer": 1, "mask_ratio": 0.5, "learn_sigma": False}
    strong, coarse, twin = (MDT(patch_size=patch, **settings).eval() for patch in (2, 4, 2))
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 5]), torch.tensor([0, 1])
    view = {"draw": Draw(KeptTokens.from_noise(torch.rand(2, 16), 8))}
    seen = []

    def noting(x, t, y, **view):
        seen.append(view)
        return x

    for other in (coarse, twin):
        with_fitting_views(noting, strong, other)(x, t, y, **view)
    assert seen == [{}, view]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_routed_predictions_of_weight_one_are_the_strong_ones_to_the_bit(runs, weight):
    """Each prediction has tokens of its own draw, from the sample's key alone."""
    trained = opened(runs, "strong")
    model, config = trained.model, SamplerConfig(cfg_cond=True, guide_from="routed", guide_strong_ratio=0.2)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 400]), torch.tensor([1, 2])
    away = away_of(trained, config)(SampleNoise(0, [5, 6], "guide"))
    predict = Guidance(away, partial(constant_weight, cfg_scale=weight)).unled(model)
    noise = SampleNoise(0, [5, 6], "guide")
    for _ in range(2):
        kept = model.policy.draw(torch.special.ndtr(noise.randn((16,))), 12, None)
        assert torch.equal(predict(x, t, y), model(x, t, y, draw=kept))


def test_the_tokens_of_the_weak_prediction_are_some_of_the_strong_ones(runs):
    trained, kept = opened(runs, "strong"), []

    def noting(x, t, y, draw):
        kept.append(draw.kept)
        return x

    config = SamplerConfig(cfg_cond=True, guide_from="routed", guide_strong_ratio=0.2, guide_ratio=0.6)
    away = away_of(trained, config)(SampleNoise(0, [5, 6], "guide"))
    for _ in range(2):
        away.both(noting, torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2))
    assert [one.ids_keep.shape[1] for one in kept] == [12, 6, 12, 6]
    for strong, weak in (kept[:2], kept[2:]):
        assert (weak.dropped | ~strong.dropped).all()
    assert not torch.equal(kept[0].dropped, kept[2].dropped)  # drawn anew


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--guide_from", "checkpoint"], "--guide_from checkpoint and --guide_path: give both"),
        (["--guide_path", "weak.pt"], "--guide_from checkpoint and --guide_path: give both"),
        (["--guide_from", "checkpoint", "--guide_path", "nowhere.pt"], "--guide_path nowhere.pt: no such file"),
        (["--guide_from", "checkpoint", "--guide_path", "COSINE"], "--noise_schedule is cosine instead of linear"),
        (["--guide_labels", "null"], "--guide_labels null: needs --guide_from checkpoint"),
        (["--guide_labels", "none"], "--guide_labels none: choose same or null"),
        (["--guide_ratio", "0.5"], "--guide_ratio 0.5: needs --guide_from masked or routed"),
        ([*MASKED, "--guide_ratio", "1"], "--guide_ratio 1.0: must be between 0 and 1"),
        (["--guide_from", "path_drop"], "is trained without dropping paths, which --policy sprint does"),
        ([*MASKED, "--guide_strong_ratio", "0.1"], "--guide_strong_ratio 0.1: needs --guide_from routed"),
        ([*ROUTED, "--guide_strong_ratio", "1"], "--guide_strong_ratio 1.0: must be in [0, 1)"),
        ([*ROUTED, "--guide_strong_ratio", "0.6"], "keeps 6 of the 16 tokens, and the weak prediction keeps 6"),
        (["--cfg_scale", "-1"], "--cfg_scale -1.0: must be 0 or more"),
        (["--guidance", "beta:0,4"], "--guidance beta:0,4: expected beta:A,B"),
        (["--guidance", "linear:2"], "--guidance linear:2: unknown"),
    ],
)
def test_what_does_not_go_together_is_refused(runs, sample, capsys, flags, sentence):
    flags = [runs / "cosine" / CHECKPOINT if flag == "COSINE" else flag for flag in flags]
    sample("refused", "--cfg_cond", "True", *flags, status=2)
    assert sentence in capsys.readouterr().err


PREDICTS = RunConfig(ModelConfig("DiT_Ti_2", 8, 1, 1, 3), DiffusionConfig(), {"scaling_factor": 1.0})


@pytest.mark.parametrize(
    "part, change, difference",
    [
        ("model", {"image_size": 16}, "the shape of its latents is (1, 16, 16) instead of (1, 8, 8)"),
        ("model", {"in_channels": 3}, "the shape of its latents is (3, 8, 8) instead of (1, 8, 8)"),
        ("model", {"num_classes": 4}, "the number of classes is 4 instead of 3"),
        ("model", {"model": "MDT_Ti_2", "policy": "mdt"}, None),
        ("diffusion", {"learn_sigma": False}, None),
        ("diffusion", {"predict_xstart": True}, "--predict_xstart is True instead of False"),
        ("objective", {"objective": "flow"}, "the objective is flow instead of ddpm"),
        ("objective", {"sigma_data": 0.5}, "--sigma_data is 0.5 instead of None"),
        ("objective", {"learned_uncertainty": True}, None),
        (None, {"class_cond": False}, "--class_cond is False instead of True"),
        (None, {"first_stage": {"scaling_factor": 2.0}}, "scaling_factor is 2.0 instead of 1.0"),
    ],
)
def test_a_weaker_model_predicts_the_same_thing_or_the_difference_is_named(part, change, difference):
    if part is not None:
        change = {part: dataclasses.replace(getattr(PREDICTS, part), **change)}
    assert guides._difference(PREDICTS, dataclasses.replace(PREDICTS, **change)) == difference


@pytest.mark.parametrize(
    "model, kind, sentence",
    [
        ("weak", "masked", "is trained without masking; choose null_label"),
        ("weak", "routed", "is trained without masking; choose null_label"),
        ("weak", "path_drop", "is trained without dropping paths, which --policy sprint does"),
        ("no_path_drop", "path_drop", "is trained without dropping paths, which --policy sprint does"),
        ("deferred", "masked", "learns nothing of the tokens that leave; choose null_label"),
        ("deferred", "routed", "learns nothing of the tokens that leave; choose null_label"),
    ],
)
def test_a_kind_that_a_model_cannot_have_is_refused(sample, capsys, model, kind, sentence):
    sample("refused", *guided("--guide_from", kind), model=model, status=2)
    assert sentence in capsys.readouterr().err


def test_a_beta_schedule_peaks_at_its_mode_with_the_scale():
    weights = beta_weight(torch.arange(1001), 3.0, 1000, (2.0, 4.0))
    assert weights.dtype == torch.float32 and weights[0] == weights[1000] == 1
    assert weights.argmax() == 250 and weights.max() == pytest.approx(3.0)


def test_equal_tokens_in_both_views_leave_nothing_to_guide():
    kept = Draw(KeptTokens.from_noise(torch.rand(2, 16), 10))

    def model(x, t, y, draw):
        return x + draw.kept.dropped.float().sum()

    away = SparserSelf(lambda: torch.zeros(()), lambda u: {"draw": kept}, lambda u: {"draw": kept}, cost=2.0)
    x, t, y = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    guidance = Guidance(away, partial(constant_weight, cfg_scale=5.0))
    assert torch.equal(guidance.lead(model)(x, t, y), model(x, t, y, kept))
    assert torch.equal(guidance.lead(model)(x, t, y, draw=kept), model(x, t, y, kept))


ALPHAS = torch.from_numpy(create_diffusion("").alphas_cumprod).float()


def exact_noise(x, t, mean, spread):
    """The noise that normal data of a mean (N,) and a spread has in x, (N, 1, 4, 4)."""
    alpha, mean = ALPHAS[t].view(-1, 1, 1, 1), mean.view(-1, 1, 1, 1)
    return (x - alpha.sqrt() * mean) * (1 - alpha).sqrt() / (1 - alpha + alpha * spread**2)


def led_away(strong, weak, weight, kind, labels):
    """Samples of a mixture that is led away from another; each is ((means of the labels), spread)."""
    process, null = create_diffusion("100", learn_sigma=False), 3

    def model(x, t, y, draw=None):
        is_weak = (y == null) | (draw is not None)
        if kind == "path_drop" and draw is not None:
            is_weak = torch.arange(len(x)) >= len(x) - draw.past
            assert torch.equal(is_weak, y == null)
        y = torch.where(y == null, labels.repeat(len(y) // len(labels)), y)
        eps = [exact_noise(x, t, torch.tensor(means)[y], spread) for means, spread in (strong, weak)]
        return torch.where(is_weak.view(-1, 1, 1, 1), eps[1], eps[0])

    aways = {
        "null_label": NullLabel(null),
        "checkpoint": OtherModel(lambda x, t, y: exact_noise(x, t, torch.tensor(weak[0])[y], weak[1])),
        "path_drop": PathDrop(null, lambda count: {"draw": Draw(past=count)}, 1.5),
        "sparser": SparserSelf(lambda: torch.zeros(()), None, lambda u: {"draw": Draw()}, 2.0),
    }
    guidance = Guidance(aways[kind], partial(constant_weight, cfg_scale=weight))
    noise = torch.randn(len(labels), 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for y in range(3):  # the path is linear in it, so that the result has no error of sampling
        of_label = noise[labels == y]
        noise[labels == y] = (of_label - of_label.mean()) / of_label.std()
    predict = process.predictor(guidance.lead(model), False, model_kwargs={"y": labels})
    step = samplers.SAMPLERS["heun"].starts["ddpm"](process)
    return samplers.last(samplers.loop(step, predict, noise, range(99, -1, -1)))


@pytest.mark.parametrize("kind", ["null_label", "checkpoint", "path_drop", "sparser"])
def test_a_guided_mixture_has_the_means_and_the_spreads_of_the_closed_form(kind):
    """With exact scores: of equal spreads, each mean becomes b + w (a - b); of equal means, the spread a^w b^(1 - w).

    The last follows from du / ds = eps for u = x / sqrt(alpha_bar) and its noise s, whose solution for a normal of
    spread a is u ~ sqrt(s^2 + a^2).
    """
    labels, means = torch.arange(3).repeat(8), (-0.9, 0.5, 0.8)
    for weight in (1.0, 1.5, 3.0):
        moved = led_away((means, 0.3), ((-0.5, 0.2, 0.6), 0.3), weight, kind, labels)
        for y, (a, b) in enumerate(zip(means, (-0.5, 0.2, 0.6), strict=True)):
            assert moved[labels == y].mean() == pytest.approx(b + weight * (a - b), rel=0.01)
            assert moved[labels == y].std() == pytest.approx(0.3, rel=0.01)
        narrowed = led_away((means, 0.3), (means, 0.4), weight, kind, labels)
        for y, a in enumerate(means):
            assert narrowed[labels == y].mean() == pytest.approx(a, rel=0.01)
            assert narrowed[labels == y].std() == pytest.approx(0.3**weight * 0.4 ** (1 - weight), rel=0.01)


def test_class_names_in_the_other_form_of_unicode_do_not_keep_a_weaker_model_from_guiding():
    model = ModelConfig(model="MDT_Ti_2", image_size=8, downsample=1, in_channels=1, num_classes=2)
    strong, weak, other = (
        RunConfig(model, DiffusionConfig(), {}, class_names=[unicodedata.normalize(form, name), "thé"])
        for form, name in (("NFC", "café"), ("NFD", "café"), ("NFC", "cafe"))
    )
    assert strong.class_names != weak.class_names and guides._difference(strong, weak) is None
    assert "list of class names" in guides._difference(strong, other)
