"""An optimizer that is shared out over two processes trains as a whole one, and its checkpoints are those of one."""

import pytest
import torch
from support import TINY_DIGITS, assert_same_weights, call, rows, run, weights

pytestmark = pytest.mark.e2e

TRAIN = "scripts/image_train.py"
FLAGS = [*TINY_DIGITS, "--batch_size", "2", "--lr", "1e-3", "--max_steps", "3", "--save_interval", "1"]
OPTIMIZERS = {"adamw": FLAGS, "adan": [*FLAGS, "--model", "MDTv2_Ti_2"]}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def runs(request, module_folder):
    """Three steps on two processes, with and without shards."""
    flags, root = OPTIMIZERS[request.param], module_folder(request.param)
    for shard in ("none", "zero"):
        run(TRAIN, root / shard, *flags, "--shard", shard, processes=2)
    return flags, root


def test_losses_gradients_and_weights_are_those_without_shards(runs):
    _, root = runs
    for plain, sharded in zip(rows(root / "none"), rows(root / "zero"), strict=True):
        for name in ("loss", "m_loss", "grad_norm", "param_norm"):
            assert plain[name] == pytest.approx(sharded[name], rel=1e-6), name
    for kind in ("model", "ema_0.9999_"):
        assert_same_weights(weights(root / "none", 3, kind), weights(root / "zero", 3, kind), atol=1e-6)


def test_a_checkpoint_holds_the_whole_optimizer_in_the_published_format(runs):
    _, root = runs
    plain, sharded = (torch.load(root / shard / "opt000003.pt", weights_only=True) for shard in ("none", "zero"))
    assert set(plain) == set(sharded) == {"state", "param_groups"}
    assert [group["params"] for group in plain["param_groups"]] == [g["params"] for g in sharded["param_groups"]]
    assert set(plain["state"]) == set(sharded["state"])
    for index, moments in plain["state"].items():
        assert set(moments) == set(sharded["state"][index])
        for name, value in moments.items():
            torch.testing.assert_close(sharded["state"][index][name], value, rtol=1e-5, atol=1e-7)


def start_again(root, saved, name):
    """The checkpoint of step 2 alone, in a folder of its own."""
    folder = root / name
    folder.mkdir()
    for path in [*(root / saved).glob("*000002*"), root / saved / "config.json"]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_sharded_run_goes_on_sharded_bit_for_bit(runs):
    flags, root = runs
    folder = start_again(root, "zero", "sharded_again")
    run(TRAIN, folder, *flags, "--use_zero", "True", processes=2)
    assert_same_weights(weights(root / "zero", 3), weights(folder, 3))


def test_a_sharded_run_goes_on_in_one_process(runs, monkeypatch):
    flags, root = runs
    folder = start_again(root, "zero", "whole_after_shards")
    assert call(monkeypatch, TRAIN, folder, *flags, "--batch_size", "4") == 0
    assert_same_weights(weights(root / "zero", 3), weights(folder, 3), atol=1e-5)
