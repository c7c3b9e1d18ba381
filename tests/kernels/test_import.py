"""Importing the package needs torch alone."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "torchvision"):
            raise AssertionError(f"{name} was imported")

already = {name for name in sys.modules if name.split(".")[0] in ("triton", "torchvision")}
assert not already, already
sys.meta_path.insert(0, Refuse())
def touched():
    raise AssertionError("CUDA was initialised")
torch.cuda._lazy_init = touched
torch.cuda.is_available = touched
import mgllava_kernels
assert not any(name.split(".")[0] in ("triton", "torchvision") for name in sys.modules)
assert not torch.cuda.is_initialized()
assert all(hasattr(mgllava_kernels, name) for name in mgllava_kernels.__all__)
"""


def test_import_touches_neither_cuda_nor_triton_nor_torchvision():
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_package_does_not_know_the_model():
    package = Path(__file__).parents[2] / "mgllava_kernels"
    for file in package.rglob("*.py"):
        text = file.read_text()
        assert "import mgllava\n" not in text, file
        assert "from mgllava " not in text, file
        assert "from mgllava." not in text, file
