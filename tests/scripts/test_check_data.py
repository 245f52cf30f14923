"""Checking a data folder before a training."""

import pytest
from support import make_colour_folder, script, truncate

from masked_diffusion.data.bad_images import read_list


@pytest.fixture
def colours(tmp_path):
    return make_colour_folder(tmp_path / "colours", size=12)


def check(*arguments):
    return script("scripts/check_data.py").main([str(argument) for argument in arguments])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_bad_file_is_named_with_its_reason(tmp_path, colours, capsys, num_workers):
    paths = truncate(colours, "red/1.png", "blue/0.png")
    (colours / "green" / "text.jpg").write_text("<html>")
    out = tmp_path / "bad.txt"
    assert check("--data_dir", colours, "--num_workers", num_workers, "--image_size", 14, "--out", out) == 1
    printed, progress = capsys.readouterr()
    assert "25 images, 3 classes (blue, green, red)" in printed
    assert "smallest 20 x 12, largest 20 x 12 pixels; 22 are enlarged for --image_size 14" in printed
    assert "3 of 25 cannot be read:" in printed and "25/25" in progress
    expected = sorted([*paths, str(colours / "green" / "text.jpg")])
    named = [line for line in printed.splitlines() if "\t" in line]
    assert [line.split("\t")[0] for line in named] == expected == read_list(out)
    assert out.read_text().splitlines() == named and all(line.split("\t")[1] for line in named)


def test_a_clean_folder_is_reported_clean(colours, capsys):
    assert check("--data_dir", colours, "--num_workers", 0, "--image_size", 12, "--class_cond", "False") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("24 images, without classes\n") and "; 0 are enlarged" in printed
    assert printed.endswith("all can be read\n")


def test_an_earlier_list_is_moved_aside(tmp_path, colours):
    out = tmp_path / "bad.txt"
    out.write_text("precious")
    assert check("--data_dir", colours, "--num_workers", 0, "--class_from", "folder", "--out", out) == 0
    assert out.read_text() == "" and (tmp_path / "bad_1.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--data_dir", "nowhere"], "--data_dir nowhere: no such folder"),
        (["--data_dir", "builtin:digits"], "--data_dir builtin:digits: comes with the code"),
        (["--out", "no/such/folder/list.txt"], "--out no/such/folder/list.txt: the folder no/such/folder does not"),
        (["--class_from", "filename"], "no class to be had"),
        (["--num_workers", "-2"], "--num_workers -2"),
    ],
)
def test_what_cannot_be_checked_is_refused(colours, capsys, flags, sentence):
    assert check("--data_dir", colours, *flags) == 2
    assert sentence in capsys.readouterr().err
