"""The page of ``scripts/demo.py``: a form, the pictures as they come out of the noise, and how to make them again.

gradio (the extra ``demo``) is imported where the page is built. The page asks a :class:`Studio` for all that it shows,
so what is drawn does not depend on gradio. Nothing on the page is loaded from another machine.
"""

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, PngImagePlugin

from masked_diffusion.data.image_files import read_image
from masked_diffusion.sampling.gallery import BATCH_SIZE
from masked_diffusion.sampling.inpainting import WHITE_FROM

MOST_PICTURES = BATCH_SIZE
EDITOR_SIDE = 256  # smaller images are enlarged to it for drawing on them
LONGEST_UPLOAD_SIDE = 4096
UPLOAD_BYTES = 10 * 2**20
KEPT_SECONDS = 3600  # of files that a page has shown or was given
WAITING = 8  # requests that wait for the one that is drawn
EACH_CLASS = "each class in turn"
DONE, CANCELLED = "Done.", "Cancelled."
# The page may load, and speak to, nothing but this server. gradio's page has scripts and styles of its own inside it.
CONTENT_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)
LOOPBACK = ("127.0.0.1", "localhost")
MISSING_GRADIO = "the demo needs gradio; install it with: pip install -e '.[demo]'"


@dataclass(frozen=True)
class Setting:
    """How pictures are sampled; named as the flags of ``infer_mdt.py``."""

    sampler: str
    num_sampling_steps: int
    guide_from: str
    guidance: str
    cfg_scale: float


@dataclass(frozen=True)
class Wish:
    """What is to be drawn. labels: class of each picture. photo: files of an image and of the mask to fill in it."""

    labels: list[int]
    seed: int
    photo: tuple[Path, Path] | None = None
    inpaint_mode: str = "plain"


@dataclass(frozen=True)
class Choices:
    """What a model offers. classes: their names; empty where it has none. modes: of inpainting, the usual one first."""

    title: str
    classes: list[str]
    samplers: list[str]
    guides: list[str]
    schedules: list[str]
    modes: list[str]
    most_steps: int
    usual: Setting


class Progress(NamedTuple):
    """One step of the sampling. images: (N, H, W, 3) uint8 where the state is shown; columns: of their grid."""

    step: int
    steps: int
    images: np.ndarray | None
    columns: int | None


class Studio(Protocol):
    """A model that draws. See ``scripts/demo.py``."""

    choices: Choices

    def command(self, setting: Setting, wish: Wish) -> str:
        """The command line of ``infer_mdt.py`` that makes the same picture, to the byte."""

    def identity(self) -> dict[str, Any]:
        """What a manifest says of the weights."""

    def draw(self, setting: Setting, wish: Wish) -> Iterator[Progress]:
        """Sample, step by step. The last one has the images. Raises ValueError or OSError for what cannot be drawn."""

    def save(self, images: np.ndarray, columns: int | None, path: Path) -> None:
        """Write the grid of images that the command writes."""


class Shown(NamedTuple):
    """What the page shows of one request.

    files: of the pictures so far, one for each setting. first: file of the first image alone, once it is finished.
    """

    text: str
    files: list[Path]
    first: Path | None = None


class Sketchbook:
    """Draw requests into files of a folder: each setting of a request in turn, with the same noise.

    folder: of the pictures; every file has a name of its own.
    """

    def __init__(self, studio: Studio, folder: Path) -> None:
        self.studio = studio
        self._folder = folder

    def draw(self, settings: Sequence[Setting], wish: Wish) -> Iterator[Shown]:
        """Yield after each step of the sampling. Raises ValueError or OSError for what cannot be drawn."""
        files: list[Path] = []
        first = None
        for place, setting in enumerate(settings, start=1):
            of = f" of setting {place}" if len(settings) > 1 else ""
            file = None
            for step, steps, images, columns in self.studio.draw(setting, wish):
                if images is not None:
                    file = self._new_file("picture")  # browsers keep what they have loaded under a name
                    self.studio.save(images, columns, file)
                    if step == steps and first is None:
                        first = self._new_file("first")
                        Image.fromarray(images[0]).save(first)
                yield Shown(f"Step {step} of {steps}{of}", [*files, *([file] if file else [])])
            assert file is not None, "the last step has the images"
            files.append(file)
        yield Shown(DONE, files, first)

    def _new_file(self, name: str) -> Path:
        # What one visitor gave or drew is no other one's to guess.
        return self._folder / f"{name}_{secrets.token_hex(16)}.png"

    def with_manifest(self, file: Path, setting: Setting, wish: Wish) -> Path:
        """A copy of a picture with the same pixels, in whose text entry ``masked_diffusion`` stands how it was made."""
        manifest = {
            "command": self.studio.command(setting, wish),
            "weights": self.studio.identity(),
            "settings": asdict(setting),
            "labels": wish.labels,
            "seed": wish.seed,
        }
        info = PngImagePlugin.PngInfo()
        info.add_itxt("masked_diffusion", json.dumps(manifest))
        copy = file.with_name(f"{file.stem}_with_manifest.png")
        with Image.open(file) as picture:
            picture.save(copy, pnginfo=info)
        return copy

    def photo(self, image: Image.Image | None, layers: Sequence[Image.Image]) -> tuple[Path, Path] | None:
        """Files of an image and of the mask that was painted on it, white where it is to be filled; None without image.

        layers: RGBA, painted where they are opaque. Raises ValueError for an image that is too large, or is not painted
        on.
        """
        if image is None:
            return None
        check_side(image)
        painted = np.zeros((image.height, image.width), dtype=bool)
        for layer in layers:
            painted |= np.asarray(layer.convert("RGBA").resize(image.size))[..., 3] >= WHITE_FROM
        if not painted.any():
            raise ValueError("nothing is painted on the image; paint over what should be filled, or remove the image")
        paths = self._new_file("photo"), self._new_file("mask")
        image.convert("RGB").save(paths[0])
        Image.fromarray((painted * 255).astype(np.uint8)).save(paths[1])
        return paths


def check_side(image: Image.Image) -> None:
    """Raise ValueError for an image with more pixels than the page is made for."""
    if max(image.size) > LONGEST_UPLOAD_SIDE:
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"the image is {size}; give one of at most {LONGEST_UPLOAD_SIDE} a side")


def for_editor(image: Image.Image) -> Image.Image:
    """Enlarge a small image for drawing on it, by a whole number: cutting it to its size again loses nothing."""
    factor = max(1, EDITOR_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def labels_of(chosen: Sequence[str], count: int, classes: Sequence[str]) -> list[int]:
    """The class of each of ``count`` pictures: those chosen, in turn; all of them where none is."""
    labels = [classes.index(name) for name in chosen if name in classes] or list(range(max(1, len(classes))))
    return [labels[i % len(labels)] for i in range(count)]


def import_gradio() -> Any:
    """gradio. Raises ValueError where it is not installed."""
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError(MISSING_GRADIO) from error
    return gradio


def build_page(sketchbook: Sketchbook) -> Any:
    """The page as ``gradio.Blocks``. Raises ValueError where gradio is not installed."""
    gr = import_gradio()
    choices = sketchbook.studio.choices
    with gr.Blocks(title=choices.title, analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
        gr.Markdown(f"# {choices.title}")
        before, first = gr.State([]), gr.State(None)
        with gr.Row():
            with gr.Column(scale=2):
                wish = _wish_inputs(gr, choices)
                settings = _setting_inputs(gr, choices, "")
                with gr.Accordion("Compare with a second setting, from the same noise", open=False, elem_id="second"):
                    compared = gr.Checkbox(False, label="Compare", elem_id="compare")
                    others = _setting_inputs(gr, choices, "_b")
                with gr.Accordion("Fill a part of an image", open=False, elem_id="inpainting"):
                    photo, upload, taken = _photo_inputs(gr, choices)
            with gr.Column(scale=3):
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Cancel", elem_id="cancel")
                text = gr.Markdown("", elem_id="text")
                results = _results(gr)
        inputs = [before, first, *wish, *photo, compared, *settings, *others]
        running = start.click(
            _drawing(gr, sketchbook),
            inputs,
            [text, *results, before, first],
            concurrency_limit=1,
            show_progress="hidden",
        )
        stopped = stop.click(None, cancels=[running], queue=False, api_visibility="private")
        stopped.then(lambda: CANCELLED, None, text, queue=False, api_visibility="private")
        taken.click(_editing(gr), first, photo[0], api_visibility="private")
        upload.upload(_editing(gr), upload, photo[0], api_visibility="private")
    return page.queue(max_size=WAITING)


def _wish_inputs(gr: Any, choices: Choices) -> list[Any]:
    """Classes, number of pictures, seed."""
    named = bool(choices.classes)
    return [
        gr.Dropdown(
            choices.classes, multiselect=True, label="Classes", info=f"empty: {EACH_CLASS}", visible=named,
            elem_id="classes",
        ),
        gr.Slider(1, MOST_PICTURES, min(len(choices.classes) or 4, 10), step=1, label="Pictures", elem_id="count"),
        gr.Number(0, precision=0, minimum=0, label="Seed", elem_id="seed"),
    ]  # fmt: skip


def _setting_inputs(gr: Any, choices: Choices, suffix: str) -> list[Any]:
    """The inputs of a :class:`Setting`, in the order of its fields."""
    usual, guided = choices.usual, bool(choices.guides)
    return [
        gr.Dropdown(choices.samplers, value=usual.sampler, label="Sampler", elem_id=f"sampler{suffix}"),
        gr.Slider(1, choices.most_steps, usual.num_sampling_steps, step=1, label="Steps", elem_id=f"steps{suffix}"),
        gr.Dropdown(
            choices.guides, value=usual.guide_from, label="Lead away from", visible=guided, elem_id=f"guide{suffix}"
        ),
        gr.Dropdown(
            choices.schedules, value=usual.guidance, label="Weight over time", visible=guided,
            elem_id=f"schedule{suffix}",
        ),
        gr.Slider(0, 10, usual.cfg_scale, step=0.1, label="Guidance weight", visible=guided, elem_id=f"weight{suffix}"),
    ]  # fmt: skip


def _photo_inputs(gr: Any, choices: Choices) -> tuple[list[Any], Any, Any]:
    """Editor and mode of inpainting, and the buttons that put an image into the editor."""
    editor = gr.ImageEditor(
        type="pil",
        image_mode="RGBA",
        sources=(),
        transforms=(),
        layers=False,
        format="png",
        brush=gr.Brush(default_size=24, colors=["#ffffff"], color_mode="fixed"),
        label="Paint over what should be filled",
        elem_id="editor",
    )
    mode = gr.Radio(choices.modes, value=choices.modes[0], label="How", elem_id="mode")
    with gr.Row():
        upload = gr.UploadButton("Upload an image", file_types=["image"], type="filepath", elem_id="upload")
        taken = gr.Button("Take the first picture drawn", elem_id="take")
    return [editor, mode], upload, taken


def _results(gr: Any) -> list[Any]:
    """Pictures and commands of both settings, the files to keep, and the pictures before."""
    with gr.Row():
        pictures = [
            gr.Image(
                label=label,
                show_label=False,  # it would cover a part of the picture
                format="png",
                type="filepath",
                interactive=False,
                buttons=["download", "fullscreen"],
                visible=not i,
                elem_id=f"picture{i}",
            )
            for i, label in enumerate(("Picture", "Second setting"))
        ]
    commands = [
        gr.Textbox(label=label, max_lines=6, interactive=False, buttons=["copy"], visible=False, elem_id=f"command{i}")
        for i, label in enumerate(("Draws this picture again", "Draws the second one again"))
    ]
    kept = gr.File(label="The pictures with their settings inside", visible=False, elem_id="kept")
    earlier = gr.Gallery(
        label="Earlier",
        columns=4,
        height=240,
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=[],
        elem_id="earlier",
    )
    return [*pictures, *commands, kept, earlier]


def _drawing(gr: Any, sketchbook: Sketchbook) -> Any:
    """What a click on Draw starts: a generator from the inputs of the page to its outputs."""

    def draw(
        before: list[str], first: str | None, chosen: list[str], count: float, seed: float,
        edited: dict[str, Any] | None, mode: str, compare: bool, *values: Any,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        half = len(values) // 2
        settings = [Setting(*values[:half])] + [Setting(*values[half:])] * compare
        try:
            photo = sketchbook.photo(edited["background"], edited["layers"]) if edited else None
            wish = Wish(labels_of(chosen, int(count), sketchbook.studio.choices.classes), int(seed), photo, mode)
            lines = [sketchbook.studio.command(setting, wish) for setting in settings]
            for shown in sketchbook.draw(settings, wish):
                kept = []
                if shown.first is not None:
                    pairs = zip(shown.files, settings, strict=True)
                    kept = [str(sketchbook.with_manifest(file, setting, wish)) for file, setting in pairs]
                    before, first = [*map(str, shown.files), *before][:MOST_PICTURES], str(shown.first)
                files = [*map(str, shown.files), None, None]
                yield (
                    shown.text,
                    files[0],
                    gr.update(value=files[1], visible=compare),
                    gr.update(value=lines[0], visible=True),
                    gr.update(value=lines[-1], visible=compare),
                    gr.update(value=kept, visible=bool(kept)),
                    before,
                    before,
                    first,
                )
        except (ValueError, OSError, FloatingPointError) as error:
            raise gr.Error(str(error), duration=None) from error

    return draw


def _editing(gr: Any) -> Any:
    """What puts the image of a file into the editor."""

    def edit(file: str | None) -> Image.Image:
        if file is None:
            raise gr.Error("there is no picture yet; draw one first")
        try:
            image = read_image(file)
            check_side(image)
        except (ValueError, OSError) as error:
            raise gr.Error(f"{Path(file).name}: {error}".replace(f"{file}: ", ""), duration=None) from error
        return for_editor(image)

    return edit


def build_app(page: Any, host: str, port: int, folder: Path) -> Any:
    """The page as a web application that answers to its own address alone, and loads nothing from elsewhere.

    folder: of the sketchbook, whose files the page may show.
    """
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import Response

    gr = import_gradio()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOOPBACK:  # else a page of the web could reach it under a name that it lets point here
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))

    @app.middleware("http")
    async def set_policy(request: Any, call_next: Any) -> Any:
        origin = request.headers.get("origin")
        if origin is not None and origin != f"http://{request.headers.get('host')}":
            return Response("This page is served to its own address alone.", status_code=403)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = CONTENT_POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=host,
        server_port=port,
        allowed_paths=[str(folder)],
        max_file_size=UPLOAD_BYTES,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        run_history=False,
        enable_monitoring=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
