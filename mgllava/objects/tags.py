"""Tags: the names an open-vocabulary detector looks for.

They come from a list, a file, a shipped vocabulary, the question, or a model that names what it sees:

    tagger = load_tagger("coco")
    tags = tagger([picture])  # one list for each picture
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from .detector import Detector

__all__ = [
    "TAGGERS",
    "VOCABULARIES",
    "FixedTags",
    "FlorenceTags",
    "QuestionTags",
    "RamTags",
    "Tagger",
    "load_tagger",
    "question_tags",
    "read_tags",
    "split_tags",
    "tagger_name",
    "vocabulary",
]

FOLDER = Path(__file__).parent / "vocabularies"
VOCABULARIES: dict[str, str] = {
    "coco": "the 80 names of COCO",
    "open-images": "the 601 names of Open Images V6",
    "lvis": "the 1203 names of LVIS v1",
}
TAGGERS: dict[str, str] = {
    **VOCABULARIES,
    "question": "what the question names, out of all these vocabularies",
    "florence-2": "what Florence-2 sees",
    "ram++": "what RAM++ sees; needs its package `ram`",
}

RAM_REPOSITORY, RAM_FILE = "xinyu1205/recognize-anything-plus-model", "ram_plus_swin_large_14m.pth"
RAM_SIDE = 384  # of its pictures, in pixels

FILE_NAME = re.compile(r"[^,]*\.[A-Za-z]{2,5}")  # "names.txt", but no "st. bernard"

# Words of a question that the vocabularies list as things: "Can you see a tin can?"
NOT_NOUNS = {"can"}
# Plurals that no rule of `_plurals` makes.
IRREGULAR = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "scarf": "scarves",
    "shelf": "shelves",
    "tooth": "teeth",
    "wolf": "wolves",
}


class Tagger(Protocol):
    """A source of tags.

    Attributes:
        name: what it is called on the command line.
        needs_questions: whether it reads the questions.
    """

    name: str
    needs_questions: bool

    def __call__(
        self, pictures: Sequence[Image.Image], questions: Sequence[str] | None = None
    ) -> list[list[str]]:
        """The names to look for in each picture; none is a legal answer.

        Args:
            pictures: upright RGB pictures, of any sizes.
            questions: for each picture its question; None where `needs_questions` is False.

        Raises:
            ValueError: questions are missing, or not one for each picture.
        """
        ...


def tagger_name(source: str) -> str:
    """A source of tags as `TAGGERS` spells it, in whatever case it is written; others as they are."""
    name = source.strip().lower()
    return name if name in TAGGERS else source


def load_tagger(source: str, *, checkpoint: str | None = None, device: str | torch.device = "cpu") -> Tagger:
    """Find the source of tags that a command line names.

    Args:
        source: one of `TAGGERS`, a text file (what ends like a file's name), or a list such as "cat, traffic light".
        checkpoint: folder or hub id of Florence-2's weights, or RAM++'s `.pth` file, where not the published ones.
        device: where such a model runs.

    Raises:
        ValueError: no tag in the list or file, what looks like a misspelt member of `TAGGERS`, or a checkpoint for a
            source that has none.
        OSError: there is no such file, or no such weights.
        ImportError: the package that RAM++ needs is not installed.
    """
    source = tagger_name(source)
    if source == "florence-2":
        from .detectors import load_detector

        return FlorenceTags(load_detector(source, checkpoint=checkpoint, device=device))
    if source == "ram++":
        return RamTags(checkpoint, device=device)
    if checkpoint is not None:
        raise ValueError(f"tags from {source!r} have no weights, but checkpoint is {checkpoint!r}")
    if source == "question":
        return QuestionTags()
    if source in VOCABULARIES:
        return FixedTags(vocabulary(source), name=source)
    if FILE_NAME.fullmatch(source) or ("." in source and os.path.isfile(source)):  # of any length
        return FixedTags(read_tags(source), name=source)
    tags = split_tags(source)
    _refuse_sources_among(tags, source)
    return FixedTags(tags, name=source)


def vocabulary(name: str) -> list[str]:
    """The names of a shipped vocabulary, in its own order. Its file says where they are from.

    Raises:
        ValueError: unknown name.
    """
    if name not in VOCABULARIES:
        raise ValueError(f"vocabulary is {name!r}; expected one of {', '.join(VOCABULARIES)}")
    return read_tags(FOLDER / f"{name}.txt")


def read_tags(path: str | Path) -> list[str]:
    """Read tags from a text file: one on a line, or several with commas between; `#` starts a comment.

    Raises:
        ValueError: the file is no UTF-8 text, or names nothing.
        OSError: it cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error
    tags = _clean([tag for line in lines for tag in line.partition("#")[0].split(",")])
    if not tags:
        raise ValueError(f"{path} names no tags; expected one on a line")
    return tags


def split_tags(text: str) -> list[str]:
    """The tags of a list with commas between.

    Raises:
        ValueError: it names nothing.
    """
    tags = _clean(text.split(","))
    if not tags:
        raise ValueError(
            f"tags are {text!r}; expected names with commas between, such as 'cat, traffic light'"
        )
    return tags


def _refuse_sources_among(tags: Sequence[str], source: str) -> None:
    """Nobody looks for a coco: a source of tags is meant, and what is looked for would be its name."""
    if "," in source:
        for tag in tags if len(tags) > 1 else ():
            if tag.lower() in TAGGERS:
                raise ValueError(f"tags are {source!r}; expected names, or {tag.lower()!r} alone")
    elif source.lower() not in _known_forms()[0]:
        for near in difflib.get_close_matches(source.lower(), TAGGERS, n=1, cutoff=0.8):
            raise ValueError(
                f"tags are {source!r}; did you mean {near!r}? For the name itself write '{source},'"
            )


def question_tags(question: str) -> list[str]:
    """The things a question names, in its order: words, and runs of words, of the shipped vocabularies.

    Plurals count and come back as singulars, and hyphens are spaces. What no vocabulary knows is passed over; a
    colour that is also a thing (orange) counts as a thing.
    """
    known, longest = _known_forms()
    words = re.findall(r"[a-z0-9]+", question.lower())
    tags: list[str] = []
    start = 0
    while start < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            tag = known.get(" ".join(words[start : start + length]))
            if tag is not None:
                tags.append(tag)
                break
        start += length
    return list(dict.fromkeys(tags))


class FixedTags:
    """The same tags for every picture."""

    needs_questions = False

    def __init__(self, tags: Sequence[str], name: str = "list") -> None:
        self.name = name
        self.tags = list(tags)

    def __call__(
        self, pictures: Sequence[Image.Image], questions: Sequence[str] | None = None
    ) -> list[list[str]]:
        return [list(self.tags) for _ in pictures]


class QuestionTags:
    """The things each picture's question names, by `question_tags`."""

    name = "question"
    needs_questions = True

    def __call__(
        self, pictures: Sequence[Image.Image], questions: Sequence[str] | None = None
    ) -> list[list[str]]:
        if questions is None or len(questions) != len(pictures):
            got = "none" if questions is None else len(questions)
            raise ValueError(f"tags from the question: expected {len(pictures)} questions, got {got}")
        return [question_tags(question) for question in questions]


class FlorenceTags:
    """The names Florence-2 gives to what it detects."""

    name = "florence-2"
    needs_questions = False

    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    def __call__(
        self, pictures: Sequence[Image.Image], questions: Sequence[str] | None = None
    ) -> list[list[str]]:
        return [_clean(found.labels) for found in self.detector(pictures)]


class RamTags:
    """The tags of RAM++ (Huang et al., arXiv 2310.15200), which the paper's boxes are made with.

    Its package is on no index and asks for an old transformers; where it is installed and imports, it is used.

    Args:
        checkpoint: its `.pth` file, or a folder that holds it; by default the published one, from the hub.
        device: where it runs.

    Raises:
        ImportError: the package `ram` does not import; says what to do.
        OSError: the weights are neither here nor can they be downloaded.
    """

    name = "ram++"
    needs_questions = False

    def __init__(self, checkpoint: str | None = None, *, device: str | torch.device = "cpu") -> None:
        try:
            from ram import get_transform
            from ram.models import ram_plus
        except ImportError as error:
            raise ImportError(
                f"tags from RAM++ need the package `ram`, which does not import here ({error}); install it from "
                "github.com/xinyu1205/recognize-anything, or take other tags: "
                + ", ".join(name for name in TAGGERS if name != self.name)
            ) from error
        self.device = torch.device(device)
        self.transform: Callable[[Image.Image], torch.Tensor] = get_transform(image_size=RAM_SIDE)
        model: Any = ram_plus(pretrained=_ram_file(checkpoint), image_size=RAM_SIDE, vit="swin_l")
        self.model = model.eval().to(self.device)

    @torch.inference_mode()
    def __call__(
        self, pictures: Sequence[Image.Image], questions: Sequence[str] | None = None
    ) -> list[list[str]]:
        if not pictures:
            return []
        batch = torch.stack([self.transform(picture) for picture in pictures]).to(self.device)
        english, _ = self.model.generate_tag(batch)
        return [_clean(tags.split("|")) for tags in english]


def _ram_file(checkpoint: str | None) -> str:
    if checkpoint is None:
        from huggingface_hub import hf_hub_download

        try:
            return hf_hub_download(RAM_REPOSITORY, RAM_FILE)
        except (OSError, ValueError) as error:
            raise OSError(
                f"the weights of RAM++ cannot be loaded: {error}. Give the file as checkpoint, or, with a network, "
                f"fetch it first: hf download {RAM_REPOSITORY} {RAM_FILE}"
            ) from error
    path = Path(checkpoint)
    path = path / RAM_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"the weights of RAM++ are not at {path}; expected {RAM_FILE}")
    return str(path)


def _clean(tags: Sequence[str]) -> list[str]:
    """Without surrounding and doubled spaces, empty ones and repetitions."""
    return [tag for tag in dict.fromkeys(" ".join(tag.split()) for tag in tags) if tag]


@cache
def _known_forms() -> tuple[Mapping[str, str], int]:
    """Every name of the vocabularies and its plurals, with the name; and the most words one has.

    Vocabularies in brackets say which of two things is meant: "bat (animal)". A question does not.
    """
    singulars = dict.fromkeys(
        re.sub(r"\(.*?\)", " ", name).lower() for name in (n for v in VOCABULARIES for n in vocabulary(v))
    )
    names = [name for name in _clean(list(singulars)) if name not in NOT_NOUNS]
    known: dict[str, str] = {plural: name for name in names for plural in _plurals(name)}
    known |= {name: name for name in names}
    known = {form.replace("-", " "): name for form, name in known.items()}
    return known, max(len(form.split()) for form in known)


def _plurals(name: str) -> list[str]:
    """The plurals a name may have; one that nobody uses does no harm."""
    stem, _, word = name.rpartition(" ")
    if word in IRREGULAR:
        plurals = [IRREGULAR[word]]
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        plurals = [word + "es"]
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        plurals = [word[:-1] + "ies"]
    elif word.endswith("man"):
        plurals = [word[:-3] + "men", word + "s"]
    elif word.endswith("o"):
        plurals = [word + "es", word + "s"]
    else:
        plurals = [word + "s"]
    return [f"{stem} {plural}".strip() for plural in plurals]
