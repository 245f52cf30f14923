"""scripts/make_notebook.py: the tutorial as a notebook."""

import json

import pytest
from support import REPO, script

MAKER = "scripts/make_notebook.py"
PAGE, NOTEBOOK = REPO / "docs" / "tutorial.md", REPO / "docs" / "tutorial.ipynb"


def sources(text, kind):
    return [cell["source"] for cell in script(MAKER).notebook_of(text, "page.md")["cells"] if cell["cell_type"] == kind]


def test_the_notebook_in_docs_is_the_tutorial_as_it_is():
    made = script(MAKER).notebook_of(PAGE.read_text(encoding="utf-8"), PAGE.name)
    remedy = "run: python scripts/make_notebook.py docs/tutorial.md docs/tutorial.ipynb"
    assert json.loads(NOTEBOOK.read_bytes()) == made, remedy


def test_prose_stays_and_each_command_has_a_cell_that_fails_with_it():
    text = "# Title\n\nFirst:\n\n```bash\nA=1 python a.py \\\n  --b 2\ncp c d\n```\n\n```python\nx = 1\n```\nLast.\n"
    assert sources(text, "markdown") == ["# Title\n\nFirst:", "```python\nx = 1\n```\nLast."]
    first, *commands = sources(text, "code")
    assert 'os.chdir("..")' in first
    assert commands == ["%%bash\nA=1 python a.py \\\n  --b 2", "%%bash\ncp c d"]


def test_pictures_are_shown_and_what_does_not_end_or_installs_has_its_own_way():
    text = "```bash\npip install x\npython infer_mdt.py --out a.gif\ntensorboard --logdir y\n```\n"
    _, install, _, show, board = sources(text, "code")
    assert install == "%pip install x" and show.endswith('Image("a.gif")')
    assert board == "%load_ext tensorboard\n%tensorboard --logdir y"


def test_a_notebook_of_the_same_page_is_replaced_and_nothing_else(tmp_path, capsys):
    page, path = tmp_path / "page.md", tmp_path / "page.ipynb"
    page.write_text("```bash\nls\n```\n", encoding="utf-8")
    for command in ("ls", "ls -l"):
        page.write_text(f"```bash\n{command}\n```\n", encoding="utf-8")
        assert script(MAKER).main([str(page), str(path)]) == 0
        assert json.loads(path.read_bytes())["cells"][-1]["source"] == f"%%bash\n{command}"
    page.rename(tmp_path / "other.md")
    assert script(MAKER).main([str(tmp_path / "other.md"), str(path)]) == 2
    assert f"{path}: exists, and was not made of other.md; give another name" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "words"), [("# Title\n", "no block of ```bash in it"), (None, "page.md")])
def test_a_page_without_commands_is_refused(tmp_path, capsys, text, words):
    if text is not None:
        (tmp_path / "page.md").write_text(text, encoding="utf-8")
    assert script(MAKER).main([str(tmp_path / "page.md"), str(tmp_path / "page.ipynb")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "page.ipynb").exists()
