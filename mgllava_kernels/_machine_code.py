"""What a compiled kernel uses: registers, spills, and the instructions that decide its speed."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

PTX_ATOMIC = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?:atom|red)\.", re.MULTILINE)
PTX_LOAD = re.compile(r"\bld\.(?:\w+(?:::\w+)*\.)*global(?:::\w+)?((?:\.\w+(?:::\w+)*)+)")
PTX_COPY = re.compile(r"\bcp\.async\.(?:ca|cg)\.shared\.global[^;\[]*\[[^\]]*\]\s*,\s*\[[^\]]*\]\s*,\s*(\w+)")
PTX_MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
AMD_ATOMIC = re.compile(r"\b(?:buffer|global|flat)_atomic_\w+")
AMD_LOAD = re.compile(r"\b(?:buffer|global|flat)_load_(?:lds_)?(\w+)")
AMD_MATRIX = re.compile(r"\bv_(mfma|smfmac|wmma)\w*")
# By the suffix of an AMD load, longest first.
AMD_WIDTHS = (
    *(("dwordx4", 16), ("b128", 16), ("dwordx3", 12), ("b96", 12), ("dwordx2", 8), ("b64", 8)),
    *(("dword", 4), ("b32", 4), ("short", 2), ("b16", 2), ("16", 2), ("byte", 1), ("8", 1)),
)


@dataclass(frozen=True)
class Usage:
    """Registers of a thread and what did not fit into them.

    `stack_bytes` is the memory of a thread for spills; `spilled_registers` counts the vector registers that
    AMD's compiler spills to it (NVIDIA's names only the bytes). `scalar_spills` counts scalar registers that
    AMD's compiler keeps in lanes of vector registers, which costs instructions but no memory.
    """

    registers: int
    stack_bytes: int
    spilled_registers: int
    scalar_spills: int

    @property
    def spills(self) -> bool:
        return bool(self.stack_bytes or self.spilled_registers or self.scalar_spills)


@dataclass(frozen=True)
class Instructions:
    """Counts in the text of a kernel: atomics on global memory, global loads by bytes, matrix instructions."""

    atomics: int
    loads: dict[int, int]
    matrix: dict[str, int]


def nvidia_usage(cubin: bytes, cuobjdump: str) -> Usage:
    """Read by the tool `cuobjdump`, which Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    values = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(values["REG"], values["STACK"] + values["LOCAL"], 0, 0)


def amd_usage(assembly: str) -> Usage:
    """Read from the metadata at the end of the assembly."""

    def value(name: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found[1])

    return Usage(
        value("vgpr_count"),
        value("private_segment_fixed_size"),
        value("vgpr_spill_count"),
        value("sgpr_spill_count"),
    )


def ptx_instructions(text: str) -> Instructions:
    loads = [_ptx_width(suffix) for suffix in PTX_LOAD.findall(text)]
    loads += [int(size, 0) for size in PTX_COPY.findall(text)]
    return _instructions(PTX_ATOMIC.findall(text), loads, PTX_MATRIX.findall(text))


def amd_instructions(text: str) -> Instructions:
    loads = [next(width for suffix, width in AMD_WIDTHS if suffix in name) for name in AMD_LOAD.findall(text)]
    return _instructions(AMD_ATOMIC.findall(text), loads, [f"v_{kind}" for kind in AMD_MATRIX.findall(text)])


def _instructions(atomics: list[str], loads: list[int], matrix: list[str]) -> Instructions:
    return Instructions(
        len(atomics), dict(sorted(Counter(loads).items())), dict(sorted(Counter(matrix).items()))
    )


def _ptx_width(suffix: str) -> int:
    """Bytes of a load like `.L1::evict_last.v4.b32`."""
    vector = re.search(r"\.v(\d)\b", suffix)
    bits = re.search(r"\.[bufs](\d+)$", suffix)
    if bits is None:
        raise ValueError(f"not the suffix of a load: {suffix}")
    return int(bits[1]) // 8 * (int(vector[1]) if vector else 1)
