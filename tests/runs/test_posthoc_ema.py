import json

import numpy as np
import pytest
import torch
from support import TINY_DIGITS, assert_same_weights, call, few_steps, weights

from masked_diffusion.runs.posthoc_ema import Snapshots, gamma_of, misfit, power_rate, solve
from masked_diffusion.train_util import TrainLoop

TRAIN, POSTHOC = "scripts/image_train.py", "scripts/posthoc_ema.py"
STEPS = 60
FLAGS = [*TINY_DIGITS, "--max_steps", STEPS, "--save_interval", 30, "--log_interval", 30, "--lr", "1e-3"]
FLAGS += ["--ema_snapshot_interval", 3]


@pytest.mark.parametrize("std, gamma", [(0.05, 16.97), (0.1, 6.94)])
def test_the_powers_are_the_papers(std, gamma):
    assert gamma_of(std) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("std", [0.01, 0.1, 0.25, 0.28])
def test_a_running_average_of_a_power_has_the_length_that_it_is_named_after(std):
    gamma, updates = gamma_of(std), 2000
    weight = np.zeros(updates)
    for update in range(1, updates + 1):
        rate = power_rate(gamma, update)
        weight *= rate
        weight[update - 1] = 1 - rate
    position = (np.arange(updates) + 0.5) / updates
    assert weight.sum() == pytest.approx(1)
    mean = (weight * position).sum()
    assert np.sqrt((weight * (position - mean) ** 2).sum()) == pytest.approx(std, rel=1e-3)
    expected = position**gamma
    np.testing.assert_allclose(weight, expected / expected.sum(), atol=0.02 * weight.max())


def test_the_shares_are_those_of_least_squares_on_a_fine_grid_of_updates():
    steps, stds, step, std = [40, 70, 100, 40, 70, 100], [0.05] * 3 + [0.1] * 3, 100, 0.07
    t = (np.arange(20_000) + 0.5) / 20_000 * step

    def profile(end, length):
        gamma = gamma_of(length)
        return np.where(t <= end, (gamma + 1) / end * (t / end) ** gamma, 0.0)

    basis, wanted = np.stack([profile(*pair) for pair in zip(steps, stds, strict=True)], axis=1), profile(step, std)
    expected = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    np.testing.assert_allclose(solve(steps, stds, step, std), expected, atol=2e-3)


def test_a_snapshot_that_is_there_is_taken_as_it_is():
    np.testing.assert_allclose(solve([10, 20, 20], [0.05, 0.05, 0.1], 20, 0.1), [0, 0, 1], atol=1e-6)


@pytest.mark.parametrize("std", [0.02, 0.07, 0.15, 0.25])
def test_a_misfit_is_the_distance_of_the_weights_of_the_updates(std):
    steps, stds = [100, 200, 300] * 2, [0.05] * 3 + [0.1] * 3
    t = (np.arange(300_000) + 0.5) / 1000

    def weight_of(step, std):
        gamma = gamma_of(std)
        return np.where(t <= step, (gamma + 1) * (t / step) ** gamma / step, 0)

    shares = solve(steps, stds, 300, std)
    wanted = weight_of(300, std)
    found = sum(share * weight_of(*one) for share, one in zip(shares, zip(steps, stds, strict=True), strict=True))
    distance = np.sqrt(((found - wanted) ** 2).sum() / (wanted**2).sum())
    rounding = 2.0**-11 * np.abs(shares).sum()
    assert misfit(steps, stds, 300, std) == pytest.approx(distance + rounding, rel=1e-3)


def test_lengths_far_from_the_kept_ones_are_warned_of(trained, monkeypatch, capsys, tmp_path):
    kept, _ = trained
    for std in (0.05, 0.1, 0.15, 0.01, 0.28):
        out = tmp_path / f"{std}.pt"
        assert call(monkeypatch, POSTHOC, tmp_path, "--run", kept, "--std", std, "--out", out) == 0
        said = "is far from those that were kept (0.05, 0.10): the result is " in capsys.readouterr().err
        assert said == (std in (0.01, 0.28)) == (Snapshots(kept).misfit(std) > 0.1)


@pytest.fixture(scope="module")
def trained(module_folder):
    """One training twice: with snapshots of two lengths, and with other lengths tracked as it went."""
    folders = module_folder("two_lengths"), module_folder("others")
    with pytest.MonkeyPatch.context() as patch:
        for folder, powers in zip(folders, ("0.05,0.10", "0.07,0.15"), strict=True):
            assert call(patch, TRAIN, folder, *FLAGS, "--ema_power", powers, "--ema_rate", "none") == 0
    return folders


def movement(folder):
    """How far the parameters went between the first snapshot and the end, and the way to measure it."""

    def distance(a, b):
        return sum((a[name].double() - b[name].double()).square().sum().item() for name in a) ** 0.5

    base = torch.load(folder / "ema_snapshots" / "base.pt", weights_only=True)
    return distance(base, weights(folder, STEPS)), distance


@pytest.mark.parametrize("std, share", [("0.07", 1e-3), ("0.15", 0.01)])
def test_an_average_made_after_the_training_is_the_one_tracked_directly(trained, std, share):
    """Within a share of the way that the parameters went; between the kept lengths, float16 and the solve together."""
    kept, tracked = trained
    found, step = Snapshots(kept).reconstruct(float(std))
    expected = weights(tracked, STEPS, f"ema_power{std}_")
    moved, distance = movement(kept)
    assert step == STEPS and list(found) == list(expected)
    assert distance(found, expected) < share * moved
    assert distance(weights(kept, STEPS), expected) > 0.02 * moved  # the test can tell


def test_half_the_space_costs_less_than_a_thousandth(trained):
    kept, _ = trained
    found, _ = Snapshots(kept).reconstruct(0.05)
    moved, distance = movement(kept)
    assert distance(found, weights(kept, STEPS, "ema_power0.05_")) < 1e-3 * moved
    snapshot = kept / "ema_snapshots" / f"power0.05_{STEPS:06d}.pt"
    assert {value.dtype for value in torch.load(snapshot, weights_only=True)["changes"].values()} == {torch.float16}
    assert snapshot.stat().st_size < 0.6 * (kept / f"model{STEPS:06d}.pt").stat().st_size


def test_snapshots_and_averages_go_on_bit_for_bit(trained, monkeypatch, tmp_path):
    kept, _ = trained
    flags = [*FLAGS, "--ema_power", "0.05,0.10", "--ema_rate", "none"]
    assert call(monkeypatch, TRAIN, tmp_path, *flags, "--max_steps", 45) == 0
    for path in tmp_path.glob("*000045*"):  # as if it had been killed after step 30, with snapshots of later ones
        path.unlink()
    assert call(monkeypatch, TRAIN, tmp_path, *flags, "--max_steps", 36) == 0
    assert max(snapshot.step for snapshot in Snapshots(tmp_path).all()) == 36
    assert call(monkeypatch, TRAIN, tmp_path, *flags) == 0
    assert_same_weights(weights(tmp_path, STEPS, "ema_power0.10_"), weights(kept, STEPS, "ema_power0.10_"))
    assert_same_weights(Snapshots(tmp_path).reconstruct(0.2)[0], Snapshots(kept).reconstruct(0.2)[0])


def test_a_run_that_ends_between_snapshots_has_one_of_its_last_step(monkeypatch, tmp_path):
    flags = [*FLAGS, "--ema_power", "0.10", "--ema_rate", "none", "--ema_snapshot_interval", 4]

    def train(steps):
        assert call(monkeypatch, TRAIN, tmp_path, *flags, "--max_steps", steps) == 0
        return [snapshot.step for snapshot in Snapshots(tmp_path).all()]

    assert train(3) == [3]
    found, step = Snapshots(tmp_path).reconstruct(0.1)
    assert step == 3
    assert_same_weights(found, weights(tmp_path, 3, "ema_power0.10_"), atol=1e-4)
    assert train(8) == [3, 4, 8]
    monkeypatch.setattr(TrainLoop, "_failure", lambda loop: RuntimeError("enough") if loop.step == 10 else None)
    with pytest.raises(RuntimeError, match="enough"):
        train(20)
    assert [snapshot.step for snapshot in Snapshots(tmp_path).all()] == [3, 4, 8, 10]


def test_the_script_writes_weights_that_can_be_sampled(trained, monkeypatch):
    kept, _ = trained
    out = kept / "posthoc_0.08.pt"
    assert call(monkeypatch, POSTHOC, kept, "--run", kept, "--std", 0.08, "--step", 30, "--out", out) == 0
    assert_same_weights(torch.load(out, weights_only=True), Snapshots(kept).reconstruct(0.08, 30)[0])
    flags = ["--num_samples", 1, *few_steps(1), "--device", "cpu"]
    assert call(monkeypatch, "scripts/image_sample.py", kept / "samples", "--model_path", out, *flags) == 0


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--std", 0.3], "--std 0.3: must be in (0, 0.28]"),
        (["--step", 31], "--step 31: no snapshot of this step"),
        (["--out", "FOLDER/model000060.pt"], "model000060.pt: it exists; give another name"),
        (["--out", "FOLDER/average.npz"], "expected a name that ends in .pt or .safetensors"),
        (["--run", "FOLDER/nowhere"], "no such folder; give the output folder of a training"),
        (["--run", "EMPTY"], "no snapshots; train with --ema_power"),
    ],
)
def test_what_cannot_be_made_is_refused(trained, monkeypatch, capsys, tmp_path, flags, sentence):
    kept, _ = trained
    flags = [str(flag).replace("FOLDER", str(kept)).replace("EMPTY", str(tmp_path)) for flag in flags]
    out = tmp_path / "out.pt"
    assert call(monkeypatch, POSTHOC, tmp_path, "--run", kept, "--std", 0.1, "--out", out, *flags) == 2
    assert sentence in capsys.readouterr().err and not out.exists()


def test_a_missing_snapshot_is_named(trained, monkeypatch, capsys, tmp_path):
    kept, _ = trained
    folder = tmp_path / "ema_snapshots"
    folder.mkdir()
    for path in (kept / "ema_snapshots").iterdir():
        if path.name != "power0.10_000033.pt":
            (folder / path.name).symlink_to(path)
    command = [POSTHOC, tmp_path, "--run", tmp_path, "--std", 0.1, "--out", tmp_path / "out.pt"]
    assert call(monkeypatch, *command) == 2
    assert "power0.10_000033.pt: this snapshot is missing" in capsys.readouterr().err
    assert call(monkeypatch, *command, "--step", 30) == 0  # which needs no later ones


def test_a_damaged_index_is_named(tmp_path):
    (tmp_path / "ema_snapshots").mkdir()
    (tmp_path / "ema_snapshots" / "index.json").write_text(json.dumps({"step": 3}))
    with pytest.raises(ValueError, match="index.json: not a list of snapshots"):
        Snapshots(tmp_path).reconstruct(0.1)


def test_a_warm_up_follows_the_weights_sooner(monkeypatch, tmp_path):
    """The rate of the first update is 0.1, of the second 2 / 11."""
    flags = [*TINY_DIGITS, "--save_interval", 1, "--lr", "1e-2", "--ema_rate", "0.99"]
    assert call(monkeypatch, TRAIN, tmp_path, *flags, "--ema_warmup", "True") == 0
    name = "final_layer.linear.weight"
    first, second = (weights(tmp_path, step, "ema_0.99_")[name] for step in (1, 2))
    torch.testing.assert_close(second, 2 / 11 * first + 9 / 11 * weights(tmp_path, 2)[name])
    torch.testing.assert_close(first, 0.9 * weights(tmp_path, 1)[name])  # of a fresh model it is zero
