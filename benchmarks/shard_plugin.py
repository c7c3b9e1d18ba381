"""pytest plugin of `benchmarks.shards`: one share of the tests, each result on disk as soon as it is there.

The record is a JSON object a line: first the share (`{"share": [...], "collected": N}`), then for each test
`{"start": id}` and `{"test": id, "outcome": ..., "seconds": ..., "reason": ...}`. Tests with a result in the record
are not run again. The session ends after a failure that leaves the GPU unusable for its process.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shards import read


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shards")
    group.addoption("--shard", metavar="I/N", help="every N-th test, from the I-th (counted from 0)")
    group.addoption("--record", metavar="FILE", help="where results go, and which tests are done already")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record"):
        index, number = (int(part) for part in config.getoption("shard").split("/"))
        config.pluginmanager.register(Recorder(Path(config.getoption("record")), index, number))


class Recorder:
    """Writes the record and leaves out what is not this share's."""

    def __init__(self, path: Path, index: int, number: int) -> None:
        self.path, self.index, self.number = path, index, number
        self.reports: list[pytest.TestReport] = []
        self.session: pytest.Session | None = None

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(
                {"test": report.nodeid, "outcome": "failed", "seconds": 0.0, "reason": _reason(report)}
            )

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        share = items[self.index :: self.number]
        done = {record["test"] for record in read(self.path) if "test" in record}
        self._write({"share": [item.nodeid for item in share], "collected": len(items)})
        kept = [item for item in share if item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports = []
        self._write({"start": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)
        if report.when != "teardown":
            return
        failed = [one for one in self.reports if one.failed]
        skipped = [one for one in self.reports if one.skipped]
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        seconds = sum(one.duration for one in self.reports)
        reason = "".join(_reason(one) for one in (failed or skipped)[:1])
        self._write(
            {"test": report.nodeid, "outcome": outcome, "seconds": round(seconds, 3), "reason": reason}
        )
        if failed and self.session is not None and _gpu_is_lost():
            self.session.shouldstop = "the GPU answers no more: the others run in a new process"


def _gpu_is_lost() -> bool:
    """Whether an error, such as an illegal memory access, makes every further CUDA call of this process fail."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """One line on why a test failed or was skipped."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return crash.message.splitlines()[0]
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    lines = str(report.longrepr or "").strip().splitlines()
    return lines[-1] if lines else ""
