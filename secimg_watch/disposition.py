"""What becomes of an inspected file. A rule only: no disk, no clock."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from secimg_watch.records import Inspection, Label

if TYPE_CHECKING:
    from secimg_watch.policy import Folder


class Disposition(Enum):
    """Seal it, leave it where it is, or set it aside for a person to look at."""

    SEAL = "encrypt"
    LEAVE = "leave"
    QUARANTINE = "quarantine"


def is_indifferent(policy: Folder) -> bool:
    """Whether a file is sealed whatever is in it, and nothing of its content is shown.

    Then no decoder has to look at it: that is cheaper, and a hostile picture meets none.
    """
    seals_all = policy.not_image == policy.undecodable == Disposition.SEAL.value
    return seals_all and policy.preview == 0


def disposition(policy: Folder, inspection: Inspection) -> Disposition:
    """What the policy wants done with a file of which the inspector says this.

    A format that ``formats`` does not list is treated as no image of ours. What could not be
    inspected at all may be anything, a picture too: it is sealed, as nothing private may be left
    in clear because a decoder crashed on it.
    """
    if inspection.label is Label.UNINSPECTED:
        return Disposition.SEAL
    listed = policy.formats == "any" or inspection.format in policy.formats
    if inspection.label is Label.NOT_IMAGE or not listed:
        return Disposition(policy.not_image)
    if inspection.label is Label.UNDECODABLE:
        return Disposition(policy.undecodable)
    return Disposition.SEAL
