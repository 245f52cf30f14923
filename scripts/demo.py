"""Open a page on this machine that draws pictures with a trained model.

python scripts/demo.py                                     # a published checkpoint, or your newest training
python scripts/demo.py --model_path output_digits/ema_0.99_002000.pt

It needs the extra ``demo``: pip install -e '.[demo]'. Ctrl-C ends it, and removes what it drew and was given.
"""

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

# infer_mdt.py, which stands above this folder, draws the pictures.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import infer_mdt
from masked_diffusion.script_util import MACHINE_FLAGS, explicit_flags, main_of, make_parser
from masked_diffusion.settings import Flag

if TYPE_CHECKING:
    from masked_diffusion.programs.infer_mdt import Drawing, OpenModel

FLAGS = {
    "model_path": infer_mdt.FLAGS["model_path"],
    "host": Flag("127.0.0.1", "address that the page is served at; another one is open to the network", "machine"),
    "port": Flag(7860, "port that the page is served at", "machine"),
    "vae_path": infer_mdt.FLAGS["vae_path"],
    "guide_path": Flag("", "weaker model that can be led away from", "guidance"),
    "device": MACHINE_FLAGS["device"],
}
MOST_USED = ("model_path", "port", "host", "device")


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Open a page on this machine that draws pictures with a trained model.", FLAGS, MOST_USED)


def plan(argv: list[str], open_model: "OpenModel") -> tuple["Drawing", argparse.Namespace]:
    """What infer_mdt.py draws with these flags, by the model that ``open_model`` gives, and the flags with their
    defaults."""
    parser = infer_mdt.create_argparser()
    args = parser.parse_args(argv)
    return infer_mdt.prepare(args, explicit_flags(parser, argv), open_model), args


def prepare(args: argparse.Namespace, explicit: set[str], stack: ExitStack) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    check_port(args.host, args.port)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mdt_demo_"))).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # of uploads; gradio has no argument for it
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from masked_diffusion.programs import demo

    path = Path(args.model_path).expanduser() if args.model_path else infer_mdt.find_model(Path.cwd())
    return demo.prepare(args, explicit, path, folder, plan)


def check_port(host: str, port: int) -> None:
    """Raise ValueError where the page cannot be served."""
    if not 0 < port < 65536:
        raise ValueError(f"--port {port}: must be 1 ... 65535")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: {os.strerror(error.errno or 0)}; give another, such as --port {port + 1}"
        ) from error


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())
