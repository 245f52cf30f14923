"""What weights show of their model, whatever is around them, and how they are made to fit another one."""

import argparse
import dataclasses

import pytest
import torch
from golden_arrays import set_golden_weights
from safetensors.torch import save_file

from masked_diffusion.models import MODELS, create_model
from masked_diffusion.runs.checkpoint import LABEL_TABLE, load_weights, read_weights
from masked_diffusion.runs.weights import Recognised, fit_channels, fit_labels, fit_positions, freeze, recognise

FAMILIES = ["MDT_Ti_2", "MDTv2_Ti_2", "DiT_Ti_2", "SiT_Ti_2"]


def tiny(name="MDT_Ti_2", **kwargs):
    kwargs = {"input_size": 8, "num_classes": 5, "decode_layer": 2, **kwargs}
    return set_golden_weights(create_model(name, **kwargs)).eval()


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("SiT")])
def test_every_model_is_recognised_by_its_weights(name):
    kwargs = {"input_size": 32, "in_channels": 3, "num_classes": 12, "learn_sigma": False}
    with torch.device("meta"):
        state = create_model(name, decode_layer=2, **kwargs).state_dict()
    decode_layer = 2 if name.startswith("MDTv2") else None
    assert recognise(state, "file") == Recognised(name, decode_layer=decode_layer, **kwargs)


@pytest.mark.parametrize("rest", ["_XL_2", "_S_8", "_Ti_2"])
def test_the_weights_of_a_sit_are_a_dits_unless_they_are_named(rest):
    with torch.device("meta"):
        states = [create_model(f"{family}{rest}", num_classes=7).state_dict() for family in ("DiT", "SiT")]
    shown = [recognise(state, "file") for state in states]
    assert shown[0] == shown[1] and shown[1].model == f"DiT{rest}" and shown[1].twin == f"SiT{rest}"
    named = shown[1].named(f"SiT{rest}")
    assert named == dataclasses.replace(shown[1], model=f"SiT{rest}", learn_sigma=False) and named.twin is None
    assert all(shown[1].named(other) == shown[1] for other in (None, f"DiT{rest}", "MDT_S_2"))


def test_a_dit_without_a_variance_has_no_twin():
    assert recognise(tiny("DiT_Ti_2", learn_sigma=False).state_dict(), "file").twin is None
    assert recognise(tiny("MDT_Ti_2").state_dict(), "file").twin is None


def test_the_published_files_are_recognised():
    for name, size in (("MDT_XL_2", 256), ("MDTv2_XL_2", 256), ("DiT_XL_2", 256), ("DiT_XL_2", 512)):
        with torch.device("meta"):
            state = create_model(name, input_size=size // 8).state_dict()
        decode_layer = 4 if name.startswith("MDTv2") else None
        assert recognise(state, "file") == Recognised(name, size // 8, 4, 1000, True, decode_layer)


def test_weights_of_no_known_size_are_refused_with_the_known_ones():
    state = tiny("DiT_Ti_2").state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("blocks.3")}
    with pytest.raises(
        ValueError, match="3 blocks of width 128 on patches of 2 are no size of DiT; known are DiT_XL_2"
    ):
        recognise(state, "file")


def test_wrapped_prefixed_and_halved_files_load_as_the_plain_one(tmp_path):
    model = tiny()
    state = {
        name: value.bfloat16().float() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
    other = {name: value + 1 for name, value in state.items()}
    args = argparse.Namespace(model="DiT-XL/2", lr=1e-4)
    files = {
        "plain.pt": state,
        "half.pt": half,
        "ddp.pt": {f"module.{name}": value for name, value in state.items()},
        "compiled.pt": {f"module._orig_mod.{name}": value for name, value in state.items()},
        "training.pt": {"model": other, "ema": state, "opt": {"state": {}}, "args": args},
        "lightning.pt": {"state_dict": state, "epoch": 3},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    save_file(half, tmp_path / "half.safetensors")
    for path in tmp_path.iterdir():
        read = read_weights(path)
        assert list(read) == list(state) or path.suffix == ".safetensors", path.name  # which sorts them
        assert all(value.dtype != torch.bfloat16 for value in read.values())
        load_weights(model, read, path)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), path.name


# -- another resolution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [16, 4])
def test_another_resolution_is_refused_unless_the_positions_are_to_be_resized(name, size):
    state, model, warnings = tiny(name).state_dict(), tiny(name, input_size=size), []
    with pytest.raises(ValueError, match=f"4 x 4 tokens, this model has {size // 2} x {size // 2}; give the --image_s"):
        fit_positions(state, model, "file", False, pytest.fail)
    load_weights(model, fit_positions(state, model, "file", True, warnings.append), "file")
    assert len(warnings) == 1 and "resized" in warnings[0]
    assert model(torch.randn(1, 4, size, size), torch.tensor([3]), torch.tensor([0])).isfinite().all()
    unchanged = [n for n in state if "pos" not in n]
    assert unchanged and all(torch.equal(model.state_dict()[n], state[n]) for n in unchanged)


def test_resized_tables_keep_the_place_of_what_they_describe():
    model, large = tiny(), tiny(input_size=16)
    state = model.state_dict()
    rows = torch.arange(4.0).repeat_interleave(4)  # the row of each of 4 x 4 tokens
    state["pos_embed"] = rows[None, :, None].expand(1, 16, 128).clone()
    name = "blocks.0.attn.rel_pos_bias.relative_position_bias_table"
    offsets = torch.arange(-3.0, 4).repeat_interleave(7)  # the row offset of each of 7 x 7
    state[name] = torch.cat([offsets, torch.tensor([7.0, 8, 9])])[:, None].expand(52, 4).clone()
    resized = fit_positions(state, large, "file", True, lambda text: None)
    grid = resized["pos_embed"][0, :, 0].view(8, 8)
    # Twice as many tokens: their middles lie at quarters of the old ones.
    torch.testing.assert_close(grid[2:6, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]), atol=0.1, rtol=0)
    assert torch.equal(grid, grid[:, :1].expand(8, 8))
    table = resized[name][:-3, 0].view(15, 15)
    assert table[[0, 7, 14], 3].tolist() == pytest.approx([-3, 0, 3], abs=1e-5)
    torch.testing.assert_close(table, -table.flip(0))
    assert resized[name][-3:, 0].tolist() == [7, 8, 9]


def test_the_same_resolution_is_left_as_it_is():
    state = tiny().state_dict()
    assert fit_positions(state, tiny(), "file", True, pytest.fail) is state


# -- other classes -----------------------------------------------------------------------------------------------------


def labels_after(former_names, names, former_rows=None, warnings=None):
    state = tiny(num_classes=former_rows or len(former_names)).state_dict()
    model = create_model("MDT_Ti_2", input_size=8, num_classes=len(names))
    report = pytest.fail if warnings is None else warnings.append
    fitted = fit_labels(state, model, "file", former_names, names, report)
    return state[LABEL_TABLE], fitted[LABEL_TABLE], model.y_embedder.embedding_table.weight


def test_label_rows_follow_the_class_names_and_the_null_row_stays():
    warnings = []
    old, new, fresh = labels_after(["cat", "dog", "owl"], ["bee", "Dog", "cat", "yak"], warnings=warnings)
    assert torch.equal(new[[2, 1, 4]], old[[0, 1, 3]])
    assert torch.equal(new[[0, 3]], fresh[[0, 3]])
    assert warnings == ["label table: 2 of 4 classes are known to file by name (Dog, cat); the others start anew, the "
                        "null class is kept"]  # fmt: skip


def test_as_many_classes_of_other_names_are_not_taken_for_the_same():
    old, new, fresh = labels_after(["cat", "dog"], ["dog", "owl"], warnings=[])
    assert torch.equal(new[[0, 2]], old[[1, 2]]) and torch.equal(new[1], fresh[1])


def test_the_same_names_or_as_many_rows_without_names_are_taken_as_they_are():
    for former, names in ((["cat", "dog"], ["cat", "dog"]), ([], ["cat", "dog"])):
        old, new, _ = labels_after(former, names, former_rows=2)
        assert new is old


def test_the_1000_classes_of_a_file_without_names_are_those_of_imagenet():
    old, new, fresh = labels_after([], ["n01443537", "otter", "no animal"], former_rows=1000, warnings=[])
    assert torch.equal(new[[0, 1, 3]], old[[1, 360, 1000]]) and torch.equal(new[2], fresh[2])


# -- freezing ----------------------------------------------------------------------------------------------------------


def test_the_parameters_that_match_are_frozen():
    model = tiny("DiT_Ti_2")
    count = freeze(model, r"^(blocks|x_embedder)\.")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("blocks.", "x_embedder."))} | {
        "pos_embed"
    }
    assert count == sum(p.numel() for n, p in model.named_parameters() if n in frozen - {"pos_embed"})


@pytest.mark.parametrize("pattern, why", [("(", "not a regular"), ("encoder", "matches no"), ("", "matches every")])
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(pattern, why):
    with pytest.raises(ValueError, match=why):
        freeze(tiny(), pattern)


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("name", ["MDT_Ti_2", "MDTv2_Ti_2", "DiT_Ti_2"])
def test_an_image_without_colour_is_to_a_colour_model_what_it_was_to_the_grey_one(name, learn_sigma):
    decoder = {} if name.startswith("DiT") else {"mask_ratio": 0.3, "decode_layer": 2}
    grey, colour, back = (
        create_model(name, input_size=8, in_channels=channels, num_classes=4, learn_sigma=learn_sigma, **decoder).eval()
        for channels in (1, 3, 1)
    )
    set_golden_weights(grey)
    messages = []
    load_weights(colour, fit_channels(grey.state_dict(), colour, "grey.pt", messages.append), "grey.pt")
    image, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([0, 4])
    with torch.no_grad():
        expected, out = grey(image, t, y), colour(image.expand(-1, 3, -1, -1), t, y)
    assert torch.allclose(out, expected.repeat_interleave(3, dim=1), atol=1e-5) and expected.std() > 0.1
    assert len(messages) == 1 and "its input and output channels are repeated" in messages[0]
    load_weights(back, fit_channels(colour.state_dict(), back, "colour.pt", messages.append), "colour.pt")
    for tensor, former in zip(back.state_dict().values(), grey.state_dict().values(), strict=True):
        assert torch.allclose(tensor, former, atol=1e-6)


def test_weights_of_latents_are_neither_grey_nor_colour():
    latents, colour = (create_model("DiT_Ti_2", input_size=8, in_channels=channels) for channels in (4, 3))
    with pytest.raises(
        ValueError, match=r"are of latents of 4 channels, the training is of colour images \(3 channels\)"
    ):
        fit_channels(latents.state_dict(), colour, "latents.pt", pytest.fail)
    state = latents.state_dict()
    assert fit_channels(state, latents, "latents.pt", pytest.fail) is state
