"""``--policy`` in trainings: recorded, rebuilt for sampling, kept by a resume."""

import json

import pytest
import torch
from support import TINY_DIGITS, assert_same_weights, call, few_steps, rows, weights

from masked_diffusion.diffusion.objectives import Flow
from masked_diffusion.models import create_model
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
    flags += [*few_steps(2), "--device", "cpu"]
    assert call(monkeypatch, "scripts/image_sample.py", folder / "samples", *flags) == 0
    assert json.loads((folder / "samples" / "manifest.json").read_text())["settings"]["policy"] == "mdt"


def test_without_a_config_the_weights_of_a_dit_show_that_it_was_trained_under_mdt(train, monkeypatch):
    folder = train("dit", *DIT_UNDER_MDT)
    flags = ["--model_path", folder / "model000002.pt", "--num_samples", 2, "--batch_size", 2]
    flags += [*few_steps(2), "--device", "cpu", "--vae_path", "none"]
    with_config = folder / "with"
    assert call(monkeypatch, "scripts/image_sample.py", with_config, *flags) == 0
    (folder / "config.json").unlink()
    assert call(monkeypatch, "scripts/image_sample.py", folder / "without", *flags, "--decode_layer", 2) == 0
    name = "samples_2x8x8x3.npz"
    assert (with_config / name).read_bytes() == (folder / "without" / name).read_bytes()


@pytest.mark.parametrize(
    "flags, warned",
    [
        (["--model", "MDT_Ti_2"], True),
        (["--model", "MDTv2_Ti_2"], True),
        (["--model", "MDT_Ti_2", "--policy", "none"], False),
        (["--model", "DiT_Ti_2"], False),
        (["--model", "DiT_Ti_2", "--policy", "mdt"], False),
        (["--model", "MDT_Ti_2", "--mask_ratio", "0.3"], False),
    ],
)
def test_a_model_that_masks_only_when_asked_says_that_it_trains_on_all_tokens(train, capsys, flags, warned):
    train("run", "--dry_run", "True", "--mask_ratio", "None", *flags)
    said = capsys.readouterr().out
    assert ("trains on all tokens, because --mask_ratio is not given; give --mask_ratio 0.30" in said) == warned


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
FLOW = ["--objective", "flow", "--model"]
ROUTED["maskdit, with a falling ratio"] = ["--policy", "maskdit", *FLOW, "DiT_Ti_2", "--ratio_schedule", "cosine:2"]
ROUTED["maskdit, in its last blocks"] = ["--policy", "maskdit", *FLOW, "MDT_Ti_2", "--decoder", "blocks"]
ROUTED["dual_timestep"] = ["--policy", "dual_timestep", *FLOW, "DiT_Ti_2", "--grad_checkpointing", "True"]
for case in ("maskdit, in its last blocks", "dual_timestep"):
    ROUTED[case] += ["--finale", "0.4", "--finale_lr", "0.5"]


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
    model, policy = config_of(whole)["model"], case.split(",")[0]
    assert (model["policy"], model["route"]) == (policy, "1,3" if policy in ("tread", "sprint") else None)


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
    assert (
        "--finale 0.1: the run has no end; give --max_steps, --max_compute or --lr_anneal_steps"
        in capsys.readouterr().err
    )


def test_a_resume_by_another_route_is_refused(train, capsys):
    train("run", "--policy", "tread")
    train("run", "--policy", "tread", "--max_steps", "3", "--route", "0,2", status=2)
    assert "the run to resume has --route 1,3, this one 0,2" in capsys.readouterr().err


def test_a_route_that_has_no_effect_is_warned_about(train, monkeypatch, tmp_path, capsys):
    flags = [*TINY_DIGITS, "--max_steps", "1", "--route", "1,2"]
    assert call(monkeypatch, TRAIN, tmp_path, *flags, sinks="stdout") == 0
    assert "warning: --route is ignored by MDT_Ti_2 under --policy mdt" in capsys.readouterr().out


def test_the_ratio_follows_its_schedule_to_the_end_or_the_finale(train, monkeypatch):
    seen = []
    draw = LatentTransformer.draw
    spy = lambda self, *args: seen.append(draw(self, *args)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(LatentTransformer, "draw", spy)
    flags = ["--policy", "tread", "--model", "DiT_Ti_2", "--mask_ratio", "0.8", "--max_steps", "5"]
    train("falls", *flags, "--ratio_schedule", "cosine:2", "--finale", "0.2")
    # cos^2 of 0, 18, 36, 54 degrees
    assert [16 if one.kept is None else one.kept.ids_keep.shape[1] for one in seen] == [3, 4, 7, 11, 16]
    seen.clear()
    train("rises", *flags, "--ratio_schedule", "linear")
    assert [16 if one.kept is None else one.kept.ids_keep.shape[1] for one in seen] == [16, 13, 10, 8, 5]


def test_an_image_has_two_levels_of_the_law_and_each_token_one_of_them(train, monkeypatch):
    seen = []
    losses = Flow.training_losses

    def spy(self, model, z, level, kwargs, noise, counts, extra, pixel_level):
        seen.append((level, pixel_level, kwargs["draw"]))
        return losses(self, model, z, level, kwargs, noise, counts, extra, pixel_level)

    monkeypatch.setattr(Flow, "training_losses", spy)
    train("run", *ROUTED["dual_timestep"], "--mask_ratio", "0.25", "--level_law", "logit_normal", "--finale", "0.5")
    (level, pixel_level, draw), (last_level, *last) = seen
    assert level.shape == (4, 2) and len(level.unique()) == 8 and ((level > 0) & (level < 1)).all()
    group = draw.group.view(4, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(pixel_level, torch.where(group, level[:, 1].view(4, 1, 1, 1), level[:, 0].view(4, 1, 1, 1)))
    assert last_level.shape == (4,) and last[0] is None and last[1].group is None


def test_the_learning_rate_of_the_finale_is_the_asked_part(train):
    flags = ["--policy", "tread", "--model", "DiT_Ti_2", "--lr", "0.001", "--finale", "0.5", "--finale_lr", "0.1"]
    folder = train("run", *flags, "--max_steps", "4")
    assert [row["lr"] for row in rows(folder)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_a_policy_has_a_finale_of_its_own_that_a_run_from_before_it_does_not_get(train):
    flags = ["--policy", "sprint", "--model", "DiT_Ti_2", "--mask_ratio", "0.75"]
    folder = train("run", *flags)
    config = config_of(folder)
    assert config["training"]["finale"] == 0.1
    assert config_of(train("plain", "--policy", "tread", "--model", "DiT_Ti_2"))["training"]["finale"] == 0
    config["training"]["finale"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    train("run", *flags, "--max_steps", "3")
    assert config_of(folder)["training"]["finale"] == 0
    train("run", *flags, "--max_steps", "4", "--finale", "0.1")
    assert config_of(folder)["training"]["finale"] == 0.1


def test_the_terms_of_maskdits_loss_are_logged_and_its_decoder_is_rebuilt_for_samples(train, monkeypatch):
    folder = train("run", *ROUTED["maskdit, with a falling ratio"], "--decoder", "64x1")
    row = rows(folder)[1]
    assert row["loss"] == pytest.approx(row["mse"] + row["mae"]) and row["mae"] > 0
    assert config_of(folder)["model"]["decoder"] == "64x1"
    flags = ["--model_path", folder / "model000002.pt", "--num_samples", 2, "--batch_size", 2]
    flags += [*few_steps(2), "--device", "cpu", "--vae_path", "none", "--objective", "flow"]
    name = "samples_2x8x8x3.npz"
    with_config, without = folder / "with", folder / "without"
    assert call(monkeypatch, "scripts/image_sample.py", with_config, *flags) == 0
    (folder / "config.json").rename(folder / "elsewhere.json")
    assert call(monkeypatch, "scripts/image_sample.py", without, *flags) == 0
    assert (with_config / name).read_bytes() == (without / name).read_bytes()
    (folder / "elsewhere.json").rename(folder / "config.json")
    train("run", *ROUTED["maskdit, with a falling ratio"], "--decoder", "64x2", "--max_steps", "3", status=2)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--policy", "maskdit"], "--objective ddpm: not with this policy, which is for x0, v, flow, edm"),
        (["--policy", "dual_timestep", "--objective", "edm"], "--objective edm: not with this policy"),
        (
            ["--policy", "maskdit", *FLOW, "DiT_Ti_2", "--learned_uncertainty", "True"],
            "--learned_uncertainty True: not w",
        ),
        (["--policy", "maskdit", *FLOW, "DiT_Ti_2", "--decoder", "big"], "--decoder big: expected WIDTHxBLOCKS"),
        (["--policy", "dual_timestep", *FLOW, "DiT_Ti_2", "--mask_ratio", "0.6"], "--mask_ratio 0.6: under dual_times"),
        (
            ["--policy", "tread", "--ratio_schedule", "cos4"],
            "--ratio_schedule cos4: expected const, linear, or cosine:K",
        ),
        (["--policy", "tread", "--ratio_schedule", "linear", "--max_steps", "0"], "linear: the run has no end; give"),
        (["--policy", "sprint", "--ratio_schedule", "linear", "--mask_ratio", "0.5"], "use --choose uniform"),
        (["--policy", "tread", "--finale", "1.5"], "--finale 1.5: must be in [0, 1]"),
        (["--policy", "tread", "--finale", "0.5", "--finale_lr", "0"], "--finale_lr 0.0: must be positive"),
        (["--policy", "sprint", "--image_size", "6", "--mask_ratio", "0.75"], "a grid of 3 x 3 tokens"),
        (["--policy", "tread", "--route", "1,4"], "--route 1,4: expected LEAVE,BACK with 0 <= LEAVE < BACK < 4"),
        (["--policy", "tread", "--mask_ratio", "0.99"], "--mask_ratio 0.99: keeps none of the 16 tokens"),
        (["--policy", "mdtv2", "--model", "DiT_Ti_2"], "--policy mdtv2: is for MDTv2_* models, and this one is DiT"),
        (["--policy", "tread", "--path_drop", "0.1"], "--path_drop 0.1: this policy has no path to drop"),
        (["--policy", "deferred", "--use_kl", "True"], "the variational term counts all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_policy_cannot_have_is_one_sentence_and_status_2(train, capsys, flags, sentence):
    folder = train("run", *flags, status=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and sentence in error and not list(folder.glob("model*"))


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--decoder", "64x1"], "--decoder is ignored by MDT_Ti_2 under --policy mdt"),
        (
            ["--policy", "dual_timestep", *FLOW, "DiT_Ti_2", "--choose", "cells"],
            "--choose is ignored by DiT_Ti_2 under",
        ),
        (["--policy", "none", "--ratio_schedule", "linear"], "--ratio_schedule is ignored under --policy none"),
        (["--policy", "tread", "--finale_lr", "0.5"], "--finale_lr is ignored without --finale"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_without_effect_under_a_policy_is_warned_about(monkeypatch, tmp_path, capsys, flags, warning):
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, "--max_steps", "1", *flags, sinks="stdout") == 0
    assert f"warning: {warning}" in capsys.readouterr().out


def test_the_rate_of_a_policys_own_finale_is_not_called_idle(monkeypatch, tmp_path, capsys):
    flags = [
        "--policy",
        "sprint",
        "--model",
        "DiT_Ti_2",
        "--mask_ratio",
        "0.75",
        "--finale_lr",
        "0.5",
        "--max_steps",
        "10",
    ]
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, *flags, "--dry_run", "True", sinks="stdout") == 0
    assert "--finale_lr" not in capsys.readouterr().out


# Policy -> flags of its training, and what is said of the weights that a plain model lacks.
WARM = {
    "tread": (["--model", "DiT_Ti_2"], None),
    "sprint": (["--model", "DiT_Ti_2", "--mask_ratio", "0.75"], "route_token, fuse.weight, fuse.bias"),
    "mdt": (["--model", "DiT_Ti_2"], "decoder_pos_embed, mask_token, sideblocks.0 (10)"),
    "deferred": (["--model", "DiT_Ti_2", "--mask_ratio", "0.75", "--learn_sigma", "False"], "channels of its variance"),
    "maskdit": ([*FLOW, "SiT_Ti_2"], "final_layer.linear (2), final_layer.adaLN_modulation (2)"),
    "dual_timestep": ([*FLOW, "SiT_Ti_2"], None),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(module_folder):
    """Weights of plain models without zeros, by the model's name."""
    folder = module_folder("plain")
    torch.manual_seed(0)
    for name in ("DiT_Ti_2", "SiT_Ti_2"):
        model = create_model(name, input_size=8, in_channels=1, num_classes=10)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return folder


@pytest.mark.parametrize("policy", WARM)
def test_a_training_under_any_policy_starts_from_plain_weights_and_names_the_new_ones(
    monkeypatch, tmp_path, plain, capsys, policy
):
    flags, sentence = WARM[policy]
    name = next(flag for flag in flags if flag.endswith("_Ti_2"))
    flags = ["--policy", policy, *flags, "--init_from", plain / f"{name}.pt", "--lr", "1e-30", "--max_steps", "1"]
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, *flags, sinks="stdout") == 0
    said = capsys.readouterr().out
    assert ("start anew" in said or "left out" in said) == (sentence is not None) and (sentence or "") in said
    given, trained = torch.load(plain / f"{name}.pt", weights_only=True), weights(tmp_path, 1)
    new = {"maskdit": "final_layer.", "deferred": "final_layer.linear."}.get(policy, "nothing")
    for name in given:
        if not name.startswith(new):  # a weight of exactly 0 moves by the rate: one of ten models has one
            torch.testing.assert_close(trained[name], given[name], rtol=0, atol=1e-20)
    if policy == "deferred":  # rows are (row, column, channel) of a patch
        mean = given["final_layer.linear.weight"].view(4, 2, -1)[:, 0]
        assert torch.equal(trained["final_layer.linear.weight"], mean)


def test_weights_of_another_policy_are_no_plain_ones(train, capsys):
    folder = train("sprint", "--policy", "sprint", "--model", "DiT_Ti_2", "--mask_ratio", "0.75")
    flags = ["--policy", "tread", "--model", "DiT_Ti_2", "--init_from", folder / "model000002.pt"]
    train("other", *flags, status=2)
    assert "3 names are not this model's, such as fuse.bias (--drop_extra True" in capsys.readouterr().err
    train("other", *flags, "--drop_extra", "True")
