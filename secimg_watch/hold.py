"""Taking a job's file in hand: open, unchanged, and with nobody writing it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from secimg_watch import kernel
from secimg_watch.errors import ChangedInHandError, NotAllowedError
from secimg_watch.records import Held, Identity, Job
from secimg_watch.selection import passes_over_kind

if TYPE_CHECKING:
    from contextlib import ExitStack

    from secimg_watch.roots import Root

_OTHER_KIND: Final = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV})
_NO_FOLDER: Final = frozenset({errno.ELOOP, errno.ENOTDIR})


def hold(job: Job, root: Root, hands: ExitStack) -> Held:
    """Open a job's file, in the staging directory if it was claimed before, else in its folder.

    ``hands`` closes the descriptors, which gives the lease back as well.

    Raises:
        FileNotFoundError: the file is gone.
        ChangedInHandError: it is not the file that settled, or is open for writing.
        NotAllowedError: it is claimed, and was given a second name.
        OSError: it cannot be opened.
    """
    claimed = root.staged(job.object_id)
    parent, name = claimed or _open_parent(job, root)
    hands.callback(os.close, parent)
    try:
        fd = os.open(name, kernel.PICTURE, dir_fd=parent)
    except OSError as error:
        # A link or a socket in its place is an arrival of its own, and no fault of the system.
        if error.errno in _OTHER_KIND and claimed is None:
            raise ChangedInHandError("the file was replaced by something else") from error
        raise
    hands.callback(os.close, fd)
    lease = kernel.take_read_lease(fd)
    if lease is kernel.Lease.WRITER:
        raise ChangedInHandError("the file was opened for writing again")
    status = os.fstat(fd)
    identity = Identity.of(status)
    # A claimed file is ours whatever happened to it; one in the folder must be what settled.
    if claimed is None and identity != job.identity:
        raise ChangedInHandError("the file was changed or replaced after it had settled")
    passed = passes_over_kind(status.st_mode, status.st_nlink)
    if passed is not None:
        # In the folder it is passed over from now on; a claimed one must not be retried for ever.
        kind = ChangedInHandError if claimed is None else NotAllowedError
        raise kind(f"the file cannot be taken any more: {passed}")
    leased = lease is kernel.Lease.GRANTED
    return Held(job, fd, parent, name, identity, status.st_mode, leased, claimed is not None)


def _open_parent(job: Job, root: Root) -> tuple[int, str]:
    try:
        return kernel.open_parent(root.fd, job.relpath)
    except OSError as error:
        # As above: where a sub-folder was, the picture is not, and this is no failed attempt at it.
        if error.errno in _NO_FOLDER:
            raise ChangedInHandError("a folder above the file was replaced") from error
        raise


def is_unchanged(job: Job, root: Root) -> bool:
    """Whether a job's file still lies in its folder just as it settled."""
    try:
        parent, name = kernel.open_parent(root.fd, job.relpath)
    except OSError:
        return False
    try:
        return Identity.of(os.stat(name, dir_fd=parent, follow_symlinks=False)) == job.identity
    except OSError:
        return False
    finally:
        os.close(parent)


def refuse_if_changed(held: Held, identity: Identity) -> None:
    """Raise unless the file in hand is still the very state that ``identity`` describes.

    Raises:
        ChangedInHandError: it was written to, or somebody is waiting to write to it.
    """
    if held.leased and not kernel.lease_intact(held.fd):
        raise ChangedInHandError("somebody opened the file for writing while it was in hand")
    if Identity.of(os.fstat(held.fd)) != identity:
        raise ChangedInHandError("the file changed while it was in hand")
