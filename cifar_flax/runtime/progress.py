"""Progress bars."""

import sys
from typing import Any

from cifar_flax import packages
from cifar_flax.errors import one_line
from cifar_flax.runtime import processes


class ProgressBar:
    """Show a progress bar if stderr is a terminal, in the main process only; otherwise do nothing."""

    def __init__(self, total: int, unit: str, start: int = 0):
        self.tqdm: Any = None  # None if no bar is shown
        if sys.stderr.isatty() and processes.is_main():
            try:
                tqdm = packages.load("tqdm").tqdm
                self.tqdm = tqdm(initial=start, total=total, unit=unit, unit_scale=unit == "B", dynamic_ncols=True)
            except Exception as error:  # tqdm reads settings from environment variables
                processes.log(f"no progress bar: {one_line(error)}")

    def close(self) -> None:
        if self.tqdm is not None:
            self.tqdm.close()

    def advance(self, count: int) -> None:
        if self.tqdm is not None:
            self.tqdm.update(count)

    def write(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        processes.log(text, is_routine=True) if self.tqdm is None else self.tqdm.write(text)
