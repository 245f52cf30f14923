"""scripts/make_api_page.py: pages from the docstrings."""

import sys

import pytest
from support import script

PAGE = "scripts/make_api_page.py"


def test_the_pages_have_the_docstrings_and_load_nothing_from_elsewhere(tmp_path, monkeypatch):
    pytest.importorskip("pdoc", reason="the extra docs builds the pages")
    monkeypatch.setattr(script(PAGE), "modules", lambda: ["masked_diffusion.choices", "masked_diffusion.diffusion"])
    assert script(PAGE).main(["--out", str(tmp_path / "api")]) == 0
    text = (tmp_path / "api" / "masked_diffusion" / "diffusion" / "samplers.html").read_text(encoding="utf-8")
    assert "euler_maruyama_step" in text and "reverse SDE" in text
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "api").rglob("*.html")]
    assert len(pages) > 5 and not any('src="http' in page for page in pages)


def test_all_rooms_and_public_modules_are_in_it():
    found = script(PAGE).modules()
    assert {"masked_diffusion", "masked_diffusion.models", "masked_diffusion.train_util"} <= set(found)
    assert len(found) == len(set(found))


def test_what_cannot_be_built_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert script(PAGE).main(["--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path}: exists; give another name, or empty it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pdoc", None)
    assert script(PAGE).main(["--out", str(tmp_path / "api")]) == 2
    assert "pip install -e '.[docs]'" in capsys.readouterr().err
