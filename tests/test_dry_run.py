"""A dry run checks what a start would check, says what a run would take, and leaves no trace."""

import re

import pytest
import torch
from support import TINY_DIGITS, call

from masked_diffusion.config import ModelConfig
from masked_diffusion.dist_util import Place, Ranks
from masked_diffusion.dry_run import forward_gflops, state_gigabytes
from masked_diffusion.optimizers import GatedOptimizer

TRAIN = "scripts/image_train.py"


@pytest.fixture
def dry(monkeypatch, capsys):
    """Run a tiny training dry, in a folder. Returns what it printed."""

    def run(folder, *flags, status=0):
        assert call(monkeypatch, TRAIN, folder, *TINY_DIGITS, "--dry_run", "True", *flags, sinks="") == status
        return "".join(capsys.readouterr())

    return run


def content(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_numbers_of_a_run_are_said(dry, tmp_path):
    out = dry(tmp_path / "new" / "run", "--batch_size", "7", "--max_steps", "1000", "--ema_rate", "0.9,0.99")
    assert not (tmp_path / "new").exists()
    for expected in (
        r"parameters: 1\.6 M",
        r"GFLOPs per image: forward [\d.]+ with all tokens, [\d.]+ masked, a training step [\d.]+",
        r"images per epoch: 1442, steps per epoch: 206\.0 of 7",
        r"steps to the end: 1000 \(4\.9 epochs\), days to the end: [\d.e-]+",
        "nothing was written",
    ):
        assert re.search(expected, out), expected
    seconds = float(re.search(r"seconds per step: ([\d.]+)", out)[1])
    days = float(re.search(r"days to the end: ([\d.e-]+)", out)[1])
    assert days == pytest.approx(1000 * seconds / 86400, rel=0.01)


def test_without_an_end_there_are_no_days(dry, tmp_path):
    assert "no end" in dry(tmp_path, "--max_steps", "0")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite", "True"]], ids=["resume", "overwrite"])
def test_a_run_that_lies_in_the_folder_is_not_touched(dry, monkeypatch, tmp_path, overwrite):
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS) == 0
    newest = tmp_path / "model000002.pt"
    newest.write_bytes(newest.read_bytes()[:-9])  # a real start would rename it
    before = content(tmp_path)
    out = dry(tmp_path, "--max_steps", "5", *overwrite)
    assert "step 2" in out and "is damaged" in out
    assert content(tmp_path) == before


def test_what_stops_a_real_start_stops_a_dry_run(dry, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    assert "cannot write there" in dry(blocked / "run", status=2)
    assert "--image_size 7" in dry(tmp_path, "--image_size", "7", status=2)


# The DiT paper's 118.6 GFLOPs of XL/2 are its 28 blocks over 256 tokens; MDT's are as many. Masked at 0.3, 26 of the 28
# blocks see 179 of the 256 tokens, and one block more puts the others back.
def test_flops_are_those_of_the_papers():
    config = ModelConfig("MDT_XL_2", 256, 8, 4, 1000, mask_ratio=0.3, decode_layer=2)
    with torch.device("meta"):
        model = config.build()
    full, masked = (forward_gflops(model, config.latent_shape, enable_mask) for enable_mask in (False, True))
    assert full == pytest.approx(118.6, abs=0.1)
    assert masked / full == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize("opt, gigabytes", [("adamw", 0.006), ("adan", 0.008)])
def test_the_state_is_weights_gradients_moments_and_the_averages(opt, gigabytes):
    model = torch.nn.Linear(1000, 250, bias=False)
    optimizer = GatedOptimizer(model.parameters(), opt, 1e-3, 0.0, "none", Ranks(Place(), torch.device("cpu")))
    assert state_gigabytes(model, optimizer, num_emas=2) == pytest.approx(gigabytes)


@pytest.mark.parametrize("model, views", [("DiT_Ti_2", ""), ("MDTv2_Ti_2", " with all tokens, ")])
def test_other_families_are_tried_out_with_their_views(dry, tmp_path, model, views):
    [line] = re.findall(r"GFLOPs per image: .*", dry(tmp_path, "--model", model))
    assert (" with all tokens, " in line) == bool(views)
