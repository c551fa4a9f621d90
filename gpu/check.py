"""Run `tests/test_gpu.py` and write its figures down: ``python gpu/check.py --out DIR --device cuda``.

After each test ``DIR/check.json`` is written anew, so that a machine that is taken away takes no figure with it. The
same command again runs what has not passed on this machine; delete the file to begin afresh.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "test_gpu.py"
OUT_OF_TIME = "not run: time"
COLLECTION = "collection"
"""Name of the row that says that there were no tests to run."""
FINE = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)

Row = dict[str, Any]


def main() -> int:
    """Parse, run, say; 0 where no test failed."""
    given = _arguments()
    device, out, since = str(given.device), Path(given.out), time.monotonic()
    # Before torch looks: one device alone, and sums in one order.
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["POWERSTEER_TEST_DEVICE"] = device
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # steps this small gain nothing from a second one
    # The plugins of whatever else is installed, and options meant for another suite.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ.pop("PYTEST_ADDOPTS", None)
    sys.path.insert(0, str(ROOT / "src"))

    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU that torch can use: give --device cpu", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    record = Record(out / "check.json", device, since + float(given.seconds))
    marks = "gpu" if given.scale == "full" else "gpu and not slow"
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-m", marks, "--tb=short", str(TESTS)]
    record.end(int(pytest.main(options, plugins=[record])))
    counts = {result: sum(row["result"] == result for row in record.rows.values()) for result in record.results}
    print(f"{record.file}: " + ", ".join(f"{count} {result}" for result, count in counts.items()))
    return int(record.failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, help="folder of check.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full", help="tiny: without what is marked slow")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no test after so many")
    return parser.parse_args()


class Record:
    """A plugin of pytest that keeps one row for each test.

    Args:
        file: Where the rows are kept.
        device: ``cuda`` or ``cpu``.
        deadline: By `time.monotonic`; no test is started after it.
    """

    def __init__(self, file: Path, device: str, deadline: float) -> None:
        self.file, self.device, self.deadline = file, device, deadline
        self.rows: dict[str, Row] = {}
        self.ran: set[str] = set()
        """Names of the tests of this run."""
        self.chosen: list[str] = []
        """Names of those that are to run."""
        self.running: Row = {}
        """Of the test under way."""

    @property
    def results(self) -> list[str]:
        """Those there are, each once."""
        return list(dict.fromkeys(row["result"] for row in self.rows.values()))

    @property
    def failed(self) -> bool:
        """Whether a test of this run did."""
        return any(self.rows[name]["result"] == "failed" for name in self.ran)

    def pytest_collectreport(self, report: Any) -> None:
        """What cannot be imported is a row too."""
        if report.failed:
            self.rows, self.ran = self.kept(None), {COLLECTION}
            self.put(_row(COLLECTION, "failed", _last_line(str(report.longrepr))))

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out what passed on this machine before; what is slow comes last."""
        if self.failed:
            return
        self.rows = self.kept({_name(item.nodeid) for item in items})
        passed = {name for name, row in self.rows.items() if row["result"] == "passed"}
        again = [item for item in items if _name(item.nodeid) not in passed]
        config.hook.pytest_deselected(items=[item for item in items if _name(item.nodeid) in passed])
        items[:] = sorted(again, key=lambda item: item.get_closest_marker("slow") is not None)
        self._write()

    def pytest_collection_finish(self, session: Any) -> None:
        """Note what is to run."""
        self.chosen = [_name(item.nodeid) for item in session.items]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        """Out of time, a test is not started."""
        if time.monotonic() < self.deadline:
            return None
        self.put(_row(_name(item.nodeid), OUT_OF_TIME))
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's set-up, call and tear-down, one after the other."""
        name = _name(report.nodeid)
        if report.when == "setup":
            self.running = _row(name, "passed")
        row = self.running
        row["seconds"] = round(row["seconds"] + report.duration, 3)
        row["figures"] = {key: _plain(value) for key, value in report.user_properties}
        if report.failed:
            row |= {"result": "failed", "why": row["why"] or _error(report)}
        elif report.skipped:
            row |= {"result": "skipped", "why": _reason(report)}
        if report.when == "teardown":
            self.put(row)

    def put(self, row: Row) -> None:
        """Keep a row, in place of an earlier one of its name."""
        self.ran.add(row["name"])
        self.rows[row["name"]] = row
        self._write()

    def end(self, code: int) -> None:
        """What did not come to its turn, or why nothing could."""
        if code == pytest.ExitCode.INTERRUPTED and time.monotonic() >= self.deadline:  # by who set the time
            for name in self.chosen:
                if name not in self.ran:
                    self.put(_row(name, OUT_OF_TIME))
        elif code not in FINE and not self.failed:
            self.rows = self.rows or self.kept(None)
            self.put(_row(COLLECTION, "failed", f"pytest ended with {pytest.ExitCode(code).name}: see what it printed"))

    def kept(self, known: set[str] | None) -> dict[str, Row]:
        """The rows of an earlier run on this machine, as far as there still are such tests, where that is known."""
        try:
            found: Any = json.loads(self.file.read_text(encoding="utf-8"))
            rows: dict[str, Row] = {row["name"]: row for row in found["rows"]}
            rows = {name: rows[name] for name in rows if known is None or name in known}
            if not all("result" in row for row in rows.values()):
                return {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        now = self.facts
        return rows if all(found.get(key) == now[key] for key in ("machine", "torch")) else {}

    @cached_property
    def facts(self) -> dict[str, str]:
        """What is measured, and on what."""
        import torch

        from powersteer.core.hardware import machine

        return {"machine": machine(self.device), "torch": torch.__version__, "diffusers": version("diffusers")}

    def _write(self) -> None:
        content = json.dumps({**self.facts, "rows": list(self.rows.values())}, indent=1, allow_nan=False)
        new = self.file.with_suffix(".new")
        new.write_text(content + "\n", encoding="utf-8")
        new.replace(self.file)


def _row(name: str, result: str, why: str = "") -> Row:
    return {"name": name, "result": result, "seconds": 0.0, "why": why, "figures": {}}


def _name(node: str) -> str:
    """A test's id without the path."""
    return node.partition("::")[2]


def _plain(value: Any) -> Any:
    """What JSON can say: numbers that are not finite become words."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _error(report: Any) -> str:
    """The first line of what was raised."""
    crash = getattr(report.longrepr, "reprcrash", None)
    said = str(report.longrepr) if crash is None else str(crash.message)
    return f"{'' if report.when == 'call' else report.when + ': '}{said.strip().partition(chr(10))[0]}"


def _reason(report: Any) -> str:
    """Why a test was skipped, or is known to fail."""
    if hasattr(report, "wasxfail"):
        return f"fails, as is known: {report.wasxfail}"
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(said).removeprefix("Skipped: ")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("E ").strip() if lines else ""


if __name__ == "__main__":
    sys.exit(main())
