"""What a GPU is set to while it is measured, as nvidia-smi tells."""

import subprocess

# As nvidia-smi calls them, and in words.
FIELDS = {
    "clocks.max.sm": "SM clock up to",
    "clocks.max.mem": "memory clock up to",
    "power.limit": "power limit",
    "mig.mode.current": "MIG",
}


def gpu_settings(uuid: str) -> str:
    """Clocks, power limit and MIG of the GPU of this UUID in words; where they are not known, the reason."""
    query = f"--query-gpu={','.join(FIELDS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader", f"--id={uuid}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return _unknown(str(error))
    lines = result.stdout.strip().splitlines()
    values = [value.strip() for value in lines[-1].split(",")] if lines else []
    if result.returncode != 0 or len(values) != len(FIELDS):
        said = (lines or result.stderr.strip().splitlines() or ["nothing"])[0]
        return _unknown(f"nvidia-smi ended with status {result.returncode} and said: {said}")
    return ", ".join(f"{name} {value}" for name, value in zip(FIELDS.values(), values, strict=True))


def _unknown(reason: str) -> str:
    return f"clocks, power limit and MIG unknown ({reason})"
