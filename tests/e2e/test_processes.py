"""The published commands as real processes, shrunk only in size."""

import json

import numpy as np
import pytest
import torch
from support import TINY_DIGITS, assert_same_weights, command, environment, few_steps, rows, run, run_command, weights

pytestmark = pytest.mark.e2e

TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"
LAUNCH = "torch.distributed.launch"


@pytest.fixture(scope="module")
def published_run(module_folder, tiny_vae, colour_folder):
    """The published training command on two processes, on images and a real autoencoder."""
    folder = module_folder("published")
    done = run(
        TRAIN, folder, *published_flags(tiny_vae, colour_folder), "--batch_size", 2, processes=2, launcher=LAUNCH,
        warm=False,
    )  # fmt: skip
    return folder, done


@pytest.fixture(scope="module")
def published_weights(published_run, module_folder):
    """Weights of that run that can show a difference: after three updates a model still predicts about zero."""
    folder = module_folder("weights")
    (folder / "config.json").write_bytes((published_run[0] / "config.json").read_bytes())
    state = weights(published_run[0], 3)
    generator = torch.Generator().manual_seed(0)
    for value in state.values():
        if value.is_floating_point():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    torch.save(state, folder / "ema_0.9999_000003.pt")
    return folder / "ema_0.9999_000003.pt"


def published_flags(tiny_vae, colour_folder):
    return [
        "--data_dir", colour_folder, "--vae_path", tiny_vae, "--image_size", 32, "--mask_ratio", "0.30",
        "--decode_layer", 2, "--model", "MDT_S_2", "--diffusion_steps", 1000, "--max_steps", 3, "--save_interval", 1,
        "--log_interval", 1, "--preview_samples", 3, "--preview_steps", 2, "--lr", "1e-3",
    ]  # fmt: skip


def test_the_published_training_command_runs_on_two_processes(published_run):
    folder, done = published_run
    assert "24 images, 3 classes (blue, green, red)" in done.stdout
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    assert {path.name for path in folder.glob("*000003*")} == {
        "model000003.pt", "ema_0.9999_000003.pt", "opt000003.pt", "state000003.pt", "checkpoint000003.json",
        "preview_000003.png",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["class_names"] == ["blue", "green", "red"]
    assert config["first_stage"]["scaling_factor"] == 0.3
    for name in ("progress.csv", "progress.json", "log.txt"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "tb").glob("events.out.tfevents.*"))


def test_two_ranks_equal_one_process_with_twice_the_batch(published_run, tiny_vae, colour_folder, tmp_path):
    folder, _ = published_run
    run(TRAIN, tmp_path, *published_flags(tiny_vae, colour_folder), "--batch_size", 4)
    moments = [torch.load(f / "opt000001.pt", weights_only=True)["state"] for f in (folder, tmp_path)]
    assert len(moments[0]) == len(moments[1]) > 100
    for index, state in moments[0].items():  # after the first update Adam's first moment is the gradient, times 0.1
        gradient, expected = state["exp_avg"], moments[1][index]["exp_avg"]
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert_same_weights(weights(folder, 3), weights(tmp_path, 3), atol=0.1 * 1e-3)
    for a, b in zip(rows(folder), rows(tmp_path), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_the_published_sampling_commands_run_in_one_folder(published_weights, tmp_path):
    flags = ["--model_path", published_weights, "--model", "MDT_S_2", "--image_size", 32,
             "--decode_layer", 2, *few_steps(3), "--num_samples", 5, "--batch_size", 2]  # fmt: skip
    guided = run(SAMPLE, tmp_path, *flags, "--cfg_cond", "True", processes=2, launcher=LAUNCH)
    path = tmp_path / "samples_5x32x32x3.npz"
    assert guided.stdout.splitlines()[-1] == str(path)
    first = path.read_bytes()
    plain = run(SAMPLE, tmp_path, *flags, processes=2, launcher=LAUNCH)
    assert "moved aside" in plain.stderr
    assert (tmp_path / "samples_5x32x32x3_1.npz").read_bytes() == first != path.read_bytes()
    manifests = [json.loads((tmp_path / name).read_text()) for name in ("manifest_1.json", "manifest.json")]
    assert [m["samples"] for m in manifests] == ["samples_5x32x32x3_1.npz", "samples_5x32x32x3.npz"]
    assert manifests[0]["settings"]["guidance"]["cfg_scale"] == 3.8 and manifests[1]["settings"]["guidance"] is None
    again = run(SAMPLE, tmp_path, *flags)
    assert "already complete" in again.stderr and again.stdout.splitlines()[-1] == str(path)
    with np.load(path, allow_pickle=False) as file:
        assert file["arr_0"].shape == (5, 32, 32, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].shape == (5,) and file["arr_1"].dtype == np.int64


@pytest.mark.parametrize("sampler, guide_from", [("ddpm", "null_label"), ("unipc", "routed")])
def test_samples_are_the_same_bytes_from_one_and_two_processes(published_weights, tmp_path, sampler, guide_from):
    flags = ["--model_path", published_weights, *few_steps(3), "--num_samples", 7,
             "--batch_size", 2, "--cfg_cond", "True", "--sampler", sampler, "--guide_from", guide_from]  # fmt: skip
    if guide_from == "routed":
        flags += ["--guide_strong_ratio", 0.2, "--guide_ratio", 0.6]
    for name, processes in (("one", None), ("two", 2)):
        run(SAMPLE, tmp_path / name, *flags, processes=processes)
    one, two = ((tmp_path / name / "samples_7x32x32x3.npz").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("launcher", ["torch.distributed.launch", "torch.distributed.run"])
def test_launchers_give_the_numbers_of_a_bare_process(launcher, tmp_path):
    flags = [*TINY_DIGITS, "--lr", "1e-3"]
    run(TRAIN, tmp_path / "launched", *flags, "--batch_size", 2, processes=2, launcher=launcher, warm=False)
    run(TRAIN, tmp_path / "bare", *flags, "--batch_size", 4)
    assert_same_weights(weights(tmp_path / "launched", 2), weights(tmp_path / "bare", 2), atol=1e-4)


@pytest.mark.parametrize("spelling", ["--local-rank=0", "--local_rank=0"])
def test_local_rank_is_taken_in_both_spellings(spelling, tmp_path):
    run(TRAIN, tmp_path, *TINY_DIGITS, "--max_steps", 1, spelling, "--dist_on_itp")
    assert weights(tmp_path, 1)


def test_without_a_log_folder_a_new_dated_one_is_made_and_printed(tmp_path):
    done = run_command(command(TRAIN, *TINY_DIGITS, "--max_steps", 1), environment(""), cwd=tmp_path)
    [folder] = tmp_path.iterdir()
    assert done.returncode == 0 and f"output folder: {folder}" in done.stdout
    assert (folder / "model000001.pt").exists()
