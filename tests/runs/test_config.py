import dataclasses
import json
import re

import pytest
from golden_arrays import golden_json

from masked_diffusion.choices import STREAM
from masked_diffusion.files import write_json
from masked_diffusion.runs.config import (
    DiffusionConfig,
    ModelConfig,
    RunConfig,
    check_resume,
    library_versions,
    read_config,
)

MODEL = ModelConfig(
    model="MDT_Ti_2",
    image_size=16,
    downsample=2,
    in_channels=4,
    num_classes=7,
    mask_ratio=0.3,
    decode_layer=1,
    learn_sigma=False,
)
PROCESS = DiffusionConfig(
    diffusion_steps=100,
    noise_schedule="cosine",
    predict_xstart=True,
    learn_sigma=False,
    sigma_small=True,
)
RUN = RunConfig(
    model=MODEL,
    diffusion=PROCESS,
    first_stage={"vae_path": "some/vae", "scaling_factor": 0.31, "shift_factor": 0.12},
    class_names=["b", "a", "10"],
    class_cond=True,
    training={"lr": 3e-4},
)


def test_a_configuration_reads_back_as_it_was_written(tmp_path):
    write_json(tmp_path / "config.json", RUN.as_json())
    assert read_config(tmp_path) == RUN


def test_a_configuration_without_a_stream_is_of_a_run_under_the_first(tmp_path):
    record = RUN.as_json()
    assert record.pop("stream") == STREAM == 2
    write_json(tmp_path / "config.json", record)
    assert read_config(tmp_path) == dataclasses.replace(RUN, stream=1)


def test_a_manifest_says_of_policies_what_a_family_does_not_have_by_itself():
    of_0_1_0 = {name: value for name, value in dataclasses.asdict(MODEL).items() if value is not None}
    assert MODEL.record() == of_0_1_0
    spelled = dataclasses.replace(MODEL, policy="mdt", choose="uniform", path_drop=0.0)
    assert spelled.record() == of_0_1_0
    for other in ({"policy": "sprint"}, {"policy": "tread", "route": "1,2"}, {"choose": "cells"}, {"path_drop": 0.5}):
        assert dataclasses.replace(MODEL, **other).record() == of_0_1_0 | other
    assert dataclasses.replace(MODEL, mask_ratio=None).record() == of_0_1_0 | {"mask_ratio": None}


def test_a_configuration_records_the_versions_of_the_libraries():
    versions = RUN.as_json()["versions"]
    assert versions == library_versions()
    assert {"masked-diffusion", "torch", "numpy"} <= set(versions)


def test_a_folder_without_a_configuration_has_none(tmp_path):
    assert read_config(tmp_path) is None
    assert read_config(tmp_path / "missing") is None


def test_a_run_from_before_there_was_a_choice_of_objectives_is_of_ddpm(tmp_path):
    value = RUN.as_json()
    assert value.pop("objective")["objective"] == "ddpm"
    write_json(tmp_path / "config.json", value)
    assert read_config(tmp_path) == RUN


@pytest.mark.parametrize("section", ["model", "diffusion", "objective"])
def test_unknown_keys_are_refused_naming_the_file(tmp_path, section):
    value = RUN.as_json()
    value[section]["of_the_future"] = 1
    write_json(tmp_path / "config.json", value)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))) as raised:
        read_config(tmp_path)
    assert "of_the_future" in str(raised.value)


@pytest.mark.parametrize("key", ["model", "diffusion", "first_stage", "class_names", "class_cond"])
def test_missing_keys_are_refused_naming_the_file(tmp_path, key):
    value = RUN.as_json()
    del value[key]
    write_json(tmp_path / "config.json", value)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))) as raised:
        read_config(tmp_path)
    assert key in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"model_type": "vit"}', '{"model": 3}'])
def test_a_file_of_another_kind_is_refused_naming_it(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
        read_config(tmp_path)


def test_a_configuration_is_json_that_people_can_read(tmp_path):
    write_json(tmp_path / "config.json", RUN.as_json())
    assert json.loads((tmp_path / "config.json").read_text())["model"]["decode_layer"] == 1
    assert len((tmp_path / "config.json").read_text().splitlines()) > 20


# -- building ----------------------------------------------------------------------------------------------------------


def test_the_model_is_built_with_every_setting():
    model = MODEL.build()
    assert (model.num_classes, model.in_channels, model.out_channels) == (7, 4, 4)
    assert (model.decode_layer, model.mask_ratio, model.num_tokens) == (1, 0.3, 16)
    assert model.has_null_class
    assert not dataclasses.replace(MODEL, class_dropout_prob=0.0).build().has_null_class
    assert dataclasses.replace(MODEL, learn_sigma=True).build().out_channels == 8
    assert MODEL.latent_shape == (4, 8, 8)


def test_the_process_is_built_with_every_setting():
    process = dataclasses.replace(PROCESS, timestep_respacing="10").build()
    assert process.num_timesteps == 10
    assert DiffusionConfig(diffusion_steps=50).build().num_timesteps == 50


def test_the_smallest_model_is_one_token_and_one_class():
    tiny = ModelConfig(model="MDT_Ti_2", image_size=2, downsample=1, in_channels=1, num_classes=1)
    assert tiny.build().num_tokens == 1


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"image_size": 15}, "--image_size 15"),
        ({"image_size": 0}, "--image_size 0"),
        ({"num_classes": 0}, "--num_classes 0"),
        ({"model": "MDT_XXL_2"}, "--model MDT_XXL_2"),
        ({"decode_layer": 4}, "--decode_layer 4"),
        ({"mask_ratio": 1.0}, "--mask_ratio 1.0"),
        ({"mask_ratio": 0.99}, "--mask_ratio 0.99"),
        ({"image_size": 18}, "--image_size 18 --model MDT_Ti_2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_naming_the_flag(change, flag):
    with pytest.raises(ValueError, match=f"^{flag}: "):
        dataclasses.replace(MODEL, **change).build()


def test_an_unknown_model_is_refused_listing_the_names():
    with pytest.raises(ValueError, match="MDT_S_2.*MDT_Ti_2"):
        dataclasses.replace(MODEL, model="mdt").build()


@pytest.mark.parametrize("change", [{"noise_schedule": "sqrt"}, {"timestep_respacing": "1000"}])
def test_an_impossible_process_is_refused(change):
    with pytest.raises(ValueError):
        dataclasses.replace(PROCESS, **change).build()


def test_the_golden_sizes_are_those_of_the_published_widths():
    small = ModelConfig(model="MDT_S_2", image_size=256, downsample=8, in_channels=4, num_classes=1000).build()
    names = golden_json("model_v1.json")["state_dict"]
    published = {re.sub(r"\.\d+\.", ".N.", name) for name in names}
    assert {re.sub(r"\.\d+\.", ".N.", name) for name in small.state_dict()} == published
    assert small.pos_embed.shape == (1, 256, 384)


# -- resuming ----------------------------------------------------------------------------------------------------------


def changed(path, value):
    """RUN with another value at ``section.name`` or ``name``."""
    section, _, name = path.rpartition(".")
    if section == "first_stage":
        return dataclasses.replace(RUN, first_stage={**RUN.first_stage, name: value})
    if section:
        return dataclasses.replace(RUN, **{section: dataclasses.replace(getattr(RUN, section), **{name: value})})
    return dataclasses.replace(RUN, **{name: value})


def test_the_same_settings_resume(tmp_path):
    check_resume(RUN, RUN, tmp_path)


@pytest.mark.parametrize(
    "path, value, named",
    [
        ("model.model", "MDT_S_2", "--model"),
        ("model.image_size", 32, "--image_size"),
        ("model.downsample", 4, "--downsample"),
        ("model.in_channels", 3, "--in_channels"),
        ("model.num_classes", 8, "--num_classes"),
        ("model.decode_layer", 2, "--decode_layer"),
        ("model.learn_sigma", True, "--learn_sigma"),
        ("diffusion.diffusion_steps", 1000, "--diffusion_steps"),
        ("diffusion.noise_schedule", "linear", "--noise_schedule"),
        ("diffusion.predict_xstart", False, "--predict_xstart"),
        ("diffusion.learn_sigma", True, "--learn_sigma"),
        ("first_stage.scaling_factor", 0.18215, "scaling_factor"),
        ("first_stage.shift_factor", 0.0, "shift_factor"),
        ("class_cond", False, "--class_cond"),
        ("class_names", ["a", "b", "10"], "class names"),
    ],
)
def test_a_setting_that_would_make_it_another_run_is_refused_naming_the_flag_and_both_values(
    tmp_path, path, value, named
):
    with pytest.raises(ValueError) as raised:
        check_resume(RUN, changed(path, value), tmp_path / "config.json")
    text = str(raised.value)
    assert str(tmp_path / "config.json") in text and named in text and str(value) in text and "--init_from" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "path, value",
    [
        ("model.mask_ratio", 0.5),
        ("diffusion.use_kl", True),
        ("training", {"lr": 1e-4}),
        ("first_stage.vae_path", "a copy in another folder"),
    ],
)
def test_a_setting_that_may_change_in_a_run_does_not_stop_it(tmp_path, path, value):
    check_resume(RUN, changed(path, value), tmp_path)


def test_a_long_list_of_names_is_shortened_in_the_message(tmp_path):
    names = [f"n{i:08d}" for i in range(1000)]
    with pytest.raises(ValueError) as raised:
        check_resume(dataclasses.replace(RUN, class_names=names), RUN, tmp_path)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_saved_by_an_editor_that_marks_its_encoding_is_read(tmp_path, encoding):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(RUN)), encoding=encoding)
    assert read_config(tmp_path) == RUN
