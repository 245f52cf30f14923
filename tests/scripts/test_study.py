"""scripts/study.py: all arms at equal compute, verdicts, controls, and a study that goes on after a kill."""

import csv
import json
import os
import re
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import image_train
import pytest
import torch
from studying import trainer
from studying.judge import KeptBytes, spread
from studying.measure import measure
from studying.plan import (
    AGAIN,
    CONTROLS,
    PLAIN,
    TREAD_FINALE,
    WEAKER,
    Run,
    arms_of,
    as_arguments,
    network_of,
    runs_of,
    training_flags,
)
from studying.progress import Progress, share_done
from studying.report import words_of
from studying.settings import OTHER_SEEDS, Study
from studying.verdicts import Verdict, judge, lack_of_power, pooled_deviation, undecided
from support import call

from masked_diffusion.choices import POLICIES
from masked_diffusion.models.cost import cost
from masked_diffusion.processes.preemption import STOPPED

STUDY = "scripts/study.py"
TINY = ["--budget", "4", "--arms", "tread", "--model", "DiT_Ti_2", "--batch_size", "4", "--held_out_images", "8"]
TINY += ["--device", "cpu", "--samples", "8"]
NO_SAMPLES = ["--samples", "0"]
ARMS = [PLAIN, "tread", WEAKER, AGAIN]


def study(monkeypatch, out, *flags):
    return call(monkeypatch, STUDY, out, "--out", out, *TINY, *flags)


@pytest.fixture(scope="module")
def quick(module_folder):
    """A finished study of two arms and the controls, one seed, killed in its second run and started again."""
    monkeypatch, out = pytest.MonkeyPatch(), module_folder("study") / "out"
    whole, count = image_train.main, 0

    def killed(argv):
        nonlocal count
        if "--dry_run" in argv:
            return whole(argv)
        count += 1
        if count == 2:
            # Stopped where the log has no row.
            flags = {"save_interval": 1, "max_compute": 0, "max_steps": 2, "lr_decay": 0, "log_interval": 9}
            whole([*argv, *as_arguments(flags)])
            raise KeyboardInterrupt
        return whole(argv)

    with monkeypatch.context() as patch:
        patch.setattr(image_train, "main", killed)
        with pytest.raises(KeyboardInterrupt):
            study(patch, out, "--quick")
        left = read_rows(out)
        assert study(patch, out, "--quick") == 0
    return out, left, count


def read_rows(out):
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_killed_study_goes_on_with_the_run_it_was_in(quick):
    out, left, count = quick
    assert [row["arm"] for row in left] == [PLAIN] and count == 5  # four runs, one of them twice
    assert [row["arm"] for row in read_rows(out)] == ARMS
    assert read_rows(out)[0] == left[0]
    assert "resuming from the checkpoint of step 2" in (out / "runs" / "tread-seed0" / "log.txt").read_text()


def test_a_run_whose_log_lacks_its_end_is_not_measured(quick, tmp_path):
    run = shutil.copytree(quick[0] / "runs" / "tread-seed0", tmp_path / "run")
    rows = (run / "progress.csv").read_text().splitlines(keepends=True)
    (run / "progress.csv").write_text("".join(rows[:-1]))
    with pytest.raises(ValueError, match="its log has no row of step"):
        measure(run, SimpleNamespace(errors=lambda trained: [0.0]), None, "cpu")


def test_every_arm_spends_the_same_compute_and_no_more(quick):
    out, _, _ = quick
    plain = Study("DiT_Ti_2", "builtin:digits", "builtin:digits-test", "none", 8, 4, 4, 8, "channel")
    budget = 4 * 4 * cost(network_of(plain, PLAIN, (1, 8, 8))) / 1e12
    for row in read_rows(out):
        share = 0.6 if row["arm"] == WEAKER else 1
        step = float(row["tflops"]) / int(row["steps"])
        assert share * budget - step < float(row["tflops"]) <= share * budget * (1 + 1e-9)
    steps = {row["arm"]: int(row["steps"]) for row in read_rows(out)}
    assert steps[PLAIN] == 4 and steps[WEAKER] == 2 and steps["tread"] > 4


def test_the_report_is_one_file_with_curves_samples_and_configurations(quick):
    page = (quick[0] / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page)
    assert page.count("<svg") == 2 and page.count("data:image/png") == 4 and page.count("<details>") == 4
    for text in ("It claims nothing", "not judged, one seed", "says nothing about ImageNet"):
        assert text in page
    assert "&quot;policy&quot;: &quot;tread&quot;" in page
    error = float(read_rows(quick[0])[0]["error"])
    bins = [float(read_rows(quick[0])[0][f"error_bin{i}"]) for i in range(8)]
    assert f"{error:.4f}" in page and error == pytest.approx(sum(bins) / 8)


def test_samples_are_judged_and_the_memory_of_a_step_is_counted(quick):
    rows = {row["arm"]: row for row in read_rows(quick[0])}
    assert all(0 <= float(row["read_right"]) <= 1 and float(row["fd"]) > 0 for row in rows.values())
    assert len({row["fd_floor"] for row in rows.values()}) == 1 < len({row["fd"] for row in rows.values()})
    memory = {arm: float(row["memory_mb"]) for arm, row in rows.items()}
    assert memory["tread"] < memory[PLAIN] == memory[AGAIN]
    page = (quick[0] / "report.html").read_text()
    assert f"<td>{memory['tread']:.1f}</td>" in page and "training images have an FD of" in page
    assert not (quick[0] / "runs" / "dry_run").exists()


def test_what_a_backward_pass_needs_is_counted_once_and_given_back():
    x, w = torch.ones(10, 30, requires_grad=True), torch.ones(30, 20, requires_grad=True)
    with KeptBytes() as kept:
        for _ in range(2):  # the second pass finds nothing left of the first
            y = (x @ w).relu()
            (y.sum() + y.exp().sum() * 0).backward()
            del y
    assert kept.most == 4 * (10 * 30 + 30 * 20 + 2 * 10 * 20)  # both factors, and the results of relu and exp
    assert x.grad is not None and spread(9, 3).tolist() == [0, 4, 8] and spread(2, 5).tolist() == [0, 1]


def test_a_verdict_says_where_the_samples_contradict_it():
    results = {Run(PLAIN, 0): {"fd": 2.0}, Run("tread", 0): {"fd": 3.0}, Run("mdt", 0): {}}
    better, worse = (Verdict("tread", (1.0,), difference, 0.1) for difference in (-1.0, 1.0))
    assert words_of(better, results) == "better, but FD says otherwise" and words_of(worse, results) == "worse"
    assert words_of(Verdict("mdt", (1.0,), -1.0, 0.1), results) == "better"


def test_the_share_that_is_done_of_each_run_counts_in_the_bar(quick, tmp_path):
    run = shutil.copytree(quick[0] / "runs" / f"{PLAIN}-seed0", tmp_path / "run")
    rows = (run / "progress.csv").read_text().splitlines(keepends=True)
    budget = float(read_rows(quick[0])[0]["tflops"])
    assert share_done(run, budget) == pytest.approx(1) and share_done(tmp_path / "none", budget) == 0
    (run / "progress.csv").write_text("".join(rows[:2]))
    assert share_done(run, budget) == pytest.approx(0.25)
    with Progress({run: budget, tmp_path / "none": budget}, 4) as progress:
        assert progress.bar.initial == 2.25
        (run / "progress.csv").write_text("".join(rows[:3]))
        progress.show("a run")
        assert progress.bar.n == 2.5 and "a run" in str(progress.bar)


@pytest.mark.parametrize("budget", [4, 30, 300, 1500])
def test_every_checkpoint_of_a_run_has_a_row_in_its_log(budget):
    plan = Study("DiT_Mini_2", "builtin:digits", "builtin:digits-test", "none", 8, budget, 64, 360, "channel")
    flags = training_flags(plan, Run("sprint", 0), (1, 8, 8))
    assert flags["save_interval"] % flags["log_interval"] == 0 and flags["adam_beta2"] == 0.99


# A training as the trainer knows it: it begins, saves when it is asked to stop, and ends with the status of that.
STOPPABLE = """
import os, signal, sys, time
folder = os.environ["OPENAI_LOGDIR"]
os.makedirs(folder)
def stop(number, frame):
    open(folder + "/saved", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if "quick" in sys.argv:
    sys.exit(0)
if "fails" in sys.argv:
    time.sleep(0.3)
    sys.exit(1)
open(folder + "/begun", "w").close()
time.sleep(60)
"""


@pytest.fixture
def stoppable(monkeypatch, tmp_path):
    """A trainer of two jobs, and the folder of its runs."""
    (tmp_path / "training.py").write_text(STOPPABLE)
    monkeypatch.setattr(trainer, "TRAINING", tmp_path / "training.py")
    return trainer.Trainer(tmp_path / "runs", "", 2, []), tmp_path / "runs"


def wait_for(*paths):
    end = time.monotonic() + 240
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_signal_reaches_the_trainings_which_save_before_the_study_ends(stoppable):
    trains, runs = stoppable

    def ask_when_begun():
        wait_for(runs / "a-seed0" / "begun", runs / "b-seed0" / "begun")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask_when_begun).start()
    assert list(trains.train({Run(arm, 0): [] for arm in "abc"})) == []
    assert trains.status == STOPPED and all((runs / f"{arm}-seed0" / "saved").exists() for arm in "ab")
    assert not (runs / "c-seed0").exists() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_reaches_the_trainings_while_a_run_is_measured_and_what_is_finished_counts(stoppable):
    trains, runs = stoppable
    for run in trains.train({Run("a", 0): ["quick"], Run("b", 0): []}):
        assert run.arm == "a"
        wait_for(runs / "b-seed0" / "begun")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(runs / "b-seed0" / "saved")  # at once, not when this is done
    assert trains.status == STOPPED


def test_a_training_that_fails_stops_the_others_when_they_have_saved(stoppable):
    trains, runs = stoppable
    with pytest.raises(RuntimeError, match="a-seed0: its training ended with status 1"):
        for _ in trains.train({Run("a", 0): ["fails"], Run("b", 0): []}):
            pass
    assert (runs / "b-seed0" / "saved").exists()


def test_each_run_is_an_ordinary_run_folder(quick):
    folder = quick[0] / "runs" / "tread-seed0"
    assert json.loads((folder / "config.json").read_text())["model"]["policy"] == "tread"
    assert {"progress.csv", "config.json", "samples.png"} <= {path.name for path in folder.iterdir()}
    assert list(folder.glob("ema_0.995_*.pt")) and list(folder.glob("model*.pt"))


def with_errors(quick, out, errors):
    """A finished study with these held-out errors of its seeds by arm, which the samples do not contradict."""
    shutil.copytree(quick[0], out)
    for arm, values in errors.items():
        first = next((quick[0] / "runs").glob(f"{arm}-seed*.json"))
        for number, value in enumerate(values):
            run = Run(arm, number + (1000 if arm == AGAIN else 0))
            path = out / "runs" / f"{run.name}.json"
            path.write_text(json.dumps(json.loads(first.read_text()) | {"error": value, "fd": value}))
            if not (out / "runs" / run.name).exists():
                shutil.copytree(first.with_suffix(""), out / "runs" / run.name)
    return out


GOOD = {PLAIN: [1.00, 1.01], "tread": [0.80, 0.81], WEAKER: [1.30, 1.31], AGAIN: [1.00, 1.02]}


@pytest.mark.parametrize(
    ("changes", "flags", "status", "says"),
    [
        ({}, ["--require-ranking"], 0, "Both controls came out as they have to."),
        ({"tread": [1.00, 1.02]}, [], 0, "Both controls"),
        ({"tread": [1.00, 1.02]}, ["--require-ranking"], 4, "no difference shown: tread"),
        ({WEAKER: [1.01, 1.02]}, [], 3, "No power: training at 60 % of the budget did not come out worse"),
        ({AGAIN: [1.30, 1.31]}, [], 3, "No power: the same training with other seeds came out different"),
    ],
)
def test_the_controls_and_the_ranking_decide_the_exit_status(
    quick, monkeypatch, tmp_path, capsys, changes, flags, status, says
):
    out = with_errors(quick, tmp_path / "out", GOOD | changes)
    assert study(monkeypatch, out, "--seeds", "2", "--publish", tmp_path / "docs", *flags) == status
    assert says in capsys.readouterr().out
    published = (tmp_path / "docs" / "tokens16.md").read_text()
    assert "| tread | 2 |" in published and (tmp_path / "docs" / "tokens16.svg").read_text().startswith("<svg")
    assert ("better" if "tread" not in changes else "no difference shown") in published


def test_an_unfinished_study_can_be_reported_and_is_called_so(quick, monkeypatch, tmp_path, capsys):
    out = with_errors(quick, tmp_path / "out", GOOD)
    (out / "runs" / "tread-seed1.json").unlink()
    flags = ["--seeds", 2, "--report_only", "--publish", tmp_path / "docs"]
    assert study(monkeypatch, out, *flags) == 0
    assert "Unfinished: 7 of 8 runs." in capsys.readouterr().out
    published = (tmp_path / "docs" / "tokens16.md").read_text()
    assert "Unfinished: 7 of 8 runs." in published and "| tread | 1 |" in published and "| better |" in published
    assert not (out / "runs" / "tread-seed1.json").exists()
    assert study(monkeypatch, tmp_path / "empty", "--report_only") == 0
    assert "none of the 12 runs is finished" in capsys.readouterr().out


@pytest.mark.e2e
def test_a_launcher_starts_each_training(quick, monkeypatch, tmp_path):
    out = with_errors(quick, tmp_path / "out", {})
    (out / "runs" / "tread-seed0.json").unlink()
    shutil.rmtree(out / "runs" / "tread-seed0")
    assert study(monkeypatch, out, "--quick", "--launcher", "env A=1", *NO_SAMPLES) == 0
    rows = [{name: row[name] for name in ("arm", "steps", "error")} for row in read_rows(out)]
    assert rows == [{name: row[name] for name in ("arm", "steps", "error")} for row in read_rows(quick[0])]


def test_a_training_that_fails_names_its_output(quick, monkeypatch, tmp_path):
    out = with_errors(quick, tmp_path / "out", {})
    (out / "runs" / "tread-seed0.json").unlink()
    with pytest.raises(RuntimeError, match=r"tread-seed0: its training ended with status 1; see .*tread-seed0\.txt"):
        study(monkeypatch, out, "--quick", "--launcher", "false", *NO_SAMPLES)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arms", "none,best"], "--arms best: unknown; choose some of none, mdt"),
        (["--model", "MDT_S_2"], "--model MDT_S_2: all arms have one plain backbone"),
        (["--budget", "0"], "--budget 0.0: must be positive"),
        (["--budget", "5"], "holds a study with budget 4.0, this one has 5.0"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--first_seed", "-1"], "--first_seed -1: must be in 0 ... 997"),
        (["--samples", "1"], "--samples 1: must be 0 (none), or at least 2"),
        (["--data_dir", "images"], "--data_dir images: give the data to measure on with --held_out_dir"),
        (["--held_out_dir", "builtin:shapes-test"], "its classes are not those of --data_dir builtin:digits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(quick, monkeypatch, capsys, flags, sentence):
    assert study(monkeypatch, quick[0], *flags) == 2
    assert sentence in capsys.readouterr().err


def test_the_least_difference_is_that_of_all_comparisons_together():
    errors = {PLAIN: [1.0, 1.2, 1.1], "tread": [1.0, 1.4, 1.2], "mdt": [2.0, 2.2, 2.1]}
    deviation, df = pooled_deviation(errors)
    assert df == 6 and deviation == pytest.approx(((0.02 + 0.08 + 0.02) / 6) ** 0.5)
    quantile = 2.9686867  # of Student's t at 1 - 0.025 / 2 with six degrees of freedom
    least = quantile * deviation * (2 / 3) ** 0.5
    assert [(one.arm, one.words) for one in judge(errors)] == [
        (PLAIN, "no difference shown"), ("tread", "no difference shown"), ("mdt", "worse"),
    ]  # fmt: skip
    assert all(one.least == pytest.approx(least) for one in judge(errors))
    assert undecided(judge(errors)) == ["tread"] and len(lack_of_power(judge(errors))) == 2


def test_all_arms_are_planned_a_seed_of_each_after_the_other():
    plan = Study("DiT_Mini_2", "builtin:digits", "builtin:digits-test", "none", 8, 300, 64, 360, "channel")
    arms = arms_of(plan, "all", (1, 8, 8))
    assert arms[0] == PLAIN
    assert set(arms) == {*POLICIES, TREAD_FINALE}
    runs = runs_of(arms, range(2))
    assert [run.arm for run in runs] == 2 * [*arms, *CONTROLS]
    assert len({run.name for run in runs}) == len(runs) and runs_of(arms, range(3))[: len(runs)] == runs
    assert {run.seed % OTHER_SEEDS for run in runs_of(arms, range(3, 5))} == {3, 4}
    assert {run.finale for run in runs if run.arm in ("sprint", "deferred", "maskdit", TREAD_FINALE)} == {0.1}
    patches_of_one_value = Study(
        "DiT_Micro_1", "builtin:digits", "builtin:digits-test", "none", 8, 300, 64, 360, "channel"
    )
    said = []
    assert set(arms) - set(arms_of(patches_of_one_value, "all", (1, 8, 8), said.append)) == {"maskdit"}
    [text] = said
    assert text.startswith("left out: maskdit: --policy maskdit: its term on dropped tokens standardises patches")
    with pytest.raises(ValueError, match="patches, which have one value each"):
        arms_of(patches_of_one_value, "maskdit", (1, 8, 8))
    assert Run(WEAKER, 0).name == "none-60-seed0" and plan.model_of("mdtv2") == "MDTv2_Mini_2"
