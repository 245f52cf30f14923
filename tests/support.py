"""Starting the project's scripts: in this process, where many small runs are compared, and as real ones."""

import atexit
import contextlib
import csv
import importlib.util
import inspect
import os
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from warm_python import WarmPython

from masked_diffusion.data.data_stream import DataOrder
from masked_diffusion.dist_util import Place, Ranks
from masked_diffusion.image_datasets import open_dataset

REPO = Path(__file__).parent.parent
TIMEOUT = 180

# A training that takes a second: digits in pixel space on the smallest model.
TINY_DIGITS = [
    "--data_dir", "builtin:digits", "--vae_path", "none", "--image_size", "8", "--model", "MDT_Ti_2",
    "--mask_ratio", "0.3", "--decode_layer", "2", "--batch_size", "4", "--max_steps", "2", "--log_interval", "1",
    "--preview_samples", "0", "--num_workers", "0", "--device", "cpu",
]  # fmt: skip

# Each kind of guidance with flags that training and sampling share, so that each of them is there once; of a model that
# can have it.
GUIDED = {
    "null_label": [],
    "checkpoint": ["--guide_labels", "null", "--guidance", "constant"],
    "path_drop": ["--guidance", "linear"],
    "masked": ["--guide_ratio", "0.6", "--guidance", "interval", "--cfg_interval", "100-999"],
    "routed": ["--guide_ratio", "0.6", "--guide_strong_ratio", "0.2", "--scale_pow", "1"],
}
SPRINT = ["--model", "DiT_Ti_2", "--policy", "sprint", "--mask_ratio", "0.5"]  # which learns to drop paths


def few_steps(number):
    """Flags of a sampling of so few steps that they have to be allowed."""
    return ["--num_sampling_steps", str(number), "--few_steps", "True"]


# Columns of the log that differ from run to run.
TIMES = {"images_per_second": 0, "seconds": 0}


@cache
def script(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPO / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(monkeypatch, path, folder, *arguments, sinks="csv"):
    """Run a script in this process, with its output in ``folder``. Returns its exit status."""
    monkeypatch.setenv("OPENAI_LOGDIR", str(folder))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", sinks)
    return script(path).main([str(argument) for argument in arguments])


@cache
def model_of(folder, *flags):
    """A model of digits with random weights, which predicts grey images, so that every setting shows. Its path."""
    with pytest.MonkeyPatch.context() as patch:
        kind = ["--max_steps", "1", "--predict_xstart", "True", "--learn_sigma", "False", "--sigma_small", "True"]
        assert call(patch, "scripts/image_train.py", folder, *TINY_DIGITS, *kind, *flags) == 0
    path = folder / "ema_0.9999_000001.pt"
    state = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for value in state.values():
        if value.is_floating_point():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    state["final_layer.linear.weight"] *= 0.3
    torch.save(state, path)
    return path


def environment(folder, **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "SLURM_", "OMPI_", "PMI_"))}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **offline, "OPENAI_LOGDIR": str(folder), **{k: str(v) for k, v in variables.items()}}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(path, *arguments, processes=None, launcher="torch.distributed.run"):
    """Command line of a script, under a launcher when a number of processes is given."""
    launch = []
    if processes is not None:
        launch = ["-m", launcher, f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return [sys.executable, *launch, str(REPO / path), *map(str, arguments)]


def run_command(arguments, env, cwd=None, timeout=TIMEOUT):
    """Run a command to its end; on time-out its whole process group is ended. Returns a CompletedProcess."""
    process = subprocess.Popen(
        arguments, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@cache
def warm_python():
    """The folder of a ``python`` that has imported torch, see ``warm_python.py``; None where the system has no such."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # another system than Linux, or a container that forbids it
        return None
    if len(tempfile.gettempdir()) > 70:  # the name of a socket may not be longer than 107
        return None
    server = WarmPython(environment(""))
    atexit.register(server.close)
    return server.folder


def run(path, folder, *arguments, processes=None, launcher="torch.distributed.run", check=True, warm=True, **variables):
    """Run a script as a real process (or several) to its end. warm: by :func:`warm_python`."""
    words = command(path, *arguments, processes=processes, launcher=launcher)
    if warm and (tools := warm_python()):
        words[0] = str(tools / "python")
    done = run_command(words, environment(folder, **variables))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def on_two_ranks(work, folder):
    """Call ``work(rank, dist_url, folder)``, a function of a test module, in two processes. Returns what each saved as
    ``{rank}.pt`` there."""
    dist_url = f"tcp://127.0.0.1:{free_port()}"
    paths = [str(Path(inspect.getfile(work)).parent), str(Path(__file__).parent)]
    python = str(warm_python() / "python") if warm_python() else sys.executable
    processes = []
    for rank in range(2):
        code = (
            f"import sys, pathlib\nsys.path[:0] = {paths}\nfrom {work.__module__} import {work.__name__} as work\n"
            f"work({rank}, {dist_url!r}, pathlib.Path({str(folder)!r}))"
        )
        processes.append(begin([python, "-c", code], environment(folder)))
    try:
        said = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def begin(arguments, env):
    """Start a command in a session of its own, stdout and stderr in one."""
    return subprocess.Popen(
        arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill_run(process, folder):
    """SIGKILL to a command and every process of its run: torchrun's ranks are in sessions of their own."""
    os.kill(process.pid, signal.SIGKILL)
    for number in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.communicate(timeout=TIMEOUT)


def processes_of(folder):
    """Ids of the processes that still run with this output folder."""
    wanted = f"OPENAI_LOGDIR={folder}".encode()
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and wanted in environ_of(path)]


def pid_of_rank(number, folder):
    """The process that a launcher started as this rank."""
    wanted = {f"RANK={number}".encode(), f"OPENAI_LOGDIR={folder}".encode()}
    [pid] = [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit()
        and wanted <= set(variables := environ_of(path))
        and any(variable.startswith(b"LOCAL_RANK=") for variable in variables)  # not the launcher
    ]
    return pid


def environ_of(process):
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return []


def rows(folder):
    with (Path(folder) / "progress.csv").open(newline="") as file:
        return [{name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)]


def has_logged(folder, step):
    """Whether a run has logged a step. A run that starts over moves the former log aside."""
    try:
        return any(row["step"] >= step for row in rows(folder))
    except FileNotFoundError:
        return False


def weights(folder, step, kind="model"):
    return torch.load(Path(folder) / f"{kind}{step:06d}.pt", weights_only=True)


def assert_same_weights(a, b, atol=0.0):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}


def make_colour_folder(folder, per_class=8, size=40):
    """Three classes of images, one colour each, in one folder per class."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            noise = rng.integers(-20, 20, (size, size + 8, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def names_in_order(folder, seed=0):
    """Paths of a folder's images in the order of the first epoch."""
    dataset = open_dataset(str(folder), image_size=8)
    return [dataset.name_of(index) for index in DataOrder(len(dataset), seed).permutation(0)]


def one_of(rank, world_size):
    """This process as if it were one of several, which say nothing to each other."""
    return Ranks(Place(rank, world_size), torch.device("cpu"))


def truncate(folder, *names):
    """Cut image files of a folder off in the middle. Returns their paths, sorted."""
    paths = sorted(Path(folder) / name for name in names)
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [str(path) for path in paths]
