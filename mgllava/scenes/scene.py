"""Scenes: which things lie where. Scene `index` of a split is a pure function of the two."""

import math
from dataclasses import dataclass
from random import Random

from .digits import check_split, ink_bounds, pictures_of
from .objects import CANVAS, COLOURS, DIGIT, PLACES, SHAPES, SIZE_SHARES, SIZES, place_of
from .textures import TEXTURES

__all__ = ["Background", "Box", "Scene", "Thing", "frame_width", "outlines", "sample_scene"]

Box = tuple[float, float, float, float]
Point = tuple[float, float]

NUM_THINGS = (9, 10)
NUM_DIGITS = (1, 2, 3)
# How often kinds (and, shuffled anew, colours) occur among the shapes. One, two and three are always among
# the counts, and some kind and colour is always absent: every count can be asked about in every scene.
COUNTS: dict[int, tuple[tuple[int, ...], ...]] = {
    6: ((3, 2, 1),),
    7: ((3, 2, 1, 1),),
    8: ((3, 2, 1, 2), (3, 2, 1, 1, 1)),
    9: ((3, 2, 1, 3), (3, 2, 1, 2, 1)),
}
FRAMED_SHARE = 0.6

# Less blurs the strokes of an 8x8 picture; more, and a frame around it does not fit its place.
DIGIT_HEIGHTS = (10.0, 46.0)
MARGIN = 4.0  # between a thing and the edge of its place
GAP = 6.0  # between things
DIGIT_GAP = 24.0  # between the centres of digits, from left to right
THINGS_PER_PLACE = 2
TRIES = 40  # for one thing, before the whole scene is laid out anew


@dataclass(frozen=True)
class Thing:
    """A shape or a digit.

    Attributes:
        kind: a name of `SHAPES`, or `digit`.
        colour: a name of `COLOURS`; of a digit, the ink's.
        size: `small`, `medium` or `large`.
        height: side of the shape's square, or height of the digit's ink before it is tilted, in pixels.
        width: the same across.
        angle: clockwise tilt in radians.
        centre: x, y in pixels.
        box: the tightest x1, y1, x2, y2 in pixels, frame included.
        shade: small shift of the colour's channels.
        digit: the digit's value.
        picture: the number of the digit's picture in `load_digits`.
        frame: colour of the frame around the digit.
    """

    kind: str
    colour: str
    size: str
    height: float
    width: float
    angle: float
    centre: Point
    box: Box
    shade: tuple[int, int, int]
    digit: int | None = None
    picture: int | None = None
    frame: str | None = None

    @property
    def place(self) -> str:
        """The named place that holds the whole thing."""
        return place_of(*self.centre)


@dataclass(frozen=True)
class Background:
    """A texture by name, its mean colour, its contrast and the seed of its details."""

    texture: str
    colour: tuple[int, int, int]
    contrast: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Attributes:
        split, index: the scene's name.
        background: what the things lie on.
        things: shapes and digits, in no particular order.
    """

    split: str
    index: int
    background: Background
    things: tuple[Thing, ...]

    @property
    def id(self) -> str:
        return f"{self.split}-{self.index:07d}"

    @property
    def shapes(self) -> list[Thing]:
        return [thing for thing in self.things if thing.kind != DIGIT]

    @property
    def digits(self) -> list[Thing]:
        """The digits from left to right."""
        return sorted((thing for thing in self.things if thing.kind == DIGIT), key=lambda thing: thing.centre)


def sample_scene(split: str, index: int) -> Scene:
    """Scene number `index` of a split.

    The number of things is independent of how many of them are digits, and kinds, colours and digits are
    exchangeable, so that neither tells anything about the other.

    Raises:
        ValueError: unknown split or negative index.
    """
    check_split(split)
    if index < 0:
        raise ValueError(f"index is {index}; expected 0 or more")
    rng = Random(f"scene {split} {index}")
    wanted = _plan(rng, split)
    things = None
    while things is None:
        things = _lay_out(rng, wanted)
    rng.shuffle(things)
    return Scene(split, index, draw_background(rng), tuple(things))


def outlines(thing: Thing) -> list[list[Point]]:
    """The outlines of a shape on the canvas, in pixels; the second one, if any, is a hole."""
    return _outlines(thing.kind, thing.height, thing.angle, thing.centre)


def frame_width(height: float) -> float:
    """Width in pixels of the border of the frame around a digit of that height."""
    return 1.4 + 0.08 * height


def _plan(rng: Random, split: str) -> list[dict]:
    """What the scene will hold, before sizes and positions: one dictionary of attributes for each thing."""
    num_digits = rng.choice(NUM_DIGITS)
    num_shapes = rng.choice(NUM_THINGS) - num_digits
    kinds = _repeat(rng, list(SHAPES), num_shapes)
    colours = _repeat(rng, list(COLOURS), num_shapes)
    plan: list[dict] = [{"kind": kind, "colour": colour} for kind, colour in zip(kinds, colours, strict=True)]

    framed = [rng.random() < FRAMED_SHARE for _ in range(num_digits)]
    framed[rng.randrange(num_digits)] = True
    frame_colours = iter(rng.sample(list(COLOURS), num_digits))
    for has_frame in framed:
        value = rng.randrange(10)
        frame = next(frame_colours) if has_frame else None
        ink = rng.choice([colour for colour in COLOURS if colour != frame])
        picture = rng.choice(pictures_of(split, value))
        plan.append({"kind": DIGIT, "colour": ink, "digit": value, "picture": picture, "frame": frame})
    return plan


def _repeat(rng: Random, names: list[str], total: int) -> list[str]:
    counts = rng.choice(COUNTS[total])
    drawn = [
        name for name, count in zip(rng.sample(names, len(counts)), counts, strict=True) for _ in range(count)
    ]
    rng.shuffle(drawn)
    return drawn


def _lay_out(rng: Random, plan: list[dict]) -> list[Thing] | None:
    """Give every planned thing a size and a position, or return None where the canvas is too crowded."""
    sized = [draw_size(rng, attributes) for attributes in plan]
    sized.sort(key=lambda thing: -thing["height"])
    things: list[Thing] = []
    for attributes in sized:
        left, top, right, bottom = extent_of(attributes)
        for _ in range(TRIES):
            place = rng.randrange(len(PLACES))
            side = CANVAS / 3
            x = rng.uniform(side * (place % 3) + MARGIN - left, side * (place % 3 + 1) - MARGIN - right)
            y = rng.uniform(side * (place // 3) + MARGIN - top, side * (place // 3 + 1) - MARGIN - bottom)
            thing = Thing(**attributes, centre=(x, y), box=(left + x, top + y, right + x, bottom + y))
            if _is_free(thing, things):
                things.append(thing)
                break
        else:
            return None
    return things


def draw_size(rng: Random, attributes: dict) -> dict:
    """A thing's attributes with size, height, width, angle and shade."""
    size = rng.choices(list(SIZE_SHARES), list(SIZE_SHARES.values()))[0]
    smallest, largest = SIZES[size]
    if attributes["kind"] != DIGIT:
        height = width = rng.uniform(smallest, largest)
        angle = math.radians(rng.uniform(-12, 12))
    else:
        height = rng.uniform(max(smallest, DIGIT_HEIGHTS[0]), min(largest, DIGIT_HEIGHTS[1]))
        left, top, right, bottom = ink_bounds(attributes["picture"])
        width = min(height * (right - left) / (bottom - top) * rng.uniform(0.9, 1.15), height)
        angle = math.radians(rng.uniform(-8, 8))
    shade = (rng.randint(-10, 10), rng.randint(-10, 10), rng.randint(-10, 10))
    return {**attributes, "size": size, "height": height, "width": width, "angle": angle, "shade": shade}


def _outlines(kind: str, height: float, angle: float, centre: Point) -> list[list[Point]]:
    cosine, sine = height / 2 * math.cos(angle), height / 2 * math.sin(angle)
    return [
        [(centre[0] + cosine * x - sine * y, centre[1] + sine * x + cosine * y) for x, y in outline]
        for outline in SHAPES[kind]
    ]


def extent_of(attributes: dict) -> Box:
    """The box of the thing when its centre is the origin."""
    if attributes["kind"] != DIGIT:
        outline = _outlines(attributes["kind"], attributes["height"], attributes["angle"], (0.0, 0.0))[0]
        columns, rows = zip(*outline, strict=True)
        return min(columns), min(rows), max(columns), max(rows)
    height, width = attributes["height"], attributes["width"]
    cosine, sine = abs(math.cos(attributes["angle"])), abs(math.sin(attributes["angle"]))
    half_width, half_height = (width * cosine + height * sine) / 2, (width * sine + height * cosine) / 2
    if attributes["frame"] is not None:
        inside = max(half_width, half_height) + 1.5 + 0.12 * height
        half_width = half_height = inside + frame_width(height)
    return -half_width, -half_height, half_width, half_height


def _is_free(thing: Thing, others: list[Thing]) -> bool:
    left, top, right, bottom = thing.box
    for other in others:
        near = left < other.box[2] + GAP and other.box[0] < right + GAP
        if near and top < other.box[3] + GAP and other.box[1] < bottom + GAP:
            return False
        if thing.kind == other.kind == DIGIT and abs(thing.centre[0] - other.centre[0]) < DIGIT_GAP:
            return False
    return sum(other.place == thing.place for other in others) < THINGS_PER_PLACE


def draw_background(rng: Random) -> Background:
    """What things lie on."""
    value = rng.uniform(26, 74)
    red, green, blue = (round(min(max(value + rng.uniform(-16, 16), 0), 255)) for _ in range(3))
    return Background(
        rng.choice(list(TEXTURES)), (red, green, blue), rng.uniform(8, 18), rng.randrange(2**32)
    )
