"""Compiled and recomputed blocks: the function stays, and they are what is really run."""

import copy

import numpy as np
import pytest
import torch
from support import TINY_DIGITS, assert_same_weights, call, few_steps, rows, weights

from masked_diffusion.models import create_model
from masked_diffusion.models.block_modes import compile_blocks, recompute_blocks
from masked_diffusion.models.layers import Block

CPU = torch.device("cpu")


def make_model(name="MDT_Ti_2"):
    torch.manual_seed(0)
    model = create_model(name, input_size=8, in_channels=1, num_classes=5, mask_ratio=0.3, decode_layer=2)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def views(model, ratio_noise=0.5):
    """Both views of a step with the same draws, forward and backward: outputs and gradients."""
    generator = torch.Generator().manual_seed(1)
    x, token_noise = (torch.rand(shape, generator=generator) for shape in ((3, 1, 8, 8), (3, 16)))
    t, y, label_noise = torch.tensor([1, 400, 999]), torch.tensor([0, 3, 4]), torch.ones(3)
    masked = {"draw": model.draw(token_noise, ratio_noise)}
    outputs = [model(x, t, y, label_noise=label_noise, **kwargs) for kwargs in ({}, masked)]
    sum(output.square().mean() for output in outputs).backward()
    return [*outputs, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["MDT_Ti_2", "MDTv2_Ti_2"])
@pytest.mark.parametrize("both", [False, True], ids=["compiled", "compiled and recomputed"])
def test_compiled_blocks_compute_the_same(counter, name, both):
    expected = views(make_model(name))
    model = make_model(name)
    if both:
        recompute_blocks(model)
    assert compile_blocks(model, CPU) is None
    begin = counter.frame_count
    for result, wanted in zip(views(model), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-6)
    assert counter.frame_count > begin


def test_both_views_and_guidance_run_compiled_and_no_shape_is_compiled_twice(counter):
    model = make_model()
    compile_blocks(model, CPU)
    begin = counter.frame_count
    views(model)
    after_views = counter.frame_count
    assert begin < after_views <= begin + 3  # one for all blocks, but for layout and number of their tokens
    views(model)
    assert counter.frame_count == after_views
    model.eval()
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([1, 5])
    with torch.no_grad():
        model.forward_with_cfg(x, torch.tensor([9, 9]), y, cfg_scale=2.0)
    assert counter.frame_count > after_views  # without gradients it is another code


def test_the_ratios_of_version_2_do_not_each_compile(counter):
    model = make_model("MDTv2_Ti_2")
    compile_blocks(model, CPU)
    counts = []
    for ratio_noise in (0.0, 0.4, 0.8, 0.99):
        views(model, ratio_noise)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1]


def test_recomputed_blocks_run_twice_in_training_and_once_without_gradients():
    expected = views(make_model())
    model = make_model()
    calls = []
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.norm1.register_forward_hook(lambda *_: calls.append(1))
    recompute_blocks(model)
    for result, wanted in zip(views(model), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)
    assert len(calls) == 2 * (4 + 5)
    calls.clear()
    with torch.no_grad():
        model(torch.rand(1, 1, 8, 8), torch.tensor([9]), torch.tensor([1]))
    assert len(calls) == 4


def test_a_copy_of_a_wrapped_model_runs_its_own_blocks(counter):
    model = make_model()
    recompute_blocks(model)
    compile_blocks(model, CPU)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for result, wanted in zip(views(copied), views(make_model()), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flag", ["--compile", "--grad_checkpointing"])
def test_a_training_is_the_same(monkeypatch, tmp_path, counter, flag):
    for name, flags in (("plain", []), ("wrapped", [flag, "True", "--preview_samples", "2", "--preview_steps", "2"])):
        assert call(monkeypatch, "scripts/image_train.py", tmp_path / name, *TINY_DIGITS, *flags) == 0
    assert (counter.frame_count > 0) == (flag == "--compile")
    assert_same_weights(*(weights(tmp_path / name, 2) for name in ("plain", "wrapped")), atol=1e-5)
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "wrapped"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_where_nothing_can_compile_one_line_says_so_and_training_goes_on(monkeypatch, tmp_path, capsys):
    def cannot(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", cannot)
    flags = ["--compile", "True", "--max_steps", "1"]
    assert call(monkeypatch, "scripts/image_train.py", tmp_path, *TINY_DIGITS, *flags, sinks="stdout") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--compile")]
    assert said == ["--compile True is ignored: this machine cannot compile (no C++ compiler)"]


def test_samples_are_drawn_by_compiled_blocks(monkeypatch, tmp_path, counter):
    assert call(monkeypatch, "scripts/image_train.py", tmp_path, *TINY_DIGITS, "--max_steps", "1") == 0
    arrays, counts = [], []
    for flag in ("False", "True"):
        flags = [
            "--model_path",
            tmp_path / "model000001.pt",
            "--num_samples",
            "2",
            "--batch_size",
            "2",
            "--device",
            "cpu",
        ]
        flags += [*few_steps(2), "--cfg_cond", "True", "--compile", flag]
        assert call(monkeypatch, "scripts/image_sample.py", tmp_path / flag, *flags) == 0
        arrays.append(np.load(tmp_path / flag / "samples_2x8x8x3.npz")["arr_0"].astype(int))
        counts.append(counter.frame_count)
    assert counts[0] == 0 < counts[1]
    assert abs(arrays[0] - arrays[1]).max() <= 1
