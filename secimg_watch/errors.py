"""Every error of the package, in one tree.

SecimgError                  never raised itself
├── UsageError           64  the command line asks for something that makes no sense
├── TamperedError        65  a sealed object, or encrypted data, does not authenticate
├── NotAnImageError      65  bytes that were to be an image are none
├── NoInputError         66  a file that was named does not exist or is not a regular file
├── CannotCreateError    73  an output exists, or its place cannot be written
├── StorageError         74  the operating system failed a read or a write
├── NotReadyError     75  the surroundings are not ready; the same call works later
│   ├── DiskFullError        the vault has less free space than the policy asks for
│   ├── FolderGoneError      a watched folder vanished, was replaced or mounted over
│   ├── VaultGoneError       a vault is not there: not made yet, replaced, or not mounted
│   ├── KeyUnavailableError  the key is there but locked, or its service does not answer
│   └── AlreadyRunningError  another process holds the state directory or the vault
├── QueueError           75  the queue's database fails: its disk is full, or does not answer
├── ChangedInHandError   75  a picture changed while it was being sealed
├── NotAllowedError      77  the operating system refused for lack of permission
└── ConfigError          78  policy or key must be corrected by a person
    ├── PolicyError          the policy file; carries every fault found
    ├── KeyMissingError      no key is stored under the configured name
    ├── KeyMismatchError     the key is not one that this vault knows
    ├── RecoveryOpenError    whether there is a recovery key was neither confirmed nor declined
    └── InsecureKeyError     the key's store is not one that keeps a secret

The exit codes are those of sysexits(3); 1 is used by the command line alone, for "some
items failed". They are part of the interface and never change their meaning.

A message is one lower-case sentence without a final stop: what happened and why. The
remedy goes into ``hint``. Neither ever contains a key, a password or plaintext.
"""

from __future__ import annotations

from typing import ClassVar


class SecimgError(Exception):
    """Base of all errors of this package.

    ``exit_code`` is what the command line exits with. ``retryable`` says whether the same
    operation can succeed later without anybody changing the policy or the key. ``hint`` is
    the next thing to do, or an empty string.
    """

    exit_code: ClassVar[int] = 70
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        """Keep the sentence that says what happened, and the remedy."""
        super().__init__(message)
        self.hint = hint


class UsageError(SecimgError):
    """The command line asks for something that makes no sense."""

    exit_code = 64


class TamperedError(SecimgError):
    """Sealed data does not authenticate: wrong key or password, damaged, or not ours.

    Deliberately one error for every cryptographic failure, so that nothing can be learnt
    by asking repeatedly which check failed.
    """

    exit_code = 65


class NotAnImageError(SecimgError):
    """Bytes that were to be an image are not one that can be recognised."""

    exit_code = 65


class NoInputError(SecimgError):
    """A file that was named does not exist, or is not a regular file."""

    exit_code = 66


class CannotCreateError(SecimgError):
    """An output exists already, or its place cannot be written."""

    exit_code = 73


class StorageError(SecimgError):
    """The operating system failed a read or a write."""

    exit_code = 74
    retryable = True


class NotReadyError(SecimgError):
    """The surroundings are not ready. Pauses a folder and burns no attempt of any job."""

    exit_code = 75
    retryable = True


class DiskFullError(NotReadyError):
    """The vault has less free space than the object and the policy's reserve need."""


class FolderGoneError(NotReadyError):
    """A watched folder vanished, was replaced, or was mounted over."""


class VaultGoneError(NotReadyError):
    """A vault is not there: not made yet, removed, replaced, or not mounted."""


class KeyUnavailableError(NotReadyError):
    """The key is locked away, or the service that keeps it does not answer."""


class AlreadyRunningError(NotReadyError):
    """Another process holds the state directory or the vault."""


class QueueError(SecimgError):
    """The queue's database fails. The process ends; the next one finds everything on disk.

    Not a `NotReadyError`: no folder alone could be paused for it.
    """

    exit_code = 75
    retryable = True


class ChangedInHandError(SecimgError):
    """A picture was changed, replaced or removed while it was being sealed."""

    exit_code = 75
    retryable = True


class NotAllowedError(SecimgError):
    """The operating system refused for lack of permission."""

    exit_code = 77
    retryable = True


class ConfigError(SecimgError):
    """Policy or key must be corrected by a person before anything can go on."""

    exit_code = 78


class PolicyError(ConfigError):
    """The policy file cannot be used. ``faults`` lists every fault, each one a sentence."""

    def __init__(self, message: str, *, faults: tuple[str, ...] = (), hint: str = "") -> None:
        """Keep the list of faults beside the summary."""
        super().__init__(message, hint=hint)
        self.faults = faults


class KeyMissingError(ConfigError):
    """No key is stored under the configured name."""


class KeyMismatchError(ConfigError):
    """The key is not one that this vault knows; nothing was encrypted or deleted."""


class RecoveryOpenError(ConfigError):
    """A recovery key was neither confirmed nor declined; nothing is deleted until it is."""


class InsecureKeyError(ConfigError):
    """The key's store does not keep a secret: refused."""
