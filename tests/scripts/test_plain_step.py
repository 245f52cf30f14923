"""The plain path that the benchmark compares with: the same function, the same training, and that nothing uses it."""

import copy
import importlib

import pytest
import torch
from support import REPO

from masked_diffusion.first_stage import load_first_stage
from masked_diffusion.models import MDT

SETTINGS = {
    "model": "MDT_Ti_2", "image_size": 8, "downsample": 1, "in_channels": 4, "num_classes": 10, "batch_size": 3,
    "num_sampling_steps": 2, "repeats": 1, "warmup": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def setup():
    return importlib.import_module("benchmarking.setup")


@pytest.fixture(scope="module")
def plain():
    return importlib.import_module("benchmarking.plain_step")


def test_it_is_the_same_function(setup, plain):
    model = setup.fresh_model(setup.Settings(**SETTINGS)).eval()
    copied = plain.PlainMDT(model).eval()
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([3, 700, 3, 700]), torch.tensor([1, 2, 10, 10])
    token_noise = torch.rand(4, 16)
    for kwargs in ({}, {"draw": model.draw(token_noise)}):
        torch.testing.assert_close(copied(x, t, y, **kwargs), model(x, t, y, **kwargs), rtol=1e-4, atol=1e-5)
    expected = model.forward_with_cfg(x, t, y, cfg_scale=3.8)
    torch.testing.assert_close(copied.guided(x, t, y, 3.8), expected, rtol=1e-4, atol=1e-5)


def test_its_step_is_the_same_step(setup, plain):
    settings = setup.Settings(**SETTINGS)
    loop = setup.make_loop(settings, setup.Ranks(setup.dist_util.Place(), torch.device("cpu")))
    model = copy.deepcopy(loop.model)
    assert isinstance(model, MDT)
    first_stage = setup.make_first_stage(settings, torch.device("cpu"))
    training = plain.PlainTraining(model, settings.run_config.diffusion.build(), first_stage, settings.train_config.lr)
    batch = setup.training_batch(settings)
    for _ in range(2):
        loop.train_step(*batch)
        training.step(*batch)
    row, losses = loop.meter.flush(), training.sums
    assert losses["loss"] / 6 == pytest.approx(row["loss"], rel=1e-4)
    assert losses["m_loss"] / 6 == pytest.approx(row["m_loss"], rel=1e-4)
    for ours, theirs in (
        (loop.model.blocks[0].attn.qkv.weight, training.model.mdt.blocks[0].attn.qkv.weight),
        (loop.model.mask_token, training.model.mdt.mask_token),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)


def test_operations_are_those_counted_by_hand(setup):
    settings = setup.Settings(**{**SETTINGS, "batch_size": 1})
    loop = setup.make_loop(settings, setup.Ranks(setup.dist_util.Place(), torch.device("cpu")))
    counted = setup.train_step_flops(loop, setup.training_batch(settings))
    width, depth, tokens, kept, patch, inputs, outputs, frequencies = 128, 4, 16, 11, 2, 4, 8, 256

    def block(length):
        """Multiply-adds of a block: qkv, projection, MLP, attention, modulation."""
        return length * (3 + 1 + 4 + 4) * width**2 + 2 * length**2 * width + 6 * width**2

    once = tokens * patch**2 * (inputs + outputs) * width + frequencies * width + width**2 + 2 * width**2
    views = 2 * once + depth * block(tokens) + 2 * block(kept) + (2 + 1) * block(tokens)
    # Backward takes twice the forward's, but for what leads to the inputs of the first layers, which nobody asks for.
    no_gradient_of_inputs = 2 * (tokens * patch**2 * inputs * width + frequencies * width)
    meter = 6 * 4  # six losses are added up in four quartiles
    assert counted == 2 * (3 * views - no_gradient_of_inputs + meter)


def test_peaks_of_cards_are_found_by_name(setup):
    assert setup.peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16, tf32=False) == 989e12
    assert setup.peak_flops("NVIDIA H100 PCIe", torch.float32, tf32=True) == 378e12
    assert setup.peak_flops("NVIDIA A100-SXM4-80GB", torch.float32, tf32=False) == 19.5e12
    assert setup.peak_flops("AMD EPYC", torch.float32, tf32=False) is None


def test_the_product_does_not_import_it():
    for folder in ("masked_diffusion", "evaluations"):
        assert not [path for path in (REPO / folder).rglob("*.py") if "plain_step" in path.read_text()]


def test_its_autoencoder_does_not_have_our_layout_in_memory(setup, monkeypatch, tiny_vae):
    from benchmarking import cases

    ours, theirs = (load_first_stage(str(tiny_vae), "cpu") for _ in range(2))
    monkeypatch.setattr(cases, "make_first_stage", lambda settings, device: theirs)
    training = cases.plain_training(setup.Settings(**SETTINGS), torch.device("cpu"))
    assert training.first_stage is theirs
    weights = [
        [parameter for parameter in stage.vae.parameters() if parameter.ndim == 4 and parameter[0, 0].numel() > 1]
        for stage in (ours, theirs)
    ]
    assert weights[0] and all(not weight.is_contiguous() for weight in weights[0] if len(weight[0]) > 1)
    assert all(weight.is_contiguous() for weight in weights[1])
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(theirs.moments(images), ours.moments(images))
