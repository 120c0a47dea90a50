"""A progress bar on a terminal, periodic lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Self

import jax
from tqdm import tqdm

LINE = (
    "{desc}: {n_fmt}/{total_fmt}{postfix} [{elapsed} elapsed, {remaining} left, {rate_noinv_fmt}]"
)


def progress_bar(
    iterable: Iterable | None = None,
    desc: str | None = None,
    total: float | None = None,
    unit: str = "row",
    show: bool | None = None,
    *,
    initial: int = 0,
    leave: bool = True,
    unit_scale: bool = False,
    interval: float = 30.0,
) -> tqdm | ProgressLines:
    """Report progress on stderr: a tqdm bar on a terminal, else periodic plain lines.

    Args:
        iterable: Items to count as they are consumed; without it, call `update`.
        desc: Label.
        total: Total number of units; by default the length of `iterable`.
        unit: Name of one unit.
        show: Whether to report; by default in the first process of a run only.
        initial: Units that are already done.
        leave: Keep the bar at the end. If False, a log gets no line before `interval`.
        unit_scale: Write 1.5M for 1500000.
        interval: Seconds between two lines.
    """
    if show is None:
        # jax.process_index alone would start the backend, and take a GPU's memory.
        show = not jax.distributed.is_initialized() or jax.process_index() == 0
    if not show or sys.stderr.isatty():
        options: dict = dict(iterable=iterable, total=total, initial=initial, unit_scale=unit_scale)
        return tqdm(desc=desc, unit=unit, leave=leave, disable=not show, **options)
    style = dict(prefix=desc, unit=unit, unit_scale=unit_scale)
    return ProgressLines(iterable, total, initial, leave, interval, style)


class ProgressLines:
    """A replacement for tqdm when stderr is not a terminal.

    Prints a line after the first update, then every `interval` seconds, and at the end. The rate
    counts from the first update, so that compilation does not distort it.
    """

    def __init__(
        self,
        iterable: Iterable | None,
        total: float | None,
        initial: int,
        leave: bool,
        interval: float,
        style: dict,
    ):
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self.iterable, self.total, self.n = iterable, total, initial
        self.initial, self.leave, self.interval, self.style = initial, leave, interval, style
        self.postfix = ""
        self._start = time.monotonic()
        self._due = self._start if leave else self._start + interval
        self._first: tuple[float, float] | None = None  # time and count of the first update
        self._printed = initial

    def __iter__(self) -> Iterator:
        with self:
            for item in self.iterable or ():
                yield item
                self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        self.n += n
        now = time.monotonic()
        self._first = self._first or (now, self.n)
        if now >= self._due:
            self._print(now)

    def set_postfix(self, *, refresh: bool = True, **values: object) -> None:
        texts = {k: tqdm.format_num(v) if isinstance(v, float) else v for k, v in values.items()}
        self.postfix = ", ".join(f"{key}={text}" for key, text in texts.items())

    def close(self) -> None:
        if self.leave and self.n != self._printed:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        first_time, first_n = self._first or (now, self.n)
        elapsed = now - self._start
        rate = (self.n - first_n) / (now - first_time) if now > first_time else None
        if rate is None and elapsed > 0:
            rate = (self.n - self.initial) / elapsed
        values: dict = dict(rate=rate, postfix=self.postfix, bar_format=LINE, **self.style)
        line = tqdm.format_meter(self.n, self.total, elapsed, **values)  # type: ignore[arg-type]
        print(line.replace("  ", " "), file=sys.stderr, flush=True)
        self._printed, self._due = self.n, now + self.interval
