"""Loader processes end with the process that started them, in whichever way that ends."""

import sys

import pytest
from support import environment, run_command

pytestmark = pytest.mark.e2e

OPEN = """
import sys
from masked_diffusion.image_datasets import load_data
data = load_data(data_dir="builtin:digits", batch_size=2, image_size=8, num_workers=2, random_flip=False)
next(data)
"""
# An error in a loader process; as at an interactive prompt, the traceback stays, and what it has seen.
FAIL = """
from masked_diffusion.data.dataset import ImageDataset
def load(self, index, rng=None):
    raise ValueError("no image")
type(data.gi_frame.f_locals["loader"].dataset.dataset).load = load
data = load_data(data_dir="builtin:digits", batch_size=2, image_size=8, num_workers=2, random_flip=False)
try:
    next(data)
except ValueError as error:
    kept = error
print("failed", "no image" in str(kept))
"""


@pytest.mark.parametrize("script", [OPEN, OPEN + FAIL], ids=["never closed", "an error is kept"])
def test_a_process_ends_although_its_loader_was_not_closed(tmp_path, script):
    done = run_command([sys.executable, "-c", script], environment(tmp_path), timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert ("failed True" in done.stdout) == (FAIL in script)
