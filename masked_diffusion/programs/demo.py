"""Open a page that draws pictures with a trained model, from checked flags."""

import argparse
import shlex
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masked_diffusion import dist_util
from masked_diffusion.data.class_names import ClassNames, names_by_label
from masked_diffusion.diffusion.samplers import SAMPLERS
from masked_diffusion.programs.infer_mdt import Drawing, OpenModel
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import Trained, open_trained
from masked_diffusion.sampling.demo_page import (
    LOOPBACK,
    Choices,
    Progress,
    Setting,
    Sketchbook,
    Wish,
    build_app,
    build_page,
    import_gradio,
)
from masked_diffusion.sampling.guides import open_away
from masked_diffusion.sampling.inpainting import MODES, no_interpolater
from masked_diffusion.sampling.pictures import grid, save_picture
from masked_diffusion.sampling.sampler_config import GUIDE_FROM, SamplerConfig
from masked_diffusion.script_util import say

MOST_STEPS, USUAL_STEPS = 250, 50
STATES_SHOWN = 8
# Passed on to infer_mdt.py where they are given.
PASSED_ON = ("vae_path", "guide_path", "device")
SCHEDULES_OFFERED = ["power_cosine", "constant", "linear", "beta:2,4"]
Plan = Callable[[list[str], OpenModel], tuple[Drawing, argparse.Namespace]]


def prepare(args: argparse.Namespace, explicit: set[str], path: Path, folder: Path, plan: Plan) -> Callable[[], None]:
    """Open the model and build the page. path: of the model. folder: of what the page shows and is given.

    plan: what infer_mdt.py draws with some flags. Returns the work. Raises ValueError or OSError.
    """
    import_gradio()
    device = dist_util.choose_device(args.device)
    trained = open_trained(path, Request(vae_path=args.vae_path), device, warn=say)
    if args.guide_path and not Path(args.guide_path).expanduser().is_file():
        raise FileNotFoundError(
            f"--guide_path {args.guide_path}: no such file; give the checkpoint of the weaker model"
        )
    passed_on = {name: getattr(args, name) for name in PASSED_ON if name in explicit}
    studio = InferStudio(trained, passed_on, device, plan)
    if args.guide_path and "checkpoint" not in studio.choices.guides:
        raise ValueError(f"--guide_path {args.guide_path}: it does not fit {path}; infer_mdt.py says what differs")
    app = build_app(build_page(Sketchbook(studio, folder)), args.host, args.port, folder)
    if args.host not in LOOPBACK:
        say(f"warning: --host {args.host}: everybody who reaches this machine can use the page")
    return lambda: serve(app, args.host, args.port)


def told_apart(names: Sequence[str]) -> list[str]:
    """Names of classes, with the label behind those that several have, such as ImageNet's two cranes."""
    often = Counter(names)
    return [f"{name} ({label})" if often[name] > 1 else name for label, name in enumerate(names)]


class InferStudio:
    """Draws what ``infer_mdt.py`` draws with the same flags, with the model loaded once.

    passed_on: flags of the command line that go to every command, beside ``--model_path``. plan: of infer_mdt.py.
    """

    def __init__(self, trained: Trained, passed_on: dict[str, str], device: torch.device | str, plan: Plan) -> None:
        self._trained = trained
        self._identity = trained.identity()
        self._model = {"model_path": str(trained.path), **passed_on}
        self._guide_path = self._model.pop("guide_path", "")
        self._device = device
        self._plan = plan
        self.choices = self._choices()

    def identity(self) -> dict[str, Any]:
        return self._identity

    def command(self, setting: Setting, wish: Wish) -> str:
        return shlex.join(["python", "infer_mdt.py", *self._flags(setting, wish), "--out", "picture.png"])

    def draw(self, setting: Setting, wish: Wish) -> Iterator[Progress]:
        drawing, _ = self._prepare(self._flags(setting, wish))
        [row] = drawing.rows
        for step, steps, images in row.watch(STATES_SHOWN):
            yield Progress(step, steps, images, drawing.columns)

    def save(self, images: np.ndarray, columns: int | None, path: Path) -> None:
        save_picture(grid(images, columns), path)

    def _choices(self) -> Choices:
        trained, config = self._trained, self._trained.config
        _, usual = self._prepare(self._given(self._model))
        names = told_apart([words[-1] for words in names_by_label(config.model.num_classes, config.class_names)])
        labels = range(config.model.num_classes if config.class_cond else 0)
        return Choices(
            title=f"{config.model.model}: {trained.path.name}",
            classes=[names[label] if label < len(names) else str(label) for label in labels],
            samplers=[name for name, entry in SAMPLERS.items() if config.objective.objective in entry.starts],
            guides=[name for name in GUIDE_FROM if config.class_cond and self._leads_away_from(name)],
            schedules=SCHEDULES_OFFERED,
            modes=["plain"] if no_interpolater(trained.model, config) else list(MODES),
            most_steps=min(MOST_STEPS, config.most_steps or MOST_STEPS),
            usual=Setting(
                usual.sampler, min(usual.num_sampling_steps, USUAL_STEPS), "null_label", usual.guidance, usual.cfg_scale
            ),
        )

    def _leads_away_from(self, name: str) -> bool:
        """Whether the model, with the weaker one where there is one, can be guided in this way."""
        try:
            sampler = SamplerConfig(
                cfg_cond=True, guide_from=name, guide_path=self._guide_path * (name == "checkpoint")
            )
            trained = self._trained
            open_away(sampler, trained.model, trained.config, str(trained.path), Request(), self._device)
        except ValueError:
            return False
        return True

    def _flags(self, setting: Setting, wish: Wish) -> list[str]:
        """The command line of ``infer_mdt.py``, but for ``--out``."""
        config = self._trained.config
        flags = {**self._model, "sampler": setting.sampler, "num_sampling_steps": setting.num_sampling_steps}
        labels = ""
        if config.class_cond:
            known = ClassNames(config.model.num_classes, config.class_names)
            # Where names are numbers, a number is a name.
            named = {
                label: label if known.row_of_number(label) == label else config.class_names[label]
                for label in wish.labels
            }
            labels = ",".join(str(named[label]) for label in wish.labels)
            flags |= {"guide_from": setting.guide_from, "guidance": setting.guidance, "cfg_scale": setting.cfg_scale}
            if setting.guide_from == "checkpoint":
                flags["guide_path"] = self._guide_path
        flags |= {"labels": labels, "seed": wish.seed}
        if wish.photo is not None:
            flags |= {"image": wish.photo[0], "mask": wish.photo[1], "inpaint_mode": wish.inpaint_mode}
        return self._given(flags)

    def _given(self, flags: Mapping[str, Any]) -> list[str]:
        return [text for name, value in flags.items() if value != "" for text in (f"--{name}", str(value))]

    def _prepare(self, argv: list[str]) -> tuple[Drawing, argparse.Namespace]:
        """What infer_mdt.py would draw with these flags, by the model at hand, and the flags with their defaults."""
        out = str(Path(tempfile.gettempdir()) / "picture.png")  # nothing is written there
        return self._plan([*argv, "--out", out], lambda *_, **__: self._trained)


def serve(app: Any, host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM, and say where it is once it can be opened."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            sys.stdout.write(f"http://{host}:{port} (Ctrl-C ends it)\n")
            sys.stdout.flush()

    Server(uvicorn.Config(app, host, port, log_level="warning", timeout_graceful_shutdown=2)).run()
