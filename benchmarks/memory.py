"""Peak memory above the inputs, and what is refused because it would not fit.

On a CPU each provider runs once in a process of its own, `python -m benchmarks.memory`, whose resident memory is
watched: freed memory goes back to the system at once there, so that nothing is hidden in what was used before. Slow
calls, which take gigabytes, are watched while they are timed (`Watched`): some megabytes that the allocator keeps are
nothing beside that.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.benchmark import Benchmark, Provider, make_call, make_problem
from benchmarks.shapes import Sizes

ROOT = Path(__file__).resolve().parents[1]
# Of the memory that is free now, at most this share is asked for.
SHARE = 0.8
# glibc raises its own threshold with every large block that is freed, and keeps what it then serves from its heap.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def available(device: torch.device) -> int | None:
    """Free bytes for tensors on a device; None if the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _meminfo("/proc/meminfo", "MemAvailable")


def refusal(provider: Provider, sizes: Sizes, dtype: torch.dtype, mode: str, free: int | None) -> str | None:
    """Why a provider is not started: by the estimate it wants more than `free` allows. None if it fits."""
    if provider.extra_bytes is None or free is None:
        return None
    wanted = provider.extra_bytes(sizes, dtype, mode)
    if wanted <= SHARE * free:
        return None
    return f"would take about {wanted / 1e9:.0f} GB beside its inputs; {free / 1e9:.0f} GB are free"


def on_gpu(call: Callable[[], object]) -> int:
    """Bytes that one call allocates at its peak on the current GPU."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def apart(benchmark: str, provider: str, sizes: Sizes, dtype: str, mode: str) -> int | None:
    """Bytes that one call on the CPU adds at its peak, in a new process; None where the system does not tell.

    Raises:
        RuntimeError: the process failed.
    """
    request = {"benchmark": benchmark, "provider": provider, "sizes": sizes, "dtype": dtype, "mode": mode}
    request["threads"] = torch.get_num_threads()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | RETURN_FREED_MEMORY | {"PYTHONPATH": path},
    )
    if result.returncode != 0:
        killed = " (killed, it seems for want of memory)" if result.returncode == -signal.SIGKILL else ""
        raise RuntimeError(
            f"measuring the memory of {provider} ended with status {result.returncode}{killed}"
        )
    return json.loads(result.stdout)["extra_bytes"]


def in_this_process(
    benchmark: Benchmark, provider: Provider, sizes: Sizes, dtype: torch.dtype, mode: str
) -> int | None:
    """Bytes that one call adds to this process at its peak."""
    device = torch.device("cpu")
    # Loading what a provider imports is no part of its memory.
    make_call(provider.function, make_problem(benchmark, benchmark.tiny, dtype, device), mode)()
    watched = Watched(make_call(provider.function, make_problem(benchmark, sizes, dtype, device), mode))
    watched()
    return watched.extra_bytes


class Watched:
    """A call on the CPU that leaves in `extra_bytes` what it added to this process at its peak.

    None before the first call, and where the system does not tell.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.extra_bytes: int | None = None

    def __call__(self) -> object:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc gives back what it keeps
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        except OSError:
            return self.call()
        before = _meminfo("/proc/self/status", "VmRSS")
        results = self.call()
        peak = _meminfo("/proc/self/status", "VmHWM")
        if before is not None and peak is not None:
            self.extra_bytes = max(0, peak - before)
        return results


def _meminfo(path: str, name: str) -> int | None:
    """Bytes of an entry of /proc, which counts in KiB."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def main() -> None:
    """Answer one request on standard input."""
    from benchmarks.registry import BENCHMARKS

    request = json.load(sys.stdin)
    # Where memory runs out, this process goes and not the one that waits for it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(request["threads"])
    benchmark = BENCHMARKS[request["benchmark"]]
    provider = next(one for one in benchmark.providers if one.name == request["provider"])
    dtype = getattr(torch, request["dtype"])
    extra = in_this_process(benchmark, provider, request["sizes"], dtype, request["mode"])
    print(json.dumps({"extra_bytes": extra}))


if __name__ == "__main__":
    main()
