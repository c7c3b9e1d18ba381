"""Pictures that carry a number, a detector that reads it, and processes to kill."""

import contextlib
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

from PIL import Image

from mgllava.objects.annotate import annotate
from mgllava.objects.annotation_files import Parts, parts_folder
from mgllava.objects.detector import Detections
from mgllava.objects.pictures import find_pictures

SETTINGS = {"detector": "numbers", "threshold": 0.2, "tags": None}


def write_picture(path, number, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number % 256, number // 256, 99)).save(path)
    return path


def write_pictures(folder, count):
    """`count` pictures of different sizes, the numbers 0.. in their names and in their colour."""
    for number in range(count):
        write_picture(folder / f"{number:04}.png", number, (8 + number % 5, 8 + number % 3))
    return folder


def found_on(number, size):
    """What the detector finds: none, one or two boxes."""
    width, height = size
    boxes = ((0.0, 0.0, width / 3, height / 7), (1.0, 2.0, width - 1.0, height - 1.0))[: number % 3]
    return Detections(boxes, (f"number {number}", "picture")[: number % 3], (0.875, 0.5)[: number % 3])


class Numbers:
    """A deterministic detector: reads the number from the colour.

    Args:
        log: file to which the number of each picture looked at is added.
        seconds: how long a picture takes.
        refuses: numbers of pictures it cannot take.
        error: how it says so.
    """

    name = "numbers"
    needs_tags = False

    def __init__(self, log=None, seconds=0.0, refuses=(), error=ValueError):
        self._log, self._seconds, self._refuses, self._error = log, seconds, refuses, error

    def __call__(self, pictures, tags=None):
        assert tags is None
        numbers = [red + 256 * green for red, green, _ in (picture.getpixel((0, 0)) for picture in pictures)]
        time.sleep(self._seconds * len(pictures))
        for number in numbers:
            if number in self._refuses:
                raise self._error(f"number {number} is too much")
        if self._log is not None:
            with open(self._log, "a") as log:
                log.write("".join(f"{number}\n" for number in numbers))
        return [found_on(number, picture.size) for number, picture in zip(numbers, pictures, strict=True)]


def run(folder, **options):
    """Annotate `folder/pictures` into `folder/boxes.json` in this process."""
    options = {"settings": SETTINGS, "num_workers": 0, "batch_size": 4} | options
    detector, tagger = options.pop("detector", None) or Numbers(folder / "log"), options.pop("tagger", None)
    pictures = find_pictures([folder / "pictures"])
    return annotate(pictures, lambda: (detector, tagger), folder / "boxes.json", **options)


def lines_of(folder):
    """All whole lines of the parts of `folder/boxes.json`."""
    lines = []
    for path in sorted(parts_folder(folder / "boxes.json").glob("*.jsonl")):
        for text in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def looked_at(folder):
    """The numbers of the pictures the detector has looked at."""
    log = folder / "log"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def assert_complete(folder, count):
    """Every picture once, with its own boxes, in order."""
    entries = json.loads((folder / "boxes.json").read_text())
    assert [entry["id"] for entry in entries] == [f"{number:04}" for number in range(count)]
    for number, entry in enumerate(entries):
        expected = found_on(number, (8 + number % 5, 8 + number % 3))
        assert entry["boxes"] == [[round(edge, 2) for edge in box] for box in expected.boxes]
        assert entry["labels"] == list(expected.labels)
        assert entry["scores"] == list(expected.scores)
    pictures = [line["picture"] for line in lines_of(folder)]
    assert len(pictures) == len(set(pictures)) == count


def start(folder, count, seconds=0.004, merge_seconds=0.0):
    """`count` processes as torchrun would start them, at work on `folder/pictures`, each of which takes that long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mgllava.objects.annotate", "accelerate"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_work, args=(str(folder), seconds, merge_seconds, index, count, port))
        for index in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def _work(folder, seconds, merge_seconds, index, count, port):
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    # A process of a fork server starts others by one of its own, which would import everything once more.
    multiprocessing.set_start_method("fork", force=True)
    if merge_seconds:
        at_once = Parts.found

        def slowly(self, pictures):
            for one in at_once(self, pictures):
                time.sleep(merge_seconds)
                yield one

        Parts.found = slowly
    folder = Path(folder)
    run(folder, detector=Numbers(folder / "log", seconds), num_workers=1)


def stop(processes):
    """Kill those that still run, as the launcher does when one has died."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
