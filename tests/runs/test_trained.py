import dataclasses
import hashlib

import pytest
import torch
from golden_arrays import set_golden_weights
from support import script
from test_first_stage import SCALE, SHIFT, save_tiny_autoencoder

from masked_diffusion.files import write_json
from masked_diffusion.first_stage import PixelSpace
from masked_diffusion.runs import trained
from masked_diffusion.runs.config import DiffusionConfig, ModelConfig, RunConfig
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import open_trained
from masked_diffusion.script_util import request_of

MODEL = ModelConfig(
    "MDT_Ti_2", image_size=8, downsample=1, in_channels=3, num_classes=7, mask_ratio=0.3, decode_layer=2
)
PIXELS = PixelSpace(3).description


def write_run(folder, name="ema_0.9999_000020.pt", recorded=True, model=MODEL, **settings):
    """A run folder with the weights of a random model."""
    config = RunConfig(**{"model": model, "diffusion": DiffusionConfig(), "first_stage": PIXELS, **settings})
    torch.save(set_golden_weights(model.build()).state_dict(), folder / name)
    if recorded:
        write_json(folder / "config.json", config.as_json())
    return folder / name


def open_with(path, warn=pytest.fail, **flags):
    """Open a checkpoint with these flags on the command line."""
    return open_trained(path, Request(**flags), "cpu", warn)


@pytest.fixture
def loaded_paths(monkeypatch):
    """Load nothing from the hub: what is asked for is written down, and pixel space in its place."""
    asked = []

    def load(vae_path, device, channels):
        asked.append(vae_path)
        first_stage = PixelSpace(channels)
        first_stage.description = {"vae_path": vae_path, "scaling_factor": 0.18215, "shift_factor": 0.0}
        return first_stage

    monkeypatch.setattr(trained, "load_first_stage", load)
    return asked


HUB = {"vae_path": "stabilityai/sd-vae-ft-mse", "scaling_factor": 0.18215, "shift_factor": 0.0}


# -- by the recorded configuration -------------------------------------------------------------------------------------


def test_a_checkpoint_is_opened_by_the_configuration_beside_it(tmp_path):
    process = DiffusionConfig(diffusion_steps=50, noise_schedule="cosine")
    path = write_run(tmp_path, diffusion=process, class_names=list("abcdefg"))
    opened = open_with(path)
    assert opened.recorded and opened.config.model == MODEL and opened.config.diffusion == process
    assert opened.config.class_names == list("abcdefg")
    assert opened.model.num_classes == 7 and isinstance(opened.first_stage, PixelSpace)


def test_the_model_has_the_files_weights_in_eval_mode_and_frozen(tmp_path):
    path = write_run(tmp_path)
    opened, state = open_with(path), torch.load(path, weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in opened.model.state_dict().items())
    assert not opened.model.training
    assert not any(p.requires_grad for p in opened.model.parameters())


CONTRADICTIONS = {
    "model": "MDT_S_2",
    "image_size": 16,
    "num_classes": 8,
    "decode_layer": 1,
    "learn_sigma": False,
    "predict_xstart": True,
    "diffusion_steps": 500,
    "noise_schedule": "cosine",
}
AGREEING = {
    "model": "MDT_Ti_2",
    "image_size": 8,
    "num_classes": 7,
    "decode_layer": 2,
    "learn_sigma": True,
    "predict_xstart": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_an_explicit_flag_that_contradicts_the_record_is_refused_with_both_values(tmp_path, name):
    path = write_run(tmp_path)
    with pytest.raises(ValueError) as raised:
        open_with(path, **{name: CONTRADICTIONS[name]})
    text = str(raised.value)
    assert text.startswith(f"--{name} {CONTRADICTIONS[name]}: {path} was trained with {AGREEING[name]}, ")
    assert "config.json" in text and "\n" not in text


def test_explicit_flags_that_agree_with_the_record_are_accepted(tmp_path):
    assert open_with(write_run(tmp_path), **AGREEING).config.model == MODEL


@pytest.mark.parametrize("name", ["num_classes", "decode_layer"])
def test_none_asks_for_what_is_recorded(tmp_path, name):
    assert open_with(write_run(tmp_path), **{name: None}).config.model == MODEL


def test_flags_at_their_defaults_contradict_nothing(tmp_path):
    """Those of a published file, too: infer_mdt.py has other defaults for it."""
    parser = script("scripts/image_sample.py").create_argparser()
    request = request_of(parser.parse_args([]), set(), usual_decode_layer=1)
    assert open_trained(write_run(tmp_path), request, "cpu", pytest.fail).config.model == MODEL
    (tmp_path / "bare").mkdir()
    bare = write_run(tmp_path / "bare", recorded=False)
    request = Request(vae_path="none", usual_decode_layer=1)
    assert open_trained(bare, request, "cpu", pytest.fail).model.decode_layer == 1


def test_a_model_with_classes_is_sampled_without_them_but_not_the_other_way_round(tmp_path):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    assert open_with(write_run(tmp_path / "with"), class_cond=False).config.class_cond
    path = write_run(tmp_path / "without", class_cond=False)
    assert not open_with(path).config.class_cond
    assert not open_with(path, class_cond=False).config.class_cond
    with pytest.raises(ValueError, match="--class_cond True: .* was trained with False"):
        open_with(path, class_cond=True)


def test_the_fixed_variance_is_chosen_at_sampling(tmp_path):
    path = write_run(
        tmp_path, model=dataclasses.replace(MODEL, learn_sigma=False), diffusion=DiffusionConfig(learn_sigma=False)
    )
    assert not open_with(path).config.diffusion.sigma_small
    assert open_with(path, sigma_small=True).config.diffusion == DiffusionConfig(learn_sigma=False, sigma_small=True)


def test_weights_of_another_size_than_recorded_are_refused(tmp_path):
    path = write_run(tmp_path)
    config = RunConfig(dataclasses.replace(MODEL, num_classes=9), DiffusionConfig(), PIXELS)
    write_json(tmp_path / "config.json", config.as_json())
    with pytest.raises(ValueError, match="another model or size"):
        open_with(path)


# -- by the flags ------------------------------------------------------------------------------------------------------

BY_FLAGS = {"model": "MDT_Ti_2", "image_size": 8, "vae_path": "none", "decode_layer": 2}


def test_a_file_without_a_record_is_opened_by_its_weights_and_the_flags_of_the_process(tmp_path):
    path = write_run(tmp_path, "mdt_xl2_v1_ckpt.pt", recorded=False)
    opened = open_with(path, **BY_FLAGS, diffusion_steps=50, noise_schedule="cosine", sigma_small=True)
    assert not opened.recorded
    assert opened.config.model == dataclasses.replace(MODEL, mask_ratio=None)
    assert opened.config.diffusion == DiffusionConfig(50, "cosine", sigma_small=True)
    assert opened.config.first_stage == PIXELS and opened.config.class_names == []


UNRECORDED = {
    "MDT": dataclasses.replace(MODEL, mask_ratio=None),
    "MDTv2": dataclasses.replace(MODEL, model="MDTv2_Ti_2", mask_ratio=None),
    "DiT": dataclasses.replace(MODEL, model="DiT_Ti_2", mask_ratio=None, decode_layer=None, learn_sigma=False),
}


@pytest.mark.parametrize("family", UNRECORDED)
def test_weights_alone_say_which_model_they_are_of(tmp_path, family):
    path, warnings = write_run(tmp_path, recorded=False, model=UNRECORDED[family]), []
    opened = open_with(path, warn=warnings.append, vae_path="none")
    assert opened.config.model == UNRECORDED[family]
    assert opened.config.diffusion.learn_sigma == UNRECORDED[family].learn_sigma
    # Only an MDT's weights do not say how many of its blocks are the decoder.
    assert [text[:34] for text in warnings] == (["--decode_layer is taken to be 2: n"] if family == "MDT" else [])


def test_the_route_of_weights_alone_is_the_policys_and_said(tmp_path):
    sprint = dataclasses.replace(UNRECORDED["DiT"], policy="sprint", route="2,3")
    path, warnings = write_run(tmp_path, model=sprint), []
    assert open_with(path, warn=warnings.append, vae_path="none").model.route == (2, 3)
    assert warnings == []
    (tmp_path / "config.json").unlink()
    route = open_with(path, warn=warnings.append, vae_path="none").model.route
    assert route != (2, 3)
    said = f"--route is taken to be {route.leave},{route.back}: neither the weights of sprint nor a config.json say"
    assert warnings == [said]


@pytest.mark.parametrize(
    "flag, value, shown",
    [("model", "MDT_S_2", "MDT_Ti_2"), ("image_size", 16, 8), ("learn_sigma", False, True), ("num_classes", 8, 7)],
)
def test_flags_that_the_weights_contradict_are_refused_with_both_values(tmp_path, flag, value, shown):
    path = write_run(tmp_path, recorded=False)
    assert open_with(path, **BY_FLAGS, num_classes=7).model.num_classes == 7
    with pytest.raises(ValueError, match=f"--{flag} {value}: the weights in .* are of {shown}; leave the flag out"):
        open_with(path, **{**BY_FLAGS, flag: value})


def test_the_decoder_of_version_2_is_contradicted_that_of_version_1_taken_and_of_dit_ignored(tmp_path):
    for family in UNRECORDED:
        (tmp_path / family).mkdir()
    paths = {f: write_run(tmp_path / f, recorded=False, model=model) for f, model in UNRECORDED.items()}
    flags = {"vae_path": "none", "decode_layer": 1}
    assert open_with(paths["MDT"], **flags).model.decode_layer == 1
    with pytest.raises(ValueError, match="--decode_layer 1: the weights in .* are of 2"):
        open_with(paths["MDTv2"], **flags)
    warnings = []
    open_with(paths["DiT"], warn=warnings.append, **flags)
    assert warnings == ["--decode_layer 1 is ignored: DiT_Ti_2 has no decoder"]


@pytest.mark.parametrize("recorded", [True, False])
def test_another_resolution_is_sampled_only_if_asked_for_and_with_a_warning(tmp_path, recorded):
    path, warnings = write_run(tmp_path, recorded=recorded), []
    flags = {"image_size": 16} if recorded else {**BY_FLAGS, "image_size": 16}
    with pytest.raises(ValueError, match="--image_size 16"):
        open_with(path, **flags)
    opened = open_with(path, warn=warnings.append, interpolate_pos=True, **flags)
    assert opened.config.model.image_size == 16 and opened.model.num_tokens == 64
    assert len(warnings) == 1 and "4 x 4 tokens, this model has 8 x 8: they are resized" in warnings[0]


def test_extra_weights_are_refused_unless_they_are_to_be_dropped_and_missing_ones_always(tmp_path):
    path = write_run(tmp_path)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "classifier.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="such as classifier.weight .--drop_extra True leaves them out"):
        open_with(path)
    opened = open_with(path, drop_extra=True)
    assert all(torch.equal(value, state[name]) for name, value in opened.model.state_dict().items())
    torch.save({name: value for name, value in state.items() if name != "final_layer.linear.weight"}, path)
    with pytest.raises(ValueError, match="names are missing, such as final_layer.linear.weight"):
        open_with(path, drop_extra=True)


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match="resnet.pt: not a checkpoint of MDT, MDTv2, DiT or SiT"):
        open_with(tmp_path / "resnet.pt", **BY_FLAGS)


def test_a_missing_file_is_named(tmp_path):
    for path, remedy in (
        (tmp_path / "no.pt", "has no ema_*.pt; train a model, or get published weights as README.md says"),
        (tmp_path / "nowhere" / "no.pt", "does not exist; train a model, or get published weights as README.md says"),
    ):
        with pytest.raises(FileNotFoundError) as raised:
            open_with(path)
        assert str(raised.value) == f"--model_path {path}: no such file; {path.parent} {remedy}"


def test_a_missing_file_is_named_with_the_newest_that_lie_beside_it(tmp_path):
    files = [f"ema_0.9999_{step:06d}.pt" for step in (9, 10, 999_999, 1_000_000)]
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError) as raised:
        open_with(tmp_path / "ema_0.9999_000011.pt")
    assert str(raised.value).endswith(f"; {tmp_path} has {', '.join(files[1:])}")


# -- first stage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["ema", "mse"])
@pytest.mark.parametrize("recorded", [True, False])
def test_where_the_first_stage_is_the_hubs_default_the_decoder_is_chosen(tmp_path, loaded_paths, decoder, recorded):
    path = write_run(tmp_path, first_stage=HUB, recorded=recorded)
    flags = {} if recorded else {"decode_layer": 2}
    open_with(path, vae_decoder=decoder, **flags)
    assert loaded_paths == [f"stabilityai/sd-vae-ft-{decoder}"]


def test_the_decoder_is_the_ema_one_by_default_whatever_was_trained_with(tmp_path, loaded_paths):
    open_with(write_run(tmp_path, first_stage=HUB))
    assert loaded_paths == ["stabilityai/sd-vae-ft-ema"]


def test_a_first_stage_that_is_not_the_hubs_default_is_taken_as_recorded(tmp_path, loaded_paths):
    open_with(write_run(tmp_path, first_stage={**HUB, "vae_path": "my/vae"}))
    assert loaded_paths == ["my/vae"]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_given_first_stage_wins(tmp_path, loaded_paths, recorded):
    flags = {} if recorded else {"decode_layer": 2}
    open_with(write_run(tmp_path, first_stage=HUB, recorded=recorded), vae_path="my/vae", **flags)
    assert loaded_paths == ["my/vae"]


def test_a_decoder_that_is_not_chosen_from_warns_where_the_record_has_another_first_stage(tmp_path, loaded_paths):
    warnings = []
    path = write_run(tmp_path, first_stage={**HUB, "vae_path": "my/vae"})
    open_with(path, warn=warnings.append, vae_decoder="mse")
    assert len(warnings) == 1 and "--vae_decoder mse is ignored" in warnings[0] and "my/vae" in warnings[0]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_decoder_that_is_not_chosen_from_warns_where_a_first_stage_is_given(tmp_path, loaded_paths, recorded):
    warnings = []
    flags = {} if recorded else {"decode_layer": 2}
    path = write_run(tmp_path, first_stage=HUB, recorded=recorded)
    open_with(path, warn=warnings.append, vae_decoder="mse", vae_path="my/vae", **flags)
    assert len(warnings) == 1 and "--vae_decoder mse is ignored" in warnings[0] and "my/vae" in warnings[0]


def latent_run(folder, **description):
    """A run on latents of the tiny autoencoder, recorded with another description where given."""
    vae_path = str(save_tiny_autoencoder(folder / "vae"))
    model = dataclasses.replace(MODEL, image_size=16, downsample=2, in_channels=4)
    recorded = {"vae_path": vae_path, "scaling_factor": SCALE, "shift_factor": SHIFT, **description}
    return write_run(folder, model=model, first_stage=recorded)


def test_the_recorded_autoencoder_is_loaded(tmp_path):
    opened = open_with(latent_run(tmp_path))
    assert opened.first_stage.description == opened.config.first_stage
    assert opened.first_stage.downsample == 2


@pytest.mark.parametrize("name, value", [("scaling_factor", 0.18215), ("shift_factor", 0.0)])
def test_an_autoencoder_of_another_scale_or_shift_than_recorded_is_refused(tmp_path, name, value):
    path = latent_run(tmp_path, **{name: value})
    with pytest.raises(ValueError) as raised:
        open_with(path)
    text = str(raised.value)
    assert text.startswith("--vae_path ") and f"its {name} is" in text and f"trained with {value}" in text


def test_a_given_autoencoder_of_another_scale_is_refused(tmp_path):
    path = latent_run(tmp_path)
    other = save_tiny_autoencoder(tmp_path / "other", scaling_factor=0.5)
    with pytest.raises(ValueError, match="its scaling_factor is 0.5, the model was trained with 0.31"):
        open_with(path, vae_path=str(other))


def test_a_copy_of_the_autoencoder_in_another_folder_is_accepted(tmp_path):
    path = latent_run(tmp_path, vae_path="a/folder/of/the/training/machine")
    with pytest.raises(FileNotFoundError, match="--vae_path a/folder/of/the/training/machine"):
        open_with(path)
    assert open_with(path, vae_path=str(tmp_path / "vae")).first_stage.description["vae_path"] == str(tmp_path / "vae")


# -- identity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rate, step",
    [("ema_0.9999_000020.pt", "0.9999", 20), ("model000020.pt", None, 20), ("mdt_xl2_v1_ckpt.pt", None, None)],
)
def test_a_manifest_names_the_weights_by_file_hash_rate_and_step(tmp_path, name, rate, step):
    path = write_run(tmp_path, name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_with(path).identity() == {"file": name, "sha256": digest, "ema_rate": rate, "step": step}
