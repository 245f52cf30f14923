"""The demo without its page: what it draws, the command beside it, and the files it makes. Its page: tests/e2e."""

import json
import shlex
import socket
import sys

import numpy as np
import pytest
from PIL import Image
from support import call, free_port, model_of, script

from masked_diffusion.programs.demo import InferStudio, told_apart
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import open_trained
from masked_diffusion.sampling.demo_page import DONE, Setting, Sketchbook, Wish, for_editor, labels_of
from masked_diffusion.sampling.image_sampler import ImageSampler

DEMO, INFER = "scripts/demo.py", "infer_mdt.py"


@pytest.fixture(scope="module")
def path(module_folder):
    return model_of(module_folder("demo") / "run")


@pytest.fixture(scope="module")
def studio(path):
    trained = open_trained(path, Request(), "cpu", warn=pytest.fail)
    return InferStudio(trained, {"device": "cpu"}, "cpu", script(DEMO).plan)


@pytest.fixture
def sketchbook(studio, tmp_path):
    return Sketchbook(studio, tmp_path)


def setting(**changes):
    fields = {"sampler": "ddim", "num_sampling_steps": 4, "guide_from": "null_label", "guidance": "constant"}
    return Setting(**{**fields, "cfg_scale": 2.0, **changes})


def photo_of(sketchbook):
    """A photo with its left half painted."""
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8))
    layer = np.zeros((256, 256, 4), dtype=np.uint8)
    layer[:, :128] = 255
    return sketchbook.photo(for_editor(image), [Image.fromarray(layer)])


@pytest.mark.parametrize("inpainted", [False, True], ids=["drawn", "filled"])
@pytest.mark.parametrize("guide_from", ["null_label", "masked"])
def test_the_command_beside_a_picture_draws_it_to_the_byte(sketchbook, studio, monkeypatch, inpainted, guide_from):
    chosen = setting(guide_from=guide_from)
    photo = photo_of(sketchbook) if inpainted else None
    wish = Wish([3, 5, 7, 3, 5, 7, 3, 5, 7, 1], seed=4, photo=photo, inpaint_mode="side" if inpainted else "plain")
    *_, last = sketchbook.draw([chosen], wish)
    python, program, *flags = shlex.split(studio.command(chosen, wish))
    out = last.files[0].with_name("by_command.png")
    assert (python, program, flags[-1]) == ("python", INFER, "picture.png")
    assert call(monkeypatch, INFER, out.parent, *flags[:-1], out) == 0
    assert last.text == DONE and out.read_bytes() == last.files[0].read_bytes()


def test_the_states_are_shown_on_the_way_under_names_of_their_own(sketchbook):
    shown = list(sketchbook.draw([setting()], Wish([1, 2], 0)))
    assert [s.text for s in shown] == [f"Step {n} of 4" for n in (1, 2, 3, 4)] + [DONE]
    files = [s.files[0] for s in shown]
    assert len(set(files)) == 4 and files[3] == files[4]
    pictures = [np.asarray(Image.open(file)).astype(int) for file in files[:4]]
    assert all(abs(a - b).max() > 0 for a, b in zip(pictures, pictures[1:], strict=False))


def test_two_settings_start_from_the_same_noise_and_one_weight_of_1_is_no_guidance(sketchbook):
    *_, last = sketchbook.draw([setting(cfg_scale=1.0), setting(cfg_scale=1.0, guide_from="masked")], Wish([4, 4], 1))
    assert len(last.files) == 2 and last.files[0].read_bytes() == last.files[1].read_bytes()
    *_, other = sketchbook.draw([setting(cfg_scale=1.0), setting(cfg_scale=5.0)], Wish([4, 4], 1))
    assert other.files[0].read_bytes() == last.files[0].read_bytes() != other.files[1].read_bytes()


def test_a_kept_picture_says_how_it_was_made_and_has_the_same_pixels(sketchbook, studio, path):
    wish = Wish([2], seed=9)
    *_, last = sketchbook.draw([setting()], wish)
    copy = sketchbook.with_manifest(last.files[0], setting(), wish)
    with Image.open(copy) as picture, Image.open(last.files[0]) as shown:
        manifest = json.loads(picture.text["masked_diffusion"])
        assert np.array_equal(np.asarray(picture), np.asarray(shown))
    assert manifest["command"] == studio.command(setting(), wish) and manifest["seed"] == 9
    assert manifest["weights"]["file"] == path.name and len(manifest["weights"]["sha256"]) == 64


def test_an_image_comes_back_from_the_editor_as_it_went_in(sketchbook):
    with Image.open(photo_of(sketchbook)[0]) as image:
        assert image.size == (256, 256)
        pixels = np.asarray(image)[::32, ::32]
    assert np.array_equal(pixels, np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8))


def test_what_cannot_be_filled_is_refused(sketchbook):
    image, clear = Image.new("RGB", (64, 64)), Image.new("RGBA", (64, 64))
    assert sketchbook.photo(None, [clear]) is None
    with pytest.raises(ValueError, match="nothing is painted"):
        sketchbook.photo(image, [clear])
    with pytest.raises(ValueError, match="give one of at most 4096"):
        sketchbook.photo(Image.new("1", (5000, 2)), [])


def test_classes_are_drawn_in_turn():
    classes = ["zero", "one", "two"]
    assert labels_of(["two", "zero"], 5, classes) == [2, 0, 2, 0, 2]
    assert labels_of([], 4, classes) == [0, 1, 2, 0] and labels_of([], 2, []) == [0, 0]


def test_the_choices_are_what_the_model_can_do(studio):
    choices = studio.choices
    assert choices.guides == ["null_label", "masked", "routed"] and choices.modes == ["side", "plain"]
    assert "ddpm" in choices.samplers and "euler" not in choices.samplers
    assert len(choices.classes) == 10 and choices.usual.cfg_scale == 4.0 and choices.usual.num_sampling_steps == 50


def test_a_stopped_request_ends_before_its_next_step(sketchbook, monkeypatch):
    finished = []
    pixels = ImageSampler.pixels
    monkeypatch.setattr(ImageSampler, "pixels", lambda *a: finished.append(1) or pixels(*a))
    request = sketchbook.draw([setting(num_sampling_steps=8)], Wish([1], 0))
    next(request), next(request)
    request.close()
    assert len(finished) == 2


def test_without_gradio_or_with_a_taken_port_one_sentence_says_what_to_do(monkeypatch, tmp_path, path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server, monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gradio", type(sys)("gradio"))
        port = server.getsockname()[1]
        assert call(patch, DEMO, tmp_path, "--model_path", path, "--port", port) == 2
    assert f"--port {port}: Address already in use; give another" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert call(monkeypatch, DEMO, tmp_path, "--model_path", path, "--port", free_port()) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


def test_classes_of_one_name_can_be_told_apart():
    names = told_apart(["crane", "cat", "crane"])
    assert names == ["crane (0)", "cat", "crane (2)"] and labels_of(["crane (2)"], 1, names) == [2]


def test_nobody_can_guess_the_name_of_anothers_file(sketchbook):
    names = [path.stem.partition("_")[2] for path in (*photo_of(sketchbook), *photo_of(sketchbook))]
    assert len(set(names)) == 4 and all(len(name) == 32 for name in names)
