"""Every way to start the processes of one run, with real processes, against one bare process of the same global batch.

torchrun and torch.distributed.launch on one machine are in test_processes.py.
"""

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import (
    REPO,
    TIMEOUT,
    TINY_DIGITS,
    assert_same_weights,
    command,
    environment,
    free_port,
    rows,
    run,
    run_command,
    weights,
)

pytestmark = pytest.mark.e2e

TRAIN = "scripts/image_train.py"
FLAGS = [*TINY_DIGITS, "--lr", "1e-3"]
BIN = Path(sys.executable).parent
JOIN_SECONDS = 3


@pytest.fixture(scope="module")
def bare(module_folder):
    """The run that all others have to equal: one process, no launcher, twice the batch."""
    folder = module_folder("bare")
    run(TRAIN, folder, *FLAGS, "--batch_size", 4)
    return folder


def start_together(jobs):
    """Run commands at the same time, each given as (arguments, environment). Returns their results."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: run_command(job[0], job[1], cwd=REPO), jobs))


def assert_equal_run(folder, bare, finished):
    for done in finished:
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(weights(folder, 2), weights(bare, 2), atol=1e-4)
    losses = [[row["loss"] for row in rows(path)] for path in (folder, bare)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert [row["samples"] for row in rows(folder)] == [4, 8]  # two processes of 2, not two runs of 2


def test_mpiexec(bare, tmp_path):
    pytest.importorskip("mpi4py", reason="under mpiexec the processes find each other through mpi4py")
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join([str(BIN), os.environ["PATH"]]))
    if mpiexec is None:
        pytest.skip("there is no mpiexec")
    training = command(TRAIN, *FLAGS, "--batch_size", 2)
    assert_equal_run(tmp_path, bare, [run_command([mpiexec, "-n", "2", *training], environment(tmp_path))])


def job_number():
    """Of a SLURM job whose port is free: it is 10000 + number % 50000."""
    while not 10_000 <= (port := free_port()) < 60_000:
        pass
    return port - 10_000


def test_the_variables_that_slurm_sets(bare, tmp_path):
    step = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": job_number()}
    training = command(TRAIN, *FLAGS, "--batch_size", 2)
    tasks = [environment(tmp_path, SLURM_PROCID=rank, SLURM_LOCALID=rank, **step) for rank in range(2)]
    assert_equal_run(tmp_path, bare, start_together([(training, env) for env in tasks]))


def test_flags_without_any_launcher(bare, tmp_path):
    place = ["--world_size", 2, "--dist_url", f"tcp://127.0.0.1:{free_port()}", "--batch_size", 2]
    trainings = [command(TRAIN, *FLAGS, *place, "--rank", rank) for rank in range(2)]
    assert_equal_run(tmp_path, bare, start_together([(training, environment(tmp_path)) for training in trainings]))


def test_two_nodes_through_the_published_scripts(bare, tmp_path):
    settings = {
        "NUM_NODE": 2, "GPU_PRE_NODE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        "DATA_PATH": "builtin:digits", "MODEL": "MDT_Ti_2", "IMAGE_SIZE": 8, "MASK_RATIO": 0.3, "BATCH_SIZE": 2,
        "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
    }  # fmt: skip
    further = (
        "--vae_path none --max_steps 2 --log_interval 1 --preview_samples 0 --num_workers 0 --device cpu --lr 1e-3"
    )
    master = (["bash", "run_ddp_master.sh", *further.split()], environment(tmp_path, **settings))
    worker = (["bash", "run_ddp_worker.sh", *further.split()], environment(tmp_path, RANK=1, **settings))
    assert_equal_run(tmp_path, bare, start_together([master, worker]))


def test_a_worker_script_without_its_settings_says_which(tmp_path):
    env = environment(tmp_path)
    for name, given in (("MASTER_ADDR", {}), ("RANK", {"MASTER_ADDR": "127.0.0.1"})):
        done = run_command(["bash", "run_ddp_worker.sh"], {**env, **given}, cwd=REPO)
        assert done.returncode != 0 and f"set {name} to" in done.stderr


@pytest.mark.parametrize(
    "script, settings",
    [
        ("run.sh", ["DATA_PATH=", "NUM_GPUS=8", "MODEL=MDT_S_2", "STEPS=2000"]),
        ("run_sample.sh", ["MODEL_PATH=output_mdt_xl2/mdt_xl2_v1_ckpt.pt", "NUM_SAMPLES=50000", "GRAPH="]),
        ("run_ddp_master.sh", ["MASTER_ADDR=$(hostname)", "RANK=0", "NUM_NODE=8", "JOIN_SECONDS=300"]),
        ("run_ddp_worker.sh", ["RANK: set RANK to the number", "JOIN_SECONDS=300", "MAX_RESTARTS=3"]),
    ],
)
def test_help_of_the_shell_scripts_lists_the_settings_and_starts_nothing(tmp_path, script, settings):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho started >&2\n")
    python.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    env = environment(tmp_path, PATH=path, PYTHON=python, VIRTUAL_ENV=tmp_path)
    done = run_command(["bash", str(REPO / script), "--help"], env, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {setting}" in done.stdout for setting in settings), done.stdout
    assert "Variables and their defaults" in done.stdout and "\n+" not in done.stdout


SHORTENED = f"""
import runpy, sys
from datetime import timedelta
from masked_diffusion import dist_util
dist_util.JOIN_TIMEOUT = timedelta(seconds={JOIN_SECONDS})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_when_a_rank_never_joins_the_other_says_so_in_time(tmp_path):
    """Rank 0 waits for one that never comes; rank 1 for a first machine that was never started."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(SHORTENED)
    training = [sys.executable, str(wrapper), *command(TRAIN, *FLAGS)[1:]]
    ports = [free_port(), free_port()]
    ranks = [
        environment(tmp_path, RANK=rank, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=ports[rank])
        for rank in range(2)
    ]
    started = time.monotonic()
    finished = start_together([(training, env) for env in ranks])
    waited = time.monotonic() - started
    for rank, done in enumerate(finished):
        assert done.returncode == 2, done.stderr
        expected = f"rank {rank} of 2: not all ranks met at 127.0.0.1:{ports[rank]} within {JOIN_SECONDS} s"
        assert expected in done.stderr and "check that every node was started" in done.stderr
        assert "Traceback" not in done.stderr
    assert JOIN_SECONDS <= waited < TIMEOUT / 3  # mostly the start of two processes
    assert not list(tmp_path.glob("*.json"))  # nothing was begun


WITHOUT = """
import importlib, pkgutil, runpy, sys
from importlib.machinery import ModuleSpec

class Broken:
    # Found, as libraries like to look whether it is there, but never imported.
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in ("mpi4py", "tensorflow") else None

    def create_module(self, spec):
        raise ImportError(f"{spec.name} must not be needed")

    def exec_module(self, module):
        raise AssertionError

sys.meta_path.insert(0, Broken())
for name in ("mpi4py", "tensorflow"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} can be imported: this proves nothing")
import masked_diffusion
names = [module.name for module in pkgutil.walk_packages(masked_diffusion.__path__, "masked_diffusion.")]
for name in names:
    importlib.import_module(name)
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, end.code
assert not {"mpi4py", "tensorflow"} & set(sys.modules)
print("imported", *names)
"""


def test_neither_mpi_nor_tensorflow_is_needed_to_import_the_package(tmp_path):
    scripts = [str(REPO / f"scripts/image_{name}.py") for name in ("train", "sample")]
    done = run_command([sys.executable, "-c", WITHOUT, *scripts], environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == 2
    imported = done.stdout.splitlines()[-1].split()[1:]
    modules = [path.relative_to(REPO).with_suffix("") for path in (REPO / "masked_diffusion").rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in modules}
    assert set(imported) == names - {"masked_diffusion"}
