"""scripts/compare_objectives.py: the same levels for every objective, and a comparison that goes on after a kill."""

import dataclasses
import json
from types import SimpleNamespace

import image_sample
import image_train
import pytest
import torch
from studying import objective_table
from studying.measure import HeldOut
from studying.plan import Run
from studying.settings import Comparison
from support import call

from masked_diffusion import create_diffusion
from masked_diffusion.choices import OBJECTIVES
from masked_diffusion.diffusion import objectives
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.programs import read_digits

COMPARE = "scripts/compare_objectives.py"
TINY = ["--objectives", "ddpm,edm", "--steps", "2", "--seeds", "1", "--sampling_steps", "1,2", "--num_samples", "10"]
TINY += ["--held_out_images", "8"]


class Best(torch.nn.Module):
    """What the best network of an objective returns for data of N(0, 1), by the papers' formulas."""

    def __init__(self, name):
        super().__init__()
        self.name, self.device_of = name, torch.nn.Parameter(torch.zeros(1))
        self.alphas_cumprod = torch.from_numpy(create_diffusion("").alphas_cumprod).float()

    def forward(self, x, time, y):
        wide = time.view(-1, 1, 1, 1)
        if self.name == "flow":
            t = wide / 1000
            return (2 * t - 1) * x / (t**2 + (1 - t) ** 2)
        if self.name == "edm":
            sigma = (4 * wide).exp()
            total = sigma**2 + 0.25
            return x * total.sqrt() * (1 / (1 + sigma**2) - 0.25 / total) * total.sqrt() / (0.5 * sigma)
        alpha_squared = self.alphas_cumprod[time.long()].view(-1, 1, 1, 1)
        if self.name == "ddpm":
            return torch.cat([(1 - alpha_squared).sqrt() * x, torch.zeros_like(x)], dim=1)
        return alpha_squared.sqrt() * x if self.name == "x0" else torch.zeros_like(x)


def best(name):
    config = ObjectiveConfig(objective=name, sigma_data=0.5)
    objective = objectives.OBJECTIVES[name](config, lambda **changes: create_diffusion("", **changes), None)
    return SimpleNamespace(model=Best(name), config=SimpleNamespace(build_objective=lambda: objective))


def test_networks_that_know_the_same_err_by_the_same_velocity_under_every_objective():
    held_out = HeldOut(Comparison(2, "1", 10, 4.0, held_out_images=8), torch.device("cpu"))
    times = objective_table.levels()
    found = {name: held_out.errors(best(name), times) for name in OBJECTIVES}
    for number, t in enumerate(times):
        x_0, noise = held_out.latents, held_out.noise[:, number]
        x = (1 - t) * x_0 + t * noise
        error = ((1 - t) * x / (t**2 + (1 - t) ** 2) - x_0) / t
        for name, errors in found.items():
            assert errors[number] == pytest.approx(float((error**2).mean()), rel=1e-3), name


@pytest.fixture(scope="module")
def compared(module_folder):
    """A comparison that is killed while it samples and started again: its folder, its scripts' calls, its output."""
    out, calls = module_folder("comparison") / "out", []
    wholes = {"train": image_train.main, "sample": image_sample.main}

    def counted(kind):
        def main(argv):
            calls.append(kind)
            if calls == ["train", "sample"]:
                raise KeyboardInterrupt
            return wholes[kind](argv)

        return main

    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as said:
        short = dataclasses.replace(read_digits.EMBEDDED["digits"], epochs=1)
        patch.setitem(read_digits.EMBEDDED, "digits", short)
        patch.setattr(image_train, "main", counted("train"))
        patch.setattr(image_sample, "main", counted("sample"))
        with pytest.raises(KeyboardInterrupt):
            call(patch, COMPARE, out, "--out", out, *TINY)
        lines = []
        said.setattr("sys.stdout", SimpleNamespace(write=lines.append, flush=lambda: None))
        assert call(patch, COMPARE, out, "--out", out, *TINY) == 0
    objective_table.classifier.cache_clear()
    return out, calls, "".join(lines)


def test_a_killed_comparison_trains_nothing_twice(compared):
    out, calls, _ = compared
    assert calls == ["train", "sample", "sample", "sample", "train", "sample", "sample"]
    assert (out / "runs" / "edm-seed0" / "ema_0.99_000002.pt").is_file()


def test_each_objective_is_trained_as_itself_and_sampled_with_its_own_sampler_and_each_length(compared):
    for objective, sampler in (("ddpm", "ddpm"), ("edm", "heun")):
        runs = compared[0] / "runs"
        config = json.loads((runs / f"{objective}-seed0" / "config.json").read_text())
        assert config["objective"]["objective"] == objective
        for length in (1, 2):
            folder = runs / f"{objective}-seed0-samples{length}"
            settings = json.loads((folder / "manifest.json").read_text())["settings"]
            assert (settings["sampler"], settings["num_sampling_steps"], settings["labels"]) == (
                sampler,
                length,
                "balanced",
            )
            assert settings["guidance"]["cfg_scale"] == 4 and (folder / "samples_10x8x8x3.png").is_file()


def test_the_table_has_the_recorded_numbers_of_each_objective(compared):
    out, _, text = compared
    lines = text.splitlines()
    assert lines[0].startswith("| objective | seeds | held-out error | read right, 1 steps |")
    for line, objective in zip(lines[2:], ("ddpm", "edm"), strict=True):
        record = json.loads((out / "runs" / f"{objective}-seed0.json").read_text())
        assert record["cpu_seconds"] > 0 and record["error"] == pytest.approx(sum(record["bins"]) / 8)
        assert line.startswith(f"| `{objective}` | 1 | {record['error']:.4f} | {100 * record['right']['1']:.1f} % |")


def test_a_folder_of_other_settings_is_refused(compared, monkeypatch, capsys):
    assert call(monkeypatch, COMPARE, compared[0], "--out", compared[0], *TINY, "--steps", 3) == 2
    assert "holds a study with steps 2, this one has 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--objectives", "flow,flaw"], "--objectives flaw: unknown; choose some of ddpm, x0, v, flow, edm"),
        (["--objectives", ","], "--objectives: give one or more of ddpm, x0, v, flow, edm"),
        (["--sampling_steps", "10,"], "--sampling_steps 10,: expected a comma list of numbers from 1 to 1000"),
        (["--sampling_steps", "1001"], "--sampling_steps 1001: expected a comma list"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--cfg_scale", "-1"], "--cfg_scale -1.0: must be 0 or more"),
    ],
)
def test_flags_that_make_no_comparison_are_refused_before_the_folder_is_taken(
    monkeypatch, tmp_path, capsys, flags, sentence
):
    out = tmp_path / "out"
    assert call(monkeypatch, COMPARE, out, "--out", out, *flags) == 2
    assert sentence in capsys.readouterr().err and not out.exists()


def test_the_seconds_of_a_stopped_training_count(monkeypatch, tmp_path):
    clock = iter([0.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(objective_table.time, "process_time", lambda: next(clock))
    comparison, run = Comparison(2, "1", 10, 4.0, 8), Run("flow", 0)

    def after(finished):
        trainer = SimpleNamespace(folder=tmp_path, train=lambda commands: finished)
        return objective_table.train(comparison, run, trainer)

    assert after([]) is None
    assert after([run]) == 7
    assert after(None) == 7  # trained, so that nothing is asked of the trainer


def test_the_table_says_the_spread_of_the_seeds():
    results = {
        Run("flow", seed): {"error": 0.5 + 0.1 * seed, "right": {"10": 0.9 + 0.02 * seed}, "cpu_seconds": 100.0}
        for seed in range(3)
    }
    *_, row = objective_table.table(results)
    assert row == "| `flow` | 3 | 0.6000 ± 0.1000 | 92.0 ± 2.0 % | 100 ± 0 |"
