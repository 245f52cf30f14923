"""Draw what each policy does with an image's tokens, as the pictures of docs/policies.md.

    python scripts/draw_policies.py --out docs/images

Blocks, routes, kept tokens and decoders are those of the model; a picture is a small SVG file.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from masked_diffusion.choices import POLICIES
from masked_diffusion.script_util import main_of, make_parser
from masked_diffusion.settings import Flag

if TYPE_CHECKING:
    from masked_diffusion.models.backbone import LatentTransformer
    from masked_diffusion.models.policies import View

FLAGS = {
    "out": Flag("docs/images", "folder to write policy_NAME.svg into", "saving"),
    "size": Flag("S_2", "size of the models to draw, such as S_2", "model"),
}
# Pixels.
ROW, MARGIN, LEFT, RIGHT = 148, 34, 118, 160  # height of a view, and what is above, left and right of the blocks
BLOCK, STEP, TALL = 30, 40, 72  # a block's width, the way to the next one, the height of all tokens
CELL = 14  # of the token grid, which has 4 x 4
BLUE, PALE, ORANGE, GREEN, LINE = "#3b6ea5", "#dfe7ef", "#d98a2b", "#4f9a5b", "#555555"
GRID = 4


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Draw what each policy does with an image's tokens.", FLAGS)


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Check the flags. Returns the work. Raises ValueError or OSError."""
    folder = Path(args.out).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--out {folder}: no such folder; make it first")
    drawings = {f"policy_{name}.svg": drawing(model_under(name, args.size)) for name in POLICIES}

    def write() -> None:
        for name, text in drawings.items():
            (folder / name).write_text(text, encoding="utf-8")

    return write


def model_under(policy: str, size: str) -> "LatentTransformer":
    """A DiT, or the only model that there is, under a policy with its own ratio; without memory for its weights."""
    import torch

    from masked_diffusion.models import create_model
    from masked_diffusion.models.policies import POLICIES as BUILT

    families = POLICIES[policy].families
    family = "DiT" if "DiT" in families else families[0]
    with torch.device("meta"):
        return create_model(f"{family}_{size}", policy=policy, mask_ratio=BUILT[policy].mask_ratio)


def drawing(model: "LatentTransformer") -> str:
    """The picture of a model's policy."""
    width, height = LEFT + STEP * len(model.stack) + RIGHT, ROW * len(model.views) + 10
    parts = [part for number, view in enumerate(model.views) for part in row(model, view, ROW * number)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="12">',
            box(0, 0, width, height, "#ffffff"),
            *parts,
            "</svg>\n",
        ]
    )


def row(model: "LatentTransformer", view: "View", top: int) -> Iterator[str]:
    """One view: its tokens, the blocks as high as there are tokens in them, and how tokens come back."""
    policy, depth = model.policy, len(model.stack)
    share = model.num_keep(0.5) / model.num_tokens if view.drops and policy.leaves else 1.0
    base = top + MARGIN + TALL
    yield from tokens(model, view, top + MARGIN)
    for number in range(depth):
        inside = model.route.leave <= number < model.route.back
        high = TALL * (share if inside else 1.0)
        x = LEFT + STEP * number
        if high < TALL:
            yield box(x, base - TALL, BLOCK, TALL, PALE)
        yield box(x, base - high, BLOCK, high, GREEN if number >= depth - model.decode_layer else BLUE)
        yield text(x + BLOCK / 2, base + 14, number)
    for to, source in model.skips.items():
        yield from skip(LEFT + STEP * source + BLOCK, LEFT + STEP * to, base)
    if share < 1:
        yield from way_round(model, base - TALL)
    yield text(LEFT, base + 34, caption(model, view), "start")


def tokens(model: "LatentTransformer", view: "View", top: int) -> Iterator[str]:
    """A grid of an image's tokens as a draw chose them: blue go through the blocks, orange have a second level."""
    import torch

    noise = torch.rand(1, GRID**2, generator=torch.Generator().manual_seed(1))
    colours = [BLUE] * GRID**2
    if view.drops and model.mask_ratio is not None:
        draw = model.policy.draw(noise, model.policy.num_keep(GRID**2, model.mask_ratio, 0.5), None)
        if draw.group is not None:
            colours = [ORANGE if second else BLUE for second in draw.group[0].tolist()]
        elif draw.kept is not None:
            colours = [PALE if dropped else BLUE for dropped in draw.kept.dropped[0].tolist()]
    for number, colour in enumerate(colours):
        yield box(20 + (CELL + 2) * (number % GRID), top + 6 + (CELL + 2) * (number // GRID), CELL, CELL, colour)


def way_round(model: "LatentTransformer", top: int) -> Iterator[str]:
    """The line of the tokens that leave, and what brings them back."""
    from masked_diffusion.models.routes import Decode

    depth, (leave, back) = len(model.stack), model.route
    begin, end = LEFT + STEP * leave - (STEP - BLOCK) / 2, LEFT + STEP * back - (STEP - BLOCK) / 2
    yield f'<path d="M{begin:g} {top + 8} V{top - 10} H{end:g}" fill="none" stroke="{LINE}" stroke-dasharray="4 3"/>'
    if back < depth:
        yield f'<path d="M{end:g} {top - 10} V{top + 4} m-4 -7 l4 7 l4 -7" fill="none" stroke="{LINE}"/>'
    if model.rejoin.interpolates:
        yield box(end - 6, top - 26, 12, 20, ORANGE)
    if isinstance(model.rejoin, Decode):
        for number in range(model.rejoin.depth):
            yield box(end + 10 + 14 * number, top + TALL / 4, 10, 3 * TALL / 4, GREEN)


def skip(begin: float, end: float, base: float) -> Iterator[str]:
    """The line of a skip, from the right of a block to the left of a later one."""
    middle, low = (begin + end) / 2, base - TALL - 6 - (end - begin) / 16
    yield (
        f'<path d="M{begin:g} {base - TALL + 6} Q{middle:g} {low:g} {end:g} {base - TALL + 6}" fill="none" '
        f'stroke="{LINE}" stroke-opacity="0.35"/>'
    )


RETURNS = {
    "Rejoin": "come back as they left",
    "Interpolate": "are predicted by the side block (orange)",
    "MaskToken": "are replaced by a mask token",
    "Fuse": "have waited before the route; a Linear fuses both",
    "Never": "do not come back, and do not count",
    "Decode": "are replaced by a mask token; a decoder (green) sees all",
}


def caption(model: "LatentTransformer", view: "View") -> str:
    """What the picture shows, in words."""
    if not view.drops or model.mask_ratio is None:
        return "All tokens go through all blocks."
    percent = 100 * model.num_keep(0.5) / model.num_tokens
    if model.policy.two_levels:
        return f"All tokens go through all blocks; {100 - percent:.0f} % of them (orange) have a second noise level."
    leave, back = model.route
    # By the nearest class that is known: a rejoin of one's own is drawn as the one that it is made from.
    how = next(RETURNS[kind.__name__] for kind in type(model.rejoin).__mro__ if kind.__name__ in RETURNS)
    return f"Blocks {leave} to {back - 1} see {percent:.0f} % of the tokens. The others {how}."


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{colour}"/>'


def text(x: float, y: float, words: object, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{LINE}">{words}</text>'


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())
