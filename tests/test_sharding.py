"""Processes that share a model."""

import torch
from support import on_two_ranks

from masked_diffusion.dist_util import Place, Ranks, joined_ranks
from masked_diffusion.sharding import no_sync, share

CPU = torch.device("cpu")


def test_a_model_of_one_process_is_left_alone():
    model = torch.nn.Linear(2, 2)
    assert share(model, Ranks(Place(), CPU)) is model
    with no_sync(model):
        pass


def share_a_replica(rank, dist_url, folder):
    torch.set_num_threads(1)
    seen = {}
    with joined_ranks(Place(rank, 2, rank), CPU, dist_url) as ranks:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, rank + 1.0)  # rank 0's is the one
        parallel = share(model, ranks)
        with no_sync(parallel):
            parallel(torch.full((1, 1), 1.0 + rank)).sum().backward()
        seen["gradient before"] = model.weight.grad.item()
        parallel(torch.full((1, 1), 10.0 * (1 + rank))).sum().backward()
        seen["gradient"], seen["weight"] = model.weight.grad.item(), model.weight.item()
    torch.save(seen, folder / f"{rank}.pt")


def test_replicas_start_from_rank_0_and_average_gradients_but_not_under_no_sync(tmp_path):
    seen = on_two_ranks(share_a_replica, tmp_path)
    assert [rank["weight"] for rank in seen] == [1.0, 1.0]
    assert [rank["gradient before"] for rank in seen] == [1.0, 2.0]
    assert [rank["gradient"] for rank in seen] == [16.5, 16.5]
