"""scripts/study.py: all arms at equal compute, verdicts, controls, and a study that goes on after a kill."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import image_train
import pytest
from studying.measure import measure
from studying.plan import AGAIN, CONTROLS, PLAIN, TREAD_FINALE, WEAKER, Run, arms_of, as_arguments, network_of, runs_of
from studying.settings import Study
from studying.verdicts import judge, lack_of_power, pooled_deviation, t_quantile, undecided
from support import call

from masked_diffusion.choices import POLICIES
from masked_diffusion.models.cost import cost

STUDY = "scripts/study.py"
TINY = ["--budget", "4", "--arms", "tread", "--model", "DiT_Ti_2", "--batch_size", "4", "--held_out_images", "8"]
TINY += ["--device", "cpu"]
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
        measure(run, SimpleNamespace(errors=lambda trained: [0.0]), "cpu")


def test_every_arm_spends_the_same_compute_and_no_more(quick):
    out, _, _ = quick
    plain = Study("DiT_Ti_2", "builtin:digits", "builtin:digits-test", "none", 8, 4, 4, 8)
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


def test_each_run_is_an_ordinary_run_folder(quick):
    folder = quick[0] / "runs" / "tread-seed0"
    assert json.loads((folder / "config.json").read_text())["model"]["policy"] == "tread"
    assert {"progress.csv", "config.json", "samples.png"} <= {path.name for path in folder.iterdir()}
    assert list(folder.glob("ema_0.995_*.pt")) and list(folder.glob("model*.pt"))


def with_errors(quick, out, errors):
    """A finished study with these held-out errors of its seeds by arm."""
    shutil.copytree(quick[0], out)
    for arm, values in errors.items():
        first = next((quick[0] / "runs").glob(f"{arm}-seed*.json"))
        for number, value in enumerate(values):
            run = Run(arm, number + (1000 if arm == AGAIN else 0))
            path = out / "runs" / f"{run.name}.json"
            path.write_text(json.dumps(json.loads(first.read_text()) | {"error": value}))
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
    assert study(monkeypatch, out, "--quick", "--launcher", "env A=1") == 0
    rows = [{name: row[name] for name in ("arm", "steps", "error")} for row in read_rows(out)]
    assert rows == [{name: row[name] for name in ("arm", "steps", "error")} for row in read_rows(quick[0])]


def test_a_training_that_fails_names_its_output(quick, monkeypatch, tmp_path):
    out = with_errors(quick, tmp_path / "out", {})
    (out / "runs" / "tread-seed0.json").unlink()
    with pytest.raises(RuntimeError, match=r"tread-seed0: its training ended with status 1; see .*tread-seed0\.txt"):
        study(monkeypatch, out, "--quick", "--launcher", "false")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arms", "none,best"], "--arms best: unknown; choose some of none, mdt"),
        (["--model", "MDT_S_2"], "--model MDT_S_2: all arms have one plain backbone"),
        (["--budget", "0"], "--budget 0.0: must be positive"),
        (["--budget", "5"], "holds a study with budget 4.0, this one has 5.0"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--data_dir", "images"], "--data_dir images: give the data to measure on with --held_out_dir"),
        (["--held_out_dir", "builtin:shapes-test"], "its classes are not those of --data_dir builtin:digits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(quick, monkeypatch, capsys, flags, sentence):
    assert study(monkeypatch, quick[0], *flags) == 2
    assert sentence in capsys.readouterr().err


def test_the_quantile_is_students():
    for probability, df, expected in ((0.975, 22, 2.0739), (0.975, 1, 12.706), (0.9975, 22, 3.1188), (0.95, 4, 2.1318)):
        assert t_quantile(probability, df) == pytest.approx(expected, abs=2e-3 * expected)


def test_the_least_difference_is_that_of_all_comparisons_together():
    errors = {PLAIN: [1.0, 1.2, 1.1], "tread": [1.0, 1.4, 1.2], "mdt": [2.0, 2.2, 2.1]}
    deviation, df = pooled_deviation(errors)
    assert df == 6 and deviation == pytest.approx(((0.02 + 0.08 + 0.02) / 6) ** 0.5)
    least = t_quantile(1 - 0.025 / 2, 6) * deviation * (2 / 3) ** 0.5
    assert [(one.arm, one.words) for one in judge(errors)] == [
        (PLAIN, "no difference shown"), ("tread", "no difference shown"), ("mdt", "worse"),
    ]  # fmt: skip
    assert all(one.least == pytest.approx(least) for one in judge(errors))
    assert undecided(judge(errors)) == ["tread"] and len(lack_of_power(judge(errors))) == 2


def test_all_arms_are_planned_a_seed_of_each_after_the_other():
    plan = Study("DiT_Mini_2", "builtin:digits", "builtin:digits-test", "none", 8, 300, 64, 360)
    arms = arms_of(plan, "all", (1, 8, 8))
    assert arms[0] == PLAIN
    assert set(arms) == {*POLICIES, TREAD_FINALE}
    runs = runs_of(arms, 2)
    assert [run.arm for run in runs] == 2 * [*arms, *CONTROLS]
    assert len({run.name for run in runs}) == len(runs) and runs_of(arms, 3)[: len(runs)] == runs
    assert {run.finale for run in runs if run.arm in ("sprint", "deferred", "maskdit", TREAD_FINALE)} == {0.1}
    patches_of_one_value = Study("DiT_Micro_1", "builtin:digits", "builtin:digits-test", "none", 8, 300, 64, 360)
    assert set(arms) - set(arms_of(patches_of_one_value, "all", (1, 8, 8))) == {"maskdit"}
    with pytest.raises(ValueError, match="patches, which have one value each"):
        arms_of(patches_of_one_value, "maskdit", (1, 8, 8))
    assert Run(WEAKER, 0).name == "none-60-seed0" and plan.model_of("mdtv2") == "MDTv2_Mini_2"
