"""scripts/refactor_gate.py: what differs, what was added, and the exit status of both."""

import shutil
from pathlib import Path

import pytest
import torch
from support import script

GATE = "scripts/refactor_gate.py"
STATE, WEIGHTS = Path("state000002.pt"), Path("model000002.pt")
LOG = {"step": ["1", "2"], "loss": ["0.5", "0.25"], "images_per_second": ["9", "8"]}


def write(folder, columns, state, weights):
    folder.mkdir()
    rows = [columns, *zip(*columns.values(), strict=True)]
    (folder / "progress.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    torch.save(state, folder / STATE)
    torch.save(weights, folder / WEIGHTS)
    return folder


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base" / "scripts").mkdir(parents=True)
    (tmp_path / "base" / "scripts" / "image_train.py").touch()
    return tmp_path / "base"


METER = {"sums": torch.tensor([1.0, 2.0]), "names": ["loss"]}


def state(**changes):
    return {"step": 2, "meter": METER, "seconds": 3.0, **changes}


def found(tmp_path, columns=LOG, new_state=None, weights=1):
    theirs = write(tmp_path / "theirs", LOG, state(), 1)
    ours = write(tmp_path / "ours", columns, new_state or state(), weights)
    return [str(finding) for finding in script(GATE).compare_folders(theirs, ours, [WEIGHTS, STATE], "MDT")]


def test_runs_that_differ_in_what_was_measured_alone_are_equal(tmp_path):
    assert found(tmp_path, LOG | {"images_per_second": ["1", "2"]}, state(seconds=4.0)) == []


def test_columns_and_entries_that_the_older_code_lacks_are_listed_as_added(tmp_path):
    meter = METER | {"updates": 1}
    assert found(tmp_path, {**LOG, "tflops": ["1", "2"]}, state(meter=meter, compute=7)) == [
        "added: MDT, ours: progress.csv, tflops",
        "added: MDT, ours: state000002.pt, meter, updates",
        "added: MDT, ours: state000002.pt, compute",
    ]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"columns": LOG | {"loss": ["0.5", "0.26"]}}, "progress.csv, loss"),
        ({"columns": {name: column for name, column in LOG.items() if name != "loss"}}, "progress.csv, loss"),
        ({"new_state": state(step=3)}, "state000002.pt, step"),
        ({"new_state": state(step=2.0)}, "state000002.pt, step"),
        ({"new_state": {"meter": METER, "seconds": 3.0}}, "state000002.pt, step"),
        ({"new_state": state(meter=METER | {"sums": torch.tensor([1.0, -2.0])})}, "state000002.pt, meter, sums"),
        ({"new_state": state(meter=METER | {"sums": torch.tensor([1.0])})}, "state000002.pt, meter, sums"),
        ({"new_state": state(meter=METER | {"names": ["mse"]})}, "state000002.pt, meter, names, 0"),
        ({"new_state": state(meter=METER | {"names": []})}, "state000002.pt, meter, names"),
        ({"weights": {"a": 1, "new": 2}}, "model000002.pt"),
    ],
)  # fmt: skip
def test_another_value_a_lost_entry_and_other_weights_are_differences(tmp_path, changes, difference):
    assert found(tmp_path, **changes) == [f"MDT, ours: {difference} differs"]


def test_a_file_that_the_newer_code_does_not_write_is_a_difference(tmp_path):
    theirs = write(tmp_path / "theirs", LOG, state(), 1)
    ours = shutil.copytree(theirs, tmp_path / "ours")
    (ours / STATE).unlink()
    findings = script(GATE).compare_folders(theirs, ours, [WEIGHTS, STATE], "MDT")
    assert [str(finding) for finding in findings] == ["MDT, ours: state000002.pt differs"]


@pytest.mark.parametrize(
    ("findings", "status", "says"),
    [
        ([("MDT, ours: progress.csv, tflops", True)], 0, "added: MDT, ours: progress.csv, tflops\n0 differences and 1"),
        (
            [("MDT, ours: ema.pt", False), ("MDT: x", True)],
            1,
            "MDT, ours: ema.pt differs\nadded: MDT: x\n1 differences",
        ),
    ],
)
def test_additions_alone_are_no_failure(monkeypatch, base, capsys, findings, status, says):
    gate = script(GATE)
    monkeypatch.setattr(gate, "compare_model", lambda *_: [gate.Finding(*finding) for finding in findings])
    assert gate.main([str(base), "--models", "MDT_Ti_2"]) == status
    assert capsys.readouterr().out.startswith(says)


# In place of a step: a slower one in the folder called base.
STAND_IN = """
import os, sys
for number, _ in enumerate(sys.stdin):
    slower = os.getcwd().endswith("base")
    print(9 if number == 0 else 4 + slower, 2 * (1 + slower), flush=True)
"""


def test_steps_of_both_codes_are_measured_in_turn_without_the_first(monkeypatch, base, capsys):
    monkeypatch.setattr(script(GATE), "STEPS", STAND_IN)
    assert script(GATE).main([str(base), "--step_rounds", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "clock: 0.800 (0.800-0.800) times the other's step; median seconds 4.000 here, 5.000 there",
        "processor: 0.500 (0.500-0.500) times the other's step; median seconds 2.000 here, 4.000 there",
    ]


def test_a_measuring_that_fails_is_an_error(monkeypatch, base):
    monkeypatch.setattr(script(GATE), "STEPS", "import sys; sys.exit('no such module')")
    with pytest.raises(RuntimeError, match="the measuring of steps failed"):
        script(GATE).compare_step_times(base, 1)


def test_a_negative_number_of_rounds_is_refused(base, capsys):
    assert script(GATE).main([str(base), "--step_rounds", "-1"]) == 2
    assert "--step_rounds -1: must be 0 or more" in capsys.readouterr().err
