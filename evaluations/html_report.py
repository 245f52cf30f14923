"""The report as one HTML page that needs no other file, and the pictures on it."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from typing import Any

import numpy as np
from PIL import Image

_STYLE = "body{font:15px sans-serif;max-width:70em;margin:2em auto}td{padding:.2em 1em .2em 0}img{max-width:100%}"
_GAP = 2  # pixels between the images of a grid
_LEGIBLE_SIDE = 64  # smaller images are enlarged


def grid(rows: list[list[np.ndarray]]) -> Image.Image:
    """Rows of images (H, W, 3) as one picture, on white; all are enlarged alike until they can be read."""
    smallest = min(side for row in rows for image in row for side in image.shape[:2])
    factor = max(1, math.ceil(_LEGIBLE_SIDE / smallest))
    rows = [[image.repeat(factor, axis=0).repeat(factor, axis=1) for image in row] for row in rows]
    height = max(image.shape[0] for row in rows for image in row)
    width = max(image.shape[1] for row in rows for image in row)
    columns = max(map(len, rows))
    picture = Image.new("RGB", (columns * (width + _GAP) - _GAP, len(rows) * (height + _GAP) - _GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            picture.paste(Image.fromarray(image), (x * (width + _GAP), y * (height + _GAP)))
    return picture


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def html_page(report: dict[str, Any], pictures: dict[str, Image.Image]) -> str:
    """The page. report: as in the JSON report; pictures: by their captions."""
    intervals = report.get("intervals") or {}
    rows = "".join(_row(name, value, intervals.get(name)) for name, value in report["metrics"].items())
    parts = [f"<h2>{html.escape(caption)}</h2>{_image(picture)}" for caption, picture in pictures.items()]
    warnings = "".join(f"<li>{html.escape(warning)}</li>" for warning in report["warnings"])
    rest = {name: value for name, value in report.items() if name not in ("metrics", "warnings", "manifest")}
    return (
        f"<!doctype html><meta charset='utf-8'><title>Evaluation</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(report['sample']['path'])}</h1><table>{rows}</table><ul>{warnings}</ul>{''.join(parts)}"
        f"<h2>Manifest of the samples</h2>{_json(report['manifest'])}<h2>What was compared</h2>{_json(rest)}\n"
    )


def _row(name: str, value: float | None, interval: tuple[float, float] | None) -> str:
    shown = "not computed" if value is None else f"{value:.4f}"
    spread = "" if interval is None else f"95 %: {interval[0]:.4f} … {interval[1]:.4f}"
    return f"<tr><td>{html.escape(name)}</td><td>{shown}</td><td>{spread}</td></tr>"


def _image(picture: Image.Image) -> str:
    return f"<img src='data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode()}'>"


def _json(content: Any) -> str:
    return f"<pre>{html.escape(json.dumps(content, indent=1, ensure_ascii=False))}</pre>"
