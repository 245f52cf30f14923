"""The training step, through the training script in this process."""

import importlib
import json
import shutil
import time
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import (
    GUIDED,
    SPRINT,
    TIMES,
    TINY_DIGITS,
    assert_same_weights,
    call,
    few_steps,
    on_two_ranks,
    rows,
    script,
    weights,
)

from masked_diffusion import dist_util
from masked_diffusion.data.image_files import EXTENSIONS, EXTENSIONS_OF_0_1_0
from masked_diffusion.processes.loader_processes import StoppedWaitingError
from masked_diffusion.processes.preemption import STOPPED
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.checkpoint import read_weights
from masked_diffusion.training.meter import Meter
from masked_diffusion.training.train_config import TrainConfig

TRAIN = "scripts/image_train.py"


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Run a tiny training; later flags win. Returns its folder."""
    count = 0

    def run(*flags, folder=None, sinks="csv"):
        nonlocal count
        count += 1
        folder = folder or tmp_path / f"run{count}"
        assert call(monkeypatch, TRAIN, folder, *TINY_DIGITS, *flags, sinks=sinks) == 0
        return folder

    return run


def test_microbatches_and_workers_change_nothing_but_the_order_of_sums(train):
    whole = train("--lr", "1e-3")
    for flags in (["--microbatch", "1"], ["--microbatch", "3"], ["--num_workers", "2"]):
        other = train("--lr", "1e-3", *flags)
        assert_same_weights(weights(whole, 2), weights(other, 2), atol=1e-4)
        for a, b in zip(rows(whole), rows(other), strict=True):
            for name in ("loss", "m_loss", "grad_norm", "loss_q0"):
                assert a[name] == pytest.approx(b[name], rel=1e-4), name


@pytest.mark.parametrize("precision", [[], ["--use_bf16", "True"], ["--weights_format", "safetensors"]], ids=str)
def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(train, precision):
    flags = ["--lr", "1e-3", "--schedule_sampler", "loss-second-moment", "--ema_rate", "0.5,0.9", *precision]
    whole = train(*flags, "--max_steps", "4")
    resumed = train(*flags, "--max_steps", "2")
    train(*flags, "--max_steps", "4", folder=resumed)
    for kind in ("model", "ema_0.5_", "ema_0.9_"):
        a, b = (read_weights(*folder.glob(f"{kind}000004.*")) for folder in (whole, resumed))
        assert_same_weights(a, b)
    assert [row | TIMES for row in rows(whole)] == [row | TIMES for row in rows(resumed)]


def test_the_first_row_after_a_resume_covers_the_steps_before_it_too(train, tmp_path):
    flags = ["--lr", "1e-3", "--log_interval", "3", "--save_interval", "2", "--max_steps", "6"]
    whole = train(*flags)
    resumed = Path(shutil.copytree(whole, tmp_path / "resumed"))
    for path in (*resumed.glob("*000004*"), *resumed.glob("*000006*")):
        path.unlink()
    train(*flags, folder=resumed)
    assert [row["step"] for row in rows(resumed)] == [3, 6]
    for row, expected in zip(rows(resumed), rows(whole), strict=True):
        assert row | TIMES == expected | TIMES


def meter_of(rank, world_size, names=("loss",)):
    alone = SimpleNamespace(device=torch.device("cpu"), world_size=world_size, is_main=rank == 0, sum_=lambda x: x)
    return Meter(list(names), alone)


def test_what_a_meter_has_collected_is_taken_up_once_by_any_number_of_ranks():
    former = meter_of(0, 1)
    former.add_losses(torch.tensor([0.1, 0.9]), {"loss": torch.tensor([1.0, 3.0])})
    former.add_update(torch.tensor(5.0), torch.tensor(True))
    state = former.state_dict()
    meters = [meter_of(rank, 2) for rank in range(2)]
    for meter in meters:
        meter.load_state_dict(state)
    first, second = (meter.flush() for meter in meters)
    assert (first["loss"], first["loss_q0"], first["loss_q3"], first["grad_norm"]) == (2.0, 1.0, 3.0, 5.0)
    assert np.isnan(second["loss"]) and second["grad_norm"] == 5.0
    assert former.flush()["loss"] == 2.0  # asking changed nothing
    other = meter_of(0, 1, ["loss", "m_loss"])
    other.load_state_dict(state)
    assert np.isnan(other.flush()["loss"])


def test_starting_a_finished_run_again_changes_no_file(train):
    folder = train()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    train(folder=folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")} == before


def test_steps_and_files_are_counted_as_completed_updates(train):
    folder = train("--max_steps", "5", "--save_interval", "2", "--log_interval", "3", "--ema_rate", "0.9,0.99")
    assert sorted(path.name for path in folder.glob("*.pt")) == sorted(
        f"{kind}{step:06d}.pt" for kind in ("model", "ema_0.9_", "ema_0.99_", "opt", "state") for step in (2, 4, 5)
    )
    assert [(row["step"], row["samples"]) for row in rows(folder)] == [(3, 12), (5, 20)]


def test_learning_rate_falls_linearly_to_the_end_of_the_run(train):
    folder = train("--lr_anneal_steps", "4", "--max_steps", "0", "--lr", "1e-3")
    assert [row["lr"] for row in rows(folder)] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_ema_follows_the_parameters_after_every_step(train):
    folder = train("--ema_rate", "0.5,0", "--save_interval", "1", "--lr", "1e-2")
    assert_same_weights(weights(folder, 2, "ema_0_"), weights(folder, 2))
    name = "final_layer.linear.bias"
    before, after = weights(folder, 1)[name], weights(folder, 2)[name]
    ema_before, ema_after = weights(folder, 1, "ema_0.5_")[name], weights(folder, 2, "ema_0.5_")[name]
    torch.testing.assert_close(ema_after, 0.5 * ema_before + 0.5 * after)
    assert not torch.equal(before, after)


def test_losses_are_logged_by_view_and_quartile_under_fixed_names(train):
    names = ["loss", "mse", "vb", "m_loss", "m_mse", "m_vb"]
    quartiles = [f"{name}_q{q}" for name in names for q in range(4)]
    folder = train("--batch_size", "1")  # three quartiles are not hit
    for row in rows(folder):
        assert set(names + quartiles + ["step", "samples", "grad_norm", "param_norm", "lr"]) <= set(row)
        hit = [q for q in range(4) if row[f"loss_q{q}"] is not None]
        assert len(hit) == 1 and row[f"loss_q{hit[0]}"] == row["loss"]
        assert row["loss"] == pytest.approx(row["mse"] + row["vb"])


def test_without_a_mask_ratio_there_is_one_view(train):
    folder = train("--mask_ratio", "None")
    assert not any(name.startswith("m_") for name in rows(folder)[0])
    assert not weights(folder, 2)["mask_token"].any()


def test_the_two_views_draw_their_own_noise_and_share_the_timesteps(train):
    [row] = rows(train("--max_steps", "1", "--batch_size", "64"))
    hit = [name for name in ("loss", "m_loss") for q in range(4) if row[f"{name}_q{q}"] is not None]
    assert hit.count("loss") == hit.count("m_loss")
    # A fresh model predicts zero: the losses are those of the noise alone, and differ between the views.
    assert row["mse"] == pytest.approx(1, abs=0.1) and row["m_mse"] == pytest.approx(1, abs=0.1)
    assert row["mse"] != row["m_mse"]


def test_weights_and_moments_stay_float32_under_half_precision(train):
    for flag in ("--use_fp16", "--use_bf16"):
        folder = train(flag, "True")
        assert all(v.dtype == torch.float32 for v in weights(folder, 2).values() if v.is_floating_point())
        assert all(np.isfinite(row["loss"]) for row in rows(folder))
    state = torch.load(folder / "opt000002.pt", weights_only=True)["state"]
    assert {value["exp_avg"].dtype for value in state.values()} == {torch.float32}


def test_model_files_are_plain_state_dicts_without_prefixes(train):
    folder = train()
    state = torch.load(folder / "ema_0.9999_000002.pt", weights_only=True)
    assert "pos_embed" in state and not any(name.startswith(("module.", "_orig_mod.")) for name in state)


# Each flag that is not kept for compatibility alone changes something. Names are those of files and log columns.
CHANGES_THE_WEIGHTS = [
    ["--adam_beta2", "0.5"],
    ["--lr", "1e-3"], ["--weight_decay", "0.5"], ["--lr_anneal_steps", "3"], ["--batch_size", "5"], ["--seed", "1"],
    ["--mask_ratio", "0.5"], ["--learn_sigma", "False"], ["--diffusion_steps", "500"], ["--class_cond", "False"],
    ["--noise_schedule", "cosine"], ["--timestep_respacing", "100"], ["--use_kl", "True"],
    ["--predict_xstart", "True"], ["--rescale_learned_sigmas", "True", "--diffusion_steps", "100"],
    ["--use_bf16", "True"], ["--use_fp16", "True"], ["--decode_layer", "1"], ["--model", "MDT_S_2"],
    ["--image_size", "10"], ["--num_classes", "12"], ["--max_steps", "3"], ["--ema_rate", "0.5"],
    ["--opt", "adan"], ["--grad_clip", "0.01"], ["--min_snr_gamma", "5"],
]  # fmt: skip


@pytest.mark.parametrize("flags", CHANGES_THE_WEIGHTS, ids=" ".join)
def test_flag_changes_the_run(train, flags):
    plain, changed = train(), train(*flags)
    for kind in ("model", "ema_0.9999_"):
        path = changed / f"{kind}000002.pt"
        if not path.exists():
            return  # another EMA rate has another file
        a, b = weights(plain, 2, kind), weights(changed, 2, kind)
        if list(a) != list(b) or any(a[n].shape != b[n].shape or not torch.equal(a[n], b[n]) for n in a):
            return
    assert [r["step"] for r in rows(plain)] != [r["step"] for r in rows(changed)]


def test_sigma_small_changes_the_bound_of_a_fixed_variance(train):
    losses = []
    for value in ("True", "False"):
        folder = train("--learn_sigma", "False", "--use_kl", "True", "--sigma_small", value, "--max_steps", "1")
        losses.append(rows(folder)[0]["loss"])
    assert losses[0] != losses[1]


def test_flips_and_crops_change_the_images(train, colour_folder):
    data = ["--data_dir", colour_folder, "--random_flip", "False"]
    plain = train(*data)
    for flags in (["--random_flip", "True"], ["--random_crop", "True"]):
        changed = train(*data, *flags)
        assert rows(plain)[-1]["grad_norm"] != rows(changed)[-1]["grad_norm"]


def test_the_preview_is_the_same_picture_for_the_same_weights(train):
    flags = ["--preview_samples", "4", "--preview_steps", "3", "--lr", "1e-3"]
    a, b = train(*flags), train(*flags, "--save_interval", "1")
    assert (a / "preview_000002.png").read_bytes() == (b / "preview_000002.png").read_bytes()
    assert (b / "preview_000001.png").exists() and not list(train().glob("preview_*"))


@pytest.mark.parametrize("kind", GUIDED)
def test_a_preview_is_what_sampling_its_checkpoint_gives(train, monkeypatch, tmp_path, kind):
    weak = train("--seed", "1", "--lr", "0.05") / "ema_0.9999_000002.pt" if kind == "checkpoint" else None
    guides = [*GUIDED[kind], *(["--guide_path", weak] if weak else [])]
    shown = ["--preview_samples", "4", "--preview_steps", "3", "--preview_cfg_scale", "200"]
    model = SPRINT if kind == "path_drop" else []
    flags = [*model, "--lr", "0.05", "--ema_rate", "0.5"]
    folder = train(*flags, *shown, "--preview_guide_from", kind, *guides, sinks="csv,log")
    sampled = ["--model_path", folder / "ema_0.5_000002.pt", "--labels", "balanced", "--guide_from", kind, *guides]
    sampled += ["--cfg_cond", "True", "--cfg_scale", "200", "--sampler", "ddim", *few_steps(3)]
    sampled += ["--num_samples", "4", "--batch_size", "4", "--device", "cpu"]
    assert call(monkeypatch, "scripts/image_sample.py", tmp_path / "samples", *sampled) == 0
    preview = (folder / "preview_000002.png").read_bytes()
    assert preview == (tmp_path / "samples" / "samples_4x8x8x3.png").read_bytes()
    passes = json.loads((tmp_path / "samples" / "manifest.json").read_text())["passes_per_image"]
    cost = f"cost of previews: {passes:g} passes of the model per image"
    assert passes > 3 and (folder / "log.txt").read_text().count(cost) == 1
    if kind == "routed":
        assert_same_weights(weights(train(*flags), 2), weights(folder, 2))


def test_the_preview_does_not_disturb_the_training(train):
    plain, shown = train(), train("--preview_samples", "2", "--preview_steps", "2", "--save_interval", "1")
    assert_same_weights(weights(plain, 2), weights(shown, 2))


def test_a_new_training_can_start_from_the_weights_of_another(train, capsys):
    source = train("--num_classes", "10", "--lr", "1e-2") / "ema_0.9999_000002.pt"
    folder = train("--init_from", source, "--num_classes", "12", "--max_steps", "1", "--lr", "1e-9")
    old, new = torch.load(source, weights_only=True), weights(folder, 1)
    torch.testing.assert_close(new["pos_embed"], old["pos_embed"], atol=1e-6, rtol=0)
    assert new["y_embedder.embedding_table.weight"].shape[0] == 13
    nameless = source.rename(source.with_name("weights.pt"))
    by_path = train("--resume_checkpoint", nameless, "--max_steps", "1", "--lr", "1e-9")
    torch.testing.assert_close(weights(by_path, 1)["pos_embed"], old["pos_embed"], atol=1e-6, rtol=0)


def test_a_published_checkpoint_resumes_from_its_path_with_its_optimizer(train, tmp_path):
    whole = train("--max_steps", "4", "--save_interval", "2")
    published = tmp_path / "published"
    published.mkdir()
    for kind in ("model", "ema_0.9999_", "opt"):
        (published / f"{kind}000002.pt").write_bytes((whole / f"{kind}000002.pt").read_bytes())
    resumed = train("--max_steps", "4", "--resume_checkpoint", published / "model000002.pt")
    assert_same_weights(weights(whole, 4), weights(resumed, 4))
    # A preempted job is started again with the same command, and goes on from its own, later checkpoint.
    train("--max_steps", "5", "--resume_checkpoint", published / "model000002.pt", folder=resumed)
    assert [row["step"] for row in rows(resumed)] == [3, 4, 5]


def test_a_run_from_another_folder_keeps_what_lies_in_its_own(train, tmp_path, capsys):
    """A configuration and a log without weights are moved aside, whatever step the run begins at."""
    source = train("--max_steps", "2")
    folder = train("--max_steps", "1", "--decode_layer", "1")
    for path in [*folder.glob("*.pt"), folder / "checkpoint000001.json"]:
        path.unlink()
    (folder / ".opt000001.pt.12.tmp").touch()
    config, log = ((folder / name).read_bytes() for name in ("config.json", "progress.csv"))
    train("--max_steps", "3", "--resume_checkpoint", source / "model000002.pt", folder=folder, sinks="csv,stdout")
    assert (folder / "config_1.json").read_bytes() == config and (folder / "progress_1.csv").read_bytes() == log
    assert "which saved nothing, to config_1.json" in capsys.readouterr().out
    assert [row["step"] for row in rows(folder)] == [3]
    assert not list(folder.glob(".*.tmp"))


def test_loss_second_moment_learns_the_unweighted_losses_of_both_views(train):
    folder = train(
        "--schedule_sampler", "loss-second-moment", "--diffusion_steps", "25", "--batch_size", "20", "--max_steps", "1"
    )
    state = torch.load(folder / "state000001.pt", weights_only=True)["schedule_sampler"]
    [row] = rows(folder)
    assert state["counts"].sum() == 20
    assert state["losses"].sum().item() == pytest.approx(20 * (row["loss"] + row["m_loss"]), rel=1e-5)


@pytest.mark.parametrize("flag, processes, batch_size, microbatch", [
    (8, 4, 8, -1),  # as before
    (8, 2, 16, 8),  # a pass holds no more than it did
    (8, 8, 4, -1),
    (16, 2, 16, -1),  # a new batch was asked for
])  # fmt: skip
def test_the_global_batch_stays_when_only_the_number_of_processes_changes(flag, processes, batch_size, microbatch):
    config = TrainConfig(batch_size=flag).on_ranks(processes, {"batch_size": 8, "global_batch": 32})
    assert (config.batch_size, config.microbatch) == (batch_size, microbatch)


def test_a_given_microbatch_stays_on_another_number_of_processes():
    config = TrainConfig(batch_size=8, microbatch=2).on_ranks(2, {"batch_size": 8, "global_batch": 32})
    assert (config.batch_size, config.microbatch) == (16, 2)


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="global batch of 32, which 3 processes cannot share"):
        TrainConfig(batch_size=8).on_ranks(3, {"batch_size": 8, "global_batch": 32})


def test_old_checkpoints_are_pruned_but_never_the_last_two(train):
    folder = train("--max_steps", "7", "--save_interval", "1", "--keep_checkpoints", "1", "--keep_every", "3")
    assert sorted(path.name for path in folder.glob("checkpoint*.json")) == [
        f"checkpoint{step:06d}.json" for step in (3, 6, 7)
    ]
    assert sorted(path.name for path in folder.glob("opt*.pt")) == [f"opt{step:06d}.pt" for step in (3, 6, 7)]


def test_a_save_that_fails_is_reported_and_tried_again_and_training_goes_on(train, monkeypatch):
    from masked_diffusion.runs import checkpoint

    save, failures = checkpoint.save_checkpoint, []

    def full_disk_at_step_2(folder, step, *further):
        if step == 2:
            failures.append(step)
            raise OSError(28, "No space left on device")
        save(folder, step, *further)

    monkeypatch.setattr(checkpoint, "save_checkpoint", full_disk_at_step_2)
    folder = train("--max_steps", "4", "--save_interval", "1")
    assert failures == [2]
    assert [path.name for path in sorted(folder.glob("model*.pt"))] == [f"model00000{step}.pt" for step in (1, 3, 4)]


@pytest.fixture
def poisoned(monkeypatch):
    """Digits of which some, by (epoch, index), are NaN. Call it with the predicate."""
    from masked_diffusion.image_datasets import DigitsDataset

    load, calls = DigitsDataset.load, []

    def poison(is_bad):
        def load_poisoned(self, index, rng=None):
            image = load(self, index, rng)
            if rng is not None:  # not the check of the first batch
                calls.append(index)
                if is_bad(len(calls) - 1):
                    image[:] = np.nan
            return image

        monkeypatch.setattr(DigitsDataset, "load", load_poisoned)

    return poison


@pytest.mark.parametrize("precision", [[], ["--use_bf16", "True"]])
def test_a_step_that_is_not_finite_changes_nothing_but_the_position(train, poisoned, precision):
    flags = ["--save_interval", "1", "--ema_rate", "0.5", "--lr", "1e-3", "--schedule_sampler", "loss-second-moment"]
    poisoned(lambda call: call == 6)  # one image of the second batch of four
    folder = train(*flags, *precision, "--max_steps", "4")
    for kind in ("model", "ema_0.5_"):
        assert_same_weights(weights(folder, 1, kind), weights(folder, 2, kind))
        assert all(value.isfinite().all() for value in weights(folder, 4, kind).values())
        assert not torch.equal(
            weights(folder, 2, kind)["final_layer.linear.bias"], weights(folder, 3, kind)["final_layer.linear.bias"]
        )
    states = [torch.load(folder / f"state{step:06d}.pt", weights_only=True) for step in (1, 2)]
    assert states[0]["schedule_sampler"]["counts"].sum() == states[1]["schedule_sampler"]["counts"].sum()
    moments = [torch.load(folder / f"opt{step:06d}.pt", weights_only=True)["state"][0] for step in (1, 2)]
    assert torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"]) and moments[0]["step"] == moments[1]["step"]


def test_skipped_updates_are_counted_in_the_log(train, poisoned):
    poisoned(lambda call: 4 <= call < 12)  # the second and the third batch
    assert [row["skipped"] for row in rows(train("--max_steps", "6", "--log_interval", "2"))] == [1, 1, 0]


def test_an_update_that_all_ranks_skip_is_one():
    ranks = SimpleNamespace(device=torch.device("cpu"), world_size=2, sum_=lambda numbers: 2 * numbers)
    meter = Meter(["loss"], ranks)
    for norm in (1.0, float("nan"), 4.0):
        meter.add_update(torch.tensor(norm), torch.tensor(norm).isfinite())
    row = meter.flush()
    assert row["skipped"] == 1 and row["grad_norm"] == 2.5 and np.isnan(row["loss"])
    assert meter.flush()["skipped"] == 0


def test_an_overflow_that_only_lowers_the_scale_is_counted_and_not_reported(train, capsys):
    folder = train("--use_fp16", "True", "--fp16_scale_growth", "20", "--max_steps", "4", sinks="csv,stdout")
    assert 0 < sum(row["skipped"] for row in rows(folder)) < 4
    assert "not finite" not in capsys.readouterr().out


def test_a_bad_step_is_reported_with_its_images(train, poisoned, capsys, monkeypatch):
    poisoned(lambda call: call == 6)
    train("--max_steps", "4", sinks="stdout")
    [line] = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert line.startswith("step 2: ") and line.count("image ") == 4 and line.count("epoch 0") == 4


def test_after_too_many_bad_steps_the_run_stops_with_the_last_good_state(train, poisoned):
    poisoned(lambda call: call >= 8)  # from the third step on
    with pytest.raises(FloatingPointError, match="3 steps in a row were not finite"):
        train("--max_steps", "50", "--max_bad_steps", "3", "--save_interval", "2")


def test_an_optimizer_saved_with_other_settings_resumes_with_those_of_the_flags(train):
    folder = train("--max_steps", "2", "--lr", "1e-3")
    path = folder / "opt000002.pt"
    state = torch.load(path, weights_only=True)
    state["param_groups"][0].update(fused=None, foreach=True, weight_decay=0.7, lr=1.0)
    for name in ("checkpoint000002.json", "state000002.pt", "config.json"):  # as the published code leaves them
        (folder / name).unlink()
    torch.save(state, path)
    resumed = train("--max_steps", "4", "--lr", "1e-3", "--resume_checkpoint", folder / "model000002.pt")
    assert_same_weights(weights(train("--max_steps", "4", "--lr", "1e-3"), 4), weights(resumed, 4))
    [group] = torch.load(resumed / "opt000004.pt", weights_only=True)["param_groups"]
    assert group["weight_decay"] == 0 and group["lr"] == 1e-3


@pytest.mark.parametrize(
    "flags, warning",
    [
        (["--fp16_scale_growth", "0.1"], "--fp16_scale_growth is ignored without --use_fp16 True"),
        (["--sigma_small", "True"], "--sigma_small is ignored with --learn_sigma True"),
        (["--opt", "adan", "--adam_beta2", "0.9"], "--adam_beta2 is ignored with --opt adan"),
        (["--use_kl", "True", "--rescale_learned_sigmas", "True"], "--rescale_learned_sigmas is ignored with --use_kl"),
        (["--preview_steps", "3"], "--preview_steps is ignored with --preview_samples 0"),
        (["--preview_guide_from", "masked"], "--preview_guide_from is ignored with --preview_samples 0"),
        (["--preview_cfg_scale", "2"], "--preview_cfg_scale is ignored with --preview_samples 0"),
        (["--guidance", "linear"], "--guidance is ignored with --preview_samples 0 and without --eval_interval"),
        (["--preview_samples", "1", "--cfg_interval", "1-2"], "--cfg_interval is ignored with --guidance power_cosine"),
        (["--eval_guide_from", "masked"], "--eval_guide_from is ignored without --eval_interval"),
        (["--max_bad_share", "0"], "--max_bad_share is ignored for the embedded digits"),
        (["--random_flip", "True"], "--random_flip is ignored for the embedded digits"),
    ],
)
def test_a_setting_without_effect_warns(train, capsys, flags, warning):
    train(*flags, "--max_steps", "1", sinks="stdout")
    assert f"warning: {warning}" in capsys.readouterr().out


def test_a_resumed_run_says_what_has_changed(train, capsys):
    folder = train("--max_steps", "1")
    train("--max_steps", "2", "--seed", "3", "--lr", "1e-3", folder=folder, sinks="stdout")
    out = capsys.readouterr().out
    assert "changed since that checkpoint: seed was 0, is 3" in out and "learning rate 0.001 from here on" in out


def test_a_preview_that_fails_does_not_stop_the_training(train, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no room for pictures")

    monkeypatch.setattr("masked_diffusion.training.preview.ImageSampler.__call__", out_of_memory)
    folder = train("--preview_samples", "2", "--save_interval", "1")
    assert (folder / "checkpoint000002.json").exists() and not list(folder.glob("preview*"))


def test_a_process_that_fails_to_gather_the_average_ends_and_leaves_no_other_waiting(train, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("no room for whole weights")

    monkeypatch.setattr("masked_diffusion.training.optimizers.EMA.averaged_model", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="whole weights"):
        train("--preview_samples", "2", "--save_interval", "1")
    train("--preview_samples", "0", "--save_interval", "1")  # without previews nothing is gathered


# -- families and their recipes ----------------------------------------------------------------------------------------

V2 = ["--model", "MDTv2_Ti_2"]
DIT = ["--model", "DiT_Ti_2"]


def optimizer_file(folder, step):
    return torch.load(folder / f"opt{step:06d}.pt", weights_only=True)


@pytest.mark.parametrize("flags", [V2, DIT], ids=lambda flags: flags[1])
def test_other_families_resume_where_they_were_bit_for_bit(train, flags):
    flags = [*flags, "--lr", "1e-2", "--ema_rate", "0.5"]
    whole, resumed = train(*flags, "--max_steps", "4"), train(*flags, "--max_steps", "2")
    train(*flags, "--max_steps", "4", folder=resumed)
    for kind in ("model", "ema_0.5_"):
        assert_same_weights(weights(whole, 4, kind), weights(resumed, 4, kind))
    assert rows(whole)[-1]["grad_norm"] == rows(resumed)[-1]["grad_norm"]


def test_version_2_trains_with_adan_clipping_and_min_snr_unless_flags_say_otherwise(train, capsys):
    folder = train(*V2, sinks="stdout,csv")
    assert "recipe: opt adan, lr 0.0003, weight_decay 0.0, grad_clip 1.0, shard zero, min_snr_gamma 5.0" in (
        capsys.readouterr().out
    )
    state = optimizer_file(folder, 2)
    assert "exp_avg_diff" in state["state"][0] and state["param_groups"][0]["betas"] == (0.98, 0.92, 0.99)
    assert state["param_groups"][0]["eps"] == 1e-8
    flags = ["--opt", "adamw", "--grad_clip", "0", "--min_snr_gamma", "None", "--shard", "none", "--lr", "1e-3"]
    folder = train(*V2, *flags, sinks="stdout,csv")
    assert "recipe: opt adamw, lr 0.001, weight_decay 0.0, grad_clip 0.0, shard none, min_snr_gamma None" in (
        capsys.readouterr().out
    )
    assert set(optimizer_file(folder, 2)["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_dit_trains_with_one_view_at_its_own_learning_rate_and_keeps_its_positions(train, capsys):
    folder = train(*DIT, sinks="stdout,csv")
    out = capsys.readouterr().out
    assert "warning: --mask_ratio is ignored by DiT_Ti_2 under --policy none" in out
    assert "warning: --decode_layer is ignored by DiT_Ti_2 under --policy none" in out
    assert rows(folder)[0]["lr"] == 1e-4 and "m_loss" not in rows(folder)[0]
    assert torch.equal(weights(folder, 2)["pos_embed"], weights(train(*DIT, "--lr", "1e-1"), 2)["pos_embed"])
    assert rows(train(*DIT, "--lr", "2e-4"))[0]["lr"] == 2e-4


def test_the_gradient_is_clipped_to_the_norm_of_the_whole_model(train):
    """With momentum alone, AdamW's first step does not depend on the gradient's size: the moments show it."""
    free, clipped = train("--max_steps", "1"), train("--max_steps", "1", "--grad_clip", "0.01")
    norm = rows(free)[0]["grad_norm"]
    assert rows(clipped)[0]["grad_norm"] == norm > 0.01  # as it was before
    for index, moments in optimizer_file(free, 1)["state"].items():
        expected = moments["exp_avg"] * 0.01 / (norm + 1e-6)
        torch.testing.assert_close(optimizer_file(clipped, 1)["state"][index]["exp_avg"], expected)


def test_min_snr_weights_the_squared_error_and_nothing_else(train):
    plain, weighted = train("--max_steps", "1"), train("--max_steps", "1", "--min_snr_gamma", "5")
    [a], [b] = rows(plain), rows(weighted)
    assert b["mse"] < a["mse"] and b["vb"] == a["vb"]
    assert b["mse_q3"] is None or b["mse_q3"] == pytest.approx(a["mse_q3"])  # noisy: snr below 5
    config = json.loads((weighted / "config.json").read_text())
    assert config["diffusion"]["min_snr_gamma"] == 5


def test_the_mask_ratio_of_a_step_depends_on_seed_and_step_alone(train, monkeypatch):
    from masked_diffusion.models import MDTv2

    num_keep, seen = MDTv2.num_keep, []
    monkeypatch.setattr(MDTv2, "num_keep", lambda self, u, share=1.0: seen.append(u) or num_keep(self, u))
    train(*V2, "--max_steps", "3")
    checks = {0.5, 1.0}  # the cost of a mean step, the largest ratio
    once = [u for u in seen if u not in checks]
    seen.clear()
    train(*V2, "--max_steps", "3", "--microbatch", "2")
    assert len(set(once)) == len(once) == 3 and all(0 <= u < 1 for u in once)
    assert [u for u in seen if u not in checks] == [u for u in once for _ in range(2)]
    seen.clear()
    train(*V2, "--max_steps", "3", "--seed", "1")
    assert not set(seen) & set(once)


def test_a_step_that_is_not_finite_leaves_adan_and_its_count_of_steps_alone(train, poisoned):
    poisoned(lambda call: call == 6)  # one image of the second batch of four
    folder = train(*V2, "--save_interval", "1", "--ema_rate", "0.5", "--max_steps", "3")
    for kind in ("model", "ema_0.5_"):
        assert_same_weights(weights(folder, 1, kind), weights(folder, 2, kind))
        assert all(value.isfinite().all() for value in weights(folder, 3, kind).values())
    first, second, third = (optimizer_file(folder, step) for step in (1, 2, 3))
    assert [s["param_groups"][0]["step"] for s in (first, second, third)] == [1, 1, 2]
    for index, moments in first["state"].items():
        assert all(torch.equal(value, second["state"][index][name]) for name, value in moments.items())


def test_the_state_of_another_optimizer_is_refused(train, monkeypatch, capsys):
    folder = train("--max_steps", "1")
    flags = [*TINY_DIGITS, "--max_steps", "2", "--opt", "adan"]
    assert call(monkeypatch, TRAIN, folder, *flags) == 2
    assert "it holds exp_avg, exp_avg_sq, step, which is not what --opt adan keeps" in capsys.readouterr().err


@pytest.fixture
def attempt(monkeypatch):
    """Say which attempt of a job the next training is, as torchrun and SLURM do."""

    def say(number, launcher="torchrun", job="42"):
        names = {"torchrun": ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
                 "SLURM": ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")}[launcher]  # fmt: skip
        for name, value in zip(names, (job, number), strict=True):
            monkeypatch.setenv(name, str(value))

    return say


def killed_at(folder, step):
    """Make a run that ended look like one that was killed after it had saved a step."""
    for path in folder.glob("*000*"):
        if str(step).zfill(6) not in path.name:
            path.unlink()


@pytest.mark.parametrize("launcher, job", [("torchrun", "42"), ("torchrun", "none"), ("SLURM", "7")])
@pytest.mark.parametrize("flags", [["--overwrite", "True"], ["--resume_checkpoint", ""]], ids=["overwrite", "fresh"])
def test_a_command_that_is_started_again_goes_on_whatever_the_first_start_was_asked(
    train, attempt, launcher, job, flags
):
    flags = ["--lr", "1e-3", "--max_steps", "4", "--save_interval", "2", *flags]
    attempt(0, launcher, job)
    folder = train(*flags)
    whole = weights(folder, 4)
    killed_at(folder, 2)
    attempt(1, launcher, job)
    train(*flags, folder=folder)
    assert_same_weights(whole, weights(folder, 4))
    assert not list(folder.glob("former_*"))


@pytest.mark.parametrize("job", ["42", "none"])
def test_a_restart_does_not_undo_a_refusal(train, attempt, monkeypatch, job):
    flags = ["--resume_checkpoint", "", "--max_steps", "2"]
    attempt(0, job=job)
    folder = train(*flags)  # an earlier job of this name and command
    for number in range(3):
        attempt(number, job=job)
        assert call(monkeypatch, TRAIN, folder, *TINY_DIGITS, *flags) == 2
    assert [row["step"] for row in rows(folder)] == [1, 2]


def test_a_restart_does_not_drop_what_was_not_done_yet(train, attempt):
    folder = train("--max_steps", "3")
    attempt(1)  # the first attempt did not come as far as to this folder
    train("--max_steps", "2", "--overwrite", "True", folder=folder)
    assert (folder / "former_1" / "model000003.pt").exists() and not (folder / "model000003.pt").exists()


def test_a_run_of_the_first_version_goes_on_without_the_images_that_it_left_out(train, colour_folder, tmp_path):
    data = shutil.copytree(colour_folder, tmp_path / "data")
    flags = ["--data_dir", str(data)]
    undisturbed = train(*flags, "--max_steps", "3")
    folder = train(*flags, "--max_steps", "1")
    config = json.loads((folder / "config.json").read_text())
    assert config["training"]["extensions"] == list(EXTENSIONS)
    for name in ("data_sha256", "extensions"):  # which 0.1.0 did not write
        del config["training"][name]
    (folder / "config.json").write_text(json.dumps(config))
    (data / "purple").mkdir()
    for name in ("blue/7.TIF", "purple/0.jfif"):
        shutil.copy(data / "blue" / "0.png", data / name)
    sinks = "log,csv"
    for steps in ("2", "3"):  # the second time as config.json says by then
        train(*flags, "--max_steps", steps, folder=folder, sinks=sinks)
        config = json.loads((folder / "config.json").read_text())
        assert config["training"]["extensions"] == list(EXTENSIONS_OF_0_1_0) and config["training"]["num_images"] == 24
    said = (folder / "log.txt").read_text()
    assert said.count("left out: 2 files (.jfif 1, .tif 1): kinds that were not read yet when this began") == 2
    assert_same_weights(weights(undisturbed, 3), weights(folder, 3))
    anew = json.loads((train(*flags, "--max_steps", "1") / "config.json").read_text())
    assert anew["training"]["extensions"] == list(EXTENSIONS) and anew["training"]["num_images"] == 26


def test_a_resume_on_changed_data_says_so(train, colour_folder, tmp_path):
    data = shutil.copytree(colour_folder, tmp_path / "data")
    flags = ["--data_dir", str(data)]
    folder = train(*flags, "--max_steps", "1", sinks="log,csv")
    moved = data.rename(tmp_path / "elsewhere")
    flags = ["--data_dir", str(moved)]
    train(*flags, "--max_steps", "2", folder=folder, sinks="log,csv")
    assert "are not those of that checkpoint" not in (folder / "log.txt").read_text()
    (moved / "red" / "0.png").rename(moved / "red" / "another.png")
    train(*flags, "--max_steps", "3", folder=folder, sinks="log,csv")
    assert "warning: the images, their labels or names are not those" in (folder / "log.txt").read_text()


def test_a_restarted_command_without_a_folder_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, TRAIN, "", *TINY_DIGITS) == 2
    assert "OPENAI_LOGDIR is not set" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_goes_on_in_another_precision(train):
    folder = train("--max_steps", "1")
    train("--max_steps", "2", "--use_fp16", "True", folder=folder)
    train("--max_steps", "3", folder=folder)
    assert weights(folder, 3)


def test_the_last_bad_step_counts(train, poisoned):
    poisoned(lambda call: call >= 4)  # of two steps of four images the second
    with pytest.raises(FloatingPointError, match="1 steps in a row"):
        train("--max_steps", "2", "--max_bad_steps", "1")


def test_pictures_are_drawn_of_a_run_that_saves_safetensors(train, monkeypatch, tmp_path):
    train("--weights_format", "safetensors", folder=tmp_path / "output_run")
    assert script("infer_mdt.py").find_model(tmp_path).name == "ema_0.9999_000002.safetensors"


FEW_BATCHES = (0, 1)
DISK_SECONDS, COLLECTIVE_SECONDS = 5.0, 4.0


def train_beside_a_rank_in_trouble(rank, dist_url, folder):
    """Two ranks train: the wait for rank 1's data ends after few batches, then rank 0's disk is slower than any
    collective may be. Saves the exit statuses."""
    torch.set_num_threads(1)
    image_train = importlib.import_module("masked_diffusion.programs.image_train")
    load_data, save, statuses = image_train.load_data, checkpoint.save_checkpoint, []

    def stopped_after(batches):
        def load(*args, **kwargs):
            yield from islice(load_data(*args, **kwargs), batches if rank else None)
            raise StoppedWaitingError("asked to stop")

        return load

    def save_slowly(*args):
        time.sleep(DISK_SECONDS)
        save(*args)

    def train(name, *flags):
        # Two ranks cannot meet twice at one address: the second time they may find the first one's store.
        place = ["--rank", rank, "--world_size", 2, "--local_rank", rank, "--dist_url", f"file://{folder}/meet_{name}"]
        statuses.append(call(patch, TRAIN, folder / name, *TINY_DIGITS, *flags, *place, sinks="log"))

    for batches in FEW_BATCHES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(image_train, "load_data", stopped_after(batches))
            train(str(batches), "--max_steps", 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save_slowly)
        patch.setattr(dist_util, "COLLECTIVE_TIMEOUT", timedelta(seconds=COLLECTIVE_SECONDS))
        patch.setattr(dist_util, "NEWS_INTERVAL", timedelta(seconds=COLLECTIVE_SECONDS / 5))
        train("slow", "--max_steps", 1)
    torch.save(statuses, folder / f"{rank}.pt")


def test_ranks_end_together_however_few_batches_one_has_and_however_slow_the_disk_is(tmp_path):
    statuses = [*[STOPPED] * len(FEW_BATCHES), 0]
    assert on_two_ranks(train_beside_a_rank_in_trouble, tmp_path) == [statuses] * 2
    for batches in FEW_BATCHES:
        said = (tmp_path / str(batches) / "log.txt").read_text()
        assert f"stopped by a signal after step {batches};" in said
        assert ("step 1 is not begun: a process has no batch" in said) == (not batches)
        saved = [path.name for path in (tmp_path / str(batches)).glob("checkpoint*")]
        assert saved == [f"checkpoint{batches:06d}.json"] * bool(batches)
    assert (tmp_path / "slow" / "checkpoint000001.json").exists()
