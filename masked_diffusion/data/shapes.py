"""Pictures drawn by code: ten classes of things whose parts relate, 32 x 32 RGB, as many as are asked for.

They stand in for photographs where there are none. Image ``index`` of ``seed`` is always the same picture.
"""

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from masked_diffusion.randomness import numpy_generator

SIDE = 32
SUPERSAMPLING = 4  # drawn so much larger and averaged down, which smooths the edges
Colour = tuple[int, int, int]
Point = tuple[float, float]


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    """hue, saturation, value in [0, 1] (hue wraps) -> RGB 0 ... 255."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


class Canvas:
    """Draws in the frame of one object: x to the right and y downwards, about -1 ... 1 over the object.

    rng: draws the object's place and size, and whatever a class asks for. mirrored: x points to the left.
    """

    def __init__(self, rng: np.random.Generator, mirrors: bool) -> None:
        self.rng = rng
        self.side = SIDE * SUPERSAMPLING
        self.scale = self.side * rng.uniform(0.3, 0.44)
        room = self.side / 2 - self.scale
        self.centre = tuple(self.side / 2 + rng.uniform(-room, room, size=2) * 0.9)
        self.direction = -1 if mirrors and rng.random() < 0.5 else 1
        self.image = self._background()
        self._draw = ImageDraw.Draw(self.image)

    def _background(self) -> Image.Image:
        """A vertical blend of two pale or two dark colours."""
        low = self.rng.uniform(0.1, 0.35) if self.rng.random() < 0.25 else self.rng.uniform(0.75, 1.0)
        hue = self.rng.random()
        top, bottom = (np.array(_hsv(hue + shift, 0.25, low)) for shift in (0.0, self.rng.uniform(-0.1, 0.1)))
        blend = np.linspace(0, 1, self.side)[:, None, None]
        rows = top * (1 - blend) + bottom * blend  # (side, 1, 3)
        return Image.fromarray(np.broadcast_to(rows, (self.side, self.side, 3)).round().astype(np.uint8))

    def colour(self, saturation: float = 0.85, value: float = 0.9) -> Colour:
        """A random vivid colour."""
        return _hsv(self.rng.random(), saturation * self.rng.uniform(0.8, 1.0), value * self.rng.uniform(0.8, 1.0))

    def point(self, x: float, y: float) -> Point:
        return self.centre[0] + self.direction * x * self.scale, self.centre[1] + y * self.scale

    def polygon(self, colour: Colour, *points: Point) -> None:
        self._draw.polygon([self.point(*point) for point in points], fill=colour)

    def box(self, colour: Colour, left: float, top: float, right: float, bottom: float) -> None:
        self.polygon(colour, (left, top), (right, top), (right, bottom), (left, bottom))

    def ellipse(self, colour: Colour, x: float, y: float, width: float, height: float | None = None) -> None:
        """width, height: the half axes; a circle without height."""
        height = width if height is None else height
        (cx, cy), rx, ry = self.point(x, y), width * self.scale, height * self.scale
        self._draw.ellipse([cx - rx, cy - ry, cx + rx, cy + ry], fill=colour)

    def line(self, colour: Colour, width: float, *points: Point) -> None:
        pixels = max(1, round(width * self.scale))
        self._draw.line([self.point(*point) for point in points], fill=colour, width=pixels, joint="curve")

    def arc(self, colour: Colour, x: float, y: float, radius: float, start: float, end: float) -> None:
        """Angles in degrees, clockwise from the right."""
        (cx, cy), r = self.point(x, y), radius * self.scale
        self._draw.arc([cx - r, cy - r, cx + r, cy + r], start, end, fill=colour, width=round(0.12 * self.scale))


BLACK, WHITE = (25, 25, 30), (245, 245, 245)
WOOD, LEAF = (120, 75, 40), (50, 140, 60)


def _boat(c: Canvas) -> None:
    sail, hull = c.colour(), c.colour(value=0.7)
    c.line(WOOD, 0.1, (0.0, -1.0), (0.0, 0.35))
    c.polygon(sail, (0.08, -0.95), (0.08, 0.2), (0.8, 0.2))
    c.polygon(WHITE, (-0.08, -0.75), (-0.08, 0.2), (-0.6, 0.2))
    c.polygon(hull, (-1.0, 0.35), (1.0, 0.35), (0.65, 0.85), (-0.65, 0.85))


def _butterfly(c: Canvas) -> None:
    upper, lower = c.colour(), c.colour()
    width = c.rng.uniform(0.4, 0.52)
    for side in (-1, 1):
        c.ellipse(lower, side * width * 0.85, 0.45, width * 0.75, 0.42)
        c.ellipse(upper, side * width, -0.35, width, 0.55)
        c.ellipse(lower, side * width, -0.35, width * 0.4, 0.22)
        c.line(BLACK, 0.06, (0.0, -0.6), (side * 0.3, -1.0))
    c.ellipse(BLACK, 0.0, 0.0, 0.1, 0.7)


def _car(c: Canvas) -> None:
    body, glass = c.colour(), (190, 225, 245)
    c.polygon(body, (-0.6, -0.1), (-0.35, -0.6), (0.35, -0.6), (0.65, -0.1))
    c.polygon(glass, (-0.45, -0.1), (-0.28, -0.48), (-0.04, -0.48), (-0.04, -0.1))
    c.polygon(glass, (0.06, -0.1), (0.06, -0.48), (0.28, -0.48), (0.48, -0.1))
    c.box(body, -1.0, -0.12, 1.0, 0.4)
    c.ellipse((250, 230, 120), 0.92, 0.05, 0.1)
    for x in (-0.55, 0.55):
        c.ellipse(BLACK, x, 0.42, 0.28)
        c.ellipse((180, 180, 185), x, 0.42, 0.12)


def _cat(c: Canvas) -> None:
    fur, inner = c.colour(saturation=0.6, value=0.85), (240, 170, 180)
    for side in (-1, 1):
        c.polygon(fur, (side * 0.8, -0.95), (side * 0.85, 0.0), (side * 0.15, -0.5))
        c.polygon(inner, (side * 0.72, -0.7), (side * 0.72, -0.2), (side * 0.4, -0.42))
    c.ellipse(fur, 0.0, 0.15, 0.88, 0.75)
    for side in (-1, 1):
        c.ellipse((230, 240, 150), side * 0.36, 0.0, 0.2, 0.2)
        c.ellipse(BLACK, side * 0.36, 0.0, 0.08, 0.2)
        for y in (0.35, 0.55):
            c.line(BLACK, 0.05, (side * 0.25, 0.42), (side * 0.95, y))
    c.polygon(inner, (-0.13, 0.28), (0.13, 0.28), (0.0, 0.45))


def _face(c: Canvas) -> None:
    skin = _hsv(c.rng.uniform(0.05, 0.1), c.rng.uniform(0.3, 0.65), c.rng.uniform(0.55, 1.0))
    hair = c.colour(saturation=0.6, value=0.6)
    c.ellipse(hair, 0.0, -0.15, 0.85, 0.85)
    c.ellipse(skin, 0.0, 0.12, 0.74, 0.8)
    iris = c.colour(value=0.5)
    for side in (-1, 1):
        c.ellipse(WHITE, side * 0.3, -0.05, 0.18, 0.13)
        c.ellipse(iris, side * 0.3, -0.05, 0.09)
    happy = c.rng.random() < 0.7
    c.arc((150, 40, 50), 0.0, 0.35 if happy else 0.75, 0.32, *((20, 160) if happy else (200, 340)))


def _fish(c: Canvas) -> None:
    body, fin = c.colour(), c.colour()
    c.polygon(fin, (-0.5, 0.0), (-1.0, -0.5), (-1.0, 0.5))
    c.polygon(fin, (-0.25, -0.35), (0.1, -0.8), (0.35, -0.35))
    c.ellipse(body, 0.15, 0.0, 0.8, 0.46)
    c.polygon(fin, (0.05, 0.1), (-0.25, 0.35), (0.15, 0.35))
    c.ellipse(WHITE, 0.6, -0.1, 0.14)
    c.ellipse(BLACK, 0.63, -0.1, 0.07)


def _flower(c: Canvas) -> None:
    petals, heart = int(c.rng.integers(5, 9)), (250, 210, 60)
    colour = c.colour()
    c.line(LEAF, 0.12, (0.0, -0.3), (0.0, 1.0))
    c.polygon(LEAF, (0.0, 0.8), (0.55, 0.35), (0.25, 0.8))
    c.polygon(LEAF, (0.0, 0.9), (-0.55, 0.45), (-0.25, 0.9))
    start = c.rng.random()
    for petal in range(petals):
        angle = 2 * np.pi * (petal + start) / petals
        c.ellipse(colour, 0.4 * np.cos(angle), -0.35 + 0.4 * np.sin(angle), 0.24)
    c.ellipse(heart, 0.0, -0.35, 0.24)


def _house(c: Canvas) -> None:
    wall, roof = c.colour(saturation=0.5), c.colour(value=0.65)
    c.box(roof, 0.35, -0.85, 0.55, -0.3)
    c.box(wall, -0.75, -0.15, 0.75, 0.9)
    c.polygon(roof, (-1.0, -0.15), (0.0, -0.95), (1.0, -0.15))
    c.box(WOOD, -0.5, 0.25, -0.1, 0.9)
    c.box((250, 240, 160), 0.15, 0.1, 0.6, 0.5)
    c.line(BLACK, 0.06, (0.375, 0.1), (0.375, 0.5))
    c.line(BLACK, 0.06, (0.15, 0.3), (0.6, 0.3))


def _mushroom(c: Canvas) -> None:
    cap, stem = c.colour(), (240, 225, 200)
    c.polygon(stem, (-0.25, 0.0), (0.25, 0.0), (0.35, 0.95), (-0.35, 0.95))
    c.polygon(cap, *((0.95 * np.cos(a), 0.1 - 0.95 * np.sin(a)) for a in np.linspace(0, np.pi, 24)))
    for x, y, size in ((-0.45, -0.2, 0.15), (0.1, -0.5, 0.18), (0.5, -0.15, 0.13)):
        c.ellipse(WHITE, x, y, size)


def _tree(c: Canvas) -> None:
    leaves = _hsv(c.rng.uniform(0.2, 0.42), 0.7, c.rng.uniform(0.4, 0.75))
    c.box(WOOD, -0.14, 0.5, 0.14, 1.0)
    for top, bottom, width in ((-0.05, 0.65, 0.8), (-0.5, 0.2, 0.62), (-1.0, -0.25, 0.45)):
        c.polygon(leaves, (-width, bottom), (width, bottom), (0.0, top))


# In the order of their labels; and whether a picture may be mirrored.
CLASSES: dict[str, tuple[Callable[[Canvas], None], bool]] = {
    "boat": (_boat, True),
    "butterfly": (_butterfly, False),
    "car": (_car, True),
    "cat": (_cat, False),
    "face": (_face, False),
    "fish": (_fish, True),
    "flower": (_flower, False),
    "house": (_house, True),
    "mushroom": (_mushroom, False),
    "tree": (_tree, False),
}


def label_of(index: int) -> int:
    """Labels come in turn: 0, 1, ..., 9, 0, ..."""
    return index % len(CLASSES)


def draw_shape(seed: int, index: int) -> Image.Image:
    """Draw picture ``index`` of a set: RGB, 32 x 32. Equal arguments give equal pixels."""
    draw, mirrors = list(CLASSES.values())[label_of(index)]
    canvas = Canvas(numpy_generator(seed, "shapes", index), mirrors)
    draw(canvas)
    return canvas.image.resize((SIDE, SIDE), Image.Resampling.BOX)
