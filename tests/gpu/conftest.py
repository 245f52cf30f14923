import pytest
import torch

from masked_diffusion import dist_util

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request):
    """Where a test runs: its code is tried on the CPU everywhere, and on a GPU by ``bash tests/run.sh --gpu``."""
    dist_util.allow_tf32(False)
    yield dist_util.choose_device(request.param)
    dist_util.allow_tf32(False)
