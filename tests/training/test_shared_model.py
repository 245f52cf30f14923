"""Processes that share a model."""

import pytest
import torch
from support import on_two_ranks

from masked_diffusion.choices import SHARDINGS
from masked_diffusion.dist_util import Place, Ranks, joined_ranks
from masked_diffusion.models import create_model
from masked_diffusion.training.optimizers import EMA, GuardedOptimizer
from masked_diffusion.training.sharding import no_sync, shard_like, share, total_norm, whole
from masked_diffusion.training.train_config import TrainConfig

CPU = torch.device("cpu")


def test_a_model_of_one_process_is_left_alone():
    model = torch.nn.Linear(2, 2)
    for shard in SHARDINGS:
        assert share(model, shard, Ranks(Place(), CPU)) == (model, model)
    with no_sync(model):
        pass


def share_two_models(rank, dist_url, folder):
    torch.set_num_threads(1)
    with joined_ranks(Place(rank, 2, rank), CPU, dist_url) as ranks:
        torch.save(replicas(ranks) | shards(ranks), folder / f"{rank}.pt")


def replicas(ranks):
    seen = {}
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, ranks.rank + 1.0)  # rank 0's is the one
    parallel = share(model, "none", ranks).trained
    with no_sync(parallel):
        parallel(torch.full((1, 1), 1.0 + ranks.rank)).sum().backward()
    seen["gradient before"] = model.weight.grad.item()
    parallel(torch.full((1, 1), 10.0 * (1 + ranks.rank))).sum().backward()
    return seen | {"gradient": model.weight.grad.item(), "weight": model.weight.item()}


def shards(ranks):
    """Of a model on this rank: what it has of it, and what an update with and without a number that is not finite does.

    A gradient is not finite on rank 1 alone.
    """
    torch.manual_seed(0)
    model = create_model("DiT_Ti_2", input_size=4, in_channels=1, num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, t, y = torch.randn(4, 1, 4, 4), torch.arange(4), torch.arange(4) % 4
    model(x, t, y, label_noise=torch.ones(4)).square().mean().backward()  # all images in one process
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = total_norm(gradients.values())
    model.zero_grad()

    trained, skeleton = share(model, "fsdp", ranks)
    part = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    with no_sync(trained):
        trained(x[part], t[part], y[part], label_noise=torch.ones(2)).square().mean().backward()
    sharded = dict(model.named_parameters())
    seen = {
        "same names": list(sharded) == list(before),
        "shapes": all(p.shape == before[name].shape for name, p in sharded.items()),
        "numbers": sum(p.to_local().numel() for p in sharded.values()) / sum(p.numel() for p in before.values()),
        "whole": all(torch.equal(whole(p.detach()), before[name]) for name, p in sharded.items()),
        "cut": all(torch.equal(shard_like(before[name], p).to_local(), p.to_local()) for name, p in sharded.items()),
        "gradients": max((whole(sharded[name].grad) - g).abs().max() / norm for name, g in gradients.items()).item(),
        "norm": (total_norm(p.grad for p in model.parameters() if p.grad is not None) / norm).item(),
    }

    config = TrainConfig(opt="adamw", lr=1e-2, weight_decay=0.0, shard="fsdp", adam_beta2=0.999)
    optimizer = GuardedOptimizer(model.parameters(), config, ranks)
    ema = EMA(model, "0.5")

    def update():
        good = total_norm(p.grad for p in model.parameters() if p.grad is not None).isfinite()
        optimizer.step(1e-2, good)
        ema.update(model, good)
        optimizer.zero_grad()
        return {name: whole(p.detach()) for name, p in model.named_parameters()}

    after = update()
    seen["moved"] = not any(torch.equal(after[name], before[name]) for name in gradients)
    averages = {name: whole(value) for name, value in ema.state_dict().items() if name in after}
    expected = {name: (after[name] + before[name]) / 2 for name in after}
    seen["average"] = max((averages[name] - value).abs().max().item() for name, value in expected.items())
    trained(x[part] * (float("nan") if ranks.rank else 1.0), t[part], y[part]).square().mean().backward()
    seen["stayed"] = all(torch.equal(p, after[name]) for name, p in update().items())

    with ema.averaged_model(skeleton) as averaged:
        predicted = averaged(x, t, y)
    alone = create_model("DiT_Ti_2", input_size=4, in_channels=1, num_classes=3).eval()
    alone.load_state_dict(averages, strict=True)
    return seen | {"stand-in": torch.equal(predicted, alone(x, t, y).detach())}


@pytest.fixture(scope="module")
def seen(module_folder):
    return on_two_ranks(share_two_models, module_folder("ranks"))


def test_replicas_start_from_rank_0_and_average_gradients_but_not_under_no_sync(seen):
    assert [rank["weight"] for rank in seen] == [1.0, 1.0]
    assert [rank["gradient before"] for rank in seen] == [1.0, 2.0]
    assert [rank["gradient"] for rank in seen] == [16.5, 16.5]


def test_each_rank_has_about_half_of_a_sharded_model_under_the_same_names(seen):
    for rank in seen:
        assert rank["same names"] and rank["shapes"] and rank["whole"] and rank["cut"]
        assert rank["numbers"] == pytest.approx(0.5, abs=0.01)


def test_gradients_of_shards_and_their_norm_are_those_of_one_process(seen):
    for rank in seen:
        assert rank["gradients"] < 1e-6
        assert rank["norm"] == pytest.approx(1, rel=1e-6)


def test_a_number_that_is_not_finite_on_one_rank_stops_the_shards_of_all(seen):
    assert all(rank["moved"] and rank["stayed"] for rank in seen)


def test_averages_are_kept_in_shards_and_stand_in_whole(seen):
    for rank in seen:
        assert rank["average"] < 1e-6 and rank["stand-in"]
