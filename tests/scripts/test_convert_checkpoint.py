"""The conversion script: formats are exchanged and nothing else."""

import json

import numpy as np
import pytest
import torch
from golden_arrays import set_golden_weights
from support import call, few_steps
from test_first_stage import save_tiny_autoencoder

from masked_diffusion.models import create_model
from masked_diffusion.models.layers import sincos_position_table
from masked_diffusion.runs.checkpoint import read_weights

CONVERT, SAMPLE = "scripts/convert_checkpoint.py", "scripts/image_sample.py"


def published(path, name="MDTv2_Ti_2", wrap=lambda state: state, **kwargs):
    """A file without config.json, of a model of 3-channel pixels."""
    kwargs = {"input_size": 8, "in_channels": 3, "num_classes": 4, "decode_layer": 2, **kwargs}
    model = create_model(name, **kwargs)
    state = {
        name: value * 0.1 if "pos" not in name else value
        for name, value in set_golden_weights(model).state_dict().items()
    }
    if name.startswith("DiT"):
        state["pos_embed"] = torch.from_numpy(sincos_position_table(128, 4)).float()[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(wrap(state), path)
    return state


@pytest.fixture
def convert(monkeypatch, tmp_path):
    def run(source, out, *flags, status=0):
        assert call(monkeypatch, CONVERT, tmp_path, "--model_path", source, "--out", out, *flags) == status
        return out

    return run


@pytest.mark.parametrize("name", ["MDT_Ti_2", "MDTv2_Ti_2", "DiT_Ti_2"])
def test_there_and_back_the_weights_are_the_same(convert, tmp_path, name):
    state = published(tmp_path / "published.pt", name, wrap=lambda state: {"ema": state, "model": {}})
    flags = [] if name != "MDT_Ti_2" else ["--decode_layer", "1"]
    there = convert(tmp_path / "published.pt", tmp_path / "there" / "weights.safetensors", "--vae_path", "none", *flags)
    back = convert(there, tmp_path / "back" / "weights.pt")
    for path in (there, back):
        read = read_weights(path)
        assert read.keys() == state.keys() and all(torch.equal(read[n], state[n]) for n in state)
    configs = [json.loads((path.parent / "config.json").read_text()) for path in (there, back)]
    assert configs[0] == configs[1]
    expected = {"model": name, "image_size": 8, "downsample": 1, "in_channels": 3, "num_classes": 4}
    assert expected.items() <= configs[0]["model"].items()
    assert configs[0]["model"]["decode_layer"] == {"MDT_Ti_2": 1, "MDTv2_Ti_2": 2, "DiT_Ti_2": None}[name]


def test_a_converted_file_is_sampled_as_the_one_it_came_from(convert, tmp_path, monkeypatch):
    published(tmp_path / "published.pt")
    converted = convert(tmp_path / "published.pt", tmp_path / "new" / "weights.safetensors", "--vae_path", "none")
    flags = ["--num_samples", "2", *few_steps(2), "--cfg_cond", "True", "--device", "cpu"]
    images = []
    for path, more in ((tmp_path / "published.pt", ["--vae_path", "none"]), (converted, [])):
        folder = tmp_path / f"samples{len(images)}"
        assert call(monkeypatch, SAMPLE, folder, "--model_path", path, *flags, *more) == 0
        with np.load(folder / "samples_2x8x8x3.npz") as file:
            images.append(file["arr_0"])
    assert np.array_equal(*images)


def test_without_an_autoencoder_at_hand_the_published_one_is_written_down(convert, tmp_path):
    model = create_model("DiT_Ti_2", input_size=4, num_classes=4)
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "new" / "dit.safetensors")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["first_stage"] == {"vae_path": "stabilityai/sd-vae-ft-ema", "scaling_factor": 0.18215,
                                     "shift_factor": 0.0}  # fmt: skip
    assert config["model"]["image_size"] == 32


def test_a_folder_is_written_for_diffusers(convert, tmp_path):
    from diffusers import DiTTransformer2DModel

    from masked_diffusion.diffusers_format import MaskedDiffusionPipeline

    published(tmp_path / "dit.pt", "DiT_Ti_2")
    flags = ["--vae_path", "none"]
    pipeline = MaskedDiffusionPipeline.from_pretrained(convert(tmp_path / "dit.pt", tmp_path / "ours", *flags))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([3], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    folder = convert(tmp_path / "dit.pt", tmp_path / "dit", "--diffusers_class", "dit", *flags)
    assert DiTTransformer2DModel.from_pretrained(folder).config.num_embeds_ada_norm == 4


def test_a_file_of_sit_is_converted_when_it_is_named(convert, tmp_path):
    published(tmp_path / "sit.pt", "SiT_Ti_2")
    flags = ["--vae_path", "none", "--model", "SiT_Ti_2"]
    converted = convert(tmp_path / "sit.pt", tmp_path / "sit" / "sit.safetensors", *flags)
    config = json.loads((converted.parent / "config.json").read_text())
    assert (config["model"]["model"], config["objective"]["objective"]) == ("SiT_Ti_2", "flow")


def test_diffusers_classes_of_dit_are_refused_where_there_are_no_timesteps(convert, tmp_path, capsys):
    published(tmp_path / "dit.pt", "DiT_Ti_2", learn_sigma=False)
    weights = convert(tmp_path / "dit.pt", tmp_path / "flow" / "dit.pt", "--vae_path", "none")
    path = weights.parent / "config.json"
    config = json.loads(path.read_text())
    config["objective"]["objective"] = "flow"
    path.write_text(json.dumps(config))
    for name in ("dit", "dit_pipeline"):
        convert(weights, tmp_path / "folder", "--diffusers_class", name, status=2)
        assert "and this model is of --objective flow; leave the flag out" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_a_baseline_of_imagenets_classes_becomes_diffusers_own_pipeline(convert, tmp_path, capsys):
    from diffusers import DiTPipeline

    vae = save_tiny_autoencoder(tmp_path / "vae", shift_factor=None)
    published(tmp_path / "dit.pt", "DiT_Ti_2", in_channels=4, num_classes=1000)
    published(tmp_path / "small.pt", "DiT_Ti_2", in_channels=4)
    flags = ["--diffusers_class", "dit_pipeline", "--vae_path", vae]
    pipeline = DiTPipeline.from_pretrained(convert(tmp_path / "dit.pt", tmp_path / "dit", *flags))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(pipeline.get_label_ids(["otter"]), num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3) and np.isfinite(images).all()
    convert(tmp_path / "small.pt", tmp_path / "small", *flags, status=2)
    assert "DiTPipeline takes 1000 for the null class" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_folder_for_diffusers_gets_the_given_copy_of_the_recorded_autoencoder(convert, tmp_path, capsys):
    first, copy, other = (save_tiny_autoencoder(tmp_path / name, **{"scaling_factor": scale})
                          for name, scale in (("first", 0.5), ("copy", 0.5), ("other", 0.25)))  # fmt: skip
    published(tmp_path / "a.pt", in_channels=4)
    recorded = convert(tmp_path / "a.pt", tmp_path / "new" / "a.safetensors", "--vae_path", first)
    folder = convert(recorded, tmp_path / "pipeline", "--vae_path", copy)
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.5
    assert "ignored" not in capsys.readouterr().err
    convert(recorded, tmp_path / "wrong", "--vae_path", other, status=2)
    assert "its scaling_factor is 0.25, the model was trained with 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "out, flags, warning",
    [
        ("b/b.pt", ["--vae_path", "none"], "--vae_path is ignored: {recorded} says it"),
        ("b/b.pt", ["--sigma_small", "True"], "--sigma_small is ignored: {recorded} says it"),
        ("b/b.pt", ["--diffusers_class", "dit"], "--diffusers_class is ignored: a file is written"),
        ("b", ["--diffusers_class", "dit", "--vae_path", "none"], "--vae_path is ignored: the transformer is written"),
        ("b", ["--sigma_small", "True"], "--sigma_small is ignored: {recorded} says it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_flag_without_effect_warns(convert, tmp_path, capsys, out, flags, warning):
    published(tmp_path / "a.pt", "DiT_Ti_2")
    recorded = convert(tmp_path / "a.pt", tmp_path / "a" / "a.pt", "--vae_path", "none")
    assert "ignored" not in capsys.readouterr().err
    config = (recorded.parent / "config.json").read_text()
    made = convert(recorded, tmp_path / out, *flags)
    assert f"warning: {warning.format(recorded=recorded.parent / 'config.json')}" in capsys.readouterr().err
    if made.suffix:
        assert (made.parent / "config.json").read_text() == config


def test_a_flag_that_the_weights_have_no_use_for_warns(convert, tmp_path, capsys):
    published(tmp_path / "a.pt", "DiT_Ti_2")
    convert(tmp_path / "a.pt", tmp_path / "a" / "a.pt", "--vae_path", "none", "--decode_layer", "2")
    assert "warning: --decode_layer 2 is ignored: DiT_Ti_2 has no decoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, value, found",
    [
        ("diffusion_steps", "500", 500),
        ("noise_schedule", "cosine", "cosine"),
        ("predict_xstart", "True", True),
        ("sigma_small", "True", True),
    ],
)
def test_what_weights_cannot_tell_of_the_process_is_written_down_by_flags(convert, tmp_path, flag, value, found):
    published(tmp_path / "a.pt")
    made = convert(tmp_path / "a.pt", tmp_path / "a" / "a.pt", "--vae_path", "none", f"--{flag}", value)
    assert json.loads((made.parent / "config.json").read_text())["diffusion"][flag] == found


def test_weights_that_the_model_does_not_have_are_left_out_if_asked_for(convert, tmp_path, capsys):
    state = published(tmp_path / "a.pt", wrap=lambda state: {**state, "classifier.weight": torch.zeros(2)})
    out = tmp_path / "new" / "a.pt"
    convert(tmp_path / "a.pt", out, "--vae_path", "none", status=2)
    assert "classifier.weight (--drop_extra True leaves them out)" in capsys.readouterr().err
    assert (
        read_weights(convert(tmp_path / "a.pt", out, "--vae_path", "none", "--drop_extra", "True")).keys()
        == state.keys()
    )


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--out", "weights.bin"], "--out weights.bin: end the name in .safetensors or .pt"),
        (["--out", ""], "--out: give the file to write"),
        (["--diffusers_class", "unet"], "--diffusers_class unet: choose ours, dit_pipeline, dit"),
        (
            ["--diffusers_class", "dit", "--out", "folder"],
            "--diffusers_class dit: MDTv2_Ti_2 trained under --policy mdtv2 is no DiT",
        ),
        (["--diffusers_class", "dit_pipeline", "--out", "folder"], "MDTv2_Ti_2 trained under --policy mdtv2 is no DiT"),
        (["--decode_layer", "1"], "--decode_layer 1: the weights in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_conversion_refuses(convert, tmp_path, capsys, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "published.pt")
    convert(tmp_path / "published.pt", tmp_path / "new" / "x.pt", "--vae_path", "none", *flags, status=2)
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published.pt"]


def test_nothing_is_written_over(convert, tmp_path, capsys):
    published(tmp_path / "a.pt")
    published(tmp_path / "b" / "b.pt", "DiT_Ti_2")
    first = convert(tmp_path / "a.pt", tmp_path / "new" / "a.safetensors", "--vae_path", "none")
    convert(tmp_path / "a.pt", first, status=2)
    assert "exists; give another name" in capsys.readouterr().err
    convert(tmp_path / "b" / "b.pt", tmp_path / "new" / "b.safetensors", "--vae_path", "none", status=2)
    assert "config.json beside it is of other weights" in capsys.readouterr().err


def test_a_new_configuration_does_not_come_to_speak_of_other_weights(convert, tmp_path, capsys):
    published(tmp_path / "source" / "mine.pt")
    published(tmp_path / "shared" / "theirs.pt")
    out = tmp_path / "shared" / "mine.safetensors"
    convert(tmp_path / "source" / "mine.pt", out, "--vae_path", "none", status=2)
    assert "would be read for theirs.pt" in capsys.readouterr().err
    assert not out.exists() and not (tmp_path / "shared" / "config.json").exists()
