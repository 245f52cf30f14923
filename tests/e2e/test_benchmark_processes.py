"""The benchmark's cases that start processes of their own."""

import json

import pytest
from support import run

pytestmark = pytest.mark.e2e

TINY = [
    "--model", "MDT_Ti_2", "--image_size", "8", "--downsample", "1", "--in_channels", "1", "--num_classes", "10",
    "--batch_size", "2", "--repeats", "1", "--warmup", "1", "--device", "cpu",
]  # fmt: skip


@pytest.mark.parametrize("case, ratio", [("scaling", "scaling"), ("memory", "ours_to_plain_net_memory_bytes")])
def test_a_case_of_several_processes_says_one_line(tmp_path, case, ratio):
    done = run("scripts/benchmark.py", tmp_path, "--case", case, *TINY)
    record = json.loads(done.stdout)
    assert record["case"] == case and record[ratio] > 0
