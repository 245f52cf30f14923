"""What a model's name stands for where no flag says otherwise, through the scripts."""

import json

import pytest
import torch
from golden_arrays import set_golden_weights
from support import TINY_DIGITS, call, few_steps, script

from masked_diffusion.models import create_model
from masked_diffusion.programs import infer_mdt

TRAIN, SAMPLE, INFER = "scripts/image_train.py", "scripts/image_sample.py", "infer_mdt.py"
SMALL = ["--vae_path", "none", "--num_samples", "2", *few_steps(2), "--device", "cpu"]


def weights_of(path, name, num_classes=4):
    """A file without config.json, as the published ones are."""
    kwargs = {"input_size": 8, "in_channels": 3, "num_classes": num_classes, "decode_layer": 2}
    state = set_golden_weights(create_model(name, **kwargs)).state_dict()
    torch.save({key: value * 0.1 if value.is_floating_point() else value for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize(
    "flags, guidance",
    [
        ([], ("constant", 1.5)),
        (["--cfg_scale", "4"], ("constant", 4.0)),
        (["--scale_pow", "2"], ("constant", 1.5)),
        (["--guidance", "power_cosine"], ("power_cosine", 1.5)),
    ],
    ids=["default", "scale", "power", "schedule"],
)
def test_dit_is_guided_by_a_constant_scale_unless_flags_say_otherwise(monkeypatch, tmp_path, capsys, flags, guidance):
    path = weights_of(tmp_path / "dit.pt", "DiT_Ti_2")
    folder = tmp_path / "samples"
    assert call(monkeypatch, SAMPLE, folder, "--model_path", path, *SMALL, "--cfg_cond", "True", *flags) == 0
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    assert (settings["guidance"]["schedule"], settings["guidance"]["cfg_scale"]) == guidance
    err = capsys.readouterr().err
    assert f"guidance of DiT_Ti_2: {guidance[0]}, cfg_scale {guidance[1]}" in err
    assert ("warning: --scale_pow is ignored by DiT_Ti_2" in err) == ("--scale_pow" in flags)
    assert "by its weights it is DiT_Ti_2 for 8 x 8" in err


def test_a_file_of_sit_is_drawn_from_as_published_when_it_is_named(monkeypatch, tmp_path, capsys):
    path = weights_of(tmp_path / "sit.pt", "SiT_Ti_2")
    flags = ["--model_path", path, *SMALL, "--cfg_cond", "True"]
    assert call(monkeypatch, SAMPLE, tmp_path / "named", *flags, "--model", "SiT_Ti_2") == 0
    assert "taken for" not in capsys.readouterr().err
    settings = json.loads((tmp_path / "named" / "manifest.json").read_text())["settings"]
    assert (settings["model"], settings["objective"]["objective"]) == ("SiT_Ti_2", "flow")
    assert (settings["sampler"], settings["guidance"]["schedule"]) == ("euler_maruyama", "constant")
    assert (settings["guidance"]["cfg_scale"], settings["guidance"]["cfg_channels"]) == (1.5, 4)
    for sampler in ("heun", "ddim"):
        flag = ["--sampler", "heun"] if sampler == "heun" else ["--use_ddim", "True"]
        assert call(monkeypatch, SAMPLE, tmp_path / sampler, *flags, "--model", "SiT_Ti_2", *flag) == 0
        assert json.loads((tmp_path / sampler / "manifest.json").read_text())["settings"]["sampler"] == sampler
    capsys.readouterr()
    assert call(monkeypatch, SAMPLE, tmp_path / "unnamed", *flags) == 0
    assert "is taken for DiT_Ti_2; if it is SiT_Ti_2, which has the same names, give --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--model", "SiT_S_2"], "are of DiT_Ti_2 or SiT_Ti_2, which have the same names; give one of them"),
        (["--objective", "flow"], "if they are of SiT_Ti_2, which has the same names, give --model SiT_Ti_2"),
        (
            ["--model", "SiT_Ti_2", "--objective", "ddpm"],
            "SiT_Ti_2 is a network of --objective flow alone; use that, or",
        ),
        (["--model", "SiT_Ti_2", "--sampler", "ddpm"], "--sampler ddpm: it does not serve --objective flow"),
    ],
)
def test_what_a_file_of_dit_or_sit_cannot_be_is_refused_with_both_names(monkeypatch, tmp_path, capsys, flags, sentence):
    path = weights_of(tmp_path / "sit.pt", "SiT_Ti_2")
    assert call(monkeypatch, SAMPLE, tmp_path / "out", "--model_path", path, *SMALL, *flags) == 2
    assert sentence in capsys.readouterr().err


def test_a_sit_is_trained_by_flow_and_from_published_weights_alone(monkeypatch, tmp_path, capsys):
    kwargs = {"input_size": 8, "in_channels": 1, "num_classes": 10}
    torch.save(set_golden_weights(create_model("SiT_Ti_2", **kwargs)).state_dict(), tmp_path / "sit.pt")
    flags = [
        *TINY_DIGITS,
        "--model",
        "SiT_Ti_2",
        "--policy",
        "tread",
        "--max_steps",
        "1",
        "--level_law",
        "logit_normal",
    ]
    fine = [*flags, "--init_from", tmp_path / "sit.pt"]
    assert call(monkeypatch, TRAIN, tmp_path / "fine", *fine, sinks="stdout") == 0
    out = capsys.readouterr().out
    assert "objective: flow" in out and "lr 0.0001" in out and "--level_law is ignored" not in out
    config = json.loads((tmp_path / "fine" / "config.json").read_text())
    assert config["objective"]["objective"] == "flow" and config["model"]["learn_sigma"] is False
    assert call(monkeypatch, TRAIN, tmp_path / "no", *fine, "--objective", "ddpm") == 2
    assert "--objective ddpm: SiT_Ti_2 is a network of --objective flow alone" in capsys.readouterr().err
    # A training's own config.json tells the two apart.
    dit = [*TINY_DIGITS, "--model", "DiT_Ti_2", "--init_from", tmp_path / "fine" / "model000001.pt"]
    assert call(monkeypatch, TRAIN, tmp_path / "dit", *dit) == 2
    assert "are of SiT_Ti_2" in capsys.readouterr().err
    picture = tmp_path / "picture.png"
    sit = ["--model_path", tmp_path / "fine" / "model000001.pt", "--num_sampling_steps", "2", "--out", picture]
    assert call(monkeypatch, INFER, tmp_path, *sit) == 0 and picture.is_file()


@pytest.mark.parametrize("name", ["MDT_Ti_2", "MDTv2_Ti_2"])
def test_the_masked_models_are_guided_by_the_power_cosine_schedule(monkeypatch, tmp_path, name):
    path = weights_of(tmp_path / "mdt.pt", name)
    assert call(monkeypatch, SAMPLE, tmp_path / "out", "--model_path", path, *SMALL, "--cfg_cond", "True") == 0
    guidance = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["guidance"]
    assert (guidance["cfg_scale"], guidance["scale_pow"]) == (3.8, 4.0)


def test_the_published_file_of_version_2_is_drawn_from_as_published(monkeypatch, tmp_path):
    weights_of(tmp_path / "mdt_xl2_v2_ckpt.pt", "MDTv2_Ti_2", num_classes=1000)
    monkeypatch.chdir(tmp_path)
    sampler, seen = infer_mdt.ImageSampler, {}

    def spy(model, config, settings, *args, **kwargs):
        seen.update(vars(settings), model=config.model.model)
        return sampler(model, config, settings, *args, **kwargs)

    monkeypatch.setattr(infer_mdt, "ImageSampler", spy)
    flags = ["--vae_path", "none", "--device", "cpu", "--num_sampling_steps", "2", "--decode_layer", "2"]
    assert call(monkeypatch, INFER, tmp_path, *flags) == 0
    expected = {"cfg_scale": 4.0, "scale_pow": 0.01, "seed": 1, "model": "MDTv2_Ti_2"}
    assert expected.items() <= seen.items()
    published = script(INFER).PUBLISHED_V2
    assert published["num_sampling_steps"] == 250
    assert published["labels"] == "19,23,106,108,278,282" and (tmp_path / "sample.jpg").is_file()


def test_use_zero_is_another_name_of_shard_zero(monkeypatch, tmp_path, capsys):
    flags = [*TINY_DIGITS, "--max_steps", "1"]
    for name, more in (("a", ["--use_zero", "True"]), ("b", ["--model", "MDTv2_Ti_2", "--use_zero", "False"])):
        assert call(monkeypatch, TRAIN, tmp_path / name, *flags, *more, sinks="stdout") == 0
    shards = [json.loads((tmp_path / name / "config.json").read_text())["training"]["shard"] for name in "ab"]
    assert shards == ["zero", "none"]
    assert "warning: --shard zero is ignored in a single process" in capsys.readouterr().out
    contradiction = ["--use_zero", "True", "--shard", "none"]
    assert call(monkeypatch, TRAIN, tmp_path / "c", *flags, *contradiction) == 2
    assert "--use_zero True is --shard zero, but --shard none is given" in capsys.readouterr().err


def test_a_new_training_takes_weights_of_its_own_model_and_leaves_frozen_parameters(monkeypatch, tmp_path, capsys):
    kwargs = {"input_size": 8, "in_channels": 1, "num_classes": 10}
    state = set_golden_weights(create_model("DiT_Ti_2", **kwargs)).state_dict()
    torch.save({"ema": state}, tmp_path / "dit.pt")
    flags = [*TINY_DIGITS, "--init_from", tmp_path / "dit.pt", "--max_steps", "1"]
    assert call(monkeypatch, TRAIN, tmp_path / "mdt", *flags) == 2
    assert "--model MDT_Ti_2: the weights in --init_from" in capsys.readouterr().err
    dit = [*flags, "--model", "DiT_Ti_2", "--freeze", r"^blocks\.[0-2]\."]
    assert call(monkeypatch, TRAIN, tmp_path / "dit", *dit) == 0
    trained = torch.load(tmp_path / "dit" / "model000001.pt", weights_only=True)
    same = {name for name, value in trained.items() if torch.equal(value, state[name])}
    assert {name for name in state if name.startswith(("blocks.0.", "blocks.1.", "blocks.2."))} <= same
    assert not {name for name in state if name.startswith(("blocks.3.", "final_layer"))} & same
    assert call(monkeypatch, TRAIN, tmp_path / "large", *dit, "--image_size", "16") == 2
    assert "4 x 4 tokens, this model has 8 x 8" in capsys.readouterr().err
    large = [*dit, "--image_size", "16", "--interpolate_pos", "True"]
    assert call(monkeypatch, TRAIN, tmp_path / "large", *large, sinks="stdout") == 0
    assert "they are resized" in capsys.readouterr().out
