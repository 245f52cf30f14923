"""A whole training through its script on a device that is a parameter: killed, resumed, and sampled."""

import time

import pytest
import torch
from support import (
    TIMEOUT,
    TINY_DIGITS,
    assert_same_weights,
    begin,
    call,
    command,
    environment,
    few_steps,
    has_logged,
    kill_run,
    rows,
    weights,
)

pytestmark = pytest.mark.e2e

TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"


def flags_for(device, steps, save_interval):
    halves = ["--use_bf16", "True"] if device.type == "cuda" else []
    length = ["--max_steps", steps, "--save_interval", save_interval]
    rates = ["--lr", "1e-3", "--ema_rate", "0.9", "--diffusion_steps", 50]
    return [*TINY_DIGITS, "--device", device.type, *length, *rates, *halves]


def kill_after(process, folder, step):
    """Kill a training between two checkpoints: some steps after that of a step is complete, before its end."""
    deadline = time.monotonic() + TIMEOUT
    # Files are written beside the training, which may be steps ahead of them.
    while not ((folder / f"checkpoint{step:06d}.json").exists() and has_logged(folder, step + 2)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    assert process.poll() is None
    kill_run(process, folder)


def test_a_training_that_is_killed_and_resumed_ends_where_an_undisturbed_one_ends(device, tmp_path, monkeypatch):
    steps, saves = (400, 20) if device.type == "cuda" else (60, 10)  # it has to last until it is killed
    flags = flags_for(device, steps, saves)
    killed = tmp_path / "killed"
    kill_after(begin(command(TRAIN, *flags), environment(killed)), killed, saves)
    assert not (killed / f"model{steps:06d}.pt").exists()
    for folder in (killed, tmp_path / "undisturbed"):
        assert call(monkeypatch, TRAIN, folder, *flags) == 0
    logs = [rows(folder) for folder in (killed, tmp_path / "undisturbed")]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] == list(range(1, steps + 1))
    if device.type == "cpu":
        for kind in ("model", "ema_0.9_"):
            assert_same_weights(weights(tmp_path / "undisturbed", steps, kind), weights(killed, steps, kind))
        assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    else:  # a GPU adds gradients in no fixed order: the same data and draws, and losses that are near
        ends = [torch.tensor([row["loss"] for row in log[-100:]]).mean() for log in logs]
        assert ends[0] == pytest.approx(ends[1].item(), rel=0.05)
    flags = ["--model_path", killed / f"ema_0.9_{steps:06d}.pt", "--num_samples", 4, *few_steps(5)]
    assert call(monkeypatch, SAMPLE, tmp_path, *flags, "--device", device.type) == 0
    assert (tmp_path / "samples_4x8x8x3.npz").exists()
