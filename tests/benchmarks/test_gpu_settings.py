"""What nvidia-smi tells of a GPU, and the reason where it tells nothing."""

import pytest

from benchmarks.gpu_settings import gpu_settings

ANSWERS = """#!/bin/sh
case "$*" in
    *--id=GPU-1*) echo '1980 MHz, 3201 MHz, 700.00 W, Disabled';;
    *) echo 'No devices were found'; exit 6;;
esac
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A folder that alone is searched for programs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "nvidia-smi"


def test_settings_are_those_of_the_gpu_that_is_measured(tool):
    tool.write_text(ANSWERS)
    tool.chmod(0o755)
    assert gpu_settings("GPU-1") == (
        "SM clock up to 1980 MHz, memory clock up to 3201 MHz, power limit 700.00 W, MIG Disabled"
    )
    assert gpu_settings("GPU-2").endswith("(nvidia-smi ended with status 6 and said: No devices were found)")


def test_without_the_tool_there_is_a_reason(tool):
    told = gpu_settings("GPU-1")
    assert told.startswith("clocks, power limit and MIG unknown (")
    assert "nvidia-smi" in told
