"""The README's examples run as they stand, on the miniature instead of a published model."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def example(first_line: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(block for block in blocks if block.startswith(first_line))


def test_the_kernels_example():
    names: dict = {}
    exec(example("import torch"), names)
    assert names["vectors"].shape == (1, 2880)
    assert (names["vectors"] - names["expected"]).norm() < 1e-4 * names["expected"].norm()


def test_the_model_example(converted_golden, golden_dir, capsys):
    code = example("import mgllava")
    for name, real in (
        ("mg-llava-vicuna-7b", converted_golden),
        ("street.png", golden_dir / "end_to_end" / "image.png"),
    ):
        assert code.count(name) == 1
        code = code.replace(name, str(real))
    exec(code, {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", ["demo", "chat", "detect", "convert", "train", "scenes", "doctor"])
def test_every_command_is_described(command):
    assert f"mgllava {command}" in README.read_text(encoding="utf-8")
