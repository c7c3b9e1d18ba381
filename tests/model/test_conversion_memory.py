"""Peak memory of a conversion, watched from outside the process that does it."""

import json
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_cases import GOLDEN, Sources, golden_state_dict, save_zero

LAYERS, HIDDEN = 8, 2**16
SHARD_BYTES = 32 * 10**6

# Converts whatever is asked for, one line of JSON each; what it says comes before and after.
CONVERTER = """
import json
import sys

from mgllava.conversion import convert_checkpoint

print("ready", flush=True)
for line in sys.stdin:
    arguments, options = json.loads(line)
    convert_checkpoint(*arguments, **options)
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint of 300 MB, twice, and its language model's folder: golden but for wide MLPs."""
    folder = tmp_path_factory.mktemp("wide")
    sources = Sources().copied("llm", folder)
    (sources.llm / "model.safetensors").unlink()  # the checkpoint has them
    config = json.loads((sources.llm / "config.json").read_text())
    config |= {"intermediate_size": HIDDEN, "num_hidden_layers": LAYERS}
    (sources.llm / "config.json").write_text(json.dumps(config))
    tensors = golden_state_dict()
    first = "llm.model.layers.0."
    block = {name.removeprefix(first): value for name, value in tensors.items() if name.startswith(first)}
    width = config["hidden_size"]
    for layer in range(LAYERS):
        tensors |= {f"llm.model.layers.{layer}.{name}": value.clone() for name, value in block.items()}
        for name, shape in {"gate": (HIDDEN, width), "up": (HIDDEN, width), "down": (width, HIDDEN)}.items():
            tensors[f"llm.model.layers.{layer}.mlp.{name}_proj.weight"] = torch.ones(shape)
    torch.save({"state_dict": tensors}, folder / "checkpoint.pth")
    save_zero(tensors, folder / "zero.pth", stage=3, ranks=2)
    yield folder, sources, 4 * sum(value.numel() for value in tensors.values())
    shutil.rmtree(folder)  # pytest would keep it


def anonymous_bytes(process):
    """Memory that is the process's own. Pages of memory-mapped files come on top in what is resident, but the
    system takes those back when it needs them: they are no reason for a conversion to fail."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon:")).split()[1])


def converted(process, *arguments, **options):
    """Have one conversion done; returns the peak of the process's own memory."""
    print(json.dumps([[str(argument) for argument in arguments], options]), file=process.stdin, flush=True)
    peak = 0
    while not select.select([process.stdout], [], [], 0.002)[0]:
        peak = max(peak, anonymous_bytes(process))
    assert process.stdout.readline() == "done\n"
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_memory_stays_around_a_shard(wide, tmp_path):
    folder, sources, size = wide
    towers = (GOLDEN / "clip", GOLDEN / "convnext")
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        # The first conversion also loads code; from here on memory is for weights.
        golden = Sources()
        converted(process, golden.checkpoint, golden.llm, *towers, tmp_path / "golden", progress=False)
        before = anonymous_bytes(process)
        for checkpoint in ("checkpoint.pth", "zero.pth"):
            output = tmp_path / checkpoint
            options = {"dtype": "float32", "max_shard_bytes": SHARD_BYTES, "progress": False}
            peak = converted(process, folder / checkpoint, sources.llm, *towers, output, **options)
            assert sum(file.stat().st_size for file in output.glob("*.safetensors")) > size
            # A shard (once more where safetensors copies what it saves) and a few copies of the largest tensor
            # while it is merged. That does not grow with the model; of this one it is less than half.
            assert peak - before < 2 * SHARD_BYTES + 6 * 4 * 48 * HIDDEN < size / 2, checkpoint
            shutil.rmtree(output)
        process.stdin.close()
        assert process.wait(timeout=60) == 0
