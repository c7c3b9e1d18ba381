"""A small world for training and testing: scenes of handwritten digits and coloured shapes, with questions.

Everything is generated: scene `index` of a split is the same everywhere, its detections, its questions and its
captions too. Digits of the test split appear in no training scene.

    scene = sample_scene("train", 0)
    picture = render(scene)
    detections = detect(scene)
    turns = ask(scene, 6)

`SceneDataset` draws such examples without files; `write_split` writes them as LLaVA-format files.
"""

from .captions import CAPTION_FAMILIES, caption, describe
from .dataset import SceneDataset
from .detections import Detections, detect, things_of_boxes
from .digits import SPLITS
from .files import write_split
from .lists import LIST_FAMILIES, list_things
from .objects import CANVAS, COLOURS, KINDS, PLACES, SHAPES
from .questions import CHANCE, FAMILIES, Turn, ask
from .render import render
from .scene import Scene, Thing, sample_scene
from .vocabulary import WORDS, split_words

__all__ = [
    "CANVAS",
    "CAPTION_FAMILIES",
    "CHANCE",
    "COLOURS",
    "FAMILIES",
    "KINDS",
    "LIST_FAMILIES",
    "PLACES",
    "SHAPES",
    "SPLITS",
    "WORDS",
    "Detections",
    "Scene",
    "SceneDataset",
    "Thing",
    "Turn",
    "ask",
    "caption",
    "describe",
    "detect",
    "list_things",
    "render",
    "sample_scene",
    "split_words",
    "things_of_boxes",
    "write_split",
]
