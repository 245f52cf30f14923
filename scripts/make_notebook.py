"""Make a Jupyter notebook of a page of the docs: its prose, and a cell for each of its commands.

    python scripts/make_notebook.py docs/tutorial.md docs/tutorial.ipynb

A test compares the notebook in ``docs/`` with its page: after a change of the page, run this again.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from masked_diffusion.files import write_json
from masked_diffusion.script_util import main_of

FENCE = re.compile(r"^```bash\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:.*\\\n)*.*\n")  # one line, and those that it is continued on
PICTURE = re.compile(r"--out (\S+\.(?:png|gif))\b")
# Pages name folders from the root of the repository, and Jupyter starts where the notebook is.
FIRST = """import os
import sys

if os.path.basename(os.getcwd()) == "docs":
    os.chdir("..")
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # of the same environment"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a notebook of a page with commands.")
    parser.add_argument("page", type=Path, help="Markdown, with commands in blocks of ```bash")
    parser.add_argument("notebook", type=Path, help=".ipynb to write; one that was made of the same page is replaced")
    return parser


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Returns the work. Raises ValueError or OSError for a page without commands, and for a file of another origin."""
    page, path = args.page, args.notebook
    text = page.read_text(encoding="utf-8")
    if not FENCE.search(text):
        raise ValueError(f"{page}: no block of ```bash in it, so there is nothing to run in a notebook")
    if path.exists() and origin(path) != page.name:
        raise ValueError(f"{path}: exists, and was not made of {page.name}; give another name")
    return lambda: write_json(path, notebook_of(text, page.name))


def origin(path: Path) -> str | None:
    """The page that a file says it was made of; None where it says nothing."""
    try:
        found = json.loads(path.read_bytes())
        return str(found["metadata"]["made_of"])
    except (ValueError, KeyError, TypeError):
        return None


def notebook_of(text: str, name: str) -> dict[str, Any]:
    """The notebook, in nbformat 4.5, of a page's text. name: of the page's file."""
    cells = list(cells_of(text))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "made_of": name}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def cells_of(text: str) -> Iterator[dict[str, Any]]:
    """The prose between blocks of commands, and a cell per command; pictures that it writes are shown after it."""
    for number, part in enumerate(FENCE.split(text)):
        if number == 1:
            yield code(FIRST)
        if number % 2:
            for command in COMMAND.findall(part):
                yield code(runnable(command.strip()))
                for picture in PICTURE.findall(command):
                    yield code(f'from IPython.display import Image\n\nImage("{picture}")')
        elif part.strip():
            yield {"cell_type": "markdown", "metadata": {}, "source": part.strip()}


def runnable(command: str) -> str:
    """What a cell runs for a command of the page; a command that fails ends the notebook's run."""
    if command.startswith("pip "):
        return f"%{command}"
    if command.startswith("tensorboard "):  # it would never end, and hold up the cells after it
        return f"%load_ext tensorboard\n%{command}"
    return f"%%bash\n{command}"


def code(source: str) -> dict[str, Any]:
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source}


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())
