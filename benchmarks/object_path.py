"""The object path of MG-LLaVA at published sizes on a CPU: original composition against `pooled_roi_align`.

    python benchmarks/object_path.py [--boxes 100] [--repeats 5] [--output
    benchmarks/results/object_path_cpu.json]

One picture, ConvNeXt-L stages for 768 pixels, float32. The original upsamples all stages to the first,
concatenates them to 2880 channels, runs torchvision's RoIAlign to 56x56 bins and averages them; it needs
about 5 GB. Both providers are compared with the original's values before anything is timed. Each provider
runs in a process of its own, so that its peak memory is the rise of the process' high-water mark over that
with the inputs in place.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import mgllava_kernels  # noqa: E402

STAGES = ((192, 192), (384, 96), (768, 48), (1536, 24))  # channels, side
PICTURE = 768
BINS = 56
TOLERANCE = 1e-5


def inputs(boxes: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    stages = [torch.randn(1, channels, side, side, generator=generator) for channels, side in STAGES]
    corners = torch.rand(boxes, 2, 2, generator=generator) * PICTURE
    return stages, torch.cat([corners.amin(1), corners.amax(1)], dim=1).round()


def original(stages: list[Tensor], boxes: Tensor) -> Tensor:
    from torchvision.ops import roi_align

    size = stages[0].shape[2:]
    maps = [stages[0]]
    maps += [F.interpolate(stage, size=size, mode="bilinear", align_corners=False) for stage in stages[1:]]
    regions = roi_align(torch.cat(maps, dim=1), [boxes], BINS, spatial_scale=size[0] / PICTURE)
    return regions.mean(dim=(2, 3))


def fast(stages: list[Tensor], boxes: Tensor) -> Tensor:
    scale = stages[0].shape[2] / PICTURE
    with mgllava_kernels.use_backend("torch"):
        return mgllava_kernels.pooled_roi_align(stages, [boxes], spatial_scale=scale, output_size=BINS)


FUNCTIONS = {"original": original, "torch": fast}


def peak_bytes() -> int:
    """High-water mark of this process; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def first_call(provider: str, boxes: int, values: Path) -> dict:
    """Save the values of one call and return how far it raised the peak memory."""
    function = FUNCTIONS[provider]
    stages, rows = inputs(boxes)
    # A call on a corner loads what the provider imports, which is no part of its extra memory.
    function([stage[..., :8, :8] for stage in stages], rows[:1] / PICTURE)
    before = peak_bytes()
    output = function(stages, rows)
    extra = peak_bytes() - before
    torch.save(output, values)
    return {"extra_bytes": extra}


@torch.no_grad()
def timing(provider: str, boxes: int, repeats: int) -> dict:
    function = FUNCTIONS[provider]
    stages, rows = inputs(boxes)
    function(stages, rows)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(stages, rows)
        seconds.append(time.perf_counter() - start)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def run_apart(provider: str, boxes: int, *options: str) -> dict:
    command = [sys.executable, __file__, "--provider", provider, "--boxes", str(boxes), *options]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)


def write_atomically(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, path)


def compare(boxes: int, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        files = {provider: Path(folder) / f"{provider}.pt" for provider in FUNCTIONS}
        results = {name: run_apart(name, boxes, "--values", str(file)) for name, file in files.items()}
        expected, actual = (torch.load(file).double() for file in files.values())
    error = ((actual - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        raise SystemExit(f"values differ: relative error {error:.1e}, at most {TOLERANCE:.0e} expected")
    for provider, result in results.items():
        result |= run_apart(provider, boxes, "--repeats", str(repeats))
    before, after = results["original"], results["torch"]
    return {
        "boxes": boxes,
        "repeats": repeats,
        "dtype": "float32",
        "relative_error": error,
        "results": results,
        "speedup": before["median_s"] / after["median_s"],
        "memory_ratio": before["extra_bytes"] / after["extra_bytes"],
        "conditions": conditions(),
    }


def conditions() -> dict:
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def print_table(record: dict) -> None:
    print(f"object path, 1 picture, {record['boxes']} boxes, {record['dtype']}; {record['conditions']}")
    print(f"relative error against the original: {record['relative_error']:.1e}")
    print(f"{'provider':<10}{'median ms':>12}{'extra MB':>12}")
    for provider, result in record["results"].items():
        print(f"{provider:<10}{result['median_s'] * 1e3:>12.1f}{result['extra_bytes'] / 1e6:>12.1f}")
    print(f"{'ratio':<10}{record['speedup']:>12.1f}{record['memory_ratio']:>12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--boxes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("--provider", choices=FUNCTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--values", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.boxes < 1 or arguments.repeats < 1:
        parser.error("--boxes and --repeats must be at least 1")
    if arguments.values is not None:
        print(json.dumps(first_call(arguments.provider, arguments.boxes, arguments.values)))
        return
    if arguments.provider is not None:
        print(json.dumps(timing(arguments.provider, arguments.boxes, arguments.repeats)))
        return
    record = compare(arguments.boxes, arguments.repeats)
    print_table(record)
    if arguments.output is not None:
        write_atomically(arguments.output, record)


if __name__ == "__main__":
    main()
