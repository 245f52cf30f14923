"""Goldens, samples and features on a device that is a parameter."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarking.settings import Settings
from benchmarking.setup import UndecodedLatents, fresh_model
from golden_arrays import assert_golden, golden_json, golden_npz, set_golden_weights

from masked_diffusion import dist_util
from masked_diffusion.models import FAMILIES
from masked_diffusion.sampling.image_sampler import ImageSampler

FILES = {"MDT": "model_v1", "MDTv2": "model_v2", "DiT": "model_dit"}


@pytest.fixture(params=FILES)
def golden(request):
    """A family's model with the golden weights, its inputs, and what it has to return."""
    arrays, config = golden_npz(f"{FILES[request.param]}.npz"), golden_json(f"{FILES[request.param]}.json")["config"]
    model = set_golden_weights(FAMILIES[request.param](**config)).eval()
    inputs = [torch.from_numpy(arrays[name]) for name in ("x", "t", "y")]
    return model, inputs, arrays["eval_forward"]


def forward(golden, device, half=None):
    model, inputs, _ = golden
    model.to(device)
    with torch.no_grad(), torch.autocast(device.type, dtype=half, enabled=half is not None):
        return model(*(value.to(device) for value in inputs)).float().cpu()


def test_goldens_hold_in_full_precision(device, golden):
    assert_golden(forward(golden, device), golden[2])


@pytest.mark.parametrize("half, largest", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_halves_are_near_the_goldens(device, golden, half, largest, record_property):
    error = np.linalg.norm(forward(golden, device, half).numpy() - golden[2]) / np.linalg.norm(golden[2])
    record_property("relative_error", float(error))
    assert 0 < error < largest


def test_tf32_is_near_the_goldens(device, golden, record_property):
    dist_util.allow_tf32(True)
    error = np.linalg.norm(forward(golden, device).numpy() - golden[2]) / np.linalg.norm(golden[2])
    record_property("relative_error", float(error))
    assert error < 0.01


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sampling_twice_gives_the_same_bytes(device, sampler):
    settings = Settings(
        model="MDT_Ti_2", image_size=8, downsample=1, in_channels=1, num_classes=10, num_sampling_steps=3
    )
    model = fresh_model(settings).to(device).eval().requires_grad_(False)
    config = settings.sampler_config.__class__(
        num_sampling_steps=3, cfg_cond=True, guidance="constant", sampler=sampler
    )
    images = [
        ImageSampler(model, settings.run_config, config, UndecodedLatents(1), device)(range(4), [0, 1, 2, 3])
        for _ in range(2)
    ]
    assert images[0].std() > 0
    np.testing.assert_array_equal(*images)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_features_of_the_evaluator_are_those_of_the_processor(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # both libraries share the card
    tf = pytest.importorskip("tensorflow")
    sys.path.insert(0, str(Path(__file__).parents[2] / "evaluations"))
    from inception_2015 import write_inception_2015
    from inception_torch import TorchInception

    graph = write_inception_2015(tf, tmp_path / "inception.pb")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    dist_util.allow_tf32(True)  # which the features have to be free of
    on_gpu, on_cpu = (TorchInception(graph, "0" * 64, [], name)(images) for name in ("cuda", "cpu"))
    for ours, exact in zip(on_gpu, on_cpu, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-3, atol=1e-4)
