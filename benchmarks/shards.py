"""Run tests in several processes at once: `python -m benchmarks.shards --folder DIR tests/kernels`.

For machines where pytest is all there is. After a crash, a test that hangs or an error that the GPU does not recover
from, the rest of a share goes on in a new process; what has a result in DIR is not run again. Ends with 0 if all tests
passed, 1 if any failed, 3 if some were not run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HANGS_AFTER = 240.0
INCOMPLETE = 3


@dataclass
class Results:
    """What is known of all shards' tests."""

    passed: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    collected: int = 0

    @property
    def missing(self) -> int:
        """Tests without a result."""
        known = self.passed | self.skipped | {test for test in self.failed if "::" in test}
        return max(0, self.collected - len(known))

    def __str__(self) -> str:
        counts = {"passed": len(self.passed), "failed": len(self.failed), "skipped": len(self.skipped)}
        counts["not run"] = self.missing
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no tests"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; none if there is no file. A line cut off by a kill is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def records_of(folder: Path) -> list[Path]:
    """The records in a folder."""
    return sorted(folder.glob("shard-*.jsonl"))


def forget(folder: Path, passed: bool) -> None:
    """Drop what is recorded of tests that failed, so that they run again; of those that `passed`, too."""
    for path in records_of(folder):
        if passed:
            path.unlink()
            continue
        kept = [record for record in read(path) if record.get("outcome") != "failed"]
        # A start without a result would count as a crash.
        done = {record["test"] for record in kept if "test" in record}
        kept = [record for record in kept if "start" not in record or record["start"] in done]
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, path)


def read_results(folder: Path) -> Results:
    """Of all records in a folder."""
    results = Results()
    for path in records_of(folder):
        for record in read(path):
            results.collected = max(results.collected, record.get("collected", 0))
            if record.get("outcome") == "failed":
                results.failed[record["test"]] = record["reason"]
            elif "test" in record:
                (results.passed if record["outcome"] == "passed" else results.skipped).add(record["test"])
    return results


class Shard:
    """One share of the tests, and the process that runs it now."""

    def __init__(self, arguments: Sequence[str], folder: Path, index: int, number: int) -> None:
        name = f"shard-{index}-of-{number}"
        self.record, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        self.command = [sys.executable, "-m", "pytest", "-p", "benchmarks.shard_plugin", "-q", "-rN"]
        self.command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        # With a space before it, pytest would take the record for a test and change its root once the file is there.
        self.command += [f"--shard={index}/{number}", f"--record={self.record}", *arguments]
        threads = str(max(1, _cores() // number))
        self.environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        self.process: subprocess.Popen[bytes] | None = None
        self.error: str | None = None
        self.lines_before = 0

    def start(self) -> None:
        self.lines_before = len(read(self.record))
        self.started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def step(self, hangs_after: float) -> bool:
        """Look after the process; whether there is more to do."""
        if self.process is None:
            return False
        status = self.process.poll()
        if status is None:
            if self._silence() < hangs_after:
                return True
            self.process.kill()
            self.process.wait()
        self._give_up_unfinished(
            f"hung: nothing for {hangs_after:.0f} s"
            if status is None
            else f"its process ended with status {status}"
        )
        self.process = None
        records = read(self.record)
        shares = [record["share"] for record in records if "share" in record]
        done = {record["test"] for record in records if "test" in record}
        if shares and done.issuperset(shares[-1]):
            return False
        if len(records) - self.lines_before < 2:
            self.error = f"pytest ended with status {status} before any test: see {self.log}"
            return False
        self.start()
        return True

    def _silence(self) -> float:
        """Seconds since anything was recorded in this process."""
        since_start = time.monotonic() - self.started
        if not self.record.is_file():
            return since_start
        return min(since_start, time.time() - self.record.stat().st_mtime)

    def _give_up_unfinished(self, reason: str) -> None:
        """A test that began and did not end has failed."""
        records: list[dict[str, Any]] = read(self.record)
        done = {record["test"] for record in records if "test" in record}
        last = next((record["start"] for record in reversed(records) if "start" in record), None)
        if last is not None and last not in done:
            line = {"test": last, "outcome": "failed", "seconds": 0.0, "reason": reason}
            with self.record.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(line) + "\n")


def run(arguments: Sequence[str], folder: Path, number: int, hangs_after: float = HANGS_AFTER) -> list[str]:
    """Run all shards to their end; what kept any of them from running."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [Shard(arguments, folder, index, number) for index in range(number)]
    shown = ""
    try:
        for shard in shards:
            shard.start()
        active = list(shards)
        while active:
            active = [shard for shard in active if shard.step(hangs_after)]
            if (now := str(read_results(folder))) != shown:
                shown = now
                print(now, flush=True)
            time.sleep(0.2)
    finally:
        for shard in shards:
            if shard.process is not None:
                shard.process.kill()
    return [shard.error for shard in shards if shard.error is not None]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the records and logs")
    parser.add_argument(
        "--shards", type=int, default=min(12, _cores()), help="processes; default %(default)s"
    )
    parser.add_argument("--hangs-after", type=float, default=HANGS_AFTER, help="seconds; default %(default)s")
    parser.add_argument("--retry", action="store_true", help="run failed tests again, too")
    parser.add_argument("--fresh", action="store_true", help="run all tests again")
    parser.add_argument("arguments", nargs="*", help="files and folders for pytest, and its options")
    options, for_pytest = parser.parse_known_args()
    # What stops this program stops its children too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if options.retry or options.fresh:
        forget(options.folder, passed=options.fresh)
    errors = run([*options.arguments, *for_pytest], options.folder, options.shards, options.hangs_after)
    results = read_results(options.folder)
    for test, reason in sorted(results.failed.items()):
        print(f"FAILED {test}: {reason}")
    for error in errors:
        print(error, file=sys.stderr)
    print(results)
    sys.exit(1 if results.failed else INCOMPLETE if errors or results.missing or not results.collected else 0)


if __name__ == "__main__":
    main()
