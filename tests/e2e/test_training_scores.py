"""Evaluating a training while it runs, with the evaluator itself, on one process and on two."""

import json
import re
import signal
import sys
import time
import types

import numpy as np
import pytest
import torch
from inception_2015 import write_inception_2015
from support import TIMEOUT, TINY_DIGITS, begin, command, environment, rows, run, weights

from masked_diffusion.training.eval_config import METRICS

pytestmark = pytest.mark.e2e

TRAIN = "scripts/image_train.py"


@pytest.fixture(scope="module")
def evaluated(module_folder):
    """Flags of a training of the digits that is evaluated after two steps."""
    folder = module_folder("digits")
    graph, reference = folder / "digits.pb", folder / "digits_test.npz"
    run("scripts/read_digits.py", folder, "--graph", graph, "--reference", reference)
    flags = ["--eval_interval", 2, "--eval_ref", reference, "--eval_graph", graph, "--eval_backend", "tensorflow"]
    return [*TINY_DIGITS, *flags, "--eval_num_samples", 7, "--eval_sampling_steps", 3, "--eval_batch_size", 2]


def test_the_score_does_not_depend_on_the_number_of_processes_nor_on_shards(evaluated, tmp_path):
    run(TRAIN, tmp_path / "start", *TINY_DIGITS)
    state = weights(tmp_path / "start", 2)
    generator = torch.Generator().manual_seed(0)
    for value in state.values():
        if value.is_floating_point():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    torch.save(state, tmp_path / "model.pt")
    # Updates that are lost in rounding: both trainings end with the weights that they begin with.
    flags = [*evaluated, "--init_from", tmp_path / "model.pt", "--lr", "1e-30", "--ema_rate", "0.5"]
    scores = []
    for processes, batch_size, shard in ((None, 4, "none"), (2, 2, "none"), (2, 2, "fsdp")):
        folder, sizes = tmp_path / f"on_{processes}_{shard}", ["--batch_size", batch_size, "--shard", shard]
        done = run(TRAIN, folder, *flags, *sizes, processes=processes, OPENAI_LOG_FORMAT="csv,log")
        report = json.loads((folder / "evaluation" / "000002" / "report.json").read_text())
        assert report["sample"]["N"] == 7, done.stderr
        scores.append({name: rows(folder)[-1][name] for name in METRICS})
        assert scores[-1] == {name: report["metrics"][METRICS[name]] for name in METRICS}
        assert json.loads((folder / "best.json").read_text())["step"] == 2
    assert scores[0] == scores[1] == scores[2] and scores[0]["eval_fid"] > 0


def test_the_torch_backend_scores_a_training_on_two_processes(tf, tmp_path, monkeypatch):
    graph, reference = write_inception_2015(tf, tmp_path / "inception.pb"), tmp_path / "reference.npz"
    np.savez(reference, arr_0=np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), "u1"))
    flags = ["--eval_interval", 1, "--eval_ref", reference, "--eval_graph", graph]  # torch is the default
    flags += ["--eval_num_samples", 3, "--eval_sampling_steps", 2, "--eval_batch_size", 2]
    folder = tmp_path / "run"
    run(TRAIN, folder, *TINY_DIGITS, *flags, "--max_steps", 1, processes=2, OPENAI_LOG_FORMAT="csv,log,tensorboard")
    report = json.loads((folder / "evaluation" / "000001" / "report.json").read_text())
    assert set(report["versions"]) == {"python", "numpy", "torch"}  # and not TensorFlow
    [row] = rows(folder)
    scores = {name: report["metrics"][METRICS[name]] for name in METRICS} | {"eval_num_samples": 3}
    assert scores["eval_fid"] > 0 and {name: row[name] for name in scores} == scores
    assert re.search(r"step 1: FID \d.* of 3 samples, the best so far", (folder / "log.txt").read_text())
    assert json.loads((folder / "best.json").read_text())["step"] == 1
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb")).Reload()
    assert [event.value for event in events.Scalars("eval_fid")] == pytest.approx([scores["eval_fid"]])
    assert [event.value for event in events.Scalars("eval_num_samples")] == [3]


def test_a_signal_ends_an_evaluation_after_its_batches_and_the_run_with_it(evaluated, tmp_path):
    folder = tmp_path / "run"
    flags = [*evaluated, "--max_steps", 9, "--eval_num_samples", 100000, "--eval_batch_size", 1]
    process = begin(command(TRAIN, *flags, processes=2), environment(folder))
    parts = folder / "evaluation" / "000002"
    deadline = time.monotonic() + TIMEOUT
    while not list(parts.glob("parts_*/*.npy")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert "stopped by a signal after step 2" in output, output  # not 3: the next start evaluates step 2
    assert "no score of step 2: the run is asked to stop" in (folder / "log.txt").read_text()
    assert (folder / "checkpoint000002.json").is_file() and list(parts.glob("parts_*/*.npy"))
