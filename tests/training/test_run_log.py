"""Logs read back: curves, cards, and whether a run is on its recipe's track."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from support import REPO, TINY_DIGITS, call, script

from masked_diffusion.training.run_log import LOSSES, compare, make_columns, read_card, read_run_log

CURVE, CARD, TRACK = "scripts/fid_curve.py", "scripts/make_card.py", "scripts/on_track.py"
CARDS = REPO / "docs" / "recipes"


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Folders of tiny trainings by seed, six steps each."""

    def run(seed, *flags):
        folder = tmp_path / f"seed{seed}"
        flags = ["--max_steps", "6", "--seed", seed, *flags]
        assert call(monkeypatch, "scripts/image_train.py", folder, *TINY_DIGITS, *flags) == 0
        return folder

    return run


def write_log(folder, **columns):
    """A log with these columns; None is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(columns["step"])
    columns = {"samples": [4 * step for step in columns["step"]], "images_per_second": [2.0] * number, **columns}
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join("" if v is None else str(v) for v in row) for row in rows)]
    (folder / "progress.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_losses_are_means_over_the_steps_before_and_scores_of_the_step(tmp_path):
    fid = [None, None, None, 8, None, None]
    run = read_run_log(write_log(tmp_path, step=range(1, 7), loss=[1, 2, 3, 4, 5, 6], eval_fid=fid))
    assert run.at("loss", 4, every=2) == 3.5 and run.at("loss", 6, every=6) == 3.5
    assert run.at("eval_fid", 4, every=2) == 8
    assert np.isnan(run.at("eval_fid", 5, every=2)) and np.isnan(run.at("loss", 9, every=2))
    assert run.global_batch == 4 and run.seconds() == 12


def test_rows_that_do_not_say_their_compute_are_reckoned_and_seconds_add_up(tmp_path):
    rates = {"images_per_second": [4.0, 2.0, 1.0]}
    run = read_run_log(write_log(tmp_path / "new", step=[1, 2, 3], tflops=[None, 7, 9], **rates))
    assert run.tflops(per_image=500).tolist() == [2, 7, 9] and run.elapsed().tolist() == [1, 3, 7]
    run = read_run_log(write_log(tmp_path / "old", step=[1, 2, 3]))
    assert run.tflops(per_image=500).tolist() == [2, 4, 6]


def test_a_band_is_four_relative_deviations_of_all_steps_around_the_mean(tmp_path):
    losses = np.array([[1.0, 2.0], [1.1, 2.0], [0.9, 2.6]])
    runs = [read_run_log(write_log(tmp_path / str(i), step=[1, 2], loss=loss)) for i, loss in enumerate(losses)]
    column = make_columns(runs, every=1)["loss"]
    relative = losses.std(axis=0, ddof=1) / losses.mean(axis=0)
    expected = 4 * np.sqrt((relative**2).mean()) * losses.mean(axis=0)
    np.testing.assert_allclose(column["tolerance"], expected)
    np.testing.assert_allclose(column["mean"], losses.mean(axis=0))
    np.testing.assert_allclose(column["spread"], losses.std(axis=0, ddof=1))


def test_leaving_the_band_above_below_and_by_diverging_is_seen(tmp_path):
    column = {"steps": [1, 2, 3, 4], "mean": [1, 1, 1, 1], "tolerance": [0.1] * 4}
    card = {"every": 1, "columns": {"loss": column, "eval_fid": column}}
    run = read_run_log(write_log(tmp_path, step=[1, 2, 3, 4], loss=[1.05, 1.2, 0.8, None], eval_fid=[None] * 4))
    found = compare(run, card)
    assert [comparison.inside for comparison in found] == [True, False, False, False]
    sides = [str(comparison).split(" is ")[1].split(" the band")[0] for comparison in found[1:]]
    assert sides == ["above", "below", "outside"]


def test_a_card_of_three_seeds_holds_a_fourth_and_not_another_learning_rate(trained, monkeypatch, tmp_path, capsys):
    wide = ["--batch_size", "16"]  # in which no quartile stays empty
    runs = [trained(seed, *wide) for seed in (0, 1, 2)]
    out = tmp_path / "card.json"
    assert call(monkeypatch, CARD, tmp_path, *runs, "--recipe", "tiny", "--every", "3", "--out", out) == 0
    card = json.loads(out.read_text())
    assert card["settings"]["global_batch"] == 16 and card["cost"]["images"] == 96 and card["runs"] == 3
    assert set(card["columns"]) == set(LOSSES) and card["columns"]["loss"]["steps"] == [3, 6]
    capsys.readouterr()
    for run in runs:
        assert call(monkeypatch, TRACK, tmp_path, run, out) == 0
    assert "20 of 20 numbers up to step 6 are in the band of tiny" in capsys.readouterr().out
    assert call(monkeypatch, TRACK, tmp_path, trained(4, *wide, "--lr", "0.3"), out) == 1
    told = capsys.readouterr().out
    assert "another recipe: lr 0.3, the card has 0.0003" in told and "is above the band" in told


def test_cost_is_that_of_the_dry_run(trained, monkeypatch, tmp_path, capsys):
    run = trained(0)
    flags = [*TINY_DIGITS, "--dry_run", "True"]
    capsys.readouterr()
    assert call(monkeypatch, "scripts/image_train.py", tmp_path / "dry", *flags, sinks="stdout") == 0
    told = float(capsys.readouterr().out.split("a training step ")[1].split()[0])
    found = script(CARD).cost([read_run_log(run)], "")
    assert found["training_gflops_per_image"] == pytest.approx(told, rel=1e-3)
    assert found["training_tflops"] == pytest.approx(24 * told / 1000, abs=1e-3)


def test_the_cards_of_the_repository_can_be_read_or_say_that_they_are_empty():
    measured = read_card(CARDS / "digits.json")
    assert measured["runs"] == 3 and {"loss_q0", "m_loss_q3", "eval_fid"} <= set(measured["columns"])
    for name in ("mdt_s2", "mdt_b2", "mdt_xl2"):
        with pytest.raises(ValueError, match="has not been measured yet"):
            read_card(CARDS / f"{name}.json")


def test_published_numbers_that_nobody_looked_up_say_so():
    published = {
        name: json.loads((CARDS / f"mdt_{name}.json").read_text())["published"] for name in ("s2", "b2", "xl2")
    }
    assert all(entry["source"] == "arXiv 2303.14389" for entries in published.values() for entry in entries)
    for name in ("s2", "b2"):
        assert all(entry["unverified"].startswith("FID and steps: ") for entry in published[name])
    assert all(entry["unverified"].startswith("steps: ") for entry in published["xl2"])
    found = [(entry["guided"], entry["FID"], entry["Inception Score"]) for entry in published["xl2"]]
    assert found == [(False, 6.23, 143.02), (True, 1.79, 283.01)]


def test_curves_have_a_panel_for_each_number_and_scale(trained, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [trained(0), trained(1)]
    for suffix in ("svg", "png"):
        assert call(monkeypatch, CURVE, tmp_path, *runs, "--out", tmp_path / f"curve.{suffix}") == 0
    assert Image.open(tmp_path / "curve.png").size == (1800, 600)  # loss and masked loss, four scales
    axes = [script(CURVE).scales(read_run_log(run)) for run in runs]
    figure = script(CURVE).draw([read_run_log(run) for run in runs], axes)
    scales = ["steps", "images", "training compute, TFLOPs", "seconds"]
    assert [panel.get_xlabel() for panel in figure.axes[:4]] == scales
    assert [panel.get_ylabel() for panel in figure.axes[::4]] == ["loss, all tokens", "loss, masked"]
    [first, second] = figure.axes[1].lines
    assert first.get_xdata().tolist() == [4, 8, 12, 16, 20, 24] and second.get_label() == "seed1"


def test_curves_show_scores_where_there_are_some(trained, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    scored, plain = trained(0), trained(1)
    write_log(scored, step=[1, 2, 3], eval_fid=[None, 9, 7], eval_is=[None, 2, 3], loss=[3, 2, 1])
    runs = [read_run_log(run) for run in (scored, plain)]
    figure = script(CURVE).draw(runs, [script(CURVE).scales(run) for run in runs])
    names = [panel.get_ylabel() for panel in figure.axes[::4]]
    assert names == ["FID", "Inception Score", "loss, all tokens", "loss, masked"]
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[9, 7], []]
    assert figure.axes[1].lines[0].get_xdata().tolist() == [8, 12]
    assert len(figure.axes[8].lines[1].get_ydata()) == 6


@pytest.mark.parametrize(
    "path, arguments, sentence",
    [
        (CURVE, ["LOG", "--out", "curve.pdf"], "--out curve.pdf: expected a name that ends in .png or .svg"),
        (CURVE, ["LOG"], "no config.json, so the run's model is not known"),
        (CURVE, ["nowhere"], "progress.csv: no such file; give a training's output folder"),
        (CARD, ["LOG", "--recipe", "one", "--out", "card.json"], "one run alone shows no spread"),
        (CARD, ["LOG", "LOG", "--recipe", "r", "--out", "card.json", "--every", "0"], "--every 0: must be at least 1"),
        (TRACK, ["LOG", "nowhere.json"], "nowhere.json: no such file; docs/recipes/ has the cards"),
        (TRACK, ["LOG", "LOG/progress.csv"], "progress.csv: not a recipe's card"),
        (TRACK, ["LOG", str(CARDS / "mdt_s2.json")], "has not been measured yet, so there is nothing to compare with"),
        (TRACK, ["LOG", str(CARDS / "digits.json")], "is at step 2, the card's first number is of step 250"),
        (TRACK, ["EMPTY", str(CARDS / "digits.json")], "not the log of a training, or still without a row"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(monkeypatch, tmp_path, capsys, path, arguments, sentence):
    log = write_log(tmp_path / "log", step=[1, 2], loss=[1, 2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "progress.csv").write_text("step,samples\n")
    arguments = [a.replace("LOG", str(log)).replace("EMPTY", str(tmp_path / "empty")) for a in arguments]
    assert call(monkeypatch, path, tmp_path, *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_runs_of_two_recipes_make_no_card(trained, monkeypatch, tmp_path, capsys):
    runs = [trained(0), trained(1, "--lr", "1e-2")]
    assert call(monkeypatch, CARD, tmp_path, *runs, "--recipe", "two", "--out", tmp_path / "card.json") == 2
    assert "has another lr than" in capsys.readouterr().err
    shorter = trained(2, "--max_steps", "2")
    assert call(monkeypatch, CARD, tmp_path, shorter, shorter, "--recipe", "r", "--out", tmp_path / "c.json") == 2
    assert "--every 250: the runs end before, at step 2" in capsys.readouterr().err


def test_without_matplotlib_a_sentence_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = write_log(tmp_path / "log", step=[1], loss=[1])
    assert call(monkeypatch, CURVE, tmp_path, log) == 2
    assert "plotting needs matplotlib: pip install -e '.[plot]'" in capsys.readouterr().err
