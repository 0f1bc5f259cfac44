"""What a policy needs of the disk: its directories, writable, on the right file system."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from secimg_watch.names import display

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from secimg_watch.policy import Folder, Policy


def check_paths(policy: Policy) -> list[str]:
    """Look at the directories that ``policy`` names, and return what is wrong, with remedies.

    Nothing is created. An empty list means that all of them can be used by this process.
    """
    checks: list[str | None] = []
    for folder in policy.folders:
        checks += _folder_checks(folder)
    for name, vault in policy.vaults.items():
        checks.append(_creatable(vault.path, f'vault "{name}"'))
    checks.append(_creatable_with_parents(policy.state, "state directory"))
    return [fault for fault in checks if fault]


def _folder_checks(folder: Folder) -> Iterator[str | None]:
    # Taking a file out of a directory needs the right to write it, except where it is kept.
    need = os.R_OK | os.X_OK | (0 if folder.after.action == "keep" else os.W_OK)
    yield _directory_fault(folder.path, "folder", need)
    if folder.staging is not None:
        yield _creatable(folder.staging, "staging directory") or _device_fault(
            folder, folder.staging, "staging directory"
        )
    if folder.after.directory is not None:
        yield _directory_fault(folder.after.directory, "move target") or _device_fault(
            folder, folder.after.directory, "move target"
        )


def _creatable(path: Path, role: str) -> str | None:
    if os.path.lexists(path):
        return _directory_fault(path, role)
    return _directory_fault(path.parent, f"parent directory of the {role}")


def _creatable_with_parents(path: Path, role: str) -> str | None:
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if existing == path:
        return _directory_fault(path, role)
    return _directory_fault(existing, f"nearest existing parent of the {role}")


def _directory_fault(path: Path, role: str, need: int = os.W_OK | os.X_OK) -> str | None:
    subject = f"the {role} {display(str(path))}"
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return f"{subject} does not exist; create it, or correct its path in the policy"
    except OSError as error:
        return f"{subject} cannot be looked at: {error.strerror}; check the directories above it"
    if not stat.S_ISDIR(mode):
        return f"{subject} is not a directory; correct its path in the policy"
    if not os.access(path, need):
        return f"{subject} may not be used by this account; change its owner or its mode"
    return None


def _device_fault(folder: Folder, place: Path, role: str) -> str | None:
    # A rename cannot leave the file system, and a copy would leave plaintext behind.
    existing = place if os.path.exists(place) else place.parent
    if not os.path.exists(folder.path) or existing.stat().st_dev == folder.path.stat().st_dev:
        return None
    return (
        f"the {role} {display(str(place))} lies on another file system than the "
        f"folder {display(str(folder.path))}; choose one on the same"
    )
