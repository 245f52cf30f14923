"""docs/policies.md: its pictures are drawn from the models, its tables are so, and its worked example trains."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from support import REPO, TINY_DIGITS, call, few_steps, script

from masked_diffusion import choices
from masked_diffusion.models import create_model
from masked_diffusion.models.cost import cost
from masked_diffusion.models.policies import POLICIES

PAGE = (REPO / "docs" / "policies.md").read_text(encoding="utf-8")
DRAW, IMAGES = "scripts/draw_policies.py", REPO / "docs" / "images"
SIZES = ("S", "B", "L", "XL")


def table(heading):
    """The rows of the first table under a heading, as lists of cells without marks."""
    lines = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if "`" in row[0]]


def build(policy, size, **settings):
    family = "MDTv2" if policy == "mdtv2" else "DiT"
    with torch.device("meta"):
        return create_model(f"{family}_{size}_2", policy=policy, mask_ratio=POLICIES[policy].mask_ratio, **settings)


def test_the_pictures_are_those_that_the_script_draws(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, DRAW, tmp_path, "--out", tmp_path) == 0
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in IMAGES.glob("policy_*.svg")}
    assert (
        {f"policy_{name}.svg" for name in choices.POLICIES} == set(drawn) == set(re.findall(r"policy_\w+\.svg", PAGE))
    )
    assert call(monkeypatch, DRAW, tmp_path, "--out", tmp_path / "none") == 2
    assert call(monkeypatch, DRAW, tmp_path, "--out", tmp_path, "--size", "M_2") == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "no such folder; make it first" in first and "--model DiT_M_2: unknown; choose one of" in second


def test_blocks_are_drawn_as_high_as_there_are_tokens_in_them():
    drawing = script(DRAW).drawing(build("sprint", "S"))
    boxes = [box.attrib for box in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}rect")]
    heights = [float(box["height"]) for box in boxes if box["width"] == "30" and box["fill"] == script(DRAW).BLUE]
    assert heights == [72.0] * 2 + [18.0] * 8 + [72.0] * 2


def test_the_settings_are_the_policies_own():
    rows = table("Settings")
    assert [row[0].strip("`") for row in rows] == list(dict.fromkeys(name.strip("`") for name, *_ in rows))
    assert {row[0].strip("`") for row in rows} == set(POLICIES)
    for name, ratio, choose, small, large, largest, finale, _ in rows:
        policy = POLICIES[name.strip("`")]
        if not policy.drops:
            continue
        assert float(re.match(r"[\d.]+", ratio)[0]) == policy.mask_ratio and choose == policy.choose
        assert float(finale) == policy.finale
        if policy.leaves:
            routes = [build(name.strip("`"), size).route for size in ("S", "B", "L", "XL")]
            said = [small.split(";")[0], small.split(";")[0], large, largest]
            assert said == [",".join(map(str, route)) for route in routes]


def test_the_costs_are_those_that_a_training_counts():
    plain = {size: cost(build("none", size)) for size in SIZES}
    rows = table("What a step costs")
    assert len(rows) == len(POLICIES)  # all but none, and maskdit twice
    for name, *numbers in rows:
        policy = re.match(r"`(\w+)`", name)[1]
        for size, number in zip(SIZES, numbers, strict=True):
            settings = {"decode_layer": 6} if policy == "mdtv2" and size == "S" else {}
            settings |= {"decoder": "blocks"} if "--decoder blocks" in name else {}
            assert cost(build(policy, size, **settings)) / plain[size] == pytest.approx(float(number), abs=0.006)


@pytest.fixture
def mean_change():
    """The page's own policy, which goes with the test."""
    [example] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 30
    exec(compile(example, "policies.md", "exec"), {})
    yield "mean_change"
    del POLICIES["mean_change"], choices.POLICIES["mean_change"]


def test_the_worked_example_trains_and_samples(mean_change, monkeypatch, tmp_path):
    flags = ["--policy", mean_change, "--model", "DiT_Ti_2", "--mask_ratio", "0.5", "--finale", "0.5", "--route", "1,2"]
    assert call(monkeypatch, "scripts/image_train.py", tmp_path, *TINY_DIGITS, *flags) == 0
    few = ["--num_samples", 2, "--batch_size", 2, *few_steps(2), "--device", "cpu"]
    path = tmp_path / "ema_0.9999_000002.pt"
    assert call(monkeypatch, "scripts/image_sample.py", tmp_path / "out", "--model_path", path, *few) == 0


def test_the_worked_example_moves_what_was_away_as_the_others_moved(mean_change):
    model = create_model("DiT_Ti_2", input_size=8, in_channels=1, policy=mean_change)
    draw, stash = model.draw(torch.rand(2, 16)), torch.randn(2, 16, 128)
    back = model.rejoin(model, draw.kept.leave(stash) + 3, stash, None, draw)
    torch.testing.assert_close(back, stash + 3)
