import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread_and_a_known_global_generator():
    # Two test processes with two threads each crawl on a small machine.
    torch.set_num_threads(1)
    torch.manual_seed(0)
