"""What a scene is made of: kinds, colours, sizes and named places."""

import math

__all__ = [
    "CANVAS",
    "COLOURS",
    "DIGIT",
    "KINDS",
    "PLACES",
    "PLURALS",
    "SHAPES",
    "SIZES",
    "SIZE_SHARES",
    "place_of",
]

Point = tuple[float, float]

CANVAS = 256  # side of a scene's picture in pixels

DIGIT = "digit"

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 46, 46),
    "orange": (246, 138, 28),
    "yellow": (250, 228, 60),
    "green": (58, 182, 66),
    "cyan": (70, 214, 222),
    "blue": (66, 104, 244),
    "pink": (244, 112, 206),
    "white": (240, 240, 240),
}

# Side of a shape, height of a digit's ink, in pixels of the canvas. In a low-resolution view of 112 px small
# things are 4 to 6 pixels tall.
SIZES: dict[str, tuple[float, float]] = {"small": (9, 13), "medium": (22, 32), "large": (42, 60)}
SIZE_SHARES: dict[str, float] = {"small": 0.65, "medium": 0.2, "large": 0.15}

PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)


def place_of(x: float, y: float) -> str:
    """The name of the third-by-third cell of the canvas that holds the point."""
    column, row = (min(int(3 * value / CANVAS), 2) for value in (x, y))
    return PLACES[3 * row + column]


def _around(radii: list[float], turn: float = -0.25) -> list[Point]:
    """Points at these distances from the origin, evenly spread; `turn` (of a full one) is where they start."""
    angles = [2 * math.pi * (turn + index / len(radii)) for index in range(len(radii))]
    return [
        (radius * math.cos(angle), radius * math.sin(angle))
        for radius, angle in zip(radii, angles, strict=True)
    ]


_ARM = 0.36
# Outlines in the square from -1 to 1, y downwards; a second outline is a hole.
SHAPES: dict[str, list[list[Point]]] = {
    "circle": [_around([1.0] * 32)],
    "square": [[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]],
    "triangle": [[(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]],
    "star": [_around([1.1, 0.45] * 5)],
    "cross": [
        [
            (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
            (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
        ]
    ],
    "ring": [_around([1.0] * 32), _around([0.55] * 24)],
}  # fmt: skip

KINDS = (*SHAPES, DIGIT)
PLURALS = {kind: kind + ("es" if kind == "cross" else "s") for kind in KINDS}
