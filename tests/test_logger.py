import csv
import json
import math
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masked_diffusion.logger import SINKS, CSVSink, JSONSink, Logger, chosen_sinks, output_folder

NAN = math.nan


def log_rows(folder, start_step, rows, names=("csv", "json")):
    logger = Logger.open(folder, start_step, names)
    for row in rows:
        logger.row(row)
    logger.close()


def steps_row(step, **values):
    return {"step": step, "samples": 8 * step, "loss": 1 / step, **values}


def csv_rows(folder):
    with (folder / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def json_rows(folder):
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


# -- where -------------------------------------------------------------------------------------------------------------


def test_the_output_folder_is_openai_logdir_with_its_tilde_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_folder({"OPENAI_LOGDIR": "~/runs/mdt"}) == tmp_path / "runs" / "mdt"


def test_a_relative_output_folder_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert output_folder({"OPENAI_LOGDIR": "output_mdt_s2"}) == tmp_path / "output_mdt_s2"


@pytest.mark.parametrize("environ", [{}, {"OPENAI_LOGDIR": ""}])
def test_without_openai_logdir_it_is_a_dated_folder_under_the_working_directory(monkeypatch, tmp_path, environ):
    monkeypatch.chdir(tmp_path)
    folder = output_folder(environ)
    assert folder.parent == tmp_path
    assert re.fullmatch(time.strftime("mdt-%Y-") + r"\d\d-\d\d-\d\d-\d\d-\d\d", folder.name)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_asked_when_none_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "here"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json")
    assert output_folder() == tmp_path / "here"
    assert chosen_sinks() == ["json"]


@pytest.mark.parametrize("environ", [{}, {"OPENAI_LOG_FORMAT": ""}, {"OPENAI_LOG_FORMAT": " , "}])
def test_all_sinks_are_chosen_unless_some_are_named(environ):
    assert chosen_sinks(environ) == ["stdout", "log", "csv", "json", "tensorboard"]


def test_sinks_are_chosen_by_a_comma_list():
    assert chosen_sinks({"OPENAI_LOG_FORMAT": "csv, log"}) == ["csv", "log"]


def test_an_unknown_sink_is_refused_with_the_known_ones():
    with pytest.raises(ValueError) as raised:
        chosen_sinks({"OPENAI_LOG_FORMAT": "csv,mlflow"})
    assert "OPENAI_LOG_FORMAT" in str(raised.value) and "mlflow is unknown" in str(raised.value)
    assert all(name in str(raised.value) for name in SINKS)


@pytest.mark.parametrize(
    "name, file", [("log", "log.txt"), ("csv", "progress.csv"), ("json", "progress.json"), ("tensorboard", "tb")]
)
def test_a_sink_writes_its_own_file_and_no_other(tmp_path, name, file):
    log_rows(tmp_path / "new" / "folder", 0, [steps_row(1)], [name])
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [file]


def test_a_logger_without_sinks_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logger = Logger()
    logger.row(steps_row(1))
    logger.text("hello")
    logger.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_readable_while_the_run_goes_on(tmp_path):
    logger = Logger.open(tmp_path, 0, ["csv", "json"])
    for step in (1, 2):
        logger.row(steps_row(step))
        assert len(csv_rows(tmp_path)) == len(json_rows(tmp_path)) == step


def test_numbers_are_written_in_full_and_counts_as_integers(tmp_path):
    log_rows(tmp_path, 0, [{"step": 30.0, "samples": 240.0, "loss": 0.1 + 0.2}])
    assert csv_rows(tmp_path) == [{"step": "30", "samples": "240", "loss": repr(0.1 + 0.2)}]
    assert json_rows(tmp_path) == [{"step": 30, "samples": 240, "loss": 0.1 + 0.2}]
    assert '"step": 30,' in (tmp_path / "progress.json").read_text()


def test_nan_becomes_an_empty_cell_and_null(tmp_path):
    log_rows(tmp_path, 0, [steps_row(1, loss_q0=NAN), steps_row(2, loss_q0=0.5)])
    assert [row["loss_q0"] for row in csv_rows(tmp_path)] == ["", "0.5"]
    assert [row["loss_q0"] for row in json_rows(tmp_path)] == [None, 0.5]


@settings(max_examples=30, deadline=None)
@given(first=st.integers(1, 8), resumed=st.integers(1, 8), second=st.integers(0, 8))
def test_a_resumed_run_has_every_step_once(first, resumed, second):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log_rows(folder, 0, [steps_row(step, run=1) for step in range(1, first + 1)])
        log_rows(folder, resumed, [steps_row(step, run=2) for step in range(resumed + 1, resumed + second + 1)])
        expected = [(step, 1) for step in range(1, min(first, resumed) + 1)]
        expected += [(step, 2) for step in range(resumed + 1, resumed + second + 1)]
        assert [(row["step"], row["run"]) for row in json_rows(folder)] == expected
        assert [(int(row["step"]), int(row["run"])) for row in csv_rows(folder)] == expected
        assert (folder / "progress.csv").read_text().count("step") <= 1  # one header


@pytest.mark.parametrize("cut", range(2, 14))
def test_a_line_that_was_cut_off_by_a_kill_is_dropped_on_resume(tmp_path, cut):
    log_rows(tmp_path, 0, [steps_row(1, x=1.25), steps_row(2, x=2.125), steps_row(3, x=3.0625)])
    whole = {"csv": csv_rows(tmp_path), "json": json_rows(tmp_path)}
    for name in ("progress.csv", "progress.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-cut])
    log_rows(tmp_path, 3, [steps_row(4, x=4.0)])
    assert csv_rows(tmp_path)[:-1] == whole["csv"][:2]
    assert json_rows(tmp_path)[:-1] == whole["json"][:2]
    assert csv_rows(tmp_path)[-1]["x"] == "4.0" and json_rows(tmp_path)[-1]["x"] == 4.0


def test_a_line_that_was_cut_off_in_its_last_cell_is_dropped_on_resume(tmp_path):
    (tmp_path / "progress.csv").write_text("step,samples,loss\r\n10,80,0.5\r\n20,160,0.2")  # of 0.25
    log_rows(tmp_path, 20, [], ["csv"])
    assert [row["step"] for row in csv_rows(tmp_path)] == ["10"]


HARM = {
    "zero bytes at the end": lambda lines: [*lines, b"\0" * 40],
    "zero bytes in place of the last row": lambda lines: [*lines[:-1], b"\0" * len(lines[-1])],
    "half a row before a row": lambda lines: [*lines[:-1], lines[-1][:7] + lines[-1]],
    "no text": lambda lines: [*lines[:-1], b"\xff\xfe\x00" + lines[-1]],
    "an empty line": lambda lines: [*lines, b"\n"],
    "another line": lambda lines: [*lines, b"step\n"],
    "a list": lambda lines: [*lines, b"[1, 2, 3]\n"],
}

COSTS_A_ROW = ("zero bytes in place of the last row", "half a row before a row", "no text")


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["csv", "json"])
def test_damaged_lines_are_left_out_and_said_and_the_log_goes_on(tmp_path, name, harm):
    log_rows(tmp_path, 0, [steps_row(step) for step in (1, 2, 3)], [name])
    path = tmp_path / f"progress.{name}"
    damaged = b"".join(HARM[harm](path.read_bytes().splitlines(keepends=True)))
    path.write_bytes(damaged)
    log_rows(tmp_path, 3, [steps_row(4)], ["log", name])
    read = csv_rows if name == "csv" else json_rows
    expected = [1, 2, 4] if harm in COSTS_A_ROW else [1, 2, 3, 4]
    assert [int(row["step"]) for row in read(tmp_path)] == expected
    said = (tmp_path / "log.txt").read_text()
    assert f"progress.{name}: 1 damaged lines are left out" in said and f"progress_1.{name}" in said
    assert (tmp_path / f"progress_1.{name}").read_bytes() == damaged  # nothing is lost


def test_a_log_without_damage_is_not_said_to_have_any(tmp_path):
    for start in (0, 2):
        log_rows(tmp_path, start, [steps_row(start + 1), steps_row(start + 2)], ["log", "csv", "json"])
    assert "damaged" not in (tmp_path / "log.txt").read_text() and not list(tmp_path.glob("*_1.*"))


@pytest.mark.parametrize(("sink", "name"), [(CSVSink, "progress.csv"), (JSONSink, "progress.json")])
def test_a_row_that_a_full_disk_cuts_leaves_no_half_and_the_next_one_is_whole(tmp_path, monkeypatch, sink, name):
    path = tmp_path / name
    opened = sink(path, 0)
    opened.row(steps_row(1))
    before = path.read_bytes()
    render = opened._render

    def cut(rows, header):
        with path.open("a") as file:
            file.write(render(rows, header)[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(opened, "_render", cut)
    with pytest.raises(OSError, match="No space"):
        opened.row(steps_row(2))
    assert path.read_bytes() == before
    monkeypatch.undo()
    opened.row(steps_row(3))
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == before.count(b"\n") + 1


def test_a_run_resumed_from_before_its_first_row_starts_its_files_over(tmp_path):
    log_rows(tmp_path, 0, [steps_row(10), steps_row(20)])
    log_rows(tmp_path, 5, [steps_row(10, run=2)])
    assert [(row["step"], row["run"]) for row in csv_rows(tmp_path)] == [("10", "2")]
    assert [(row["step"], row["run"]) for row in json_rows(tmp_path)] == [(10, 2)]


def test_a_file_of_nothing_but_a_torn_header_starts_over_on_resume(tmp_path):
    (tmp_path / "progress.csv").write_text("step,samp")
    (tmp_path / "progress.json").write_text('{"step": 1')
    log_rows(tmp_path, 5, [steps_row(6)])
    assert [row["step"] for row in csv_rows(tmp_path)] == ["6"]
    assert [row["step"] for row in json_rows(tmp_path)] == [6]


def test_a_fresh_start_moves_the_old_files_aside_and_wipes_nothing(tmp_path):
    for run in (1, 2, 3):
        log_rows(tmp_path, 0, [steps_row(1, run=run)])
    for name, run in (("progress_1", 1), ("progress_2", 2), ("progress", 3)):
        assert json.loads((tmp_path / f"{name}.json").read_text())["run"] == run
        assert (tmp_path / f"{name}.csv").read_text().splitlines()[1].endswith(f",{run}")


@pytest.mark.parametrize("start_step", [0, 5])
def test_messages_are_appended_to_the_log(tmp_path, start_step):
    for message in ("first", "second"):
        logger = Logger.open(tmp_path, start_step, ["log"])
        logger.text(message)
        logger.close()
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"


def test_names_that_are_new_after_a_resume_become_columns_of_all_rows(tmp_path):
    log_rows(tmp_path, 0, [steps_row(1, vb=0.25)])
    log_rows(tmp_path, 1, [steps_row(2, m_loss=0.75), steps_row(3, m_loss=NAN)])
    rows = csv_rows(tmp_path)
    assert list(rows[0]) == ["step", "samples", "loss", "vb", "m_loss"]
    assert [(row["step"], row["vb"], row["m_loss"]) for row in rows] == [
        ("1", "0.25", ""),
        ("2", "", "0.75"),
        ("3", "", ""),
    ]
    assert [row.get("m_loss") for row in json_rows(tmp_path)] == [None, 0.75, None]
    assert [row["loss"] for row in json_rows(tmp_path)] == [1.0, 1 / 2, 1 / 3]


def test_names_that_are_gone_after_a_resume_leave_empty_cells(tmp_path):
    log_rows(tmp_path, 0, [steps_row(1, m_loss=0.75)])
    log_rows(tmp_path, 1, [{"loss": 0.5, "samples": 16, "step": 2}])
    assert csv_rows(tmp_path)[1] == {"step": "2", "samples": "16", "loss": "0.5", "m_loss": ""}


@pytest.mark.parametrize("sink, name", [(CSVSink, "progress.csv"), (JSONSink, "progress.json")])
def test_rewriting_on_resume_is_atomic(tmp_path, monkeypatch, sink, name):
    log_rows(tmp_path, 0, [steps_row(step) for step in (1, 2, 3)])
    before = (tmp_path / name).read_bytes()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        sink(tmp_path / name, 1)
    assert (tmp_path / name).read_bytes() == before


# -- people ------------------------------------------------------------------------------------------------------------


def test_the_terminal_shows_a_table_without_what_is_nan_and_stays_open(tmp_path, capsys):
    log_rows(tmp_path, 0, [{"step": 10.0, "loss": 0.123456789, "loss_q0": NAN}], ["stdout"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:-1]] == [
        ["|", "step", "|", "10", "|"],
        ["|", "loss", "|", "0.123457", "|"],
    ]
    assert len({len(line) for line in lines}) == 1 and set(lines[0]) == {"-"}
    assert not sys.stdout.closed


# -- TensorBoard -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensorboard_events(monkeypatch):
    """Reader of an event folder, by TensorBoard's own loader and without TensorFlow."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return lambda folder: [
        event for path in sorted(folder.iterdir()) for event in LegacyEventFileLoader(str(path)).Load()
    ]


def test_tensorboard_reads_the_scalars_that_were_logged(tmp_path, tensorboard_events):
    log_rows(tmp_path, 0, [steps_row(1, q=NAN), steps_row(2, q=0.5)], ["tensorboard"])
    version, start, *rows = tensorboard_events(tmp_path / "tb")
    assert version.file_version == "brain.Event:2"
    assert [row.step for row in rows] == [1, 2]
    scalars = [{value.tag: value.simple_value for value in row.summary.value} for row in rows]
    assert scalars == [{"step": 1, "samples": 8, "loss": 1}, {"step": 2, "samples": 16, "loss": 0.5, "q": 0.5}]
    assert abs(rows[0].wall_time - time.time()) < 60


def test_tensorboard_shows_steps_that_ran_twice_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_rows(tmp_path, 0, [steps_row(step, run=1) for step in (1, 2, 3)], ["tensorboard"])
    log_rows(tmp_path, 2, [steps_row(step, run=2) for step in (3, 4)], ["tensorboard"])
    assert len(list((tmp_path / "tb").iterdir())) == 2
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    shown = [(event.step, event.value) for event in accumulator.Scalars("run")]
    assert shown == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_tensorboard_events_are_written_without_importing_tensorflow(tmp_path):
    code = (
        "import sys; from pathlib import Path; from masked_diffusion.logger import Logger\n"
        "logger = Logger.open(Path(sys.argv[1]), 0, ['tensorboard']); logger.row({'step': 1, 'loss': 2.0})\n"
        "logger.close(); print([name for name in sys.modules if name.split('.')[0] == 'tensorflow'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert len(list((tmp_path / "tb").iterdir())) == 1


def test_a_message_with_a_name_that_is_no_utf_8_is_written_escaped(tmp_path):
    logger = Logger.open(tmp_path, 0, ["log"])
    logger.text("caf\udce9.png is bad")
    logger.close()
    assert (tmp_path / "log.txt").read_text() == "caf\\udce9.png is bad\n"


def test_the_terminal_shows_ten_numbers_and_files_all(tmp_path, capsys):
    row = {"step": 3, "loss": 0.25, "loss_q0": 0.5, "param_norm": 7.0, "grad_norm": 1.5}
    for names, shown in ((["stdout"], False), (["stdout-all"], True), (["log"], False)):
        logger = Logger.open(tmp_path, 0, names)
        logger.row(row)
        logger.close()
        said = capsys.readouterr().out
        assert ("loss_q0" in said and "param_norm" in said) == shown
        assert all(name in said for name in ("step", "grad_norm")) == (names != ["log"])
    assert "param_norm" in (tmp_path / "log.txt").read_text()


def test_wandb_is_refused_in_a_sentence_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed; install it with: pip install -e '.\\[wandb\\]'"):
        chosen_sinks({"OPENAI_LOG_FORMAT": "csv,wandb"})


def test_wandb_keeps_an_offline_run_in_the_folder_and_its_name_over_a_resume(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="the log target wandb needs the extra of its name")
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = []
    for start, loss in ((0, 0.5), (1, 0.25)):
        logger = Logger.open(tmp_path, start, ["wandb"])
        logger.row({"step": start + 1, "loss": loss, "vb": math.nan})
        logger.close()
        names.append((tmp_path / "wandb_id.txt").read_text())
    assert names[0] == names[1]
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in runs} == {f"run-{name}.wandb" for name in names}
    deadline = time.monotonic() + 30  # wandb's own process writes the last of a run after its end was confirmed
    while not all(b"loss" in path.read_bytes() for path in runs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
