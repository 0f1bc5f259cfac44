"""Hints from inotify: something may have arrived here. The scan decides what did.

What watchdog's own observer leaves silent is made visible by extending its inotify reader at two
of its public methods. `_Reader.add_callback` sees every watch that the kernel refuses, so a
folder that is only partly heard is known with the number and the reason; and it keeps our own
staging directory unwatched. `_Reader.handle_event` sees the kernel's queue overflow.

Its bookkeeping trusts the folder, and is replaced where that does harm. `_Group` and `_Emitter`
walk a new sub-folder without ever following a link: one that took the sub-folder's place would
have everything behind it watched and listed. And they let go of watches whose paths watchdog has
lost: a sub-folder that was moved out of the folder keeps its path in watchdog's books, and when
the next one of that name goes, the entry is missed by an exception that ends the thread.

IN_MOVED_FROM is left out of every watch: watchdog holds each of those back for half a second to
find its other half, and all later events of the folder wait behind it. Our own claims, which
move a file out of sight, would delay every next arrival. So an arrival by rename is reported
without its old name, which is what watchdog's "full" emitter does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Protocol

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)

from secimg_watch import kernel
from secimg_watch.scan import folders
from secimg_watch.selection import STAGING_NAME

if TYPE_CHECKING:
    from secimg_watch.records import FolderKey

# A renamed sub-folder keeps its kernel watch, and its new path is learnt by adding that watch
# again. watchdog warns of this, with paths of the folder in the text.
warnings.filterwarnings("ignore", message="Callback with id", category=RuntimeWarning)

_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent,
    FileClosedEvent,
    FileMovedEvent,
    DirCreatedEvent,
    DirMovedEvent,
]


class Listener(Protocol):
    """Who takes the hints of one folder. Called from the watcher's threads; must not block."""

    def hint(self, relpath: str, *, directory: bool, renamed: bool) -> None:
        """Something happened to this path."""

    def doubt(self, why: str) -> None:
        """Events were lost: only a full scan can tell what is there."""


class Watcher(Protocol):
    """A source of hints."""

    def watch(self, folder: FolderKey, root: str, listener: Listener, *, recursive: bool) -> None:
        """Start giving hints; an ``OSError`` says that the folder cannot be watched at all."""

    def unwatch(self, folder: FolderKey) -> None:
        """Stop giving hints."""

    def unwatched(self, folder: FolderKey) -> tuple[int, str]:
        """How many sub-folders the kernel refused to watch, and why."""

    def is_alive(self, folder: FolderKey) -> bool:
        """Whether every thread that the folder's hints pass through is running."""

    def close(self) -> None:
        """Stop everything."""


def native_watcher() -> Watcher | None:
    """The kernel's watcher, or ``None`` where there is none and folders are polled."""
    return _native()


class _Handler(FileSystemEventHandler):
    """Turns events into hints. An exception here would end watchdog's dispatcher: none leaves."""

    def __init__(self, root: str, listener: Listener) -> None:
        self._prefix = root.rstrip("/") + "/"
        self._listener = listener

    def on_any_event(self, event: FileSystemEvent) -> None:
        try:
            moved = isinstance(event, FileMovedEvent | DirMovedEvent)
            path = os.fsdecode(event.dest_path if moved else event.src_path)
            if path.startswith(self._prefix):
                relpath = path[len(self._prefix) :]
                self._listener.hint(relpath, directory=event.is_directory, renamed=moved)
        except Exception:  # noqa: BLE001 - see the class
            self._listener.doubt("an event could not be understood")


if sys.platform == "linux":
    from watchdog.observers.api import BaseObserver, ObservedWatch
    from watchdog.observers.inotify import InotifyFullEmitter, InotifyWatchGroup
    from watchdog.observers.inotify_c import (
        CallbackId,
        InotifyConstants,
        InotifyEvent,
        InotifyFD,
        Mask,
        WatchCallback,
        WatchDescriptor,
    )
    from watchdog.observers.inotify_move_event_grouper import (
        GroupedInotifyEvent,
        PathedInotifyEvent,
    )

    class _Reader(InotifyFD):
        """watchdog's inotify reader, with its silences made audible."""

        def __init__(self, root: str, listener: Listener) -> None:
            super().__init__()
            self._staging = os.fsencode(os.path.join(root, STAGING_NAME))
            self._listener = listener
            self.refused: dict[bytes, int] = {}

        def add_callback(
            self, path: bytes, mask: Mask, callback: WatchCallback, id_: CallbackId
        ) -> WatchDescriptor:
            if path == self._staging or path.startswith(self._staging + b"/"):
                raise OSError(errno.EACCES, "the staging directory is not watched")
            try:
                wanted = Mask(mask & ~InotifyConstants.IN_MOVED_FROM | InotifyConstants.IN_ONLYDIR)
                descriptor = super().add_callback(path, wanted, callback, id_)
            except OSError as error:
                # What vanished in between needs no watch.
                if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
                    self.refused[path] = error.errno or 0
                raise
            if descriptor < 0:
                # watchdog says nothing of a directory that may not be read.
                self.remove_callbacks([(descriptor, id_)])
                self.refused[path] = errno.EACCES
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            self.refused.pop(path, None)
            return descriptor

        def handle_event(self, event: InotifyEvent) -> None:
            super().handle_event(event)
            if event.is_queue_overflow:
                # Only now is everything watched anew: what comes after the scan is heard again.
                self._listener.doubt("the kernel's event queue overflowed")

    class _Group(InotifyWatchGroup):
        """watchdog's books of what is watched where, of a folder that nobody need trust."""

        def _add_all_callbacks(self, path: bytes) -> None:
            self._add_callback(path)
            if self.is_recursive:
                for folder in _folders_below(self.path, path):
                    self._add_callback(folder)

        def _recursive_simulate(self, src_path: bytes) -> list[InotifyEvent]:  # noqa: ARG002 - watchdog's
            return []  # whoever is told of a new sub-folder scans it

        def _remove_watch_internally(self, wd: WatchDescriptor) -> None:
            with contextlib.suppress(KeyError):
                super()._remove_watch_internally(wd)

    def _folders_below(root: bytes, path: bytes) -> list[bytes]:
        below = "" if path == root else os.fsdecode(os.path.relpath(path, root))
        try:
            fd = os.open(root, kernel.DIRECTORY)
        except OSError:
            return []
        try:
            return [os.path.join(root, os.fsencode(folder)) for folder in folders(fd, below)]
        finally:
            os.close(fd)

    class _Emitter(InotifyFullEmitter):
        """watchdog's emitter, with our books and without its own walks."""

        def on_thread_start(self) -> None:
            self._inotify = _Group(
                self._inotify_fd,
                os.fsencode(self.watch.path),
                event_mask=self.get_event_mask_from_filter(),
                is_recursive=self.watch.is_recursive,
            )

        def build_and_queue_event(
            self, event: GroupedInotifyEvent, *, full_events: bool = True
        ) -> None:
            alone = event if isinstance(event, PathedInotifyEvent) else None
            if alone is not None and alone.ev.is_directory and alone.ev.is_moved_to:
                self.queue_event(DirMovedEvent("", os.fsdecode(alone.path)))
            else:
                super().build_and_queue_event(event, full_events=full_events)

    class _Watch:
        """One folder, with an inotify queue of its own: its storm drowns no other folder."""

        def __init__(self, root: str, listener: Listener, *, recursive: bool) -> None:
            self.reader = _Reader(root, listener)
            self.observer = BaseObserver(_Emitter, inotify_fd=self.reader)
            try:
                self.reader.start()
                self.observer.start()
                self.scheduled: ObservedWatch = self.observer.schedule(
                    _Handler(root, listener), root, recursive=recursive, event_filter=_EVENTS
                )
            except BaseException:
                self.close()
                raise

        def is_alive(self) -> bool:
            threads = [self.reader, self.observer, *self.observer.emitters]
            return len(threads) > 2 and all(thread.is_alive() for thread in threads)  # noqa: PLR2004 - reader, observer and an emitter

        def close(self) -> None:
            for thread in (self.observer, self.reader):
                if thread.is_alive():
                    thread.stop()
            for thread in (self.observer, self.reader):
                if thread.is_alive() and thread is not threading.current_thread():
                    thread.join()

    class InotifyWatcher:
        """All natively watched folders."""

        def __init__(self) -> None:
            """Start with none."""
            self._watches: dict[FolderKey, _Watch] = {}
            self._lock = threading.Lock()

        def watch(
            self, folder: FolderKey, root: str, listener: Listener, *, recursive: bool
        ) -> None:
            """See `Watcher.watch`."""
            watch = _Watch(root, listener, recursive=recursive)
            with self._lock:
                self._watches[folder] = watch

        def unwatch(self, folder: FolderKey) -> None:
            """See `Watcher.unwatch`."""
            with self._lock:
                watch = self._watches.pop(folder, None)
            if watch is not None:
                watch.close()

        def unwatched(self, folder: FolderKey) -> tuple[int, str]:
            """See `Watcher.unwatched`."""
            with self._lock:
                watch = self._watches.get(folder)
            refused = dict(watch.reader.refused) if watch else {}
            there = [number for path, number in refused.items() if os.path.isdir(path)]
            return (len(there), os.strerror(there[0])) if there else (0, "")

        def is_alive(self, folder: FolderKey) -> bool:
            """See `Watcher.is_alive`."""
            with self._lock:
                watch = self._watches.get(folder)
            return watch is not None and watch.is_alive()

        def close(self) -> None:
            """See `Watcher.close`."""
            for folder in list(self._watches):
                self.unwatch(folder)

    def _native() -> Watcher | None:
        return InotifyWatcher()

else:

    def _native() -> Watcher | None:
        return None
