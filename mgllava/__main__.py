"""`python -m mgllava` is `mgllava`."""

from .cli import main

main()
