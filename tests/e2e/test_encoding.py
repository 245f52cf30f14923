"""Encoding latents as real processes: killed while it writes, it ends with the bytes of an undisturbed run."""

import os
import signal
import time
from pathlib import Path

import pytest
from support import TIMEOUT, begin, command, environment, kill_run, make_colour_folder, pid_of_rank, run

from masked_diffusion.data.latent_cache import INDEX_NAME, RECORD_NAME, UNFINISHED_NAME

pytestmark = pytest.mark.e2e

ENCODE = "scripts/encode_latents.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_colour_folder(tmp_path_factory.mktemp("images"), per_class=100)


@pytest.fixture(scope="module")
def flags(images, tiny_vae):
    return ["--data_dir", images, "--vae_path", tiny_vae, "--image_size", 32, "--batch_size", 2, "--num_workers", 0,
            "--device", "cpu"]  # fmt: skip


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """Latents of 300 images in 60 files."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(ENCODE, folder, *flags, "--shard_size", 5, "--out", folder)
    files = files_of(folder)
    assert len(files) == 62 and {RECORD_NAME, INDEX_NAME} < files.keys()
    return files


def wait_until(process, condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_an_encoding_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_one(flags, undisturbed, tmp_path):
    arguments = [*flags, "--shard_size", 5, "--out", tmp_path]
    for processes, enough in ((None, 5), (2, 20)):
        process = begin(command(ENCODE, *arguments, processes=processes), environment(tmp_path))
        wait_until(process, lambda enough=enough: len(list(tmp_path.glob("0*.safetensors"))) >= enough)
        kill_run(process, tmp_path)
        kept = sorted(tmp_path.glob("0*.safetensors"))
        assert enough <= len(kept) < 60 and not (tmp_path / RECORD_NAME).exists()
        kept[0].write_bytes(kept[0].read_bytes()[:100])  # as an old disk may
    times = {path: path.stat().st_mtime_ns for path in kept[1:]}
    run(ENCODE, tmp_path, *arguments, processes=2)
    assert files_of(tmp_path) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_ranks_whose_torchrun_is_killed_end_in_the_middle_of_a_file(flags, tmp_path):
    arguments = command(ENCODE, *flags, "--shard_size", 150, "--out", tmp_path, processes=2)
    process = begin(arguments, environment(tmp_path))
    wait_until(process, lambda: (tmp_path / INDEX_NAME).exists())
    ranks = [pid_of_rank(number, tmp_path) for number in range(2)]
    os.kill(process.pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=TIMEOUT)  # the ranks hold stdout, too
    deadline = time.monotonic() + TIMEOUT
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert out.count("RuntimeError: torchrun has ended; start the same command again") == 2
    assert set(files_of(tmp_path)) == {UNFINISHED_NAME, INDEX_NAME}
