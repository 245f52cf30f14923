"""Runs that end by compute: exact, resumable, with learning rate and finale as shares of it."""

import shutil

import pytest
from support import TIMES, TINY_DIGITS, assert_same_weights, call, rows, weights

from masked_diffusion.models import create_model
from masked_diffusion.models.cost import cost, plain_cost
from masked_diffusion.training.budget import Budget
from masked_diffusion.training.train_config import TrainConfig

TRAIN = "scripts/image_train.py"
SPRINT = ["--model", "DiT_Ti_2", "--policy", "sprint", "--objective", "flow", "--lr", "1e-3", "--max_steps", "0"]
SPRINT += ["--mask_ratio", "0.75"]


@pytest.fixture
def train(monkeypatch, tmp_path):
    def start(folder, *flags, status=0):
        assert call(monkeypatch, TRAIN, tmp_path / folder, *TINY_DIGITS, *SPRINT, *flags) == status
        return tmp_path / folder

    return start


@pytest.fixture(scope="module")
def model():
    return create_model("DiT_Ti_2", input_size=8, in_channels=1, num_classes=10, learn_sigma=False, policy="sprint")


@pytest.fixture(scope="module")
def costs(model):
    """Multiply-adds of a step of four images: sparse, of all tokens, plain."""
    return [4 * number for number in (cost(model), cost(model, model.num_tokens), plain_cost(model))]


def test_a_run_ends_with_the_last_step_within_its_compute_and_logs_what_it_took(train, costs):
    sparse, whole, plain = costs
    budget = (4 * sparse + 2 * whole + whole // 2) / 1e12
    folder = train("run", "--max_compute", budget, "--finale", 2.6 * whole / (budget * 1e12))
    log = rows(folder)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    steps = [b - a for a, b in zip([0, *(row["tflops"] for row in log)], [row["tflops"] for row in log], strict=False)]
    assert steps == pytest.approx([one / 1e12 for one in [sparse] * 4 + [whole] * 2])
    assert log[-1]["plain_samples"] == pytest.approx(4 * (4 * sparse + 2 * whole) / plain)
    assert all(a["seconds"] < b["seconds"] for a, b in zip(log, log[1:], strict=False))


def test_a_run_stopped_anywhere_goes_on_to_the_same_end(train, costs, tmp_path):
    sparse, whole, _ = costs
    flags = ["--max_compute", (3 * sparse + 3 * whole) / 1e12, "--finale", 0.5, "--lr_warmup", 2]
    flags += ["--lr_decay", 0.5, "--save_interval", 1]
    expected = train("whole", *flags)
    last = int(rows(expected)[-1]["step"])
    for step in (2, last - 1):
        resumed = tmp_path / f"from{step}"
        shutil.copytree(expected, resumed)
        for later in range(step + 1, last + 1):
            for path in resumed.glob(f"*{later:06d}*"):
                path.unlink()
        train(resumed.name, *flags)
        assert_same_weights(weights(resumed, last), weights(expected, last))
        assert [row | TIMES for row in rows(resumed)] == [row | TIMES for row in rows(expected)]
        assert rows(resumed)[-1]["seconds"] > rows(expected)[step - 1]["seconds"]


def test_what_a_checkpoint_does_not_say_of_its_compute_is_reckoned(model, costs):
    sparse, whole, _ = costs
    budget = Budget(TrainConfig(max_steps=8, finale=0.5), model, 4)
    budget.begin(5, {})
    assert (budget.step, budget.compute) == (5, 4 * sparse + whole)
    budget.begin(5, {"compute": 7})
    assert budget.compute == 7 and budget.last_step == 8


def test_the_learning_rate_rises_at_the_start_and_falls_over_the_last_share(train):
    folder = train("run", "--max_steps", "8", "--lr_warmup", "3", "--lr_decay", "0.5")
    expected = [1 / 3, 2 / 3, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [row["lr"] for row in rows(folder)] == pytest.approx([1e-3 * share for share in expected])


def test_the_same_steps_by_compute_and_by_number_give_the_same_weights(train, costs):
    by_number = train("number", "--max_steps", "3", "--lr_decay", "1")
    by_compute = train("compute", "--max_compute", 3 * costs[0] / 1e12, "--lr_decay", "1")
    assert_same_weights(weights(by_number, 3), weights(by_compute, 3))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max_compute", "1e-12"], "--max_compute 1e-12: one step takes"),
        (["--max_compute", "-1"], "--max_compute -1.0: must not be negative"),
        (["--max_compute", "1", "--max_steps", "3"], "--max_compute 1.0: the end is given in steps, too"),
        (["--max_steps", "3", "--lr_decay", "1.5"], "--lr_decay 1.5: must be in [0, 1]"),
        (["--lr_decay", "0.5"], "--lr_decay 0.5: give the end with --max_steps or --max_compute"),
        (["--finale", "0.5"], "--finale 0.5: the run has no end"),
        (["--lr_warmup", "-1"], "--lr_warmup -1: must not be negative"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(train, capsys, flags, sentence):
    train("run", *flags, status=2)
    assert sentence in capsys.readouterr().err
