"""What failed and passed on a second try: told last, with the first failure and its seed, and few of them tolerated.

A machine that does something else meanwhile makes a test of real processes fail now and then; a race in the code looks
the same. So a second try is granted, and what needs one is written to `build/second-try/report.txt`, which `make`
prints last: more than `TOLERATED` of them fail `make test`.

    python -m tests.second_try begin    forget what earlier calls of make have left
    python -m tests.second_try end      print the report; 1 if too many tests needed a second try
"""

import json
import os
import random
import sys
from pathlib import Path

import pytest

TOLERATED = 2
VARIABLE = "SOLVENT_SECOND_TRY"
"""Set for a second try."""
SEED_VARIABLE = "SOLVENT_TEST_SEED"
FOLDER = Path(__file__).parents[1] / "build" / "second-try"


class SecondTries:
    """A plugin of the process that leads a test session.

    Args:
        folder: where the failures of first tries wait, and the report is written.
    """

    def __init__(self, folder: Path, *, is_second: bool, seed: str) -> None:
        self._failures, self._report = folder / "failed.json", folder / "report.txt"
        self._is_second, self._seed = is_second, seed
        self._failed: dict[str, str] = {}
        self._passed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed[report.nodeid] = f"seed {self._seed}, in {report.when}:\n{report.longreprtext}"
        elif report.when == "call" and report.passed:
            self._passed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Keep the failures of a first try; of a second one, report what has passed."""
        self._failures.parent.mkdir(parents=True, exist_ok=True)
        if not self._is_second:
            if self._failed:
                self._failures.write_text(json.dumps(self._failed))
            return
        first = json.loads(self._failures.read_text()) if self._failures.exists() else {}
        with self._report.open("a") as file:
            for nodeid in self._passed:
                if nodeid in first and nodeid not in self._failed:
                    file.write(f"==== {nodeid} passed on its second try; the first, {first[nodeid]}\n")


def seed_of(nodeid: str, seed: str) -> str:
    """Return what a test's own randomness starts from: alike whichever tests run before it."""
    return f"{seed} {nodeid}"


def pytest_configure(config: pytest.Config) -> None:
    """Draw the session's seed, for its workers too, and watch, in the process that leads."""
    if hasattr(config, "workerinput"):
        return
    os.environ.setdefault(SEED_VARIABLE, str(random.SystemRandom().randrange(10**6)))
    tries = SecondTries(FOLDER, is_second=bool(os.environ.get(VARIABLE)), seed=os.environ[SEED_VARIABLE])
    config.pluginmanager.register(tries, "second tries")


def pytest_report_header() -> str:
    return f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]} repeats this session's random choices"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the test's randomness from the session's seed, which is shown if it fails."""
    random.seed(seed_of(item.nodeid, os.environ[SEED_VARIABLE]))
    print(f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]}")


def main(what: str) -> int:
    """Begin or end what one call of make tests."""
    report = FOLDER / "report.txt"
    if what == "begin":
        for path in (report, FOLDER / "failed.json"):
            path.unlink(missing_ok=True)
        return 0
    if not report.exists():
        return 0
    text = report.read_text()
    num_tests = text.count("==== ")
    print(f"{text}\n{num_tests} test(s) needed a second try ({report}); {TOLERATED} are tolerated")
    return int(num_tests > TOLERATED)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
