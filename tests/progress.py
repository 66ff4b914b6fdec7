"""What runs, how much is left, and at the end one line that says how it went.

At a terminal the line is written over; elsewhere there is a new one now and then.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

#: Seconds between two lines where they cannot be written over.
EVERY = 20.0


def clock(seconds: float) -> str:
    """`75` is `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Progress:
    """Counts the tests that have ended, in the process that shows them."""

    def __init__(self, terminal: Any) -> None:
        self.terminal = terminal
        self.total = self.ended = self.failed = 0
        self.running: dict[str, None] = {}
        self.began = self.said = time.monotonic()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = max(self.total, len(session.items))
        self.began = time.monotonic()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self.total = len(ids)
        self.began = time.monotonic()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = None
        self.show()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)
        self.ended += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self, report: Any) -> Iterator[Any]:
        category, letter, word = yield
        return category, "", ("" if not letter else word)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed += 1
            self.clear()
            what = "failed" if report.when == "call" else f"error in {report.when}"
            self.terminal.write_line(f"{what}: {report.nodeid}", red=True)

    def show(self) -> None:
        """The line of now."""
        now = time.monotonic()
        if not self.over and now - self.said < EVERY:
            return
        self.said, spent = now, now - self.began
        left = spent / self.ended * (self.total - self.ended) if self.ended > 20 else None
        line = (
            f"{self.ended:,} of {self.total:,} tests"
            + (f", {self.failed} failed" if self.failed else "")
            + (f", about {clock(left)} left" if left is not None else "")
            + f" · {next(reversed(self.running), '')}"
        )
        if self.over:
            width = self.terminal._tw.fullwidth - 1
            self.terminal.rewrite(line[:width], erase=True)
        else:
            self.terminal.write_line(line)

    def clear(self) -> None:
        if self.over:
            self.terminal.rewrite("", erase=True)

    @property
    def over(self) -> bool:
        """Whether lines can be written over."""
        return bool(sys.stdout.isatty())

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self.clear()

    def closing(self) -> str:
        """How it went, in a line."""
        counts = {name: len(reports) for name, reports in self.terminal.stats.items()}
        skipped, failed = counts.get("skipped", 0), counts.get("failed", 0) + counts.get("error", 0)
        ran = counts.get("passed", 0) + failed
        spent = clock(time.monotonic() - self.began)
        if not ran:
            return f"No test ran ({skipped:,} skipped)."
        how = f"{failed:,} of {ran:,} tests failed" if failed else f"All {ran:,} tests passed"
        return f"{how} in {spent}" + (
            f"; {skipped:,} were skipped, for the reasons above." if skipped else "."
        )


@pytest.hookimpl(trylast=True)  # when there is something to write to
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput") and config.option.verbose <= 0:
        config.pluginmanager.register(Progress(terminal), "progress-line")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    shown = config.pluginmanager.get_plugin("progress-line")
    if shown is not None and shown.total and not config.option.collectonly:
        shown.terminal.write_line(shown.closing())
