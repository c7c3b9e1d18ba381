"""The miniature checkpoint, converted once for all tests that only read the result."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def converted_golden(golden_dir, tmp_path_factory) -> Path:
    from mgllava.conversion import convert_checkpoint

    files = golden_dir / "end_to_end"
    output = tmp_path_factory.mktemp("converted") / "miniature"
    convert_checkpoint(
        files / "mg_llava.pth",
        llm=files / "llm",
        clip=files / "clip",
        convnext=files / "convnext",
        output=output,
        template="vicuna",
    )
    return output
