"""Small pictures, drawn at random: figures by shape, colour and count, or a two-digit number."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (215, 40, 40),
    "orange": (245, 135, 25),
    "yellow": (235, 205, 35),
    "green": (45, 160, 65),
    "blue": (40, 85, 210),
    "purple": (135, 55, 165),
    "black": (25, 25, 25),
}
MAX_COUNT = 6
NUMBERS = range(10, 100)
#: (height, width) of what is drawn for training: multiples of 28, patches of 14 merged 2 x 2.
SIZES = ((84, 84), (112, 112), (84, 112), (112, 84), (84, 140))

_SUPERSAMPLING = 2  # drawn so many times larger, so that edges come out smooth
_COLOUR_JITTER = 14
_PAPER = ((255, 255, 255), (240, 240, 240), (250, 245, 228), (228, 238, 250))

_Point = tuple[float, float]
_Stroke = list[_Point]


@dataclass(frozen=True)
class Figure:
    """One figure: a word of `SHAPES` and one of `COLOURS`."""

    shape: str
    colour: str


@dataclass(frozen=True)
class Picture:
    """What is to be drawn: figures, or a number in a colour.

    Attributes:
        size: (height, width) in pixels.
        figures: one to `MAX_COUNT` of them; none where a number is drawn.
        number: of two digits, or None.
        colour: of the number.
        seed: of everything that does not matter: places, sizes, turns, shades, paper.
    """

    size: tuple[int, int]
    figures: tuple[Figure, ...] = ()
    number: int | None = None
    colour: str | None = None
    seed: int = 0


def random_picture(rng: random.Random, size: tuple[int, int]) -> Picture:
    """Draws what a picture shows: a number, one figure, several that are alike, or a mixture."""
    seed = rng.getrandbits(40)
    draw = rng.random()
    if draw < 0.35:
        number, colour = rng.choice(NUMBERS), rng.choice(list(COLOURS))
        return Picture(size, number=number, colour=colour, seed=seed)
    count = 1 if draw < 0.5 else rng.randint(2, MAX_COUNT)
    figures = [Figure(rng.choice(SHAPES), rng.choice(list(COLOURS))) for _ in range(count)]
    if draw < 0.65:
        figures = figures[:1] * count
    return Picture(size, figures=tuple(figures), seed=seed)


def draw(picture: Picture) -> Image.Image:
    """Returns the RGB picture; the same one for the same description."""
    rng = random.Random(picture.seed)
    height, width = (side * _SUPERSAMPLING for side in picture.size)
    image = Image.new("RGB", (width, height), _shade(rng, rng.choice(_PAPER), 5))
    canvas = ImageDraw.Draw(image)
    if picture.number is not None:
        _draw_number(canvas, rng, picture, height, width)
    else:
        places = _places(rng, len(picture.figures), height, width)
        for figure, (x, y, radius) in zip(picture.figures, places, strict=True):
            colour = _shade(rng, COLOURS[figure.colour], _COLOUR_JITTER)
            _draw_figure(canvas, rng, figure.shape, colour, x, y, radius)
    return image.reduce(_SUPERSAMPLING)


def _shade(rng: random.Random, colour: Sequence[int], jitter: int) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + rng.randint(-jitter, jitter))) for value in colour)


def _places(
    rng: random.Random, count: int, height: int, width: int
) -> list[tuple[float, float, float]]:
    """Draws a place (x, y, radius) for each figure; none touches another or the edge."""
    largest = min(height, width) * (0.42 if count == 1 else 0.30 if count == 2 else 0.2)
    smallest = 7.0 * _SUPERSAMPLING
    while True:
        places: list[tuple[float, float, float]] = []
        for _ in range(count * 20):
            radius = rng.uniform(smallest, max(smallest, largest))
            x = rng.uniform(radius + 2, width - radius - 2)
            y = rng.uniform(radius + 2, height - radius - 2)
            if all(math.hypot(x - a, y - b) > radius + r + 3 for a, b, r in places):
                places.append((x, y, radius))
                if len(places) == count:
                    return places
        largest *= 0.9  # too crowded


def _draw_figure(
    canvas: ImageDraw.ImageDraw,
    rng: random.Random,
    shape: str,
    colour: tuple[int, ...],
    x: float,
    y: float,
    radius: float,
) -> None:
    if shape == "circle":
        radius *= 0.9
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    outline = _OUTLINES[shape]
    turn = rng.uniform(-0.3, 0.3)
    cosine, sine = radius * math.cos(turn), radius * math.sin(turn)
    canvas.polygon(
        [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a, b in outline], fill=colour
    )


def _star() -> list[_Point]:
    points = []
    for i in range(10):
        length, angle = (1.0, 0.42)[i % 2], math.pi * (i / 5 - 0.5)
        points.append((length * math.cos(angle), length * math.sin(angle)))
    return points


# Corners in the unit circle, y downwards.
_OUTLINES: dict[str, list[_Point]] = {
    "square": [(-0.7, -0.7), (0.7, -0.7), (0.7, 0.7), (-0.7, 0.7)],
    "triangle": [(0.0, -0.98), (0.87, 0.5), (-0.87, 0.5)],
    "star": _star(),
    "cross": [
        *((-0.28, -0.9), (0.28, -0.9), (0.28, -0.28), (0.9, -0.28), (0.9, 0.28), (0.28, 0.28)),
        *((0.28, 0.9), (-0.28, 0.9), (-0.28, 0.28), (-0.9, 0.28), (-0.9, -0.28), (-0.28, -0.28)),
    ],
}


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> _Stroke:
    """Points of an ellipse from one angle to another, in degrees: 0 right, 90 down."""
    angles = [math.radians(start + (end - start) * i / 14) for i in range(15)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


_SIX = [(0.76, 0.0), (0.4, 0.22), (0.17, 0.52), *_arc(0.5, 0.7, 0.4, 0.3, 195, 555)]

# Strokes of each digit in the unit square, y downwards.
_DIGITS: list[list[_Stroke]] = [
    [_arc(0.5, 0.5, 0.42, 0.5, 0, 360)],
    [[(0.2, 0.26), (0.58, 0.0), (0.58, 1.0)]],
    [[*_arc(0.5, 0.28, 0.42, 0.28, 180, 400), (0.05, 1.0), (0.95, 1.0)]],
    [[*_arc(0.46, 0.26, 0.4, 0.26, 190, 450), *_arc(0.46, 0.76, 0.46, 0.24, 270, 525)]],
    [[(0.72, 1.0), (0.72, 0.0), (0.03, 0.68), (0.98, 0.68)]],
    [[(0.88, 0.0), (0.2, 0.0), (0.13, 0.45), *_arc(0.46, 0.68, 0.44, 0.32, 220, 510)]],
    [_SIX],
    [[(0.04, 0.0), (0.95, 0.0), (0.4, 1.0)]],
    [_arc(0.5, 0.25, 0.36, 0.25, 90, 450), _arc(0.5, 0.75, 0.43, 0.25, 270, 630)],
    [[(1 - x, 1 - y) for x, y in _SIX]],
]


def _draw_number(
    canvas: ImageDraw.ImageDraw, rng: random.Random, picture: Picture, height: int, width: int
) -> None:
    colour = _shade(rng, COLOURS[picture.colour], _COLOUR_JITTER)
    tall = rng.uniform(0.4, 0.72) * min(height, width * 0.8)
    wide, gap = tall * rng.uniform(0.48, 0.62), tall * rng.uniform(0.22, 0.34)
    thickness = max(4, round(tall * rng.uniform(0.08, 0.15)))
    slant = rng.uniform(-0.05, 0.22) * tall
    margin = thickness / 2 + 4
    spare_x = width - (2 * wide + gap + abs(slant)) - 2 * margin
    spare_y = height - tall - 2 * margin
    left = margin + max(0.0, -slant) + rng.uniform(0, max(0.0, spare_x))
    top = margin + rng.uniform(0, max(0.0, spare_y))
    for digit in map(int, str(picture.number)):
        for stroke in _DIGITS[digit]:
            points = [
                (
                    left + (x + rng.gauss(0, 0.012)) * wide + (1 - y) * slant,
                    top + (y + rng.gauss(0, 0.012)) * tall,
                )
                for x, y in stroke
            ]
            canvas.line(points, fill=colour, width=thickness, joint="curve")
            for x, y in (points[0], points[-1]):
                half = thickness / 2
                canvas.ellipse((x - half, y - half, x + half, y + half), fill=colour)
        left += wide + gap
