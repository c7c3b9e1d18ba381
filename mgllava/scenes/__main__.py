"""`python -m mgllava.scenes` is `mgllava scenes`."""

from ..cli import friendly_errors
from .command import scenes_app

scenes_app(friendly_errors)(prog_name="python -m mgllava.scenes")
