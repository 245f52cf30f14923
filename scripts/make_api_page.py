"""Build the API pages from the docstrings: HTML that is read in a browser, without a server.

    python scripts/make_api_page.py --out api

It needs the extra ``docs``: pip install -e '.[docs]'.
"""

import argparse
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

from masked_diffusion.script_util import main_of

PACKAGE = "masked_diffusion"


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Build the API pages from the docstrings.")
    parser.add_argument("--out", type=Path, default=Path("api"), help="new or empty folder (default: %(default)s)")
    return parser


def modules() -> list[str]:
    """The package and what stands in it: it names only a part of that itself. Rooms bring their modules along."""
    import masked_diffusion

    return [PACKAGE, *(f"{PACKAGE}.{found.name}" for found in pkgutil.iter_modules(masked_diffusion.__path__))]


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Returns the work. Raises ValueError where pdoc is not installed, or the folder is in use."""
    out = args.out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists; give another name, or empty it")
    try:
        import pdoc
        import pdoc.render
    except ModuleNotFoundError as error:
        if error.name != "pdoc":
            raise
        raise ValueError("the API pages need pdoc; install it with: pip install -e '.[docs]'") from error

    def work() -> None:
        pdoc.render.configure(docformat="restructuredtext", footer_text="Masked Diffusion Transformer")
        pdoc.pdoc(*modules(), output_directory=out)
        sys.stdout.write(f"{(out / 'index.html').absolute()}\n")

    return work


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())
