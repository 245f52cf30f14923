import contextlib
import io
import time
from datetime import timedelta

import pytest
import torch
from support import free_port, on_two_ranks

from masked_diffusion import dist_util
from masked_diffusion.dist_util import (
    Place,
    Ranks,
    choose_device,
    joined_ranks,
)

CPU = torch.device("cpu")


# -- device ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this machine has so many GPUs."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize("count, expected", [(0, "cpu"), (1, "cuda:0"), (4, "cuda:0")])
def test_auto_takes_a_gpu_where_there_is_one(gpus, count, expected):
    gpus(count)
    assert choose_device("auto") == torch.device(expected)


def test_every_local_rank_has_a_gpu_of_its_own(gpus):
    gpus(4)
    assert [choose_device(name, 3) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        torch.device("cuda:3"),
        torch.device("cuda:3"),
        torch.device("cuda:1"),
        CPU,
    ]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "tpu:0", "", "CUDA"])
def test_an_unknown_device_is_refused_with_the_known_ones(gpus, name):
    gpus(1)
    with pytest.raises(ValueError, match="^--device .*: expected auto, cpu, cuda, cuda:N or mps$"):
        choose_device(name)


def test_mps_is_taken_where_there_is_one_and_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: no MPS device is available here; use --device cpu"):
        choose_device("mps")


def test_cuda_is_refused_where_there_is_none(gpus):
    gpus(0)
    with pytest.raises(ValueError, match="--device cuda:0: no CUDA device .* --device cpu"):
        choose_device("cuda:0")


@pytest.mark.parametrize("name, local_rank", [("cuda:2", 0), ("cuda", 2), ("auto", 2)])
def test_a_gpu_that_does_not_exist_is_refused(gpus, name, local_rank):
    gpus(2)
    with pytest.raises(ValueError, match="--device cuda:2: this machine has 2 GPUs"):
        choose_device(name, local_rank)


# -- alone -------------------------------------------------------------------------------------------------------------


def test_alone_everything_is_a_no_op():
    tensor = torch.arange(3.0)
    with joined_ranks(Place(), CPU) as ranks:
        assert not torch.distributed.is_initialized()
        assert ranks.is_main and (ranks.rank, ranks.world_size, ranks.device) == (0, 1, CPU)
        assert ranks.sum_(tensor) is tensor and ranks.concat(tensor) is tensor
        assert ranks.from_main(lambda: {"a": 1}) == ranks.from_main_patiently(lambda: {"a": 1}, "") == {"a": 1}
        with pytest.raises(KeyError, match="why"):
            ranks.from_main(lambda: {}["why"])
    assert tensor.tolist() == [0, 1, 2]


def test_what_ranks_ask_each_other_between_steps_stays_off_their_devices(tmp_path):
    """On "meta", a tensor that is read or sent raises; on a GPU, it would make the host wait for the step."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ranks = Ranks(Place(0, 2), torch.device("meta"))  # which speaks to itself alone, as if to two
        assert [ranks.any(asked) for asked in (True, False, False)] == [False, True, False]
        assert ranks.from_main(lambda: {"a": 1}) == {"a": 1}
    finally:
        torch.distributed.destroy_process_group()


def test_only_rank_0_is_the_main_process():
    assert [Ranks(Place(rank, 3, rank), CPU).is_main for rank in range(3)] == [True, False, False]


def test_a_rank_without_an_address_to_meet_at_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with (
        pytest.raises(ValueError, match="rank 1 of 2, but MASTER_ADDR and MASTER_PORT are not set.*torchrun"),
        joined_ranks(Place(1, 2, 1), CPU),
    ):
        pytest.fail("joined")


@pytest.mark.parametrize("by, rank", [("environment", 0), ("environment", 1), ("tcp", 1), ("file", 0)])
def test_a_rank_that_does_not_join_is_reported_in_time(monkeypatch, tmp_path, by, rank):
    monkeypatch.setattr(dist_util, "JOIN_TIMEOUT", timedelta(seconds=1))
    port, dist_url = free_port(), "env://"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    if by != "environment":
        dist_url = f"tcp://127.0.0.1:{port}" if by == "tcp" else f"file://{tmp_path}/meet"
    begin = time.monotonic()
    with pytest.raises(ValueError) as raised, joined_ranks(Place(rank, 2, rank), CPU, dist_url):
        pytest.fail("joined")
    assert time.monotonic() - begin < 15
    text = str(raised.value)
    assert "\n" not in text and text.startswith(f"rank {rank} of 2: not all ranks met at ") and "within 1 s" in text
    assert (f"127.0.0.1:{port}" if by != "file" else "meet") in text
    assert not torch.distributed.is_initialized()


# -- two processes -----------------------------------------------------------------------------------------------------


def two_ranks_talk(rank, dist_url, out):
    """What one of two real processes saw, written to a file that the test reads."""
    torch.set_num_threads(1)
    seen = {}
    with joined_ranks(Place(rank, 2, rank), CPU, dist_url) as ranks:
        rows = torch.arange(6).reshape(3, 2) + 10 * rank
        seen["concat"] = ranks.concat(rows).tolist()
        seen["concat of a transposed view"] = ranks.concat(rows.T).tolist()
        tensor = torch.tensor([1.0, 2.0]) * (rank + 1)
        seen["sum in place"] = ranks.sum_(tensor) is tensor
        seen["sum"] = tensor.tolist()
        calls = []
        seen["from main"] = ranks.from_main(lambda: calls.append(rank) or {"folder": f"of rank {rank}"})
        seen["calls"] = calls
        try:
            ranks.from_main(fail_on_main)
        except Exception as error:
            seen["error"] = (type(error).__name__, str(error))
        seen["after the error"] = ranks.from_main(lambda: rank)

        dist_util.NEWS_INTERVAL = timedelta(seconds=0.2)
        news, said = count_calls(ranks), io.StringIO()
        with contextlib.redirect_stderr(said):
            seen["slow"] = ranks.from_main_patiently(lambda: time.sleep(0.7) or rank, "looking")
        seen["news"], seen["said"] = len(news), said.getvalue()
        try:
            ranks.from_main_patiently(fail_on_main, "looking")
        except Exception as error:
            seen["slow error"] = (type(error).__name__, str(error))
    seen["left"] = not torch.distributed.is_initialized()
    torch.save(seen, f"{out}/{rank}.pt")


def count_calls(ranks):
    """A list that grows with each call of from_main."""
    calls, from_main = [], ranks.from_main
    ranks.from_main = lambda compute: calls.append(1) or from_main(compute)
    return calls


def fail_on_main():
    raise FileNotFoundError("--data_dir: no such folder")


@pytest.fixture(scope="module")
def seen(module_folder):
    return on_two_ranks(two_ranks_talk, module_folder("ranks"))


def test_concat_is_in_the_order_of_the_ranks_on_both(seen):
    expected = [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13], [14, 15]]
    assert [rank["concat"] for rank in seen] == [expected, expected]
    transposed = [[0, 2, 4], [1, 3, 5], [10, 12, 14], [11, 13, 15]]
    assert [rank["concat of a transposed view"] for rank in seen] == [transposed, transposed]


def test_sum_adds_up_over_the_ranks_in_place(seen):
    assert [rank["sum"] for rank in seen] == [[3.0, 6.0]] * 2
    assert all(rank["sum in place"] for rank in seen)


def test_from_main_computes_on_rank_0_only_and_tells_all(seen):
    assert [rank["from main"] for rank in seen] == [{"folder": "of rank 0"}] * 2
    assert [rank["calls"] for rank in seen] == [[0], []]


def test_an_error_on_rank_0_is_raised_on_all_and_the_ranks_go_on_together(seen):
    assert [rank["error"] for rank in seen] == [("FileNotFoundError", "--data_dir: no such folder")] * 2
    assert [rank["after the error"] for rank in seen] == [0, 0]


def test_slow_work_of_rank_0_keeps_no_collective_waiting(seen):
    assert [rank["slow"] for rank in seen] == [0, 0]
    assert all(rank["news"] >= 4 for rank in seen)  # three times that it is not done, then the result
    assert seen[0]["said"].splitlines() == ["still looking"] * (seen[0]["news"] - 2) and seen[1]["said"] == ""
    assert [rank["slow error"] for rank in seen] == [("FileNotFoundError", "--data_dir: no such folder")] * 2


def test_the_process_group_is_left_at_the_end(seen):
    assert all(rank["left"] for rank in seen)


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_tf32_can_be_set_whatever_the_program_computed_in_before(before, allowed):
    matmul = torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision(before)
        dist_util.allow_tf32(allowed)
        assert matmul.allow_tf32 is allowed and torch.get_float32_matmul_precision() == (
            "high" if allowed else "highest"
        )
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("theirs, named", [(("a", "b"), None), (("x", "b"), "data"), (("x", "y"), "data and flags")])
def test_ranks_that_have_other_data_or_flags_are_found_by_all(theirs, named, monkeypatch):
    """The table of all ranks is the same on each, so each refuses alike."""
    asked = []
    ranks = Ranks(Place(), torch.device("cpu"))
    monkeypatch.setattr(ranks, "concat", lambda mine: asked.append(mine) or mine)
    ranks.check_alike(dict(zip(("data", "flags"), theirs, strict=True)), "")
    monkeypatch.setattr(ranks, "concat", lambda mine: torch.cat([mine, asked[0]]))
    if named is None:
        ranks.check_alike({"data": "a", "flags": "b"}, "80 images")
        return
    with pytest.raises(ValueError, match=rf"rank 1 has other {named} than rank 0 \(here: 80 images\)"):
        ranks.check_alike({"data": "a", "flags": "b"}, "80 images")
