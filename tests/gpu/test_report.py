"""The table of speeds: its batches, its rows, its files. Nothing here is timed."""

import json
import os
import subprocess

import pytest
import torch
from benchmarking import report
from support import REPO, call

from masked_diffusion import train_util

REPORT = "scripts/gpu_report.py"


def test_the_largest_batch_is_the_last_that_fits():
    tried = []

    def make(size):
        def step():
            tried.append(size)
            if size > 8:
                raise torch.OutOfMemoryError("full")

        return step

    assert report.largest_batch(make, [4, 8, 16, 32], torch.device("cpu")) == 8
    assert tried == [4, 4, 8, 8, 16]
    assert report.largest_batch(make, [16], torch.device("cpu")) is None


def test_a_report_has_a_row_for_each_path_of_each_model(monkeypatch, tmp_path, capsys):
    compiled = []
    monkeypatch.setattr(
        train_util, "compile_blocks", lambda model, device: compiled.append(device)
    )  # it takes a minute
    flags = ["--models", "MDT_Ti_2", "--image_size", "32", "--first_batch", "1", "--largest_batch", "3"]
    flags += ["--repeats", "1", "--device", "cpu", "--out", tmp_path / "r"]
    assert call(monkeypatch, REPORT, tmp_path, *flags) == 0
    assert compiled
    records = [json.loads(line) for line in (tmp_path / "r" / "report.jsonl").read_text().splitlines()]
    assert [record["path"] for record in records] == ["ours", "ours, compiled", "plain"]
    assert {record["batch"] for record in records} == {2} and all(r["images_per_second"] > 0 for r in records)
    [written] = (tmp_path / "r").glob("report_*.md")
    table = capsys.readouterr().out
    assert table.splitlines()[0] == "| model | path | batch | images/s | MFU | peak GB | of plain |"
    assert written.read_text().endswith(table)


def test_a_path_that_does_not_fit_has_a_row_that_says_so():
    rows = [
        {"model": "M", "path": "ours", "batch": 4, "images_per_second": 30.0, "peak_memory_bytes": 2e9, "mfu": 0.25},
        {"model": "M", "path": "plain", "batch": None},
    ]
    lines = report.table(rows).splitlines()
    assert lines[2] == "| M | ours | 4 | 30.0 | 25% | 2.0 |  |"
    assert lines[3].startswith("| M | plain | does not fit |")


@pytest.mark.parametrize("flags", [["--first_batch", "0"], ["--first_batch", "64", "--largest_batch", "32"]])
def test_sizes_that_cannot_be_doubled_are_refused(monkeypatch, tmp_path, capsys, flags):
    assert call(monkeypatch, REPORT, tmp_path, *flags, "--device", "cpu", "--out", tmp_path / "r") == 2
    assert "--first_batch" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["False", "True"])
def test_the_gpu_set_and_its_table_are_skipped_in_words_where_there_is_no_gpu(tmp_path, there):
    stand_in = tmp_path / "python"  # which says of torch what it is told, and notes what else it is asked
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {there} || echo "$@" >> "{tmp_path}/asked"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": "my_report"}
    command = ["bash", str(REPO / "tests" / "run.sh"), "--gpu", "--no-install", "-x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    asked = tmp_path / "asked"
    if there == "False":
        assert "There is no CUDA device here" in done.stdout and not asked.exists()
    else:
        assert asked.read_text().splitlines() == [
            "-m pytest -m gpu tests/gpu -x", "scripts/gpu_report.py --out my_report"
        ]  # fmt: skip
