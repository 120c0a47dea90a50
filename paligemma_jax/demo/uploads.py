"""The files of visitors: bounded for each and in all; the oldest are deleted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from paligemma_jax.demo.limits import Limits

MIN_BYTES = 100_000  # that a file counts, so that their number is bounded, too


class Uploads:
    """The folder that Gradio stores the pictures of visitors in, uploaded and drawn.

    A visitor is an address. Files that are in the folder at the beginning belong to the page and
    are kept. `Limits` bounds the rest, uploads in progress included.
    """

    def __init__(self, folder: Path, limits: Limits):
        self.folder = folder.resolve()
        self.visitor_limit = int(limits.visitor_megabytes * 1e6)
        self.total_limit = int(limits.total_megabytes * 1e6)
        self.visitors: dict[str, set[Path]] = defaultdict(set)
        self.pending: Counter[str] = Counter()  # bytes of uploads in progress, by visitor
        self.page: set[Path] = set()

    def keep_present(self) -> None:
        """Keep the files that are in the folder now."""
        self.page = set(self._files())

    def contains(self, path: str) -> bool:
        """Whether a path is inside the folder. The file may be deleted already."""
        try:
            return Path(path).resolve().is_relative_to(self.folder)
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, a loop of links
            return False

    def begin(self, visitor: str, size: int) -> bool:
        """Make room for an upload of `size` bytes.

        Returns False if there cannot be any, because of other uploads in progress.
        """
        if (
            self.pending[visitor] + size > self.visitor_limit
            or self.pending.total() + size > self.total_limit
        ):
            return False
        self.pending[visitor] += size
        self.delete_oldest(visitor)
        return True

    def end(self, visitor: str, size: int, paths: Iterable[str]) -> None:
        """Record the files of an upload that `begin` made room for."""
        self.pending[visitor] -= size
        self.visitors[visitor] |= {Path(path).resolve() for path in paths if self.contains(path)}
        self.delete_oldest(visitor)

    def touch(self, path: str) -> None:
        """Count a file as new, because it is used."""
        file = Path(path)
        if self.contains(path) and file.is_file():
            file.touch()

    def delete_oldest(self, visitor: str | None = None) -> None:
        """Delete the oldest files beyond the limits: those of a visitor, and of all."""
        self.pending = +self.pending
        files = self._files()
        for path in self.page:
            files.pop(path, None)
        if visitor is not None:
            own = self.visitors[visitor] = self.visitors[visitor] & files.keys()
            sizes = {path: size for path, size in files.items() if path in own}
            for path in _beyond(sizes, self.visitor_limit - self.pending[visitor]):
                own.discard(path)
                if not any(path in others for others in self.visitors.values()):
                    _delete(path)
                    del files[path]
        for path in _beyond(files, self.total_limit - self.pending.total()):
            _delete(path)

    def _files(self) -> dict[Path, int]:
        """All files and the bytes that they count, oldest first."""
        found = []
        for path in self.folder.rglob("*"):
            try:
                stat = path.stat()
            except OSError:  # deleted in the meantime
                continue
            if path.is_file():
                found.append((stat.st_mtime_ns, path, max(stat.st_size, MIN_BYTES)))
        return {path: size for _, path, size in sorted(found)}


def _beyond(sizes: dict[Path, int], limit: int) -> list[Path]:
    """The first files without which the others fit the limit."""
    total, beyond = sum(sizes.values()), []
    for path, size in sizes.items():
        if total <= limit:
            break
        beyond.append(path)
        total -= size
    return beyond


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    with suppress(OSError):
        path.parent.rmdir()  # Gradio makes a folder for every file
