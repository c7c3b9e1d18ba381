"""Every size that is measured, with its origin."""

from dataclasses import dataclass

from mgllava_kernels._workloads import IMAGE_WIDTH, LEVEL, MODEL_WIDTH, PICTURE, REGIONS, STAGES

PUBLISHED = "published sizes: MG-LLaVA, arXiv 2406.17770, with CLIP ViT-L/14 at 336 px, ConvNeXt-L at 768 px, Vicuna-7B"
PYRAMID = "finest level of torchvision's feature pyramid for two pictures of 1216 x 800 px"
LEVELS = "levels of torchvision's feature pyramid for one picture of 1216 x 800 px"

# Growth curves: what varies, and what stays.
BOX_COUNTS = (0, 1, 10, 100, 300, 1000)
PICTURE_COUNTS = (1, 2, 4, 8, 16)
CANVASES = (384, 512, 768, 1024, 1536)
# Of plain RoIAlign: boxes of one picture, and the three finest levels of the pyramid, their heights in proportion.
REGION_COUNTS = (0, 1, 10, 100, 300)
MAP_SIZES = ((200, 304), (100, 152), (50, 76))
CURVES = {
    "boxes": {"images": 1, "canvas": PICTURE},
    "images": {"boxes": 10, "canvas": PICTURE},
    "canvas": {"images": 1, "boxes": 10},
    "width": {"images": 1, "boxes": 100},
}
# What grows with an axis.
TOGETHER = {"width": "height"}

Sizes = dict[str, int]
ALL_MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """Sizes of one call.

    `quick` cases make up the two minutes of `--quick`; `gpu_only` ones would take minutes on a CPU.
    """

    name: str
    sizes: Sizes
    origin: str
    modes: tuple[str, ...] = ALL_MODES
    quick: bool = False
    gpu_only: bool = False


# What warms up a process and what tests use: every branch, nothing to wait for. All widths are divided.
TINY = {"images": 2, "boxes": 3, "canvas": 128, "divisor": 16}


def stage_shapes(sizes: Sizes) -> list[tuple[int, int, int, int]]:
    """The shapes (B, C_l, H_l, W_l) of the four stages' maps for square canvases of `canvas` pixels."""
    canvas, divisor = sizes["canvas"], sizes.get("divisor", 1)
    sides = [side * canvas // PICTURE for _, side in STAGES]
    channels = [channels // divisor for channels, _ in STAGES]
    return [(sizes["images"], count, side, side) for count, side in zip(channels, sides, strict=True)]


def tokens_of(sizes: Sizes) -> int:
    """Image tokens of one picture: the positions of the coarsest stage."""
    return stage_shapes(sizes)[-1][2] ** 2


def token_width(sizes: Sizes) -> int:
    """Width of the ViT's tokens."""
    return IMAGE_WIDTH // sizes.get("divisor", 1)


def model_width(sizes: Sizes) -> int:
    """Width of the language model."""
    return MODEL_WIDTH // sizes.get("divisor", 1)


def _counted(number: int, noun: str, plural: str) -> str:
    return f"{number:,} {noun if number == 1 else plural}"


def _picture_case(
    images: int,
    boxes: int | None,
    canvas: int = PICTURE,
    modes: tuple[str, ...] = ALL_MODES,
    quick: bool = False,
    gpu_only: bool = False,
    nchw: bool = False,
) -> Case:
    name = _counted(images, "picture", "pictures")
    if boxes is not None:
        name += f", {_counted(boxes, 'box', 'boxes')}" + (" each" if images > 1 else "")
    if canvas != PICTURE:
        name += f", {canvas} px"
    sizes = {"images": images, "boxes": boxes or 0, "canvas": canvas}
    if nchw:
        name, sizes["nchw"] = f"{name}, NCHW maps", 1
    return Case(name, sizes, PUBLISHED, modes, quick, gpu_only)


def _with_curves(*, boxes: bool) -> tuple[Case, ...]:
    """The published sizes and the growth curves; of ops without boxes (`boxes` False) those without them.

    Maps are channels_last, as ConvNeXt leaves them; on a GPU also NCHW, as another tower may.
    """
    forward = ("forward",)
    if boxes:
        cases = [
            *(_picture_case(1, count, quick=count in (0, 10)) for count in BOX_COUNTS if count <= 100),
            *(_picture_case(1, count, modes=forward) for count in BOX_COUNTS if count > 100),
        ]
    else:
        cases = [_picture_case(1, None, quick=True)]
    few, many = (10, 100) if boxes else (None, None)
    cases += [_picture_case(count, few, modes=forward) for count in PICTURE_COUNTS if count > 1]
    cases += [_picture_case(1, few, canvas, forward) for canvas in CANVASES if canvas != PICTURE]
    cases += [_picture_case(count, many, gpu_only=boxes or count > 16) for count in (8, 32)]
    cases.append(_picture_case(8, many, modes=forward, gpu_only=True, nchw=True))
    return _distinct(cases)


def _distinct(cases: list[Case]) -> tuple[Case, ...]:
    """Of cases of one name the last."""
    return tuple({case.name: case for case in cases}.values())


def _region_cases() -> tuple[Case, ...]:
    """The published shapes, and forward passes along the growth curves."""
    images, channels, height, width = LEVEL
    cases: list[Case] = []
    for noun, _, boxes, side, ratio, aligned in REGIONS:
        name = f"{boxes:,} {noun} to {side}x{side}, ratio {ratio}" + (", aligned" if aligned else "")
        sizes = {"images": images, "channels": channels, "height": height, "width": width, "boxes": boxes}
        sizes |= {"side": side, "ratio": ratio, "aligned": int(aligned), "large": int(noun != "boxes")}
        cases.append(
            Case(name, sizes, PYRAMID, quick=(boxes, side, ratio) == (512, 7, 2) and noun == "boxes")
        )
    grown = [(count, MAP_SIZES[0]) for count in REGION_COUNTS]
    grown += [(100, size) for size in MAP_SIZES[1:]]
    for boxes, (height, width) in grown:
        name = f"1 picture, {_counted(boxes, 'box', 'boxes')} to 7x7 of {height} x {width} cells"
        sizes = {"images": 1, "channels": channels, "height": height, "width": width, "boxes": boxes}
        sizes |= {"side": 7, "ratio": 2, "aligned": 0, "large": 0}
        cases.append(Case(name, sizes, LEVELS, ("forward",)))
    return tuple(cases)


POOLED_ROI_ALIGN = _with_curves(boxes=True)
NECK = _with_curves(boxes=True)
CONV_GATE = _with_curves(boxes=False)
PROJECTORS = _distinct(
    [
        *(_picture_case(count, None, gpu_only=count > 1, quick=count == 1) for count in (1, 8, 32)),
        *(_picture_case(1, count, modes=("forward",)) for count in BOX_COUNTS if count),
        *(_picture_case(count, 10, modes=("forward",)) for count in PICTURE_COUNTS if count > 1),
        *(_picture_case(1, 10, canvas, ("forward",)) for canvas in CANVASES if canvas != PICTURE),
        _picture_case(1, 100),
        *(_picture_case(count, 100, gpu_only=True) for count in (8, 32)),
    ]
)
ROI_ALIGN = _region_cases()
TINY_REGIONS = {
    "images": 2,
    "channels": 16,
    "height": 20,
    "width": 24,
    "boxes": 6,
    "side": 7,
    "ratio": 2,
    "aligned": 0,
    "large": 0,
}

# Whole models. On a CPU layers are left out, which the names say; the neck has published sizes throughout.
PUBLISHED_MODEL = {"vit_layers": 24, "blocks": 27, "layers": 32, "vocabulary": 32000, "words": 64}
SHALLOW_MODEL = {"vit_layers": 2, "blocks": 1, "layers": 1, "vocabulary": 1000, "words": 64}
TINY_MODEL = TINY | SHALLOW_MODEL | {"words": 6, "vocabulary": 50}
SHALLOW = "published widths; 2 ViT layers, 1 ConvNeXt block a stage and 1 language layer, to fit a CPU"


def _model_cases(
    published: tuple[tuple[int, int], ...], layers: int, modes: tuple[str, ...]
) -> tuple[Case, ...]:
    """Shallow models of one picture on any device, the published one for (pictures, boxes) on a GPU."""
    cases = []
    for boxes in (10, 100):
        sizes = {"images": 1, "boxes": boxes, "canvas": PICTURE} | SHALLOW_MODEL
        cases.append(Case(f"shallow model, 1 picture, {boxes} boxes", sizes, SHALLOW, modes))
    for images, boxes in published:
        sizes = {"images": images, "boxes": boxes, "canvas": PICTURE} | PUBLISHED_MODEL | {"layers": layers}
        name = _picture_case(images, boxes).name
        cases.append(Case(name, sizes, PUBLISHED, modes, gpu_only=True))
    return tuple(cases)


# The vision flow needs no language model: one layer stands for it.
VISION_FLOW = _model_cases(((1, 100), (8, 100)), 1, ("forward",))
FIRST_TOKEN = _model_cases(((1, 100), (8, 100)), 32, ("forward",))
GENERATION = _model_cases(((1, 100),), 32, ("forward",))
TRAINING_STEP = _model_cases(((2, 100),), 32, ("both",))
PREPROCESSING = tuple(
    Case(f"{width} x {height} px", {"pictures": 4, "width": width, "height": height}, origin, ("forward",))
    for width, height, origin in (
        (640, 480, "usual size of COCO's pictures"),
        (4032, 3024, "a telephone's camera, 12 megapixels"),
    )
)
TINY_PICTURES = {"pictures": 1, "width": 20, "height": 30}
CONVERSION = tuple(
    Case(f"checkpoint of {megabytes} MB", {"wide": wide}, "the tests' miniature, widened", ("forward",))
    for megabytes, wide in ((30, 1 << 14 | 1 << 13), (600, 1 << 19))
)
TINY_CHECKPOINT = {"wide": 96}
