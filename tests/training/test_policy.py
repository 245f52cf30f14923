"""``--policy`` in trainings: recorded, rebuilt for sampling, kept by a resume."""

import json

import pytest
from support import TINY_DIGITS, assert_same_weights, call, rows, weights

from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.tokens import KeptTokens

TRAIN = "scripts/image_train.py"
DIT_UNDER_MDT = ["--model", "DiT_Ti_2", "--policy", "mdt"]


@pytest.fixture
def train(monkeypatch, tmp_path):
    def start(folder, *flags, status=0):
        assert call(monkeypatch, TRAIN, tmp_path / folder, *TINY_DIGITS, *flags) == status
        return tmp_path / folder

    return start


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_dit_trained_under_mdt_is_rebuilt_by_its_config_for_samples(train, monkeypatch):
    folder = train("dit", *DIT_UNDER_MDT)
    assert {"loss", "m_loss"} <= set(rows(folder)[0])
    model = config_of(folder)["model"]
    assert (model["policy"], model["mask_ratio"], model["decode_layer"]) == ("mdt", 0.3, 2)
    assert "sideblocks.0.attn.qkv.weight" in weights(folder, 2)
    flags = ["--model_path", folder / "model000002.pt", "--num_samples", 2, "--batch_size", 2]
    flags += ["--num_sampling_steps", 2, "--device", "cpu"]
    assert call(monkeypatch, "scripts/image_sample.py", folder / "samples", *flags) == 0
    assert json.loads((folder / "samples" / "manifest.json").read_text())["settings"]["policy"] == "mdt"


def test_without_a_config_the_weights_of_a_dit_show_that_it_was_trained_under_mdt(train, monkeypatch):
    folder = train("dit", *DIT_UNDER_MDT)
    flags = ["--model_path", folder / "model000002.pt", "--num_samples", 2, "--batch_size", 2]
    flags += ["--num_sampling_steps", 2, "--device", "cpu", "--vae_path", "none"]
    with_config = folder / "with"
    assert call(monkeypatch, "scripts/image_sample.py", with_config, *flags) == 0
    (folder / "config.json").unlink()
    assert call(monkeypatch, "scripts/image_sample.py", folder / "without", *flags, "--decode_layer", 2) == 0
    name = "samples_2x8x8x3.npz"
    assert (with_config / name).read_bytes() == (folder / "without" / name).read_bytes()


def test_an_mdt_under_none_trains_one_view(train, capsys):
    folder = train("mdt", "--policy", "none")
    assert "loss" in rows(folder)[0] and "m_loss" not in rows(folder)[0]
    model = config_of(folder)["model"]
    assert (model["policy"], model["mask_ratio"]) == ("none", None)


def test_a_run_whose_config_names_no_policy_goes_on_under_the_familys(train):
    whole, resumed = train("whole", "--max_steps", "3"), train("resumed")
    config = config_of(resumed)
    assert config["model"].pop("policy") == "mdt"
    (resumed / "config.json").write_text(json.dumps(config))
    train("resumed", "--max_steps", "3")
    assert_same_weights(weights(whole, 3), weights(resumed, 3))
    assert config_of(resumed)["model"]["policy"] == "mdt"


def test_a_resume_under_another_policy_is_refused(train, capsys):
    train("run")
    train("run", "--max_steps", "3", "--policy", "none", status=2)
    assert "the run to resume has --policy mdt, this one none" in capsys.readouterr().err


def test_a_policy_that_does_not_fit_ends_the_start_with_its_name(train, capsys):
    train("run", "--policy", "mdtv2", status=2)
    assert "--policy mdtv2: is for MDTv2_* models" in capsys.readouterr().err


ROUTED = {
    "tread": ["--policy", "tread", "--model", "MDT_Ti_2", "--grad_checkpointing", "True", "--mask_ratio", "0.5"],
    "sprint, with a finale": ["--policy", "sprint", "--model", "DiT_Ti_2", "--mask_ratio", "0.75", "--finale", "0.4"],
}

DEFERRED = ["--policy", "deferred", "--model", "DiT_Ti_2", "--mask_ratio", "0.75"]
ROUTED["deferred"] = [*DEFERRED, "--learn_sigma", "False"]


def test_a_policy_whose_loss_counts_kept_tokens_refuses_a_variational_term(train, capsys):
    train("run", *DEFERRED, status=2)
    assert "--policy deferred: only kept tokens count in its loss" in capsys.readouterr().err


def test_the_loss_of_deferred_counts_kept_tokens_alone(train, monkeypatch):
    """A network that predicts nothing has an error of about 1 on each token, and none where it does not count."""
    folder = train("run", *ROUTED["deferred"], "--batch_size", "32", "--max_steps", "1")
    assert rows(folder)[0]["mse"] == pytest.approx(1, abs=0.15)
    moved = []
    mean = KeptTokens.mean
    monkeypatch.setattr(KeptTokens, "mean", lambda self, values: moved.append(values.shape) or mean(self, values))
    train("seen", *ROUTED["deferred"], "--max_steps", "2", "--finale", "0.5")
    assert len(moved) == 1


@pytest.mark.parametrize("case", ROUTED)
def test_a_routed_training_does_not_depend_on_microbatches_and_goes_on_where_it_was(train, monkeypatch, case):
    flags = [*ROUTED[case], "--max_steps", "3"]
    whole, parts = train("whole", *flags), train("parts", *flags, "--microbatch", "2")
    assert_same_weights(weights(whole, 3), weights(parts, 3), atol=1e-5)
    resumed = train("resumed", *flags, "--save_interval", "1", "--keep_checkpoints", "2")
    for path in resumed.glob("*000003.*"):
        path.unlink()
    train("resumed", *flags)
    assert_same_weights(weights(whole, 3), weights(resumed, 3))
    model = config_of(whole)["model"]
    assert (model["policy"], model["route"]) == (case.split(",")[0], None if case == "deferred" else "1,3")


def test_a_finale_is_the_last_share_of_the_run_with_all_tokens(train, monkeypatch):
    seen = []
    draw = LatentTransformer.draw
    spy = lambda self, *args: seen.append(draw(self, *args)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(LatentTransformer, "draw", spy)
    train("run", "--policy", "tread", "--model", "DiT_Ti_2", "--max_steps", "5", "--finale", "0.4")
    assert [draw.kept is not None for draw in seen] == [True, True, True, False, False]


def test_path_drops_are_drawn_for_each_image_and_recorded(train, monkeypatch):
    folder = train("all", "--policy", "sprint", "--model", "DiT_Ti_2", "--mask_ratio", "0.75")
    assert config_of(folder)["model"]["path_drop"] == 0.1 and config_of(folder)["model"]["choose"] == "cells"
    other = train("most", "--policy", "sprint", "--model", "DiT_Ti_2", "--mask_ratio", "0.75", "--path_drop", "0.9")
    assert rows(folder)[1]["loss"] != rows(other)[1]["loss"]
    uniform = train(
        "uniform", "--policy", "sprint", "--model", "DiT_Ti_2", "--mask_ratio", "0.75", "--choose", "uniform"
    )
    assert rows(folder)[1]["loss"] != rows(uniform)[1]["loss"]


def test_a_finale_of_a_run_without_an_end_is_refused(train, capsys):
    train("run", "--policy", "tread", "--finale", "0.1", "--max_steps", "0", status=2)
    assert "--finale 0.1: the run has no end; give --max_steps or --lr_anneal_steps" in capsys.readouterr().err


def test_a_resume_by_another_route_is_refused(train, capsys):
    train("run", "--policy", "tread")
    train("run", "--policy", "tread", "--max_steps", "3", "--route", "0,2", status=2)
    assert "the run to resume has --route 1,3, this one 0,2" in capsys.readouterr().err


def test_a_route_that_has_no_effect_is_warned_about(train, monkeypatch, tmp_path, capsys):
    flags = [*TINY_DIGITS, "--max_steps", "1", "--route", "1,2"]
    assert call(monkeypatch, TRAIN, tmp_path, *flags, sinks="stdout") == 0
    assert "warning: --route is ignored by MDT_Ti_2 under --policy mdt" in capsys.readouterr().out
