"""The worked examples of docs/change_one_thing.md, each run from the document."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import REPO, TINY_DIGITS, call, few_steps

from masked_diffusion import choices
from masked_diffusion.data import sources
from masked_diffusion.diffusion import objectives, samplers
from masked_diffusion.image_datasets import open_dataset
from masked_diffusion.models.backbone import DiT

PAGE = (REPO / "docs" / "change_one_thing.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"
DIT = [*TINY_DIGITS, "--model", "DiT_Ti_2", "--max_steps", "1"]  # for which a mask ratio is said to be ignored


@pytest.fixture
def run(monkeypatch):
    """Run the block under a heading; what it registers goes with the test. Returns its names."""
    tables = [choices.OBJECTIVES, choices.SAMPLERS, objectives.OBJECTIVES, samplers.SAMPLERS]
    tables += [sampler.starts for sampler in samplers.SAMPLERS.values()]
    former = [dict(table) for table in tables]
    monkeypatch.setattr(sources, "SOURCES", sources.SOURCES)
    monkeypatch.setattr(DiT, "make_blocks", DiT.make_blocks)

    def run(heading):
        names = {}
        exec(compile(EXAMPLES[heading], f"change_one_thing.md, {heading}", "exec"), names)
        return names

    yield run
    for table, entries in zip(tables, former, strict=True):
        table.clear()
        table.update(entries)


def train_and_sample(monkeypatch, folder, *flags, sampling=()):
    assert call(monkeypatch, TRAIN, folder, *DIT, *flags) == 0
    few = ["--num_samples", 2, "--batch_size", 2, *few_steps(2), "--device", "cpu", *sampling]
    assert call(monkeypatch, SAMPLE, folder, "--model_path", folder / "ema_0.9999_000001.pt", *few) == 0
    return torch.load(folder / "model000001.pt", weights_only=True)


def test_every_example_is_short_and_tested():
    assert set(EXAMPLES) == {"A loss", "A sampler", "A block", "A source of data", "A metric"}
    assert all(len([line for line in text.splitlines() if line]) <= 30 for text in EXAMPLES.values())


def test_a_loss(run, monkeypatch, tmp_path):
    loss = run("A loss")["NoisyFlow"]
    assert loss.weight(None, torch.tensor(0.25)) == 0.5
    train_and_sample(monkeypatch, tmp_path, "--objective", "noisy_flow", sampling=["--sampler", "heun"])


def test_a_sampler_is_of_second_order(run, monkeypatch, tmp_path):
    run("A sampler")
    train_and_sample(monkeypatch, tmp_path, "--objective", "flow", sampling=["--sampler", "midpoint"])
    deviation, errors = 0.5, []
    for steps in (20, 40):  # exact predictions on Gaussian data of this deviation: the ODE has a known end
        levels = np.linspace(1, 0, steps + 1)[:-1].tolist()
        path = SimpleNamespace(
            after=lambda t, levels=levels: [*levels, 0.0][levels.index(t) + 1],
            slope=lambda prediction: prediction.eps - prediction.pred_xstart,
        )

        def predict(x, t):
            t = t.view(-1, 1, 1, 1)
            variance = (1 - t) ** 2 * deviation**2 + t**2
            clean, noise = (1 - t) * deviation**2 * x / variance, t * x / variance
            return samplers.Prediction(clean, noise, clean, noise)

        step = samplers.SAMPLERS["midpoint"].starts["flow"](path)
        x = samplers.last(samplers.loop(step, predict, torch.ones(1, 1, 1, 1).double(), levels))
        errors.append(abs(x.item() - deviation))
    assert errors[0] > 3.5 * errors[1]


def test_a_block(run, monkeypatch, tmp_path):
    run("A block")
    state = train_and_sample(monkeypatch, tmp_path)
    hidden, width = int(128 * 4 * 2 / 3), 128
    assert state["blocks.0.mlp.fc1.weight"].shape == (2 * hidden, width)
    assert state["blocks.0.mlp.fc2.weight"].shape == (width, hidden)


def test_a_source_of_data(run, monkeypatch, tmp_path):
    run("A source of data")
    dataset = open_dataset("checkers", image_size=16, random_flip=False)
    assert dataset.class_names == ["fine", "coarse"] and len(dataset) == 100
    fine, coarse = dataset.load(0)[0], dataset.load(1)[0]
    assert (fine[0, :4] == [-1, -1, 1, 1]).all() and (coarse[0, :8] == [-1, -1, -1, -1, 1, 1, 1, 1]).all()
    assert call(monkeypatch, TRAIN, tmp_path, *DIT, "--data_dir", "checkers") == 0


def test_a_metric(run):
    distance = run("A metric")["uncorrelated_distance"]
    rng = np.random.default_rng(0)
    sets = [rng.normal(mean, deviation, (20_000, 3)) for mean, deviation in ((0, 1), (1, 2))]
    features = [
        SimpleNamespace(pool_statistics=SimpleNamespace(mu=values.mean(0), sigma=np.cov(values, rowvar=False)))
        for values in sets
    ]
    assert distance(*features) == pytest.approx(3 * (1 + 1), rel=0.05) and distance(features[0], features[0]) == 0
