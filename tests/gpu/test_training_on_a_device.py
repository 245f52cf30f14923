"""Training steps on a device that is a parameter: precisions, overflow, shards, resumes, and when the host waits."""

import contextlib
import dataclasses

import pytest
import torch
from benchmarking.settings import Settings
from benchmarking.setup import fresh_model, make_loop, training_batch

from masked_diffusion.dist_util import Place, Ranks
from masked_diffusion.image_datasets import load_data
from masked_diffusion.runs.checkpoint import snapshot
from masked_diffusion.training import sharding
from masked_diffusion.training.optimizers import GuardedOptimizer
from masked_diffusion.training.saver import TrainingState

# A model of a GPU's day and one of a CPU's second.
ON_GPU = Settings(model="MDT_S_2", batch_size=8)
ON_CPU = Settings(
    model="MDT_Ti_2", image_size=8, downsample=1, in_channels=1, num_classes=10, batch_size=3
)  # as the embedded digits


def settings_for(device, **changes):
    return dataclasses.replace(ON_GPU if device.type == "cuda" else ON_CPU, **changes)


def loop_for(device, **changes):
    settings = settings_for(device, **changes)
    loop = make_loop(settings, Ranks(Place(), device))
    if settings.use_fp16:  # a scale that fits from the first step on; by itself it begins high and comes down
        loop.scaler.load_state_dict({**loop.scaler.state_dict(), "scale": 2.0**10})
    return loop, training_batch(settings)


def steps_of(device):
    return 20 if device.type == "cuda" else 3


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_bf16": True}, {"use_fp16": True}, {"grad_checkpointing": True}, {"use_bf16": True, "compile": True}],
    ids=["fp32", "bf16", "fp16", "recomputed", "compiled"],
)
def test_steps_in_every_way_of_computing_lower_the_loss_of_one_batch(device, changes):
    if changes.get("compile") and device.type == "cpu":
        pytest.skip("compiled steps on a CPU are tested elsewhere")
    loop, batch = loop_for(device, **changes)
    rows = []
    for _ in range(2):
        for _ in range(steps_of(device)):
            loop.train_step(*batch)
        rows.append(loop.meter.flush())
    assert rows[1]["loss"] < rows[0]["loss"]
    assert rows[1]["skipped"] == 0 and rows[1]["grad_norm"] > 0
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in loop.model.parameters())


def test_halves_recover_from_an_overflow(device):
    loop, batch = loop_for(device, use_fp16=True)
    loop.train_step(*batch)
    loop.scaler.update(2.0**60)  # no half holds a gradient of this scale
    before = snapshot(loop.model.state_dict())
    loop.train_step(*batch)
    assert all(torch.equal(value.cpu(), before[name]) for name, value in loop.model.state_dict().items())
    assert loop.scaler.get_scale() == 2.0**59
    loop.scaler.update(2.0**10)
    loop.train_step(*batch)
    row = loop.meter.flush()
    assert row["skipped"] == 1
    assert any(not torch.equal(value.cpu(), before[name]) for name, value in loop.model.state_dict().items())


def state_of(loop):
    return TrainingState(loop.model, loop.emas, loop.optimizer, loop.scaler, loop.schedule_sampler)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return a == b


@pytest.mark.parametrize("half", ["", "use_fp16"])
def test_a_state_that_went_to_the_host_and_back_is_the_same_to_the_bit(device, half, tmp_path):
    changes = {half: True} if half else {}
    loop, batch = loop_for(device, **changes)
    for _ in range(2):
        loop.train_step(*batch)
    saved = snapshot(state_of(loop).files(2, "pt", {}))
    torch.save(saved, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
    other, _ = loop_for(device, **changes)
    model, ema, optimizer, state = read.values()
    other.model.load_state_dict(model)
    other.emas[0].load_state_dict(ema)
    other.optimizer.load_state_dict(optimizer)
    if half:
        other.scaler.load_state_dict(state["scaler"])
    again = snapshot(state_of(other).files(2, "pt", {}))
    assert equal(again, saved)
    for run in (loop, other):
        run.train_step(*batch)
    for name, value in loop.model.state_dict().items():  # a GPU adds gradients in no fixed order
        tolerance = {"rtol": 0.0, "atol": 0.0} if device.type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(other.model.state_dict()[name], value, **tolerance)


@contextlib.contextmanager
def host_never_waits(device):
    """Raise where the host waits for the device inside this context."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("changes", [{}, {"use_bf16": True}, {"use_fp16": True}], ids=["fp32", "bf16", "fp16"])
def test_the_host_waits_for_nothing_in_a_step(device, changes):
    loop, (images, extras) = loop_for(device, **changes)
    if device.type == "cuda":
        images, extras = images.pin_memory(), {name: value.pin_memory() for name, value in extras.items()}
    loop.train_step(images, extras)  # makes tables and the optimizer's state
    with host_never_waits(device):
        for _ in range(3):
            loop.train_step(images, extras)
    assert loop.meter.flush()["skipped"] == 0


def test_the_loader_delivers_what_a_device_can_fetch_by_itself(device, colour_folder):
    batches = load_data(
        data_dir=str(colour_folder),
        batch_size=2,
        image_size=32,
        class_cond=True,
        num_workers=0,
        draws=settings_for(device).draw_spec,
        pin_memory=device.type == "cuda",
    )
    images, extras = next(batches)
    batches.close()
    for tensor in (images, *extras.values()):
        assert tensor.is_pinned() == (device.type == "cuda")
        assert torch.equal(tensor.to(device, non_blocking=True).cpu(), tensor)


@pytest.fixture
def group_of_one(device, tmp_path):
    """A process group of this process alone, over nccl on a GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield Ranks(Place(), device)
    torch.distributed.destroy_process_group()


def test_collectives_find_their_backend_by_where_a_tensor_is(device, group_of_one):
    for place in {device, torch.device("cpu")}:
        tensor = torch.arange(3.0, device=place)
        torch.distributed.all_reduce(tensor)
        assert tensor.tolist() == [0.0, 1.0, 2.0]


def test_shards_of_one_process_move_as_the_whole_model(device, group_of_one):
    settings = settings_for(device)
    batch = training_batch(settings)
    loop = make_loop(settings, Ranks(Place(), device))
    loop.train_step(*batch)

    sharded = make_loop(settings, Ranks(Place(), device))
    model = fresh_model(settings).to(device).train()
    sharding._shard(model, group_of_one, None)
    sharded.model = sharded.shared_model = model
    config = dataclasses.replace(settings.train_config, shard="none")
    sharded.optimizer = GuardedOptimizer(model.parameters(), config, group_of_one)
    sharded.emas = []
    sharded.train_step(*batch)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(sharding.whole(value), loop.model.state_dict()[name], rtol=1e-3, atol=1e-5)
