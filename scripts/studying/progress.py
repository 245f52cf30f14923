"""The progress bar of a study. A share of a run counts as such, so that the time to the end is known within a run."""

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studying.measure import read_rows
from tqdm.auto import tqdm

SECONDS = 2.0  # between two looks at the runs


class Progress:
    """A bar that looks at the runs' logs in a thread of its own, as trainings may run in this process.

    budgets: TFLOPs of each run's folder, of those that are not measured yet. total: number of all runs.
    """

    def __init__(self, budgets: Mapping[Path, float], total: int) -> None:
        self._budgets = budgets
        self._measured = total - len(budgets)
        initial = self.done()
        interval = 0.5 if sys.stderr.isatty() else 60.0  # a file keeps every line
        self.bar: Any = tqdm(total=total, initial=initial, unit="run", smoothing=0, mininterval=interval, miniters=0)
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Progress":
        self._watcher.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._ended.set()
        self._watcher.join()
        self.bar.close()

    def done(self) -> float:
        """Runs that are done, with parts of runs."""
        return round(self._measured + sum(share_done(*run) for run in self._budgets.items()), 2)

    def show(self, text: str = "") -> None:
        """Bring the bar up to date. text: to show behind it from now on."""
        if text:
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(self.done() - self.bar.n)

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS):
            self.show()


def share_done(folder: Path, budget: float) -> float:
    """The share of a run's compute that its log shows as spent; 0 without a log."""
    try:
        return min(1.0, float(read_rows(folder)[-1]["tflops"]) / budget)
    except (OSError, IndexError, KeyError, TypeError, ValueError):  # not begun, or a row is being written
        return 0.0
