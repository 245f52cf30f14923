"""Every objective through the scripts: a training, a resume, samples, pictures, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support import REPO, TINY_DIGITS, assert_same_weights, call, few_steps, make_colour_folder, rows, script, weights

from masked_diffusion import choices, create_diffusion
from masked_diffusion.diffusion import objectives, samplers
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.runs.config import read_config
from masked_diffusion.sampling import guides

TRAIN, SAMPLE, INFER = "scripts/image_train.py", "scripts/image_sample.py", "infer_mdt.py"
VISUALIZE, ENCODE = "scripts/visualize.py", "scripts/encode_latents.py"
CARD, TRACK = "scripts/make_card.py", "scripts/on_track.py"
NAMES = ["x0", "v", "flow", "edm"]
WEIGHTS = "ema_0.9999_000002.pt"


@pytest.fixture(scope="module")
def runs(module_folder):
    """A folder for each objective, of two steps with a preview."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folders = {name: module_folder(name) for name in NAMES}
        for name, folder in folders.items():
            flags = ["--objective", name, "--preview_samples", "4", "--preview_steps", "2"]
            assert call(monkeypatch, TRAIN, folder, *TINY_DIGITS, *flags) == 0
        yield folders


@pytest.mark.parametrize("name", NAMES)
def test_a_training_records_its_objective_and_draws_previews(runs, name):
    config = json.loads((runs[name] / "config.json").read_text())
    assert config["objective"]["objective"] == name and config["model"]["learn_sigma"] is False
    assert (config["objective"]["sigma_data"] is not None) == (name == "edm")
    assert (runs[name] / "preview_000002.png").is_file()


def test_the_deviation_of_the_digits_is_measured(runs):
    images = __import__("sklearn.datasets", fromlist=["load_digits"]).load_digits().images[:1000] / 8 - 1
    config = json.loads((runs["edm"] / "config.json").read_text())
    assert config["objective"]["sigma_data"] == pytest.approx(images.std(), rel=0.01)


@pytest.mark.parametrize("name, sampler", [("x0", "ddpm"), ("v", "unipc"), ("flow", "euler_maruyama"), ("edm", "heun")])
def test_samples_are_drawn_under_guidance_and_say_what_made_them(runs, name, sampler, monkeypatch, tmp_path, capsys):
    flags = ["--num_samples", "5", *few_steps(3), "--cfg_cond", "True", "--sampler", sampler]
    paths = [tmp_path / "together", tmp_path / "apart"]
    for path, batch_size in zip(paths, ("5", "2"), strict=True):
        arguments = ["--model_path", runs[name] / WEIGHTS, "--batch_size", batch_size, *flags]
        assert call(monkeypatch, SAMPLE, path, *arguments) == 0
    images = [np.load(path / "samples_5x8x8x3.npz")["arr_0"].astype(int) for path in paths]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert images[0].std() > 1 or name == "x0"  # whose fresh network returns grey
    manifest = json.loads((paths[0] / "manifest.json").read_text())
    assert name in json.dumps(manifest)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_drawn(runs, name, monkeypatch, tmp_path):
    out = tmp_path / "picture.png"
    arguments = ["--model_path", runs[name] / WEIGHTS, "--num_sampling_steps", "2", "--out", out, "--labels", "1,2"]
    assert call(monkeypatch, INFER, tmp_path, *arguments) == 0
    assert out.is_file()


CONTINUOUS = ["flow", "edm"]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_training_is_evaluated_by_a_sampler_of_its_objective(name, monkeypatch, tmp_path):
    monkeypatch.setattr(script(TRAIN), "EVALUATOR", REPO / "tests" / "stand_in_evaluator.py")
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    flags = ["--eval_interval", "2", "--eval_ref", tmp_path / "reference.npz", "--eval_num_samples", "3"]
    flags += ["--eval_sampling_steps", "2", "--eval_cfg_scale", "1.5", "--objective", name]
    assert call(monkeypatch, TRAIN, tmp_path / "run", *TINY_DIGITS, *flags) == 0
    assert rows(tmp_path / "run")[-1]["eval_fid"] is not None
    made = json.loads((tmp_path / "run" / "evaluation" / "000002" / "manifest.json").read_text())["settings"]
    assert made["objective"]["objective"] == name and made["sampler"]["cfg_channels"] == 4
    assert made["sampler"]["sampler"] == {"flow": "euler", "edm": "heun"}[name]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_masked_inputs_are_reconstructed(runs, name, monkeypatch, tmp_path):
    out = tmp_path / "picture.png"
    flags = [
        "--model_path",
        runs[name] / WEIGHTS,
        "--data_dir",
        "builtin:digits-test",
        "--num_images",
        "2",
        "--out",
        out,
    ]
    assert call(monkeypatch, VISUALIZE, tmp_path, "reconstruction", *flags, "--num_sampling_steps", "2") == 0
    assert np.asarray(Image.open(out)).std() > 1


@pytest.fixture(scope="module")
def latents(module_folder, tiny_vae):
    """Encoded images of three colours, and the flags of a training on them."""
    folder = module_folder("latents")
    images = make_colour_folder(folder / "images", per_class=2)
    flags = ["--vae_path", tiny_vae, "--image_size", "32", "--num_workers", "0", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = ["--data_dir", images, "--out", folder / "encoded", "--batch_size", "2", *flags]
        assert call(monkeypatch, ENCODE, folder, *arguments) == 0
    return ["--data_dir", folder / "encoded", *flags, "--image_size", "32"]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_encoded_latents_are_trained_on_and_measured(latents, name, monkeypatch, tmp_path):
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, *latents, "--objective", name) == 0
    objective = json.loads((tmp_path / "config.json").read_text())["objective"]
    assert (objective["sigma_data"] is not None) == (name == "edm")
    assert objective["sigma_data"] is None or 0.01 < objective["sigma_data"] < 10
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_dry_run_says_the_cost(name, monkeypatch, tmp_path, capsys):
    flags = ["--dry_run", "True", "--objective", name]
    assert call(monkeypatch, TRAIN, tmp_path / "run", *TINY_DIGITS, *flags, sinks="") == 0
    out = capsys.readouterr().out
    assert f"objective: {name}" in out and "GFLOPs per image" in out and not (tmp_path / "run").exists()


def test_a_card_is_of_one_objective(runs, monkeypatch, tmp_path, capsys):
    flags = ["--recipe", "mine", "--every", "2", "--out", tmp_path / "card.json"]
    assert call(monkeypatch, CARD, tmp_path, runs["flow"], runs["x0"], *flags) == 2
    assert "has another objective" in capsys.readouterr().err
    assert call(monkeypatch, CARD, tmp_path, runs["flow"], runs["flow"], *flags) == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["settings"]["objective"] == "flow" and card["settings"]["level_law"] == "uniform"
    call(monkeypatch, TRACK, tmp_path, runs["edm"], tmp_path / "card.json")
    assert "another recipe: objective edm, the card has flow" in capsys.readouterr().out
    del card["settings"]["objective"]  # as the cards of 0.1.0
    (tmp_path / "card.json").write_text(json.dumps(card))
    call(monkeypatch, TRACK, tmp_path, runs["edm"], tmp_path / "card.json")
    assert "another recipe: objective edm, the card has ddpm" in capsys.readouterr().out


def test_a_learned_uncertainty_weighs_the_losses_and_goes_on_after_a_stop(monkeypatch, tmp_path, capsys):
    flags = [*TINY_DIGITS, "--objective", "edm", "--learned_uncertainty", "True", "--batch_size", "16", "--lr", "0.01"]
    flags += ["--grad_clip", "0.1"]  # else the first weight is lost in AdamW's scale
    for folder, steps in (("whole", ["6"]), ("parts", ["3", "6"]), ("without", ["6"])):
        for max_steps in steps:
            more = ["--learned_uncertainty", "False"] if folder == "without" else []
            assert call(monkeypatch, TRAIN, tmp_path / folder, *flags, "--max_steps", max_steps, *more) == 0
    assert_same_weights(weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6))
    state = torch.load(tmp_path / "whole" / "state000006.pt", weights_only=True)["schedule_sampler"]
    assert state["counts"].sum() == 6 * 16
    names = [f"{folder}/model000006.pt" for folder in ("whole", "without")]
    differing = [torch.load(tmp_path / file, weights_only=True)["final_layer.linear.weight"] for file in names]
    assert not torch.equal(*differing)
    assert weights(tmp_path / "whole", 6).keys() == weights(tmp_path / "without", 6).keys()
    for folder, former, value in (("whole", "True", "False"), ("without", "False", "True")):
        said = (tmp_path / folder / "config.json").read_text()
        more = ["--max_steps", "7", "--learned_uncertainty", value]
        assert call(monkeypatch, TRAIN, tmp_path / folder, *flags, *more) == 2
        assert f"--learned_uncertainty {former}, this one {value}" in capsys.readouterr().err
        assert (tmp_path / folder / "config.json").read_text() == said
    pair = [read_config(tmp_path / folder) for folder in ("whole", "without")]
    assert pair[0].objective.record() == pair[1].objective.record()  # what is sampled is told apart by its weights
    assert guides._difference(*pair) is None


def test_a_finished_run_is_resumed_under_its_own_objective_alone(runs, monkeypatch, capsys):
    flags = [*TINY_DIGITS, "--max_steps", "3"]
    assert call(monkeypatch, TRAIN, runs["v"], *flags, "--objective", "flow") == 2
    assert "--objective v, this one flow" in capsys.readouterr().err
    assert call(monkeypatch, TRAIN, runs["v"], *flags, "--objective", "v") == 0
    assert (runs["v"] / "model000003.pt").is_file()


@pytest.mark.parametrize(
    "name, flags, sentence",
    [
        ("flow", ["--sampler", "ddpm"], "--sampler ddpm: it does not serve --objective flow; choose one of ddim, "),
        ("v", ["--sampler", "euler"], "--sampler euler: it does not serve --objective v; choose one of ddpm, ddim"),
        ("v", ["--objective", "flow"], "--objective flow: "),
        ("flow", ["--num_sampling_steps", "0"], "--num_sampling_steps 0: must be at least 1"),
        ("flow", ["--cfg_scale", "nan"], None),
        ("edm", ["--sampler", "eulr"], "--sampler eulr: unknown; choose one of ddpm, ddim, dpmsolver++"),
        ("edm", ["--sampler", "unipc"], "--sampler unipc: it does not serve --objective edm; choose one of ddim, heun"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_sample(runs, name, flags, sentence, monkeypatch, tmp_path, capsys):
    arguments = ["--model_path", runs[name] / WEIGHTS, "--num_samples", "2", *flags]
    if sentence is None:
        with pytest.raises(SystemExit, match="2"):
            call(monkeypatch, SAMPLE, tmp_path, *arguments)
        assert "expected a finite number" in capsys.readouterr().err.splitlines()[-1]
        return
    assert call(monkeypatch, SAMPLE, tmp_path, *arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--objective", "flow", "--learn_sigma", "True"], "--learn_sigma True: it belongs to --objective ddpm"),
        (["--objective", "v", "--predict_xstart", "True"], "--predict_xstart True: it belongs to --objective ddpm"),
        (["--objective", "edm", "--sigma_data", "0"], "--sigma_data 0.0: must be positive"),
        (["--objective", "flows"], "--objective flows: unknown; choose one of ddpm, x0, v, flow, edm"),
        (["--objective", "flow", "--level_law", "normal"], "--level_law normal: unknown; choose one of uniform, logit"),
        (["--objective", "flow", "--level_std", "0"], "--level_std 0.0: must be positive"),
        (["--objective", "flow", "--time_shift", "-1"], "--time_shift -1.0: must be positive"),
        (["--objective", "edm", "--p_std", "-1"], "--p_std -1.0: must be positive"),
        (["--objective", "edm", "--schedule_sampler", "loss-second-moment"], "edm has no numbered timesteps"),
        (
            ["--objective", "flow", "--eval_sampler", "ddpm", "--eval_interval", "1", "--eval_ref", __file__],
            "--eval_sampler",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_step(flags, sentence, monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, *flags) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["level_mean", "level_std", "sigma_data", "p_mean", "p_std", "time_shift"])
def test_a_number_that_is_none_is_refused_in_one_sentence(flag, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, f"--{flag}", "nan")
    assert f"argument --{flag}: expected a finite number" in capsys.readouterr().err.splitlines()[-1]


def test_settings_without_effect_are_said(monkeypatch, tmp_path, capsys):
    flags = ["--objective", "flow", "--min_snr_gamma", "5", "--p_mean", "0", "--time_shift", "auto", "--max_steps", "1"]
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, *flags, sinks="stdout") == 0
    out = capsys.readouterr().out
    assert "--min_snr_gamma is ignored with --objective flow" in out
    assert "--p_mean is ignored with --objective flow" in out
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["objective"]["time_shift"] == pytest.approx((64 / 4096) ** 0.5)


def test_the_documented_objective_is_trained_sampled_and_not_mistaken_for_another_one(monkeypatch, tmp_path, capsys):
    page = (REPO / "docs" / "objectives.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) <= 60
    for table in (choices.OBJECTIVES, objectives.OBJECTIVES):
        monkeypatch.setitem(table, "clean_flow", None)  # and is taken out again
    for name in ("euler", "heun", "ddim"):
        monkeypatch.setitem(choices.SAMPLERS, name, choices.SAMPLERS[name])
        monkeypatch.setitem(samplers.SAMPLERS[name].starts, "clean_flow", None)
    exec(block, {"__name__": "documented"})
    flow, clean = (
        objectives.OBJECTIVES[name](ObjectiveConfig(name, time_shift=2.0), create_diffusion, 4)
        for name in ("flow", "clean_flow")
    )
    x_start, noise, t = torch.randn(8, 1, 4, 4), torch.randn(8, 1, 4, 4), torch.linspace(0.1, 0.9, 8)
    x = flow.q_sample(x_start, t, noise)

    def velocity(x_t, time):
        return torch.tanh(x_t)

    def clean_data(x_t, time):
        return x_t - (time / 1000).view(-1, 1, 1, 1) * torch.tanh(x_t)

    losses = [flow.training_losses(velocity, x_start, t, noise=noise)["mse"]]
    losses.append(clean.training_losses(clean_data, x_start, t, noise=noise)["mse"])
    torch.testing.assert_close(*losses)
    predictions = [
        objective.predictor(net, False)(x, t)[:2] for objective, net in ((flow, velocity), (clean, clean_data))
    ]
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-5)
    flags = ["--objective", "clean_flow", "--level_law", "logit_normal", "--preview_samples", "2"]
    assert call(monkeypatch, TRAIN, tmp_path / "run", *TINY_DIGITS, *flags, sinks="stdout") == 0
    out = capsys.readouterr().out
    assert "objective: clean_flow" in out and "is ignored" not in out
    arguments = ["--model_path", tmp_path / "run" / WEIGHTS, "--num_samples", "2", *few_steps(2)]
    for sampler in ("euler", "heun"):
        assert call(monkeypatch, SAMPLE, tmp_path / sampler, *arguments, "--sampler", sampler) == 0
    assert call(monkeypatch, SAMPLE, tmp_path / "unipc", *arguments, "--sampler", "unipc") == 2
    assert "does not serve --objective clean_flow; choose one of ddim, heun, euler" in capsys.readouterr().err
    arguments = ["--model_path", tmp_path / "run" / WEIGHTS, "--out", tmp_path / "folder"]
    assert call(monkeypatch, "scripts/convert_checkpoint.py", tmp_path, *arguments) == 2
    assert "--objective clean_flow: no scheduler of diffusers takes its predictions" in capsys.readouterr().err


def test_a_deviation_is_measured_on_the_images_that_can_be_read(monkeypatch, tmp_path):
    folder = make_colour_folder(tmp_path / "images", size=16)
    sorted(folder.glob("*/*"))[0].write_bytes(b"broken")
    flags = ["--data_dir", folder, "--objective", "edm", "--max_bad_share", "0.5", "--dry_run", "True"]
    assert call(monkeypatch, TRAIN, tmp_path / "run", *TINY_DIGITS, *flags) == 0
