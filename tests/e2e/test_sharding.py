"""A training that is shared out over two processes is the one of whole copies, and so are its checkpoints."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import TINY_DIGITS, assert_same_weights, call, rows, run, weights

from masked_diffusion.runs.posthoc_ema import Snapshots

pytestmark = pytest.mark.e2e

TRAIN = "scripts/image_train.py"
FLAGS = [*TINY_DIGITS, "--batch_size", "2", "--microbatch", "1", "--lr", "1e-4", "--max_steps", "20"]
FLAGS += ["--save_interval", "10", "--preview_samples", "2", "--preview_steps", "2"]
FLAGS += ["--ema_power", "0.1", "--ema_snapshot_interval", "10"]
# MDTv2's recipe is Adan, with gradients that are clipped.
OPTIMIZERS = {"adamw": FLAGS, "adan": [*FLAGS, "--model", "MDTv2_Ti_2"]}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def runs(request, module_folder):
    """Twenty steps on two processes, in each way to share."""
    flags, root = OPTIMIZERS[request.param], module_folder(request.param)
    for shard in ("none", "zero", "fsdp"):
        run(TRAIN, root / shard, *flags, "--shard", shard, processes=2)
    return flags, root


def made_afterwards(folder):
    """An average of another length, from the snapshots of steps 10 and 20."""
    assert [snapshot.step for snapshot in Snapshots(folder).all()] == [10, 20]
    return Snapshots(folder).reconstruct(0.15)[0]


@pytest.mark.parametrize("shard", ["zero", "fsdp"])
def test_losses_gradients_weights_and_previews_are_those_of_whole_copies(runs, shard):
    _, root = runs
    assert len(rows(root / shard)) == 20
    for plain, sharded in zip(rows(root / "none"), rows(root / shard), strict=True):
        for name in ("loss", "m_loss", "grad_norm", "param_norm"):
            assert plain[name] == pytest.approx(sharded[name], rel=1e-5), name
    for kind in ("model", "ema_0.9999_", "ema_power0.1_"):
        assert_same_weights(weights(root / "none", 20, kind), weights(root / shard, 20, kind), atol=1e-5)
    assert_same_weights(made_afterwards(root / "none"), made_afterwards(root / shard), atol=1e-5)
    pictures = [np.asarray(Image.open(root / name / "preview_000020.png"), dtype=int) for name in ("none", shard)]
    assert abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("shard", ["zero", "fsdp"])
def test_a_checkpoint_holds_the_whole_optimizer_in_the_published_format(runs, shard):
    _, root = runs
    plain, sharded = (torch.load(root / name / "opt000020.pt", weights_only=True) for name in ("none", shard))
    assert set(plain) == set(sharded) == {"state", "param_groups"}
    assert [group["params"] for group in plain["param_groups"]] == [g["params"] for g in sharded["param_groups"]]
    assert set(plain["state"]) == set(sharded["state"])
    for index, moments in plain["state"].items():
        assert set(moments) == set(sharded["state"][index])
        for name, value in moments.items():
            torch.testing.assert_close(sharded["state"][index][name], value, rtol=1e-3, atol=1e-5)


def start_again(root, saved, name):
    """The checkpoint of step 10 alone, in a folder of its own, with the snapshots of later steps, too."""
    folder = root / name
    shutil.copytree(root / saved / "ema_snapshots", folder / "ema_snapshots")
    for path in [*(root / saved).glob("*000010*"), root / saved / "config.json"]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("shard, flag", [("zero", ["--use_zero", "True"]), ("fsdp", ["--shard", "fsdp"])])
def test_a_sharded_run_goes_on_sharded_bit_for_bit(runs, shard, flag):
    flags, root = runs
    folder = start_again(root, shard, f"{shard}_again")
    run(TRAIN, folder, *flags, *flag, processes=2)
    for kind in ("model", "ema_0.9999_", "ema_power0.1_"):
        assert_same_weights(weights(root / shard, 20, kind), weights(folder, 20, kind))
    assert_same_weights(made_afterwards(root / shard), made_afterwards(folder))


@pytest.mark.parametrize("shard", ["zero", "fsdp"])
def test_a_sharded_run_goes_on_in_one_process(runs, monkeypatch, shard):
    flags, root = runs
    folder = start_again(root, shard, f"whole_after_{shard}")
    assert call(monkeypatch, TRAIN, folder, *flags, "--batch_size", "4", "--shard", "none") == 0
    for kind in ("model", "ema_0.9999_", "ema_power0.1_"):
        assert_same_weights(weights(root / "none", 20, kind), weights(folder, 20, kind), atol=1e-5)
    assert_same_weights(made_afterwards(root / "none"), made_afterwards(folder), atol=1e-5)


def test_a_run_of_whole_copies_goes_on_in_shards(runs):
    flags, root = runs
    folder = start_again(root, "none", "fsdp_after_none")
    run(TRAIN, folder, *flags, "--shard", "fsdp", processes=2)
    for kind in ("model", "ema_0.9999_", "ema_power0.1_"):
        assert_same_weights(weights(root / "none", 20, kind), weights(folder, 20, kind), atol=1e-5)
    assert_same_weights(made_afterwards(root / "none"), made_afterwards(folder), atol=1e-5)


@pytest.mark.parametrize("precision", ["--use_bf16", "--use_fp16"])
def test_halves_are_computed_in_shards_as_in_whole_copies(tmp_path, precision):
    flags = [*TINY_DIGITS, "--batch_size", "2", "--lr", "1e-4", "--max_steps", "10", precision, "True"]
    run(TRAIN, tmp_path / "none", *flags, processes=2)
    run(TRAIN, tmp_path / "fsdp", *flags, "--shard", "fsdp", "--grad_checkpointing", "True", processes=2)
    plain, sharded = rows(tmp_path / "none"), rows(tmp_path / "fsdp")
    assert [row["skipped"] for row in plain] == [row["skipped"] for row in sharded]
    assert any(row["grad_norm"] for row in plain)
    for a, b in zip(plain, sharded, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert (a["grad_norm"] or 0) == pytest.approx(b["grad_norm"] or 0, rel=1e-3)  # skipped steps have none
    assert {value.dtype for value in weights(tmp_path / "fsdp", 10).values()} <= {torch.float32, torch.int64}


def test_what_is_frozen_stays_so_in_shards(tmp_path):
    flags = [*TINY_DIGITS, "--batch_size", "2", "--max_steps", "4", "--freeze", "blocks.0", "--preview_samples", "0"]
    for shard in ("none", "fsdp"):
        run(TRAIN, tmp_path / shard, *flags, "--shard", shard, processes=2)
    plain, sharded = weights(tmp_path / "none", 4), weights(tmp_path / "fsdp", 4)
    assert_same_weights(plain, sharded, atol=1e-5)
    averages = weights(tmp_path / "fsdp", 4, "ema_0.9999_")
    frozen = [name for name in sharded if name.startswith("blocks.0.")]
    assert frozen and all(torch.equal(sharded[name], averages[name]) for name in frozen)
    assert not torch.equal(sharded["x_embedder.proj.weight"], averages["x_embedder.proj.weight"])
