"""Pictures that compare, by the scripts that draw them."""

import json
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from support import TINY_DIGITS, call, model_of, script

from masked_diffusion.models import create_model
from masked_diffusion.sampling.gallery import BIAS_TABLE, Row, num_frames, parse_sweep, relative_bias
from masked_diffusion.sampling.inpainting import Photo
from masked_diffusion.sampling.pictures import LEGIBLE_SIDE, TEXT_SIZE, table

TRAIN, INFER, LOOK = "scripts/image_train.py", "infer_mdt.py", "scripts/visualize.py"
TILE, GAP = 64, 4


@pytest.fixture(scope="module")
def models(module_folder):
    """A function of further flags of the training: a model's path."""
    folder = module_folder("models")
    return lambda *flags: model_of(folder / " ".join(map(str, flags)).replace("/", "_"), *flags)


@pytest.fixture(scope="module")
def trained(models):
    return models()


@pytest.fixture
def draw(monkeypatch, tmp_path, trained):
    """Run infer_mdt.py or visualize.py. Returns the pixels of its picture (of every frame)."""

    def run(*flags, path=INFER, out="picture.png"):
        mode = [] if path == INFER else [flags[0]]
        rest = flags if path == INFER else flags[1:]
        steps = [] if {"--num_sampling_steps", "relative_bias"} & set(map(str, flags)) else ["--num_sampling_steps", 4]
        arguments = [*mode, "--model_path", trained, "--out", tmp_path / out, *steps, *rest]
        assert call(monkeypatch, path, tmp_path, *arguments) == 0
        with Image.open(tmp_path / out) as picture:
            frames = []
            for frame in range(getattr(picture, "n_frames", 1)):
                picture.seek(frame)
                frames.append(np.asarray(picture.convert("RGB")).astype(int))
        return frames[0] if len(frames) == 1 else frames

    return run


@pytest.fixture
def refused(monkeypatch, tmp_path, trained, capsys):
    def run(*flags, path=INFER):
        out = [] if "--out" in flags else ["--out", tmp_path / "refused.png"]
        mode, rest = ([], flags) if path == INFER else ([flags[0]], flags[1:])
        assert call(monkeypatch, path, tmp_path, *mode, "--model_path", trained, *out, *rest) == 2
        assert not (tmp_path / "refused.png").exists()
        return capsys.readouterr().err.split("error: ")[1]

    return run


def tiles(picture, rows, columns):
    """Tiles of a table, right of its names: (rows, columns, 64, 64, 3)."""
    left = picture.shape[1] - columns * (TILE + GAP) - GAP
    top = picture.shape[0] - rows * (TILE + GAP) - GAP
    step = TILE + GAP
    return np.array(
        [
            [picture[top + GAP + r * step :, left + GAP + c * step :][:TILE, :TILE] for c in range(columns)]
            for r in range(rows)
        ]
    )


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_rows_of_a_sweep_are_what_its_values_draw_alone(draw):
    swept = tiles(draw("--sweep", "cfg_scale=1,8", "--labels", "3,5"), 2, 2)
    for row, scale in enumerate(("1", "8")):
        alone = tiles(draw("--cfg_scale", scale, "--labels", "3,5"), 1, 2)
        assert np.array_equal(swept[row], alone[0])
    assert not np.array_equal(swept[0], swept[1])


def test_a_sweep_over_labels_has_the_same_noise_in_every_row(draw):
    swept = tiles(draw("--sweep", "labels=3,5,3"), 3, 3)
    assert np.array_equal(swept[0], swept[2]) and not np.array_equal(swept[0], swept[1])
    assert not np.array_equal(swept[0, 0], swept[0, 1])


@pytest.mark.parametrize(
    "sweep",
    [
        "scale_pow=1,9",
        "cfg_skip_tol=0,99",
        "guidance=power_cosine,constant",
        "sampler=ddpm,unipc",
        "seed=0,1",
        "num_sampling_steps=2,4",
        "cfg_scale=2,8",
        "guide_from=null_label,masked",
        "guide_from=masked,routed --guide_strong_ratio 0.2",
    ],
)
def test_settings_can_be_swept_over_and_change_the_samples(draw, sweep):
    first, second = tiles(draw("--sweep", *sweep.split(), "--labels", "1,2", "--cfg_scale", "8"), 2, 2)
    assert not np.array_equal(first, second)


def test_each_row_of_a_sweep_over_kinds_of_guidance_has_the_settings_of_its_kind(draw, trained):
    """Here the weaker model is the model itself, which leaves nothing to guide."""
    common = ["--labels", "1,2", "--cfg_scale", "8", "--guidance", "constant"]
    settings = ["--guide_path", trained, "--guide_ratio", "0.6"]
    swept = tiles(draw("--sweep", "guide_from=null_label,checkpoint,masked", *settings, *common), 3, 2)
    alone = ["--sweep", "cfg_scale=8,1", "--guide_from", "masked", "--guide_ratio", "0.6", *common]
    masked, unguided = tiles(draw(*alone), 2, 2)
    assert np.array_equal(swept[2], masked)
    assert np.abs(swept[1] - unguided).max() <= 1 and np.abs(swept[0] - unguided).max() > 1


def test_an_interval_can_be_swept_over(draw):
    picture = draw("--sweep", "cfg_interval=0-10,0-999", "--guidance", "interval", "--labels", "1", "--cfg_scale", "8")
    assert not np.array_equal(*tiles(picture, 2, 1))


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("temperature=1,2", "'temperature' cannot be swept over; choose one of labels, num_sampling_steps"),
        ("guide_from=null_label,best", "--guide_from best: unknown; choose one of null_label"),
        ("guide_from=null_label,checkpoint", "--guide_from checkpoint and --guide_path: give both, or none"),
        ("guide_from=null_label,path_drop", "is trained without dropping paths"),
        ("cfg_scale", "give the values"),
        ("cfg_scale= ,", "give the values"),
        ("sampler=ddim,rk4", "--sampler rk4: unknown"),
        ("labels=3,10", "--labels 10: no class of this name; here numbers are names"),
        ("num_sampling_steps=4,5000", "--num_sampling_steps 5000: the process has 1000"),
    ],
)
def test_sweeps_of_nonsense_are_refused(refused, text, sentence):
    assert sentence in refused("--sweep", text)


def test_a_setting_that_no_row_of_a_sweep_has_is_refused(refused):
    said = refused("--sweep", "guide_from=null_label,masked", "--guide_strong_ratio", "0.1")
    assert said.startswith("--guide_strong_ratio: no row of --sweep guide_from=null_label,masked has a use for it")


@pytest.mark.parametrize(
    "flags, why",
    [
        (["inpaint_mode=side,plain"], "it needs --image and --mask"),
        (["cfg_interval=0-10,5-9"], "it needs --guidance interval"),
        (["scale_pow=1,4", "--guidance", "constant"], "it needs --guidance power_cosine"),
        (["cfg_channels=3,4"], "there are no more than 3 channels to guide"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_sweep_whose_rows_would_be_equal_is_refused(refused, flags, why):
    assert refused("--sweep", *flags).strip() == f"--sweep {flags[0]}: all rows would be equal, because {why}"


def test_a_model_without_classes_has_no_guidance_to_sweep_over(monkeypatch, models, tmp_path, capsys):
    path, out = models("--class_cond", "False"), tmp_path / "picture.png"
    common = ["--model_path", path, "--out", out, "--num_sampling_steps", 2]
    assert call(monkeypatch, INFER, tmp_path, *common, "--sweep", "cfg_scale=1,4") == 2
    assert "trained without classes and cannot be guided" in capsys.readouterr().err and not out.exists()
    assert call(monkeypatch, INFER, tmp_path, *common, "--cfg_scale", "4") == 0
    assert "warning: --cfg_scale is ignored here, because the model was" in capsys.readouterr().err


def test_a_sweep_is_a_setting_and_its_values():
    assert parse_sweep("a=1, 2,,x-y", ("a", "b")) == ("a", ["1", "2", "x-y"])


# -- the denoising -----------------------------------------------------------------------------------------------------


def test_a_strip_goes_from_noise_to_the_picture(draw):
    strip = tiles(draw("--frames", 4, "--labels", "3,5"), 2, 4)
    finished = tiles(draw("--labels", "3,5"), 1, 2)[0]
    assert np.array_equal(strip[:, -1], finished)
    distances = np.abs(strip - strip[:, -1:]).mean(axis=(2, 3, 4))
    assert (np.diff(distances[:, 1:], axis=1) < 0).all() and (distances[:, 0] > 30).all()


def test_a_strip_names_the_step_of_each_state(draw):
    strip = draw("--frames", 4, "--labels", "3,5", "--num_sampling_steps", "10")
    left, top = strip.shape[1] - 4 * (TILE + GAP) - GAP, strip.shape[0] - 2 * (TILE + GAP) - GAP
    images = np.zeros((1, 4, TILE, TILE, 3), dtype=np.uint8)
    expected = np.asarray(table(images, ["3"], [f"step {number}" for number in (1, 4, 7, 10)])).astype(int)
    assert np.array_equal(strip[:top, left:], expected[:top, -(4 * (TILE + GAP) + GAP) :])


def test_the_name_of_the_longest_step_is_no_wider_than_the_smallest_tile():
    assert ImageFont.load_default(TEXT_SIZE).getlength("step 1000") <= LEGIBLE_SIDE


def test_no_state_is_shown_twice(draw):
    assert draw("--frames", 9, "--labels", "3").shape[1] < 5 * (TILE + GAP)  # of four steps


def test_a_gif_shows_the_denoising_and_rests_on_the_picture(draw, tmp_path):
    frames = draw("--labels", "3,5", "--num_sampling_steps", "8", "--frames", "5", out="denoising.gif")
    assert len(frames) == 5
    finished = draw("--labels", "3,5", "--num_sampling_steps", "8")
    assert np.abs(frames[-1] - finished).mean() < 4  # a GIF has 256 colours
    assert np.abs(frames[0] - finished).mean() > 10
    with Image.open(tmp_path / "denoising.gif") as picture:
        assert picture.format == "GIF" and picture.info["loop"] == 0


def test_a_sweep_can_be_animated(draw):
    assert len(draw("--sweep", "cfg_scale=1,8", "--labels", "3", "--frames", "3", out="sweep.gif")) == 3


@pytest.mark.parametrize(
    "frames, out, swept, expected", [(0, "a.png", True, 1), (0, "a.gif", False, 25), (7, "a.jpg", False, 7)]
)
def test_how_many_states_are_shown(tmp_path, frames, out, swept, expected):
    assert num_frames(frames, tmp_path / out, swept) == expected


def test_impossible_numbers_of_states_are_refused(refused):
    assert "--frames -1: must not be negative" in refused("--frames", "-1")
    assert "only an animation has room for both" in refused("--frames", "3", "--sweep", "seed=1,2")


class Numbers:
    """In place of an ImageSampler: images of the sample's number, or of its label."""

    def trajectory(self, indices, labels, frames, inpainting):
        levels = np.array([10 * index + label for index, label in zip(indices, labels, strict=True)], dtype=np.uint8)
        return np.broadcast_to(levels[None, :, None, None, None], (frames, len(levels), 2, 2, 3))


def test_a_row_is_drawn_in_batches_and_pastes_its_photo():
    labels = [i % 3 for i in range(25)]
    row = Row("", Numbers(), labels, photo=Photo(np.full((2, 2, 3), 255, np.uint8), np.array([[1, 0], [0, 0]]) > 0))
    images = row.trajectory(2)
    assert images.shape == (2, 25, 2, 2, 3)
    assert images[1, :, 0, 0, 0].tolist() == [10 * i + label for i, label in enumerate(labels)]
    assert (images[:, :, 1] == 255).all()


# -- inpainting from the command line ----------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path):
    """Paths of a photo and a mask of its right half."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(np.where(np.arange(8) >= 4, 255, 0).astype(np.uint8)[None].repeat(8, axis=0)).save(
        tmp_path / "mask.png"
    )
    return tmp_path / "photo.png", tmp_path / "mask.png"


def test_a_photo_is_filled_where_the_mask_is_white(draw, photo):
    filled = tiles(draw("--image", photo[0], "--mask", photo[1], "--labels", "3,5"), 1, 2)[0]
    original = np.asarray(Image.open(photo[0]).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.array_equal(filled[0][:, :16], original[:, :16])  # away from the border, which bicubic enlarging blurs
    assert np.array_equal(filled[0][:, :16], filled[1][:, :16])
    assert not np.array_equal(filled[0][:, 48:], filled[1][:, 48:])


def test_the_ways_of_inpainting_can_be_compared_in_one_picture(draw, photo, capsys):
    picture = draw("--image", photo[0], "--mask", photo[1], "--labels", "3", "--sweep", "inpaint_mode=side,plain")
    assert "per image: 14 of inpaint_mode side, 7 of inpaint_mode plain\n" in capsys.readouterr().err
    assert not np.array_equal(*tiles(picture, 2, 1))


@pytest.mark.parametrize("flag", ["--image", "--mask"])
def test_a_photo_without_a_mask_is_refused(refused, photo, flag):
    assert "--image and --mask: give both" in refused(flag, photo[0])


def test_what_inpainting_refuses_is_said_before_the_work(refused, photo, tmp_path):
    Image.new("L", (9, 8), "white").save(tmp_path / "other.png")
    Image.new("L", (8, 8), "black").save(tmp_path / "black.png")
    assert "it is 9 x 8 pixels, the image is 8 x 8" in refused("--image", photo[0], "--mask", tmp_path / "other.png")
    assert "nothing to fill" in refused("--image", photo[0], "--mask", tmp_path / "black.png")
    assert "--inpaint_mode half: unknown" in refused(
        "--image", *photo[:1], "--mask", photo[1], "--inpaint_mode", "half"
    )


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--inpaint_mode", "plain"], "inpaint_mode"),
        (["--guidance", "constant", "--scale_pow", "2"], "scale_pow"),
        (["--cfg_interval", "1-2"], "cfg_interval"),
        (["--sweep", "seed=1,2", "--seed", "3"], "seed"),
    ],
)
def test_a_setting_without_effect_warns(draw, capsys, flags, name):
    draw("--labels", "1", *flags)
    assert f"warning: --{name} is ignored here" in capsys.readouterr().err


def test_the_cost_in_passes_is_said_of_each_row_where_rows_differ(draw, capsys):
    draw("--labels", "1", "--guidance", "constant", "--cfg_scale", "3")
    assert "cost: 8 passes of the model per image\n" in capsys.readouterr().err
    draw("--labels", "1", "--guidance", "constant", "--sweep", "cfg_scale=1,3")
    assert "cost in passes of the model per image: 4 of cfg_scale 1, 8 of cfg_scale 3\n" in capsys.readouterr().err


@pytest.mark.parametrize("path, mode", [(INFER, []), (LOOK, ["relative_bias"])])
def test_another_picture_of_the_name_is_moved_aside_and_the_same_one_stays(draw, tmp_path, capsys, path, mode):
    (tmp_path / "picture.png").write_bytes(b"drawn before")
    flags = [*mode, *(["--labels", "1"] if path == INFER else [])]
    draw(*flags, path=path)
    assert "another picture of this name was moved aside: picture_1.png" in capsys.readouterr().err
    draw(*flags, path=path)
    assert "moved aside" not in capsys.readouterr().err
    assert {file.name for file in tmp_path.glob("*.png")} == {"picture.png", "picture_1.png"}
    assert (tmp_path / "picture_1.png").read_bytes() == b"drawn before"


# -- looking into a model ----------------------------------------------------------------------------------------------


def test_the_bias_of_a_token_above_is_drawn_above_the_middle(tmp_path):
    side = 5  # of a grid of 3 x 3 tokens
    values = torch.zeros(side**2 + 3, 2)
    # The one that looks stands one row below the one it looks at: row offset 1, column offset 0.
    values[(1 + 2) * side + (0 + 2), 1] = 2.0
    values[-1] = 9.0  # one of the unused rows
    picture, limit = relative_bias({f"blocks.0{BIAS_TABLE}": values, "other": torch.ones(1)}, tmp_path)
    assert limit == 2.0
    second = np.asarray(picture)[:, -(65 + GAP) : -GAP][-(65 + GAP) : -GAP]  # tiles of 5 x 13 pixels
    assert second[13 + 6, 26 + 6].tolist() == [178, 24, 43]
    assert second[39 + 6, 26 + 6].tolist() == [255, 255, 255]


V2 = ["--model", "MDTv2_Ti_2"]
V2_BLOCKS = ("en_inblocks.0", "en_outblocks.0", "de_blocks.0", "de_blocks.1", "sideblocks.0")


def test_position_biases_are_drawn_for_every_block_and_head(draw, capsys):
    picture = draw("relative_bias", path=LOOK)
    assert (picture != 255).any()
    assert picture.shape[0] > 5 * 64 and picture.shape[1] > 4 * 64
    assert "white is 0, full red" in capsys.readouterr().out


def test_the_biases_of_version_2_are_drawn_in_the_order_of_its_blocks(draw, models):
    path = models(*V2)
    state = torch.load(path, weights_only=True)
    assert tuple(name.removesuffix(BIAS_TABLE) for name in state if name.endswith(BIAS_TABLE)) == V2_BLOCKS
    picture = draw("relative_bias", "--model_path", path, path=LOOK)
    assert picture.shape[0] > 5 * 64 and np.array_equal(picture, np.asarray(relative_bias(state, path)[0]))


@pytest.mark.parametrize("flags", [[], V2], ids=["MDT", "MDTv2"])
def test_a_reconstruction_has_four_rows_and_keeps_what_was_not_masked(draw, models, flags):
    path, common = models(*flags), ["--data_dir", "builtin:digits", "--num_images", 3]
    picture = draw("reconstruction", "--model_path", path, *common, "--mask_ratio", 0.5, path=LOOK)
    image, masked, side, plain = tiles(picture, 4, 3)
    assert not np.array_equal(side, plain) and not np.array_equal(image, masked)
    shares = (masked == 128).all(axis=-1).mean(axis=(1, 2))
    assert (shares > 0.05).all()  # bicubic enlarging blurs the borders of single tokens
    untouched = np.abs(masked - image).max(axis=-1) == 0
    assert np.abs(side - image)[untouched].mean() < np.abs(side - image)[~untouched].mean() / 4


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--data_dir", "builtin:digits-test"),
        ("--num_images", 3),
        ("--mask_ratio", 0.6),
        ("--seed", 1),
        ("--sampler", "ddpm"),
        ("--num_sampling_steps", 3),
    ],
)
def test_every_setting_of_a_reconstruction_changes_it(draw, flag, value):
    common = ["reconstruction", "--data_dir", "builtin:digits", "--num_images", 2, "--num_sampling_steps", 2]
    assert not np.array_equal(draw(*common, path=LOOK), draw(*common, flag, value, path=LOOK))


def test_a_file_without_a_record_is_looked_into_by_flags(draw, trained, tmp_path, refused, capsys):
    """The model's flags and the autoencoder's, which have a meaning only there."""
    alone = tmp_path / "alone.pt"
    alone.write_bytes(trained.read_bytes())
    common = ["reconstruction", "--model_path", alone, "--data_dir", "builtin:digits", "--vae_path", "none"]
    common += ["--num_images", 2]
    assert "--model MDT_S_2: the weights in" in refused(*common, "--model", "MDT_S_2", path=LOOK)
    assert "--image_size 16: the weights in" in refused(*common, "--image_size", "16", path=LOOK)
    pictures = [draw(*common, "--decode_layer", layers, path=LOOK) for layers in (1, 2)]
    assert not np.array_equal(*pictures)
    capsys.readouterr()
    draw(*common, "--vae_decoder", "ema", path=LOOK)
    assert "warning: --vae_decoder ema is ignored: the first stage is none" in capsys.readouterr().err


def test_the_decoder_of_the_hub_can_be_chosen(refused, trained, tmp_path, monkeypatch):
    """Without the hub: the one that is asked for is named."""
    state = create_model("MDT_Ti_2", input_size=4, num_classes=4, mask_ratio=0.3).state_dict()
    torch.save(state, tmp_path / "latents.pt")
    asked = []

    def no_hub(vae_path, *others):
        asked.append(vae_path)
        raise FileNotFoundError(f"--vae_path {vae_path}")

    monkeypatch.setattr("masked_diffusion.runs.trained.load_first_stage", no_hub)
    flags = ["reconstruction", "--model_path", tmp_path / "latents.pt", "--data_dir", "builtin:digits"]
    for more in ([], ["--vae_decoder", "ema"]):
        refused(*flags, *more, path=LOOK)
    assert asked == ["stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"]


@pytest.mark.parametrize("mode", ["relative_bias", "reconstruction"])
def test_a_dit_has_nothing_to_look_into(refused, models, mode):
    flags = [mode, "--model_path", models("--model", "DiT_Ti_2")]
    if mode == "reconstruction":
        text = refused(*flags, "--data_dir", "builtin:digits", path=LOOK)
        assert (
            "DiT_Ti_2 has no side-interpolater under --policy none; give an MDT or MDTv2 that was trained with" in text
        )
    else:
        assert "this model has no relative-position biases; give an MDT's or MDTv2's file" in refused(*flags, path=LOOK)


def test_a_model_trained_without_masking_has_nothing_to_reconstruct_with(refused, models):
    flags = ["reconstruction", "--model_path", models("--mask_ratio", "None"), "--data_dir", "builtin:digits"]
    # The weights of this test are random, the mask token's, too: it is the record that tells.
    assert "this model was trained without masking, so its side-interpolater has" in refused(*flags, path=LOOK)


def test_latents_are_refused_with_the_images_they_were_made_of(monkeypatch, refused, tiny_vae, colour_folder, tmp_path):
    flags = ["--data_dir", colour_folder, "--out", tmp_path / "latents", "--vae_path", tiny_vae, "--image_size", 32]
    assert call(monkeypatch, "scripts/encode_latents.py", tmp_path, *flags, "--device", "cpu") == 0
    text = refused("reconstruction", "--data_dir", tmp_path / "latents", path=LOOK)
    assert text.strip() == (
        f"--data_dir {tmp_path / 'latents'}: holds latents; give the images they were made of ({colour_folder})"
    )


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["reconstruction"], "--data_dir: give the folder"),
        (["reconstruction", "--data_dir", "builtin:digits", "--num_images", "0"], "--num_images 0: must be at least 1"),
        (["reconstruction", "--data_dir", "builtin:digits", "--mask_ratio", "1"], "mask_ratio 1.0: must be in [0, 1)"),
        (["relative_bias", "--model_path", ""], "--model_path: give the checkpoint to look into"),
        (["relative_bias", "--out", "a.gif"], "pictures are written as .png or .jpg; change the name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_looking_refuses(refused, flags, sentence):
    assert sentence in refused(*flags, path=LOOK)


def test_classes_in_the_other_form_of_unicode_are_the_same_classes(draw, trained, colour_folder, tmp_path):
    names = [unicodedata.normalize("NFC", name) for name in ("café", "crème", "thé")]
    for name, colour in zip(names, ("red", "green", "blue"), strict=True):
        shutil.copytree(colour_folder / colour, tmp_path / "data" / unicodedata.normalize("NFD", name))
    model = tmp_path / "model" / trained.name
    flags = ["--data_dir", tmp_path / "data", "--max_steps", 1]
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, TRAIN, model.parent, *TINY_DIGITS, *flags) == 0
    text = (model.parent / "config.json").read_text(encoding="utf-8")
    config = json.loads(text) | {"class_names": names}
    assert config["class_names"] != json.loads(text)["class_names"]
    (model.parent / "config.json").write_text(json.dumps(config))
    look = ["--model_path", model, "--num_images", 1, "--num_sampling_steps", 1]
    draw("reconstruction", *look, "--data_dir", tmp_path / "data", path=LOOK)
    with pytest.MonkeyPatch.context() as patch:  # so does a resumed run
        assert call(patch, TRAIN, model.parent, *TINY_DIGITS, *flags, "--max_steps", 2) == 0


def test_data_of_other_classes_is_refused(refused, colour_folder):
    assert "has other classes than" in refused("reconstruction", "--data_dir", colour_folder, path=LOOK)


def test_a_model_without_biases_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no relative-position biases"):
        relative_bias({"weight": torch.ones(1)}, tmp_path)


def test_flags_that_relative_bias_does_not_use_warn(draw, capsys):
    draw("relative_bias", "--seed", "3", path=LOOK)
    assert "warning: --seed is ignored with relative_bias" in capsys.readouterr().err


def test_every_flag_of_visualize_has_help():
    for action in script(LOOK).create_argparser()._actions:
        assert action.help and not action.help.startswith("(default"), action.dest
