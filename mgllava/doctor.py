"""What `mgllava doctor` reports: versions, devices, the path each op takes, and known mismatches."""

import importlib
import os
import platform
from dataclasses import dataclass, field
from importlib import metadata

import torch

from mgllava_kernels.backend import active_backend, registered_ops

from ._version import __version__

PACKAGES = (
    "torch",
    "triton",
    "torchvision",
    "transformers",
    "timm",
    "safetensors",
    "accelerate",
    "huggingface_hub",
    "pillow",
)


@dataclass
class Report:
    """A section is a title and its (name, value) rows; problems are sentences that say what to do."""

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def examine() -> Report:
    """Look at this environment without changing it."""
    report = Report()
    versions = {name: _version(name) for name in PACKAGES}
    report.sections["Versions"] = [
        ("mgllava", __version__),
        ("python", platform.python_version()),
        *((name, version or "not installed") for name, version in versions.items()),
        ("opencv, for the detector `proposals`", _opencv(report)),
    ]
    report.sections["Devices"] = _devices()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report.sections[f"Kernels on {device.type}"] = _kernels(device, report)
    report.problems += _mismatches(versions)
    return report


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _opencv(report: Report) -> str:
    """The version that imports: it comes in four packages, of which any will do."""
    try:
        cv2 = importlib.import_module("cv2")
    except Exception as error:  # any failure of its own is what is to be reported
        report.problems.append(
            "the detector `proposals` cannot run: OpenCV does not import "
            f"({type(error).__name__}: {error}). pip install opencv-python-headless"
        )
        return "not installed" if isinstance(error, ModuleNotFoundError) else "does not import"
    return str(cv2.__version__)


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"compute capability {properties.major}.{properties.minor}",
            )
        )
    if torch.backends.mps.is_available():
        rows.append(("mps", "Apple GPU"))
    return rows


def _kernels(device: torch.device, report: Report) -> list[tuple[str, str]]:
    rows = [("MGLLAVA_KERNELS", os.environ.get("MGLLAVA_KERNELS", "not set (auto)"))]
    for dtype in (torch.float32, torch.bfloat16):
        probe = torch.empty(1, device=device, dtype=dtype)
        for op in registered_ops():
            try:
                chosen = active_backend(probe, op=op)
            except (ValueError, RuntimeError) as error:
                report.problems.append(f"{op} cannot run: {error}")
                continue
            rows.append((f"{op}, {str(dtype).removeprefix('torch.')}", f"{chosen.name}: {chosen.reason}"))
    return rows


def _mismatches(versions: dict[str, str | None]) -> list[str]:
    problems = []
    # A torchvision built for another torch raises RuntimeError ("operator torchvision::nms does not exist").
    for package, purpose in (
        ("torchvision", "non-maximum suppression of detections, and timm"),
        ("timm", "the high-resolution tower"),
    ):
        if versions[package] is None:
            problems.append(f"{package} is not installed; it is needed for {purpose}: pip install {package}")
            continue
        if package == "timm" and problems:
            continue  # it imports torchvision, which is the one at fault
        try:
            importlib.import_module(package)
        except Exception as error:  # any failure of theirs is what is to be reported
            problems.append(
                f"{package} {versions[package]} does not import beside torch {versions['torch']} "
                f"({type(error).__name__}: {error}). The two builds do not match: install torch and torchvision "
                "from the same index, for example pip install --force-reinstall torch torchvision"
            )
    if torch.version.cuda and not torch.cuda.is_available():
        problems.append(
            f"torch is built for CUDA {torch.version.cuda} but sees no GPU: everything runs on the CPU. That is fine "
            "without an NVIDIA GPU; with one, look at nvidia-smi and the driver's version"
        )
    if torch.cuda.is_available() and versions["triton"] is None:
        problems.append(
            "a GPU is here but triton is not installed: the fused kernels stay off. pip install triton"
        )
    return problems
