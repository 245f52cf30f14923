"""Whatever becomes of stdout and stderr, the work ends with its usual result."""

import io
import shlex
import sys

import pytest
from support import TINY_DIGITS, call, command, environment, few_steps, rows, run_command, script

from masked_diffusion.processes.standard_streams import lasting_streams
from masked_diffusion.runs.checkpoint import damage

TRAIN, SAMPLE, ENCODE = "scripts/image_train.py", "scripts/image_sample.py", "scripts/encode_latents.py"


def full():
    return open("/dev/full", "w")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [full, closed, lambda: None], ids=["full", "closed", "closed from the start"])
def test_a_training_and_a_sampling_without_stdout_and_stderr_end_as_usual(stream, monkeypatch, tmp_path):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, sinks="stdout,log,csv") == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 2] and (tmp_path / "checkpoint000002.json").exists()
    said = (tmp_path / "log.txt").read_text()
    assert said.count("stdout cannot be written") == said.count("stderr cannot be written") == 1
    assert "saved the checkpoint of step 2" in said
    flags = ["--model_path", tmp_path / "ema_0.9999_000002.pt", "--num_samples", 2, *few_steps(2)]
    assert call(monkeypatch, SAMPLE, tmp_path, *flags) == 0
    assert (tmp_path / "samples_2x8x8x3.npz").exists()


def encoding(colour_folder, tiny_vae, out, num_workers=0):
    flags = ["--data_dir", colour_folder, "--vae_path", tiny_vae, "--image_size", 32, "--shard_size", 5]
    return [*flags, "--device", "cpu", "--num_workers", num_workers, "--out", out]


@pytest.fixture(scope="module")
def latents(colour_folder, tiny_vae, module_folder):
    """What an encoding writes that has a stdout and a stderr."""
    folder = module_folder("latents")
    assert script(ENCODE).main([str(flag) for flag in encoding(colour_folder, tiny_vae, folder)]) == 0
    return files_of(folder)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stream", [full, closed, lambda: None], ids=["full", "closed", "closed from the start"])
def test_an_encoding_without_stdout_and_stderr_ends_as_usual(
    stream, monkeypatch, tmp_path, latents, colour_folder, tiny_vae
):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    assert call(monkeypatch, ENCODE, tmp_path, *encoding(colour_folder, tiny_vae, tmp_path / "latents")) == 0
    assert files_of(tmp_path / "latents") == latents


def test_a_log_that_cannot_be_written_is_told_to_the_others(monkeypatch, tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, sinks="stdout,log,csv") == 0
    assert "HumanSink could not write" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_the_streams_are_as_before_when_the_work_is_done():
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyError), lasting_streams():
        assert sys.stdout is not before[0]
        raise KeyError
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.e2e
@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>&1 | head -n 1; exit ${PIPESTATUS[0]}"], ids=["closed", "pipe"])
def test_a_real_training_without_stdout_and_stderr_ends_as_usual(redirection, tmp_path):
    line = shlex.join(command(TRAIN, *TINY_DIGITS))
    done = run_command(["bash", "-c", f"{line} {redirection}"], environment(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stderr cannot be written" in (tmp_path / "log.txt").read_text()
    assert damage(tmp_path, 2) is None


@pytest.mark.e2e
def test_a_real_encoding_without_stdout_and_stderr_ends_as_usual(tmp_path, latents, colour_folder, tiny_vae):
    line = shlex.join(command(ENCODE, *encoding(colour_folder, tiny_vae, tmp_path / "latents", num_workers=1)))
    done = run_command(["bash", "-c", f"{line} >&- 2> /dev/full"], environment(tmp_path))
    assert done.returncode == 0 and files_of(tmp_path / "latents") == latents
