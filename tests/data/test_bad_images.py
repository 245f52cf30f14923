"""Unreadable images of a run: found, counted, listed, and too many of them stop it."""

import numpy as np
import pytest
import torch
from PIL import Image
from support import TINY_DIGITS, assert_same_weights, call, make_colour_folder, names_in_order, rows, truncate, weights

from masked_diffusion.data.bad_images import LIST_NAME, BadImages, read_list, write_list
from masked_diffusion.data.data_stream import candidates
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.dist_util import Place, Ranks
from masked_diffusion.image_datasets import open_dataset

TRAIN = "scripts/image_train.py"
BAD = ("blue/3.png", "red/0.png", "red/7.png")


@pytest.fixture
def colours(tmp_path):
    return make_colour_folder(tmp_path / "colours", size=12)


@pytest.fixture
def train(monkeypatch, tmp_path, colours):
    def run(name, *flags, status=0, sinks="csv"):
        arguments = [*TINY_DIGITS, "--data_dir", colours, "--max_steps", 6, "--batch_size", 4, "--lr", "1e-3", *flags]
        assert call(monkeypatch, TRAIN, tmp_path / name, *arguments, sinks=sinks) == status
        return tmp_path / name

    return run


def bad_images(colours, tmp_path, share=0.2):
    dataset = open_dataset(str(colours), image_size=8)
    place = Ranks(Place(), torch.device("cpu"))
    return BadImages(dataset, seed=0, max_bad_share=share, ranks=place, path=tmp_path / LIST_NAME)


def test_the_list_keeps_any_name(tmp_path):
    names = {"a b/ü.png": "cut off", "x\udcff.png": "two words"}
    write_list(tmp_path / "list", names)
    assert read_list(tmp_path / "list") == list(names) and read_list(tmp_path / "none") == []


@pytest.mark.parametrize("share, allowed", [(0, 0), (0.01, 1), (0.2, 4), (1, 24)])
def test_one_image_may_be_bad_unless_none_may(colours, tmp_path, share, allowed):
    assert bad_images(colours, tmp_path, share).allowed == allowed


def test_every_candidate_before_the_one_in_use_is_bad(colours, tmp_path):
    bad = bad_images(colours, tmp_path)
    tried = list(candidates((2, 5), 24, 0))
    used = next(index for index in tried if index not in tried[:3])
    assert tried[0] == 5 and len(tried) == 101 and set(tried) <= set(range(24))
    batch = {"epoch": [2, 2], "index": [5, 6], "used": [used, 6]}
    bad.note({name: torch.tensor(values) for name, values in batch.items()})
    bad.gather()
    assert set(bad.found) == set(tried[: tried.index(used)]) and len(read_list(bad.path)) == len(bad.found)


def test_a_run_lists_exactly_its_bad_files_and_counts_them(train, colours, capsys):
    paths = truncate(colours, *BAD)
    folder = train("run", "--max_bad_share", 0.2, "--max_steps", 12, sinks="stdout,csv")
    lines = (folder / LIST_NAME).read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == paths and all(line.split("\t")[1] for line in lines)
    counts = [row["bad_images"] for row in rows(folder)]
    assert counts == sorted(counts) and counts[-1] == 3
    out = capsys.readouterr().out
    assert all(out.count(f"{path} is replaced by another image: ") == 1 for path in paths)


def test_without_bad_files_there_is_no_list(train):
    folder = train("run")
    assert not (folder / LIST_NAME).exists() and {row["bad_images"] for row in rows(folder)} == {0}


def test_a_resumed_run_ends_as_an_undisturbed_one_and_lists_each_file_once(train, colours):
    paths = truncate(colours, *BAD)
    whole = train("whole", "--max_bad_share", 0.2, "--max_steps", 12)
    for steps in (5, 9, 12):
        resumed = train("resumed", "--max_bad_share", 0.2, "--max_steps", steps, "--num_workers", steps % 2)
    assert_same_weights(weights(whole, 12), weights(resumed, 12))
    assert sorted(read_list(resumed / LIST_NAME)) == paths == sorted(read_list(whole / LIST_NAME))


def test_a_single_bad_image_of_the_first_batch_is_skipped_with_a_warning(train, colours, capsys):
    [path] = truncate(colours, names_in_order(colours)[0])
    folder = train("run", "--max_steps", 1, "--batch_size", 1, "--log_interval", 100, sinks="stdout")
    assert f"{path} is replaced by another image" in capsys.readouterr().out
    assert read_list(folder / LIST_NAME) == [path]


def test_too_many_bad_images_stop_the_run_after_a_last_checkpoint(train, colours, capsys):
    truncate(colours, *names_in_order(colours)[16:])  # 8 of 24, none of them among the first
    with pytest.raises(RuntimeError, match=r"of 24 images cannot be read, more than --max_bad_share 0.2 .* step \d"):
        train("run", "--max_bad_share", 0.2, "--max_steps", 100)
    folder = train("run", "--max_bad_share", 0.2, "--max_steps", 100, status=2)  # nor does it start again
    last = rows(folder)[-1]
    assert last["bad_images"] > 4 and (folder / f"checkpoint{int(last['step']):06d}.json").exists()
    listed = read_list(folder / LIST_NAME)
    for name in listed[:-1]:  # repaired, so that the same command goes on
        Image.new("RGB", (12, 12)).save(name)
    capsys.readouterr()
    train("run", "--max_bad_share", 0.2, "--max_steps", int(last["step"]) + 1, sinks="stdout")
    assert f"{len(listed) - 1} files are no longer listed" in capsys.readouterr().out
    assert listed[-1] in read_list(folder / LIST_NAME) and not set(listed[:-1]) & set(read_list(folder / LIST_NAME))


def test_a_resumed_run_is_refused_while_its_list_is_too_long(colours, tmp_path):
    paths = truncate(colours, *names_in_order(colours)[:5])
    bad = bad_images(colours, tmp_path)
    write_list(bad.path, dict.fromkeys([*paths, str(colours / "gone.png")], "cut off"))
    with pytest.raises(ValueError, match=f"5 of 24 images cannot be read, more than .* 0.2 allows; {bad.path} lists"):
        bad.take_up(resumed=True)
    assert sorted(read_list(bad.path)) == paths
    assert bad_images(colours, tmp_path).take_up(resumed=False) == [] and not bad.path.exists()
    assert sorted(read_list(tmp_path / "bad_files_1.txt")) == paths


def test_half_of_the_first_images_bad_is_refused_whatever_is_allowed(train, colours, capsys):
    truncate(colours, *(f"{colour}/{i}.png" for colour in ("red", "blue", "green") for i in range(6)))
    train("run", "--max_bad_share", 1, "--batch_size", 24, status=2)
    error = capsys.readouterr().err
    assert "--data_dir: 18 of the first 24 images are bad, such as " in error and "cannot be read as an image" in error


def test_data_that_fail_stop_the_run_after_a_last_checkpoint(train, monkeypatch):
    from masked_diffusion.image_datasets import SourceDataset

    load, calls = SourceDataset.load, []

    def load_until_the_disk_is_gone(self, index, rng=None):
        calls.append(rng)
        if sum(rng is not None for rng in calls) > 20:  # five batches; two of them are read ahead
            raise OSError("the storage failed")
        return load(self, index, rng)

    monkeypatch.setattr(SourceDataset, "load", load_until_the_disk_is_gone)
    with pytest.raises(OSError, match="the storage failed"):
        train("run", "--max_steps", 100)
    monkeypatch.setattr(SourceDataset, "load", load)
    saved = train("run", "--max_steps", 6)
    assert [row["step"] for row in rows(saved)] == [1, 2, 3, 4, 5, 6]
    assert (saved / "checkpoint000004.json").exists()
    assert_same_weights(weights(train("whole"), 6), weights(saved, 6))


def test_a_nan_batch_names_the_image_that_was_shown(train, colours, monkeypatch, capsys):
    truncate(colours, *BAD)
    from masked_diffusion.image_datasets import SourceDataset

    load = SourceDataset.load
    monkeypatch.setattr(SourceDataset, "load", lambda self, i, rng=None: load(self, i, rng) * np.float32("nan"))
    train("run", "--max_bad_share", 1, "--max_steps", 2, "--batch_size", 24, sinks="stdout")
    line, _ = (line for line in capsys.readouterr().out.splitlines() if "not finite" in line)
    assert line.count("(epoch 0, ") == 24 and not any(f"/{name} (epoch" in line for name in BAD)


def test_an_unreadable_image_says_which_and_why():
    error = UnreadableImageError("a.png", "cut\n off")
    assert error.reason == "cut off" and "a.png" in str(error)


def test_names_with_line_breaks_or_without_utf_8_come_back_from_the_list(tmp_path):
    names = [
        "a.png",
        "line\nbreak.png",
        "tab\tand\rreturn.png",
        '"quoted".png',
        "\udce9.png",
        "line\u2028sep.png",
        "b\\n.png",
    ]
    write_list(tmp_path / "bad.txt", dict.fromkeys(names, "because\nof this"))
    assert read_list(tmp_path / "bad.txt") == names
    lines = (tmp_path / "bad.txt").read_bytes().split(b"\n")
    assert len(lines) == len(names) + 1 and lines[0] == b"a.png\tbecause of this" and lines[4].startswith(b"\xe9.png")
