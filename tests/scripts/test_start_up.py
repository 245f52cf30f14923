"""``--help`` and wrong flags are answered without torch, whose import takes seconds."""

import json
import sys

import pytest
from support import REPO, run_command

HELP = [
    "image_train", "image_sample", "check_data", "encode_latents", "convert_checkpoint", "visualize", "posthoc_ema",
    "read_digits", "train_autoencoder", "on_track", "fid_curve", "make_card", "make_dataset", "refactor_gate", "study",
    "demo", "draw_policies", "make_api_page", "guidance_sweep", "benchmark", "gpu_report",
    "benchmark_evaluator", "compare_objectives", "make_notebook",
]  # fmt: skip
# Commands, and what is said of them.
WRONG = {
    "scripts/image_train.py --no_such_flag 1": "unrecognized arguments: --no_such_flag",
    "scripts/image_train.py --lr fast": "argument --lr: expected a finite number",
    "scripts/image_train.py --lr 0": "--lr 0.0: must be positive",
    "scripts/image_train.py --model MDT_S_3": "--model MDT_S_3: unknown; choose one of MDT_XL_2",
    "scripts/image_train.py --policy some": "--policy some: unknown; choose one of none, mdt",
    "scripts/image_train.py --objective cold": "--objective cold: unknown; choose one of ddpm",
    "scripts/image_train.py --eval_interval -1": "--eval_interval -1: must be 0 or more",
    "scripts/image_train.py --ema_power 0.5": "--ema_power 0.5: expected numbers in (0, 0.28]",
    "scripts/image_sample.py --guidance more": "--guidance more: unknown; choose one of power_cosine",
    "scripts/image_sample.py --num_samples 0": "--num_samples 0: must be at least 1",
    "scripts/image_sample.py": "--model_path: give the checkpoint to sample",
    "infer_mdt.py --sampler fastest": "--sampler fastest: unknown; choose one of ddpm",
    "infer_mdt.py --image photo.png": "--image and --mask: give both",
    "scripts/encode_latents.py --dtype int8": "--dtype int8: choose one of fp32",
    "scripts/study.py --out study --model MDT_S_2": "--model MDT_S_2: all arms have one plain backbone",
    "scripts/compare_objectives.py --out table --seeds 0": "--seeds 0: must be at least 1",
    "scripts/convert_checkpoint.py": "--model_path: give the file to read",
    "scripts/benchmark.py --case train": "--case train: unknown; choose of train_step, sample",
    "scripts/benchmark.py --case index_of": "--case index_of: opens what --case index writes; use --case index",
    "scripts/benchmark.py --index_form 7z": "--index_form 7z: unknown; choose one of folder, zip",
    "scripts/benchmark.py --repeats 0": "--repeats 0: must be at least 1",
    "scripts/gpu_report.py --models MDT_S_3": "--model MDT_S_3: unknown; choose one of MDT_XL_2",
    "scripts/gpu_report.py --first_batch 0": "--first_batch 0: must be in 1 ... 1024",
    "scripts/demo.py --port 0": "--port 0: must be 1 ... 65535",
}
# Runs commands in turn, and writes after each its status and which of the slow libraries were imported by then.
PROGRAM = """
import contextlib, io, json, runpy, sys
found, paths = [], list(sys.path)
for command in json.loads(sys.argv[1]):
    sys.argv = command.split()
    sys.path[:] = [sys.argv[0].rpartition("/")[0], *paths]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    slow = [name for name in ("torch", "diffusers", "timm", "torchvision") if name in sys.modules]
    found.append([status, slow, said.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers():
    """Command -> its status, the slow libraries that were imported by then, and what it said."""
    helps = [f"scripts/{name}.py --help" for name in HELP] + ["infer_mdt.py --help"]
    commands = [*helps, *WRONG]
    done = run_command([sys.executable, "-c", PROGRAM, json.dumps(commands)], None, cwd=REPO)
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout), strict=True))


def test_help_is_printed_without_torch(answers):
    for command in (command for command in answers if command.endswith("--help")):
        status, slow, said = answers[command]
        assert status in (0, None) and said.startswith("usage:"), command
        assert not slow, command


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_flag_is_refused_without_torch(answers, command):
    status, slow, said = answers[command]
    assert status == 2 and WRONG[command] in said
    assert not slow
