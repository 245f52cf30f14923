import argparse
import io
import json
import os
import pickle
import re
import resource
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from golden_arrays import set_golden_weights

from masked_diffusion.models import MDT
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.checkpoint import (
    check_names,
    damage,
    load_weights,
    newest_complete_step,
    plan_start,
    read_file,
    read_weights,
    save_checkpoint,
)


def tiny_model(**kwargs):
    settings = {"input_size": 4, "hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 5, **kwargs}
    return set_golden_weights(MDT(**settings))


def write_checkpoint(folder, step, position=None, **parts):
    """A checkpoint whose weights tell its step."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"w": torch.full((64,), float(step))}
    files = {
        checkpoint.model_file(step): weights,
        checkpoint.ema_file("0.9999", step): weights,
        checkpoint.opt_file(step): {"state": {}, "param_groups": []},
        checkpoint.state_file(step): {"step": step, "position": 8 * step if position is None else position},
    }
    save_checkpoint(folder, step, files | parts, {})
    return files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def names_of_step(step):
    return [
        checkpoint.manifest_file(step),
        checkpoint.ema_file("0.9999", step),
        checkpoint.model_file(step),
        checkpoint.opt_file(step),
        checkpoint.state_file(step),
    ]


def tear(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_one_sentence(raised, *parts):
    text = str(raised.value)
    assert "\n" not in text and len(text) < 400
    for part in parts:
        assert str(part) in text


# -- writing -----------------------------------------------------------------------------------------------------------


def test_files_have_the_published_names(tmp_path):
    write_checkpoint(tmp_path, 70)
    assert names(tmp_path) == [
        "checkpoint000070.json",
        "ema_0.9999_000070.pt",
        "model000070.pt",
        "opt000070.pt",
        "state000070.pt",
    ]
    assert checkpoint.model_file(1234567) == "model1234567.pt"


def test_a_model_file_is_a_plain_state_dict_that_torch_reads_without_running_code(tmp_path):
    model = tiny_model()
    save_checkpoint(tmp_path, 3, {"model000003.pt": model.state_dict()}, {})
    state = torch.load(tmp_path / "model000003.pt", weights_only=True)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_what_is_written_reads_back_exactly(tmp_path):
    model, state = tiny_model(), {"step": 5, "position": 40, "scaler": {"scale": 2.0**20}, "schedule_sampler": {}}
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path, 5, {"opt000005.pt": optimizer.state_dict(), "state000005.pt": state}, {})
    assert read_file(tmp_path / "opt000005.pt") == optimizer.state_dict()
    assert read_file(tmp_path / "state000005.pt") == state


def test_the_manifest_is_written_after_all_other_files(tmp_path, monkeypatch):
    order = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append(target.name), replace(self, target))[1])
    write_checkpoint(tmp_path, 2)
    assert order[-1] == "checkpoint000002.json" and len(order) == 5


@pytest.mark.parametrize("failing", ["model000002.pt", "opt000002.pt", "checkpoint000002.json"])
def test_a_save_that_fails_half_way_is_no_checkpoint_and_leaves_the_one_before(tmp_path, monkeypatch, failing):
    write_checkpoint(tmp_path, 1)
    replace = Path.replace

    def full_disk(self, target):
        if target.name == failing:
            raise OSError("no space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(tmp_path, 2)
    monkeypatch.undo()
    assert newest_complete_step(tmp_path, pytest.fail) == 1
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


# -- reading without running code --------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_file_with_code_is_refused_in_one_sentence_and_its_code_does_not_run(tmp_path, kind):
    path, marker = tmp_path / "model000001.pt", tmp_path / "marker"
    content = {"w": torch.zeros(2), "x": Malicious(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    for read in (read_file, read_weights):
        with pytest.raises(ValueError) as raised:
            read(path)
        assert_one_sentence(raised, path, "refused", "run code")
    assert not marker.exists()
    if kind != "pickle":
        torch.load(path, weights_only=False)  # the file is armed
        assert marker.exists()


def test_other_classes_than_the_namespace_of_a_command_line_are_refused_in_one_sentence(tmp_path):
    path = tmp_path / "0400000.pt"
    weights = {"w": torch.zeros(2)}
    torch.save({"ema": weights, "args": argparse.Namespace(lr=1e-4)}, path)
    assert list(read_weights(path)) == ["w"]
    torch.save({"ema": weights, "args": argparse.Namespace(parser=argparse.Action(["--x"], "x"))}, path)
    with pytest.raises(ValueError) as raised:
        read_weights(path)
    assert_one_sentence(raised, path, "refused")


def test_a_git_lfs_pointer_is_named_with_its_remedy(tmp_path):
    path = tmp_path / "mdt_xl2_v1_ckpt.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700000000\n")
    with pytest.raises(ValueError) as raised:
        read_file(path)
    assert_one_sentence(raised, path, "LFS pointer", "git lfs pull")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_named(tmp_path, suffix, share):
    from safetensors.torch import save_file

    path = tmp_path / f"model{suffix}"
    weights = {"w": torch.ones(1000)}
    torch.save(weights, path) if suffix == ".pt" else save_file(weights, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError) as raised:
        read_file(path)
    assert_one_sentence(raised, path, "not a readable checkpoint")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>404</html>", b"hello", bytes(4096), b'{"a": 1}'])
def test_a_file_of_another_kind_is_not_accused_of_holding_code(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_file(path)
    assert_one_sentence(raised, path, "not a readable checkpoint")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'no.pt'}: no such file")):
        read_file(tmp_path / "no.pt")


def test_safetensors_files_are_read(tmp_path):
    from safetensors.torch import save_file

    model = tiny_model()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = read_weights(tmp_path / "model.safetensors")
    load_weights(tiny_model(), state, tmp_path)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "content", [{}, [torch.zeros(1)], torch.zeros(1), {"net": {"w": torch.zeros(1)}}, {"w": torch.zeros(1), "n": 1}]
)
def test_what_is_not_a_mapping_of_names_to_tensors_is_refused_as_weights(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError) as raised:
        read_weights(tmp_path / "model.pt")
    assert_one_sentence(raised, tmp_path / "model.pt", "state dict")


# -- loading into a model ----------------------------------------------------------------------------------------------


def test_weights_are_loaded_into_the_model(tmp_path):
    model = MDT(input_size=4, hidden_size=16, depth=3, num_heads=2, num_classes=5)
    load_weights(model, tiny_model().state_dict(), tmp_path)
    for name, value in tiny_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_missing_extra_and_misshapen_names_are_all_named(tmp_path):
    state = tiny_model().state_dict()
    del state["mask_token"]
    state["cls_token"] = torch.zeros(1)
    state["pos_embed"] = torch.zeros(1, 9, 16)
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for load in (load_weights, check_names):
        with pytest.raises(ValueError) as raised:
            load(model, state, tmp_path / "model.pt")
        assert_one_sentence(
            raised,
            tmp_path / "model.pt",
            "1 names are missing, such as mask_token",
            "1 names are not this model's, such as cls_token",
            "1 shapes differ, such as pos_embed (1, 9, 16) instead of (1, 4, 16)",
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "other, complaint",
    [({"depth": 4}, "names are not this model's"), ({"depth": 2, "decode_layer": 1}, "names are missing")]
    + [({"hidden_size": 32}, "shapes differ"), ({"num_classes": 6}, "y_embedder.embedding_table.weight (7, 16)")],
)
def test_weights_of_another_size_are_refused(tmp_path, other, complaint):
    with pytest.raises(ValueError) as raised:
        load_weights(tiny_model(), tiny_model(**other).state_dict(), tmp_path)
    assert_one_sentence(raised, "another model or size", complaint)


# -- finding the newest complete one -----------------------------------------------------------------------------------


def test_the_newest_step_is_found_by_number_not_by_name(tmp_path):
    for step in (999999, 1000000, 20):
        write_checkpoint(tmp_path, step)
    assert newest_complete_step(tmp_path, pytest.fail) == 1000000


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert newest_complete_step(tmp_path, pytest.fail) is None
    assert newest_complete_step(tmp_path / "missing", pytest.fail) is None


def test_files_without_a_manifest_are_no_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint000002.json").unlink()
    assert newest_complete_step(tmp_path, pytest.fail) == 1


PARTS = ["model000020.pt", "ema_0.9999_000020.pt", "opt000020.pt", "state000020.pt"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "harm, complaint", [(tear, "bytes instead of"), (flip_a_bit, "SHA-256"), (Path.unlink, "is missing")]
)
def test_a_damaged_checkpoint_is_renamed_and_the_one_before_taken(tmp_path, part, harm, complaint):
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    harm(tmp_path / part)
    reports = []
    assert newest_complete_step(tmp_path, reports.append) == 10
    assert len(reports) == 1 and all(text in reports[0] for text in ("step 20", part, complaint, ".corrupt"))
    later = [name for name in names(tmp_path) if "000020" in name]
    assert later and all(name.endswith(".corrupt") for name in later)
    assert damage(tmp_path, 10) is None
    assert newest_complete_step(tmp_path, pytest.fail) == 10  # said once


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"model000020.pt": 3}}', "null"])
def test_a_damaged_manifest_is_a_damaged_checkpoint(tmp_path, content):
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint000020.json").write_text(content)
    reports = []
    assert newest_complete_step(tmp_path, reports.append) == 10
    assert "manifest cannot be read" in reports[0]


def test_when_all_are_damaged_none_is_taken(tmp_path):
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
        tear(tmp_path / checkpoint.model_file(step))
    reports = []
    assert newest_complete_step(tmp_path, reports.append) is None
    assert len(reports) == 2 and all(name.endswith(".corrupt") for name in names(tmp_path))


def test_only_the_files_of_the_damaged_step_are_renamed(tmp_path):
    write_checkpoint(tmp_path, 20)
    others = ["model1000020.pt", "opt1000020.pt", "mine000020.pt", "model000010.pt", "preview_000020.png", "log.txt"]
    for name in others:
        (tmp_path / name).write_text("keep me")
    tear(tmp_path / "opt000020.pt")
    newest_complete_step(tmp_path, lambda message: None)
    assert set(others) <= set(names(tmp_path))


@pytest.mark.parametrize("target", ["../outside.pt", "{absolute}"])
def test_a_manifest_that_points_out_of_its_folder_touches_nothing_there(tmp_path, target):
    run, outside = tmp_path / "run", tmp_path / "outside.pt"
    outside.write_bytes(b"precious")
    write_checkpoint(run, 10)
    entry = {"size": 8, "sha256": checkpoint.sha256_of(outside)}
    manifest = {"step": 20, "files": {target.format(absolute=outside): entry}}
    (run / "checkpoint000020.json").write_text(json.dumps(manifest))
    reports = []
    assert newest_complete_step(run, reports.append) == 10
    assert "is missing" in reports[0]
    assert outside.read_bytes() == b"precious" and names(tmp_path) == ["outside.pt", "run"]


def test_the_weights_that_the_manifest_lists_are_loaded_whatever_lies_beside_them(tmp_path):
    """Both formats of a step, as a run through it in another one left them: the other is stale."""
    write_checkpoint(tmp_path, 4)
    listed = json.loads((tmp_path / "checkpoint000004.json").read_text())
    for kind in ("model000004", "ema_0.9999_000004"):
        stale, fresh = tmp_path / f"{kind}.pt", tmp_path / f"{kind}.safetensors"
        fresh.write_bytes(stale.read_bytes())
        listed["files"][fresh.name] = listed["files"].pop(stale.name)
    (tmp_path / "checkpoint000004.json").write_text(json.dumps(listed))
    start = plan(tmp_path)
    for name in (checkpoint.model_file, partial(checkpoint.ema_file, "0.9999")):
        assert checkpoint.sibling(start, name).suffix == ".safetensors"
    with pytest.raises(FileNotFoundError, match=r"ema_0\.5_000004\.pt: no such file"):
        checkpoint.sibling(start, partial(checkpoint.ema_file, "0.5"))
    with pytest.raises(ValueError) as raised:
        plan(tmp_path / "new", str(tmp_path / "model000004.pt"))
    assert_one_sentence(
        raised, "--resume_checkpoint", "model000004.pt: this file is left over", "give model000004.safetensors"
    )
    (tmp_path / "model000004.safetensors").unlink()  # nothing takes its place
    with pytest.raises(FileNotFoundError):
        checkpoint.sibling(start, checkpoint.model_file)


def test_saving_a_step_in_another_format_removes_its_weights_in_the_former_one(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 2)
    write_checkpoint(tmp_path, 4)
    seen = []
    monkeypatch.setattr(checkpoint, "write_json", lambda path, value: seen.append(names(path.parent)))
    weights, rest = {"w": torch.ones(3)}, {checkpoint.opt_file(4): {}, checkpoint.state_file(4): {}}
    formats = {f"{kind}000004.safetensors": weights for kind in ("model", "ema_0.9999_")}
    save_checkpoint(tmp_path, 4, formats | rest, {})
    assert [name for name in seen[0] if "000004" in name] == sorted([*formats, *rest, "checkpoint000004.json"])
    assert set(names_of_step(2)) <= set(seen[0])


# -- where a training begins -------------------------------------------------------------------------------------------


def plan(folder, resume_checkpoint="auto", init_from=None, overwrite=False):
    return plan_start(folder, str(resume_checkpoint), init_from and str(init_from), overwrite)


@pytest.mark.parametrize("resume_checkpoint", ["auto", ""])
def test_a_new_folder_starts_at_step_0(tmp_path, resume_checkpoint):
    start = plan(tmp_path / "run", resume_checkpoint)
    assert (start.step, start.folder, start.init_from) == (0, tmp_path / "run", None)
    assert any("starting at step 0" in message for message in start.messages)
    assert not (tmp_path / "run").exists()


def test_auto_resumes_from_the_newest_complete_checkpoint(tmp_path):
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    start = plan(tmp_path)
    assert (start.step, start.folder) == (20, tmp_path)
    assert any("step 20" in message and "later than" not in message for message in start.messages)


def test_auto_says_which_checkpoint_was_damaged(tmp_path):
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    flip_a_bit(tmp_path / "model000020.pt")
    start = plan(tmp_path)
    assert start.step == 10
    assert "step 20" in start.messages[0] and ".corrupt" in start.messages[0]


def test_a_fresh_start_in_a_folder_with_checkpoints_is_refused_with_both_remedies(tmp_path):
    write_checkpoint(tmp_path, 10)
    before = names(tmp_path)
    with pytest.raises(ValueError) as raised:
        plan(tmp_path, "")
    assert_one_sentence(raised, "--resume_checkpoint", tmp_path, "step 10", "OPENAI_LOGDIR", "--overwrite True")
    assert names(tmp_path) == before


def test_an_explicit_checkpoint_of_another_folder_is_where_the_run_begins(tmp_path):
    write_checkpoint(tmp_path / "other", 10)
    start = plan(tmp_path / "run", tmp_path / "other" / "model000010.pt")
    assert (start.step, start.folder, start.init_from) == (10, tmp_path / "other", None)
    assert any("model000010.pt" in message for message in start.messages)


def test_an_explicit_earlier_checkpoint_does_not_undo_later_work_in_the_run_folder(tmp_path):
    for step in (10, 20):
        write_checkpoint(tmp_path / "run", step)
    start = plan(tmp_path / "run", tmp_path / "run" / "model000010.pt")
    assert (start.step, start.folder) == (20, tmp_path / "run")
    assert any("later than what the flags ask for" in message for message in start.messages)


def test_an_explicit_later_checkpoint_wins_over_the_run_folder(tmp_path):
    write_checkpoint(tmp_path / "run", 10)
    write_checkpoint(tmp_path / "other", 30)
    start = plan(tmp_path / "run", tmp_path / "other" / "model000030.pt")
    assert (start.step, start.folder) == (30, tmp_path / "other")


def test_a_damaged_later_checkpoint_does_not_win(tmp_path):
    write_checkpoint(tmp_path / "other", 10)
    write_checkpoint(tmp_path / "run", 20)
    tear(tmp_path / "run" / "opt000020.pt")
    start = plan(tmp_path / "run", tmp_path / "other" / "model000010.pt")
    assert (start.step, start.folder) == (10, tmp_path / "other")


def test_an_ema_file_is_refused_naming_the_file_to_give(tmp_path):
    write_checkpoint(tmp_path, 10)
    with pytest.raises(ValueError) as raised:
        plan(tmp_path, tmp_path / "ema_0.9999_000010.pt")
    assert_one_sentence(raised, "--resume_checkpoint", tmp_path / "model000010.pt", "--init_from")


@pytest.mark.parametrize("flag", ["resume_checkpoint", "init_from"])
def test_a_missing_file_is_named_with_its_flag(tmp_path, flag):
    with pytest.raises(FileNotFoundError) as raised:
        plan(tmp_path, **{flag: tmp_path / "model000010.pt"})
    assert_one_sentence(raised, f"--{flag}", tmp_path / "model000010.pt", "no such file")


def test_a_file_without_a_step_in_its_name_gives_its_weights_to_a_run_from_step_0(tmp_path):
    path = tmp_path / "mdt_xl2_v1_ckpt.pt"
    torch.save({"w": torch.zeros(1)}, path)
    for start in (plan(tmp_path / "run", path), plan(tmp_path / "run", init_from=path)):
        assert (start.step, start.folder, start.init_from) == (0, tmp_path / "run", path)
        assert any(str(path) in message for message in start.messages)


def test_a_stopped_run_that_began_from_other_weights_goes_on_with_the_same_command(tmp_path):
    path = tmp_path / "ema_0.9999_400000.pt"
    torch.save({"w": torch.zeros(1)}, path)
    write_checkpoint(tmp_path / "run", 10)
    start = plan(tmp_path / "run", init_from=path)
    assert (start.step, start.folder, start.init_from) == (10, tmp_path / "run", None)


def test_paths_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint(tmp_path / "other", 10)
    assert plan(tmp_path / "run", "~/other/model000010.pt").folder == tmp_path / "other"
    assert plan(tmp_path / "run", init_from="~/other/model000010.pt").init_from == tmp_path / "other/model000010.pt"


def test_overwrite_moves_the_former_run_into_a_numbered_folder_and_leaves_other_files(tmp_path):
    run_files = [*names_of_step(10), "config.json", "progress.csv", "progress.json", "log.txt", "preview_000010.png"]
    for number in (1, 2):
        write_checkpoint(tmp_path, 10, position=number)
        for name in run_files[5:]:
            (tmp_path / name).write_text(str(number))
        (tmp_path / "tb").mkdir()
        (tmp_path / "notes.md").write_text("mine")
        start = plan(tmp_path, "", overwrite=True)
        assert (start.step, start.folder) == (0, tmp_path)
        assert any(f"former_{number}" in message for message in start.messages)
        former = tmp_path / f"former_{number}"
        assert names(former) == sorted([*run_files, "tb"])
        assert read_file(former / "state000010.pt")["position"] == number
    assert names(tmp_path) == ["former_1", "former_2", "notes.md"]


def test_overwrite_moves_a_run_without_a_complete_checkpoint_too(tmp_path):
    for name in ("config.json", "model000010.pt", "notes.txt"):
        (tmp_path / name).touch()
    assert plan(tmp_path, overwrite=True).step == 0
    assert names(tmp_path) == ["former_1", "notes.txt"]
    assert names(tmp_path / "former_1") == ["config.json", "model000010.pt"]


def test_overwrite_of_an_empty_folder_is_a_plain_start(tmp_path):
    assert plan(tmp_path, overwrite=True).step == 0
    assert names(tmp_path) == []


def test_overwrite_does_not_move_away_the_checkpoint_that_is_asked_for(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "run", 10)
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path / "run")
    for path in (tmp_path / "run" / "model000010.pt", "run/model000010.pt"):
        with pytest.raises(ValueError) as raised:
            plan(tmp_path / "run", path, overwrite=True)
        assert_one_sentence(raised, "--overwrite True", "--resume_checkpoint")
    assert names(tmp_path / "run") == before


def test_overwrite_does_not_move_away_the_weights_that_are_asked_for(tmp_path):
    write_checkpoint(tmp_path, 10)
    source = tmp_path / "ema_0.9999_000010.pt"
    try:
        start = plan(tmp_path, init_from=source, overwrite=True)
    except ValueError as error:
        assert "--overwrite" in str(error) and "--init_from" in str(error)
        assert source.is_file()
    else:
        assert start.init_from is not None and start.init_from.is_file()


def test_auto_does_not_start_anew_over_files_of_another_code(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "model010000.pt")
    with pytest.raises(ValueError) as raised:
        plan(tmp_path)
    assert_one_sentence(raised, tmp_path / "model010000.pt", "no manifest", "--resume_checkpoint", "OPENAI_LOGDIR")


@pytest.mark.parametrize("flag", ["resume_checkpoint", "init_from"])
@pytest.mark.parametrize("name", ["model010000.pt", "ema_0.9999_010000.pt"])
def test_a_run_from_elsewhere_does_not_begin_among_files_of_another_code(tmp_path, flag, name):
    write_checkpoint(tmp_path / "elsewhere", 10)
    (tmp_path / "run").mkdir()
    torch.save({"w": torch.zeros(1)}, tmp_path / "run" / name)
    given = {"resume_checkpoint": "auto"} | {flag: tmp_path / "elsewhere" / "model000010.pt"}
    with pytest.raises(ValueError) as raised:
        plan(tmp_path / "run", **given)
    assert_one_sentence(raised, tmp_path / "run" / name, "no manifest", "OPENAI_LOGDIR")


def test_files_of_another_code_are_gone_on_from_when_their_path_is_given(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "model010000.pt")
    start = plan(tmp_path, tmp_path / "model010000.pt")
    assert (start.step, start.folder) == (10000, tmp_path)


def test_a_run_that_was_killed_during_its_first_save_starts_again(tmp_path):
    write_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint000010.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    assert plan(tmp_path).step == 0


# -- what a checkpoint says of its run --------------------------------------------------------------------------------


def test_the_state_is_that_of_the_step_and_published_checkpoints_have_none(tmp_path):
    write_checkpoint(tmp_path, 10, position=77)
    assert checkpoint.read_state(plan(tmp_path))["position"] == 77
    assert checkpoint.read_state(checkpoint.Start(0, tmp_path)) is None
    (tmp_path / "state000010.pt").unlink()
    assert checkpoint.read_state(checkpoint.Start(10, tmp_path)) is None


def test_the_manifest_carries_the_configuration(tmp_path):
    save_checkpoint(tmp_path, 1, {}, {"model": {"depth": 4}})
    assert json.loads((tmp_path / "checkpoint000001.json").read_text())["config"] == {"model": {"depth": 4}}


# -- writing while training goes on -----------------------------------------------------------------------------------


def test_a_snapshot_does_not_follow_the_training(tmp_path):
    weight, history = torch.zeros(3), torch.zeros(2, 3)
    writer = checkpoint.CheckpointWriter(tmp_path)
    parts = {"model000001.pt": {"w": weight, "t": history.T}, "opt000001.pt": {"groups": [{"lr": 1.0, "m": weight}]}}
    writer.start(1, checkpoint.snapshot(parts), {})
    weight += 1
    history += 1
    assert writer.outcome(wait=True) == (1, None)
    state, optimizer = read_file(tmp_path / "model000001.pt"), read_file(tmp_path / "opt000001.pt")
    assert not state["w"].any() and not state["t"].any() and not optimizer["groups"][0]["m"].any()
    assert optimizer["groups"][0]["lr"] == 1.0 and newest_complete_step(tmp_path, pytest.fail) == 1


def test_an_outcome_is_told_once_and_not_before_it_is_known(tmp_path, monkeypatch):
    go_on = threading.Event()

    class Slow(checkpoint.CheckpointWriter):
        def _write(self, *arguments):
            go_on.wait()
            super()._write(*arguments)

    writer = Slow(tmp_path)
    assert writer.outcome() is None and writer.outcome(wait=True) is None
    writer.start(1, {"model000001.pt": {"w": torch.zeros(1)}}, {})
    assert writer.outcome() is None and not names(tmp_path)
    go_on.set()
    assert writer.outcome(wait=True) == (1, None) and writer.outcome(wait=True) is None


def test_an_error_of_the_disk_is_an_outcome_and_any_other_is_raised(tmp_path):
    writer = checkpoint.CheckpointWriter(tmp_path / "missing")
    writer.start(1, {"model000001.pt": {"w": torch.zeros(1)}}, {})
    step, error = writer.outcome(wait=True)
    assert step == 1 and isinstance(error, FileNotFoundError)
    writer = checkpoint.CheckpointWriter(tmp_path)
    writer.start(2, {"model000002.safetensors": {"w": "no tensor"}}, {})
    with pytest.raises(Exception, match="tensor|str"):
        writer.outcome(wait=True)


@pytest.mark.parametrize("room", [0, 1000, 100_000, 150_000])
def test_a_disk_without_room_is_an_error_of_the_disk_wherever_it_ends(tmp_path, room):
    """torch's own writer would hide it behind a RuntimeError."""
    writer = checkpoint.CheckpointWriter(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        writer.start(1, {"model000001.pt": {str(i): torch.ones(5000) for i in range(8)}}, {})
        step, error = writer.outcome(wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert step == 1 and isinstance(error, OSError) and "File too large" in str(error)
    assert names(tmp_path) == []


def test_the_writer_prunes_only_after_the_new_checkpoint_is_complete(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    writer = checkpoint.CheckpointWriter(tmp_path, keep_last=2)
    monkeypatch.setattr(checkpoint, "write_json", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    writer.start(4, {"model000004.pt": {"w": torch.zeros(1)}}, {})
    assert writer.outcome(wait=True)[1] is not None and (tmp_path / "checkpoint000001.json").exists()
    monkeypatch.undo()
    writer.start(4, {"model000004.pt": {"w": torch.zeros(1)}}, {})
    assert writer.outcome(wait=True) == (4, None)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["checkpoint000003.json", "checkpoint000004.json"]


@pytest.mark.parametrize("form", checkpoint.WEIGHTS_FORMATS)
def test_a_checkpoint_is_found_checked_and_set_aside_in_either_format(tmp_path, form):
    weights = {"w": torch.arange(6.0).reshape(2, 3).T}
    parts = {checkpoint.model_file(7, form): weights, checkpoint.ema_file("0.9", 7, form): weights}
    writer = checkpoint.CheckpointWriter(tmp_path)
    writer.start(7, checkpoint.snapshot(parts), {})
    assert writer.outcome(wait=True) == (7, None)
    path = checkpoint.sibling(checkpoint.Start(7, tmp_path), checkpoint.model_file)
    assert path.suffix == f".{form}" and torch.equal(checkpoint.read_weights(path)["w"], weights["w"])
    assert plan(tmp_path, str(path)).step == 7
    flip_a_bit(path)
    assert newest_complete_step(tmp_path, lambda _: None) is None
    assert all(name.endswith(".corrupt") for name in names(tmp_path)) and len(names(tmp_path)) == 3


def test_a_missing_part_of_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model000007\.pt: no such file.*step 7"):
        checkpoint.sibling(checkpoint.Start(7, tmp_path), checkpoint.model_file)


def test_saved_bytes_hold_no_object_that_needs_code(tmp_path):
    write_checkpoint(tmp_path, 1, **{"model000001.pt": tiny_model().state_dict()})
    for name in ("model000001.pt", "ema_0.9999_000001.pt", "opt000001.pt", "state000001.pt"):
        torch.load(io.BytesIO((tmp_path / name).read_bytes()), weights_only=True)


def test_an_incomplete_checkpoint_of_ours_is_not_taken_for_a_published_one(tmp_path):
    write_checkpoint(tmp_path, 10)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoint000010.json").unlink()
    with pytest.raises(ValueError, match=r"incomplete, it has no checkpoint000010\.json.*--init_from"):
        plan(tmp_path, str(tmp_path / "model000010.pt"))


def test_published_weights_of_a_later_step_are_not_written_over(tmp_path):
    for step in (50, 100):
        torch.save({"w": torch.zeros(1)}, tmp_path / checkpoint.model_file(step))
    with pytest.raises(ValueError, match=r"write over model000100\.pt"):
        plan(tmp_path, str(tmp_path / "model000050.pt"))
    assert plan(tmp_path, str(tmp_path / "model000100.pt")).step == 100


def test_a_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(tmp_path):
    for _ in range(2):
        write_checkpoint(tmp_path, 1)
        tear(tmp_path / "model000001.pt")
        assert newest_complete_step(tmp_path, lambda _: None) is None
    assert {"model000001.pt.corrupt", "model000001.pt.corrupt2"} <= set(names(tmp_path))


def test_old_checkpoints_that_cannot_be_removed_are_no_failed_save(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr(checkpoint, "prune", refuse)
    writer = checkpoint.CheckpointWriter(tmp_path, keep_last=2)
    writer.start(1, {"model000001.pt": {"w": torch.zeros(1)}}, {})
    assert writer.outcome(wait=True) == (1, None)


@pytest.mark.parametrize(
    "steps, asked, overwrite, expected",
    [
        ([], "auto", False, None),
        ([2, 10], "auto", False, "run"),
        ([2], "auto", True, None),
        ([2], "", False, None),
        ([], "other/model000004.pt", False, "other"),
        ([2], "other/model000004.pt", False, "other"),
        ([10], "other/model000004.pt", False, "run"),
        ([10], "other/model000004.pt", True, "other"),
        ([], "other/weights.pt", False, None),
    ],
)
def test_the_run_to_resume_is_known_by_names_alone(tmp_path, steps, asked, overwrite, expected):
    run = tmp_path / "run"
    run.mkdir()
    for step in steps:
        (run / checkpoint.manifest_file(step)).touch()
    asked = str(tmp_path / asked) if "/" in asked else asked
    assert checkpoint.run_to_resume(run, asked, overwrite) == (tmp_path / expected if expected else None)
