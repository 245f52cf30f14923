"""Sweeps that sample and score sets, by the scripts that make them. What evaluates is a stand-in without libraries."""

import csv
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support import REPO, TINY_DIGITS, call, few_steps, script

from masked_diffusion.sampling.scored_sets import Sweep

pytest.importorskip("matplotlib", reason="sweeps are plotted")

GUIDANCE, POSTHOC, SAMPLE = "scripts/guidance_sweep.py", "scripts/posthoc_ema.py", "scripts/image_sample.py"
SMALL = ["--num_samples", 2, *few_steps(2), "--device", "cpu"]


@pytest.fixture(scope="module")
def run(module_folder):
    """A training with an average, and with snapshots of two more."""
    folder = module_folder("run")
    flags = ["--max_steps", 4, "--lr", "5e-2", "--ema_rate", "0.3"]
    flags += ["--ema_power", "0.05,0.10", "--ema_snapshot_interval", 1]
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "scripts/image_train.py", folder, *TINY_DIGITS, *flags) == 0
    return folder


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """Run a sweep, sampling in this process. Returns its status and which programs it ran."""
    np.savez(tmp_path / "ref.npz", arr_0=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    started = []
    real = subprocess.run

    def run(command, **settings):
        started.append(command[1].rsplit("/", 1)[-1])
        if command[1].endswith("evaluator.py"):
            return real([command[0], REPO / "tests" / "stand_in_evaluator.py", *command[2:]], **settings)
        monkeypatch.setenv("OPENAI_LOGDIR", settings["env"]["OPENAI_LOGDIR"])
        return SimpleNamespace(returncode=script(SAMPLE).main(command[2:]))

    def work(path, *flags):
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", run)
            started.clear()
            return call(patch, path, tmp_path, "--eval_ref", tmp_path / "ref.npz", *flags), list(started)

    return work


def table(folder):
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stand_in_fid(path):
    with np.load(path) as file:
        pixels = file["arr_0"].astype(np.int64)
    return float((pixels.ravel() * np.arange(1, pixels.size + 1) % 1009).sum())


def weight_flags(run, out, weights="1,30"):
    flags = ["--weights", weights, "--out", out, "--model_path", run / "ema_0.3_000004.pt", *SMALL]
    return [*flags, "--guidance", "constant", "--guide_from", "masked"]


def test_each_weight_has_a_set_with_its_scores_and_a_stopped_sweep_goes_on(run, sweep, tmp_path):
    out = tmp_path / "sweep"
    assert sweep(GUIDANCE, *weight_flags(run, out)) == (0, ["image_sample.py", "evaluator.py"] * 2)
    rows = table(out)
    assert [float(row["weight"]) for row in rows] == [1, 30]
    sets = [out / f"weight_{weight}" / "samples_2x8x8x3.npz" for weight in (1, 30)]
    assert [float(row["fid"]) for row in rows] == [stand_in_fid(path) for path in sets]
    assert rows[0]["fid"] != rows[1]["fid"] and rows[0]["precision"] == ""
    manifests = [json.loads((path.parent / "manifest.json").read_text()) for path in sets]
    assert [float(row["passes_per_image"]) for row in rows] == [one["passes_per_image"] for one in manifests]
    assert float(rows[0]["passes_per_image"]) == 2 < float(rows[1]["passes_per_image"])
    assert (out / "sweep.png").stat().st_size > 1000
    times = [path.stat().st_mtime_ns for path in sets]
    # One more weight: the sets are looked at, and one is made and scored.
    status, started = sweep(GUIDANCE, *weight_flags(run, out, "1,3"))
    assert status == 0 and started.count("evaluator.py") == 1
    assert [float(row["weight"]) for row in table(out)] == [1, 3, 30]
    assert [path.stat().st_mtime_ns for path in sets] == times


def test_a_sweep_ends_with_the_program_that_refuses(run, sweep, tmp_path, capsys):
    flags = weight_flags(run, tmp_path / "sweep")
    assert sweep(GUIDANCE, *flags, "--sampler", "rk4") == (2, ["image_sample.py"])
    assert "--sampler rk4: unknown" in capsys.readouterr().err
    assert not (tmp_path / "sweep" / "sweep.csv").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--cfg_scale=3"], "--cfg_scale: --weights decides it; leave it out"),
        (["--cfg_cond", "True"], "--cfg_cond: --weights decides it; leave it out"),
        (["--eval_ref", "none.npz"], "--eval_ref none.npz: no such file"),
        (["--eval_graph", "none.pb"], "--eval_graph none.pb: no such file"),
        (["--processes", "0"], "--processes 0: must be at least 1"),
    ],
)
def test_what_cannot_be_swept_over_is_refused(run, sweep, tmp_path, capsys, flags, sentence):
    assert sweep(GUIDANCE, *weight_flags(run, tmp_path / "sweep"), *flags) == (2, [])
    assert sentence in capsys.readouterr().err and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("weights", ["1,-2", "1,nan", "1,,2", "inf"])
def test_weights_are_numbers_of_0_or_more(sweep, tmp_path, weights):
    with pytest.raises(SystemExit, match="2"):
        sweep(GUIDANCE, "--weights", weights, "--out", tmp_path / "sweep")


def test_a_folder_of_another_sweep_is_refused(run, sweep, tmp_path, capsys):
    out = tmp_path / "sweep"
    out.mkdir()
    (out / "sweep.json").write_text(json.dumps({"axis": "weight", "sample": [], "score": []}))
    assert sweep(GUIDANCE, *weight_flags(run, out)) == (2, [])
    assert f"--out {out}: it holds a sweep of other settings; give another folder" in capsys.readouterr().err
    (out / "sweep.json").write_text("{")
    assert sweep(GUIDANCE, *weight_flags(run, out)) == (2, [])
    assert "sweep.json: not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize("allowing", [["--few_steps", "True"], ["--few_steps=True"]], ids=" ".join)
def test_a_sweep_that_was_refused_for_its_few_steps_goes_on_when_they_are_allowed(
    run, sweep, tmp_path, capfd, allowing
):
    flags = [*weight_flags(run, tmp_path / "sweep", "1"), "--num_sampling_steps", 3]
    assert sweep(GUIDANCE, *flags, "--few_steps", "False") == (2, ["image_sample.py"])
    assert "; give --few_steps True to make images with 3 steps all the same" in capfd.readouterr().err
    del flags[flags.index("--few_steps") :][:2]
    assert sweep(GUIDANCE, *flags, *allowing) == (0, ["image_sample.py", "evaluator.py"])


def test_a_sweep_without_matplotlib_is_refused(run, sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert sweep(GUIDANCE, *weight_flags(run, tmp_path / "sweep")) == (2, [])
    assert "plotting needs matplotlib" in capsys.readouterr().err


def test_a_series_of_averages_is_made_sampled_and_scored(run, sweep, tmp_path):
    out = tmp_path / "lengths"
    flags = ["--run", run, "--sweep", "0.05:0.10:2", "--out", out, *SMALL]
    assert sweep(POSTHOC, *flags) == (0, ["image_sample.py", "evaluator.py"] * 2)
    rows = table(out)
    assert [float(row["std"]) for row in rows] == [0.05, 0.1]
    for std, row in zip(("0.05", "0.1"), rows, strict=True):
        manifest = json.loads((out / f"std_{std}" / "manifest.json").read_text())
        assert manifest["settings"]["weights"]["file"] == f"posthoc_{std}_000004.pt"
        assert float(row["fid"]) == stand_in_fid(out / f"std_{std}" / manifest["samples"])
    made = [path.stat().st_mtime_ns for path in sorted(out.glob("posthoc_*.pt"))]
    assert sweep(POSTHOC, *flags) == (0, ["image_sample.py"] * 2)
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("posthoc_*.pt"))] == made and len(made) == 2


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--sweep", "0.02:0.3:3"], "--std 0.3: must be in (0, 0.28]"),
        (["--sweep", "0.05:0.1:2", "--model_path", "a.pt"], "--model_path: the sweep samples its own averages"),
        (["--std", "0.05"], "--eval_ref: unknown without --sweep"),
    ],
)
def test_a_series_that_cannot_be_is_refused(run, sweep, tmp_path, capsys, flags, sentence):
    assert sweep(POSTHOC, "--run", run, "--out", tmp_path / "out.pt", *flags) == (2, [])
    assert sentence in capsys.readouterr().err and not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("text", ["0.02:0.2", "0.2:0.02:3", "0.02:0.2:1", "a:b:c"])
def test_a_series_is_two_lengths_and_a_number(run, sweep, tmp_path, text):
    with pytest.raises(SystemExit, match="2"):
        sweep(POSTHOC, "--run", run, "--out", tmp_path / "out", "--sweep", text)


def test_a_run_without_its_configuration_is_no_series(run, sweep, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "ema_snapshots").symlink_to(run / "ema_snapshots")
    assert sweep(POSTHOC, "--run", bare, "--sweep", "0.05:0.1:2", "--out", tmp_path / "out") == (2, [])
    assert f"--run {bare}: there is no config.json, which sampling needs" in capsys.readouterr().err


def test_a_sweep_of_other_weights_does_not_go_on_with_these(tmp_path):
    def sweep(**source):
        return Sweep(tmp_path / "sweep", "std", ["sample.py"], ["evaluator.py"], source=source)

    sweep(run="a", step=2).claim()
    sweep(run="a", step=2).claim()
    with pytest.raises(ValueError, match="it holds a sweep of other settings"):
        sweep(run="b", step=2).claim()
