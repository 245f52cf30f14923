"""A dry run checks what a start would check, says what a run would take, and leaves no trace."""

import re

import pytest
import torch
from support import TINY_DIGITS, call

from masked_diffusion.dry_run import state_gigabytes, view_gflops
from masked_diffusion.models import MODELS
from masked_diffusion.runs.config import ModelConfig

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
        r"memory per process .*by --shard:\n +1 process: none 0\.04 GB, zero 0\.04 GB, fsdp 0\.04 GB\n +2 processes: ",
        r"8 processes: none 0\.04 GB, zero 0\.03 GB, fsdp 0\.01 GB\n",
        r"peak of a step here, --shard none, activations and all: [\d.]+ GB on the (host|GPU)",
        r"images per epoch: 1442, steps per epoch: 206\.0 of 7",
        r"steps to the end: 1000 \(4\.9 epochs\), days to the end: [\d.e-]+",
        "nothing was written",
    ):
        assert re.search(expected, out), expected
    seconds = float(re.search(r"seconds per step: ([\d.]+)", out)[1])
    days = float(re.search(r"days to the end: ([\d.e-]+)", out)[1])
    assert days == pytest.approx(1000 * seconds / 86400, rel=0.01)


def test_compute_and_finale_of_the_whole_run_are_said(dry, tmp_path):
    flags = ["--model", "DiT_Ti_2", "--policy", "deferred", "--objective", "flow", "--mask_ratio", "0.75"]
    out = dry(tmp_path, *flags, "--max_steps", "10", "--finale", "0.5", "--batch_size", "2")
    step = float(re.search(r"a training step ([\d.]+)", out)[1])
    share, whole = re.search(r"finale: the last (\d+)% of the run on all tokens, ([\d.]+) GFLOPs", out).groups()
    assert share == "50" and float(whole) > 1.5 * step
    total = float(re.search(r"compute of the whole run: ([\d.]+) TFLOPs", out)[1])
    assert total == pytest.approx(2 * 5 * (step + float(whole)) / 1000, rel=1e-3)


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
    full, masked = (view_gflops(model, view) for view in model.views)
    assert full == pytest.approx(118.6, abs=0.1)
    assert masked / full == pytest.approx(0.75, abs=0.005)


COPIES = [("adamw", "none", 7), ("adamw", "zero", 5.5), ("adan", "none", 9), ("adan", "zero", 6)]


@pytest.mark.parametrize("opt, shard, copies", COPIES)
def test_the_state_is_weights_gradients_moments_and_the_averages(opt, shard, copies):
    model = MODELS["MDT_Ti_2"](input_size=8, in_channels=1, num_classes=10)
    numbers = sum(p.numel() for p in model.parameters())
    size = state_gigabytes(model, opt, num_emas=3, shard=shard, processes=4)
    assert size == pytest.approx(copies * 4 * numbers / 1e9)


def test_fsdp_shares_out_everything_but_what_is_gathered_at_a_time():
    model = MODELS["MDT_Ti_2"](input_size=8, in_channels=1, num_classes=10)
    sizes = [state_gigabytes(model, "adamw", 1, "fsdp", processes) for processes in (1, 2, 4, 10**9)]
    assert sizes[0] == pytest.approx(state_gigabytes(model, "adamw", 1, "none", 1))
    gathered = sizes[3]
    assert 0 < gathered < sizes[2] < sizes[1] < sizes[0]
    assert sizes[1] - gathered == pytest.approx(sizes[0] / 2) and sizes[2] - gathered == pytest.approx(sizes[0] / 4)


@pytest.mark.parametrize("model, views", [("DiT_Ti_2", ""), ("MDTv2_Ti_2", " with all tokens, ")])
def test_other_families_are_tried_out_with_their_views(dry, tmp_path, model, views):
    [line] = re.findall(r"GFLOPs per image: .*", dry(tmp_path, "--model", model))
    assert (" with all tokens, " in line) == bool(views)
