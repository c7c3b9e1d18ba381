"""Shared by all tests: no network, one seed, the golden values and the converted miniature."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several workers would wait for each other's cores; read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is decorated: before any kernel module is imported.
    os.environ["TRITON_INTERPRET"] = "1"

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def converted_golden(golden_dir, tmp_path_factory) -> Path:
    """The miniature checkpoint, converted once for all tests that only read the result."""
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


@pytest.fixture
def run():
    """The command line, as a newcomer calls it."""
    from typer.testing import CliRunner

    from mgllava.cli import app

    runner = CliRunner()

    def invoke(*arguments, **kwargs):
        # Rich folds long lines at the width of the terminal; a wide one keeps messages whole.
        return runner.invoke(app, [str(a) for a in arguments], env={"COLUMNS": "500"}, **kwargs)

    return invoke
