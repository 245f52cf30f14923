"""Evaluating a training while it runs, through the training script in this process. What evaluates is a stand-in that
takes no libraries; tests/e2e/test_training_scores.py has the real one."""

import json
import sys

import numpy as np
import pytest
import torch
from support import (
    GUIDED,
    REPO,
    SPRINT,
    TIMES,
    TINY_DIGITS,
    assert_same_weights,
    call,
    few_steps,
    rows,
    script,
    weights,
)

from masked_diffusion.dist_util import Ranks
from masked_diffusion.runs import checkpoint
from masked_diffusion.training.eval_config import METRICS
from masked_diffusion.training.training_eval import lone_environment

TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"
STAND_IN = REPO / "tests" / "stand_in_evaluator.py"
COLUMNS = {*METRICS, "eval_num_samples"}


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    return path


@pytest.fixture
def train(monkeypatch, tmp_path, reference):
    """Run a tiny training that is evaluated at every step; later flags win. Returns its folder."""
    monkeypatch.setattr(script(TRAIN), "EVALUATOR", STAND_IN)
    evaluated = ["--eval_interval", "1", "--eval_ref", reference, "--eval_num_samples", "5", "--eval_batch_size", "2"]
    evaluated += ["--eval_sampling_steps", "2", "--ema_rate", "0.5", "--lr", "0.05"]

    def run(name, *flags, status=0, sinks="csv,log"):
        assert call(monkeypatch, TRAIN, tmp_path / name, *TINY_DIGITS, *evaluated, *flags, sinks=sinks) == status
        return tmp_path / name

    return run


def test_a_run_with_and_without_evaluation_ends_bit_for_bit_the_same(train):
    flags = ["--max_steps", "4", "--log_interval", "2", "--schedule_sampler", "loss-second-moment"]
    without = train("without", *flags, "--eval_interval", "0")
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    evaluated = train("with", *flags, "--eval_interval", "2")
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]
    for kind in ("model", "ema_0.5_"):
        assert_same_weights(weights(without, 4, kind), weights(evaluated, 4, kind))
    unlike = COLUMNS | TIMES.keys()
    pairs = list(zip(rows(without), rows(evaluated), strict=True))
    assert len(pairs) == 2
    for a, b in pairs:
        assert {k: v for k, v in a.items() if k not in unlike} == {k: v for k, v in b.items() if k not in unlike}


def test_columns_stand_in_every_row_and_are_empty_where_nothing_was_evaluated(train):
    folder = train("run", "--max_steps", "3", "--eval_interval", "2")
    assert all(set(row) >= COLUMNS for row in rows(folder))
    before = train("before", "--max_steps", "1", "--eval_interval", "2")
    assert set(rows(before)[0]) >= COLUMNS  # from the start, before there is a score
    assert [row["eval_num_samples"] for row in rows(folder)] == [None, 5, None]
    assert [row["eval_sfid"] for row in rows(folder)] == [None, 2, None]
    assert [row["eval_precision"] for row in rows(folder)] == [None, None, None]
    assert "step 2: FID " in (folder / "log.txt").read_text() and " of 5 samples" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("kind", GUIDED)
def test_an_evaluation_is_what_sampling_its_checkpoint_gives(train, monkeypatch, tmp_path, kind):
    weak = train("weak", "--eval_interval", "0", "--seed", "1") / "ema_0.5_000002.pt" if kind == "checkpoint" else None
    guides = [*GUIDED[kind], *(["--guide_path", weak] if weak else [])]
    model = SPRINT if kind == "path_drop" else []
    evaluated = ["--eval_cfg_scale", "30", "--eval_interval", "2", "--eval_sampling_steps", "3"]
    evaluated += ["--eval_guide_from", kind, *guides]
    folder = train("run", *model, *evaluated, sinks="csv,log")
    manifest = json.loads((folder / "evaluation" / "000002" / "manifest.json").read_text())
    assert manifest["settings"].get("guide", {}).get("from", "null_label") == kind
    cost = f"cost of evaluations: {manifest['passes_per_image']:g} passes of the model per image"
    assert manifest["passes_per_image"] > 3 and (folder / "log.txt").read_text().count(cost) == 1
    sampled = ["--model_path", folder / "ema_0.5_000002.pt", "--cfg_cond", "True", "--cfg_scale", "30"]
    sampled += ["--guide_from", kind, *guides]
    sampled += [*few_steps(3), "--num_samples", "5", "--batch_size", "2", "--device", "cpu"]
    assert call(monkeypatch, SAMPLE, tmp_path / "samples", *sampled) == 0
    with np.load(tmp_path / "samples" / "samples_5x8x8x3.npz") as file:
        pixels = file["arr_0"].astype(np.int64)
    fid = float((pixels.ravel() * np.arange(1, pixels.size + 1) % 1009).sum())
    assert rows(folder)[-1]["eval_fid"] == fid


def test_the_row_of_an_evaluated_step_does_not_count_again_after_a_resume(train):
    flags = ["--eval_interval", "3", "--log_interval", "5", "--max_steps", "5", "--lr", "1e-3"]
    whole = train("run", *flags)
    expected = rows(whole)
    assert [row["step"] for row in expected] == [3, 5]
    for path in whole.glob("*000005*"):
        path.unlink()
    train("run", *flags)
    assert [row | TIMES for row in rows(whole)] == [row | TIMES for row in expected]


def test_nobody_but_the_writer_waits_for_a_slow_disk(train, monkeypatch):
    """A collective gives up after some minutes; each wait for a checkpoint lets the other ranks know meanwhile."""
    waits = []
    patiently = Ranks.from_main_patiently
    monkeypatch.setattr(
        Ranks,
        "from_main_patiently",
        lambda self, compute, doing: waits.append(doing) or patiently(self, compute, doing),
    )
    train("run", "--max_steps", "2", "--eval_interval", "2")
    assert waits.count("writing a checkpoint") == 3  # before the save, before the best is noted, at the end


def test_every_setting_of_the_sampling_changes_the_score(train):
    few = ["--eval_interval", "2", "--eval_sampling_steps", "3"]
    scores = [rows(train("plain", *few))[-1]["eval_fid"]]
    for name, value in (("sampler", "ddim"), ("sampling_steps", 4), ("cfg_scale", 400), ("num_samples", 6)):
        scores.append(rows(train(name, *few, f"--eval_{name}", value))[-1]["eval_fid"])
    assert len(set(scores)) == len(scores)
    assert rows(train("batch", *few, "--eval_batch_size", "5"))[-1]["eval_fid"] == scores[0]


def test_the_checkpoint_of_the_lowest_fid_is_recorded_and_never_pruned(train, monkeypatch):
    monkeypatch.setenv("EVALUATOR_SCORES", "1=7,2=5,3=6,4=5,5=9,6=9")
    folder = train("run", "--max_steps", "6", "--keep_checkpoints", "2")
    assert json.loads((folder / "best.json").read_text()) == {
        "step": 2, "eval_fid": 5, "eval_sfid": 2, "eval_is": 3, "eval_num_samples": 5,
    }  # fmt: skip
    assert sorted(path.name for path in folder.glob("checkpoint*")) == [
        f"checkpoint{step:06d}.json" for step in (2, 5, 6)
    ]


def test_samples_go_once_they_have_a_report_and_the_grid_stays(train):
    folder = train("run") / "evaluation" / "000002"
    names = {path.name for path in folder.iterdir()}
    assert names == {"report.json", "manifest.json", "samples_5x8x8x3.png", "evaluator.log"}


def test_a_failed_evaluation_costs_a_line_of_the_log_and_is_made_up_for_at_the_next_start(train, monkeypatch):
    monkeypatch.setenv("EVALUATOR_FAILS", "out of luck")
    folder = train("run", "--eval_interval", "2")
    assert "no score of step 2: evaluator.py: error: out of luck" in (folder / "log.txt").read_text()
    assert rows(folder)[-1]["eval_fid"] is None and not (folder / "best.json").exists()
    assert (folder / "evaluation" / "000002" / "samples_5x8x8x3.npz").is_file()
    monkeypatch.delenv("EVALUATOR_FAILS")
    train("run", "--eval_interval", "2")  # which has nothing else to do
    train("run", "--eval_interval", "2", "--max_steps", "3")
    assert [(row["step"], row["eval_fid"] is not None) for row in rows(folder)] == [
        (1, False), (2, False), (2, True), (3, False),
    ]  # fmt: skip
    assert checkpoint.read_best(folder)["step"] == 2
    train("run", "--eval_interval", "2", "--max_steps", "4", "--log_interval", "4")
    assert [row["step"] for row in rows(folder)] == [1, 2, 2, 3, 4]  # step 2 is not evaluated again


def test_samples_that_are_not_finite_cost_a_line_of_the_log(train):
    folder = train("run", "--lr", "1e30", "--eval_interval", "2", "--max_bad_steps", "0")
    assert "no score of step 2: " in (folder / "log.txt").read_text()


def test_starting_anew_moves_scores_and_best_aside(train):
    folder = train("run")
    train("run", "--overwrite", "True", "--eval_interval", "0")
    assert (folder / "former_1" / "best.json").is_file() and (folder / "former_1" / "evaluation").is_dir()
    assert not (folder / "best.json").exists() and not (folder / "evaluation").exists()


def test_a_dry_run_tries_the_evaluator_and_writes_nothing(train, capsys):
    folder = train("dry", "--dry_run", "True")
    assert not folder.exists()
    assert "nothing was written" in capsys.readouterr().out


def test_settings_without_evaluation_are_said_to_be_ignored(train, capsys):
    train("run", "--eval_interval", "0", "--eval_sampler", "ddim", sinks="stdout")
    assert "warning: --eval_sampler is ignored without --eval_interval" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--eval_interval", "-1"], "--eval_interval -1: must be 0 or more"),
        (["--eval_num_samples", "1"], "--eval_num_samples 1: must be 2 or more"),
        (["--eval_batch_size", "0"], "--eval_batch_size 0: must be 1 or more"),
        (["--eval_backend", "jax"], "--eval_backend jax: unknown; choose one of torch, tensorflow"),
        (["--eval_sampler", "rk4"], "--eval_sampler rk4: unknown; choose one of ddpm"),
        (["--eval_sampling_steps", "2000"], "--eval_sampling_steps 2000: the process has 1000"),
        (["--eval_cfg_scale", "2", "--class_cond", "False"], "--eval_cfg_scale 2.0: guidance needs classes"),
        (["--eval_ref", ""], "--eval_interval 1: give the reference batch to compare with --eval_ref"),
        (["--eval_ref", "no/such.npz"], "--eval_ref no/such.npz: no such file"),
        (["--eval_graph", "no/such.pb"], "--eval_graph no/such.pb: no such file"),
        (["--eval_ref", str(STAND_IN)], f"--eval_ref {STAND_IN}: the evaluator cannot work with it: "),
    ],
)
def test_what_cannot_be_is_refused_before_the_training(train, tmp_path, capsys, flags, sentence):
    train("run", *flags, status=2)
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_the_evaluator_beside_the_script_the_flag_is_refused(train, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script(TRAIN), "EVALUATOR", tmp_path / "evaluator.py")
    train("run", status=2)
    assert "the evaluator is not part of the installed package, and" in capsys.readouterr().err


def test_the_evaluator_is_not_told_of_the_trainings_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
        assert name not in lone_environment()
    assert {"PATH", "HOME"} <= set(lone_environment()) or sys.platform == "win32"
