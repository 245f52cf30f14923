"""What a training step must not cost: waiting for the device."""

import pytest
import torch
from support import TINY_DIGITS, call
from torch.profiler import ProfilerActivity, profile

from masked_diffusion.train_util import TrainLoop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A number read from a tensor, and shapes that depend on values: on a GPU each of them waits for it. What CUDA calls
# these is added there; the flag that is read a step late is copied to pinned memory, and its event has long passed.
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique")
CUDA_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "Memcpy DtoH (Device -> Pageable)")
BF16 = ("--use_bf16", "True")
# The CPU's kernel counts its steps in host memory by itself; the GPU's does not.
INSIDE_A_KERNEL = "aten::_fused_adamw_"
MICROBATCHES = ("--microbatch", "2", "--grad_clip", "1", "--ema_rate", "0.9,0.99")


def ancestors(event):
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names


@pytest.mark.parametrize("flags", [(), BF16, MICROBATCHES, ("--model", "DiT_Ti_2")], ids=str)
def test_no_step_but_those_that_log_waits_for_the_device(monkeypatch, tmp_path, flags):
    waits = []
    train_step = TrainLoop.train_step

    def profiled(self, images, extras):
        if self.step < 2:  # the first ones make what is kept
            return train_step(self, images, extras)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (DEVICE == "cuda")]) as profiler:
            train_step(self, images, extras)
        names = [event.name for event in profiler.events() if INSIDE_A_KERNEL not in ancestors(event)]
        assert names.count("aten::mul") > 10  # it sees the step
        waits.append([name for name in names if name in WAITS + CUDA_WAITS])
        return None

    monkeypatch.setattr(TrainLoop, "train_step", profiled)
    run = [*TINY_DIGITS, "--device", DEVICE, "--max_steps", "3", "--log_interval", "100", *flags]
    assert call(monkeypatch, "scripts/image_train.py", tmp_path, *run) == 0
    assert waits == [[]]
