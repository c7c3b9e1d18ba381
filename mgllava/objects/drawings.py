"""Drawings as files: what they are called, and whole or not there at all."""

import errno
import os
import zlib
from pathlib import Path

from PIL import Image

__all__ = ["drawing_name", "save_drawing"]

LONGEST_NAME = 200  # in bytes; file systems take 255


def drawing_name(id: str | int, suffix: str = ".jpg") -> str:
    """The file's name for a picture's drawing: its id, as far as a name can hold it, and another for every other id."""
    text = str(id).replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    name = text.encode(errors="backslashreplace")
    if len(name) > LONGEST_NAME:
        name = name[:LONGEST_NAME] + f"-{zlib.crc32(name):08x}".encode()
    return f"{name.decode(errors='ignore')}{suffix}"


def save_drawing(drawing: Image.Image, path: Path) -> None:
    """Write a drawing in the format that the path's suffix names, `.jpg` or `.png`.

    Raises:
        OSError: the disk is full or not writable; a drawing that was there still is.
    """
    scratch = path.with_name(f".{path.name}")  # always the same: the next drawing replaces what a kill left
    try:
        drawing.save(scratch, format="PNG" if path.suffix == ".png" else "JPEG")
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        reason = f"the drawing cannot be written: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
