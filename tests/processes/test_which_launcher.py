import pytest
from hypothesis import given
from hypothesis import strategies as st

from masked_diffusion.processes.launchers import Place, find_place, launched_rank, local_world_size

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
OTHER_SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize("environ", [TORCHRUN, OPEN_MPI, MPICH, SLURM])
def test_the_place_is_read_from_every_launcher(environ):
    assert find_place(environ) == Place(rank=5, world_size=8, local_rank=1)
    assert launched_rank(environ) == 5


def test_a_bare_process_is_alone():
    assert find_place({}) == Place(0, 1, 0)
    assert launched_rank({}) == 0


@pytest.mark.parametrize("environ", [TORCHRUN, OPEN_MPI, MPICH])
def test_a_launcher_inside_a_slurm_step_wins_over_the_step(environ):
    assert find_place({**OTHER_SLURM, **environ}) == Place(5, 8, 1)


def test_a_slurm_step_that_serves_mpi_programs_is_still_a_slurm_step():
    # srun --mpi=pmi2 sets these two, and a local rank only in its own words.
    assert find_place({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8"}) == Place(5, 8, 1)


def test_torchrun_wins_over_mpi():
    assert find_place({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == Place(0, 2, 0)


@pytest.mark.parametrize("environ", [{"RANK": "3"}, {"WORLD_SIZE": "4"}, {"LOCAL_RANK": "3"}, {"SLURM_PROCID": "3"}])
def test_half_of_a_launchers_variables_do_not_count(environ):
    # Clusters set RANK to the number of the node, without WORLD_SIZE.
    assert find_place(environ) == Place(0, 1, 0)
    assert find_place({**environ, **OPEN_MPI}) == Place(5, 8, 1)


def test_flags_win_over_the_environment():
    assert find_place(TORCHRUN, rank=2, world_size=3, local_rank=0) == Place(2, 3, 0)
    assert find_place(TORCHRUN, local_rank=7) == Place(5, 8, 7)
    assert find_place(TORCHRUN, rank=0) == Place(0, 8, 1)
    assert find_place({}, rank=1, world_size=2) == Place(1, 2, 1)


def test_without_a_local_rank_all_processes_are_on_one_machine():
    assert find_place({"RANK": "5", "WORLD_SIZE": "8"}) == Place(5, 8, 5)


@pytest.mark.parametrize(
    "flags", [{"rank": 1}, {"rank": 2, "world_size": 2}, {"rank": -1, "world_size": 2}, {"rank": 0, "world_size": 0}]
)
def test_a_rank_outside_the_world_is_refused_naming_the_flags(flags):
    with pytest.raises(ValueError, match=f"--rank {flags['rank']} --world_size"):
        find_place({}, **flags)
    bad = {"RANK": str(flags["rank"]), "WORLD_SIZE": str(flags.get("world_size", 1))}
    with pytest.raises(ValueError):
        find_place(bad)
    assert launched_rank(bad) == 0


@given(world_size=st.integers(1, 64), data=st.data())
def test_every_rank_of_a_world_has_its_place(world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    assert find_place({"RANK": str(rank), "WORLD_SIZE": str(world_size)}) == Place(rank, world_size, rank)


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"MPI_LOCALNRANKS": "3"}, 3),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "2(x3)"}, 1),
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "1"}, 8),
        ({"LOCAL_WORLD_SIZE": "0"}, 1),
    ],
)
def test_the_processes_of_this_machine_are_counted(environ, expected):
    assert local_world_size(environ) == expected
