"""What the inspector and its child say to each other; neither side needs a decoder for it."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from secimg_watch.records import Inspection

MESSAGE: Final = 4096
"""Largest request, hello, or JSON part of a reply, in bytes."""

MAX_PREVIEW: Final = 1 << 20
"""Largest preview in bytes; what does not fit at any quality is left out."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to do with a picture, and the worker's limits.

    Attributes:
        size: The file's length in bytes; a confined worker cannot ask for it.
        preview: Longest side of the preview in pixels, 0 for none.
        decode: Whether to decode even without a preview.
        max_pixels: Pictures with more are not decoded.
        memory: Address space in bytes.
        seconds: Time on the clock after which the worker is killed.
    """

    size: int
    preview: int
    decode: bool
    max_pixels: int
    memory: int
    seconds: float

    def to_json(self) -> bytes:
        """Encode the request as one message."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, message: bytes) -> Request:
        """Decode a message.

        Raises:
            ValueError, TypeError: The message is not a request.
        """
        return cls(**json.loads(message))


def encode_reply(found: Inspection) -> bytes:
    """Encode what was found as a reply."""
    head = json.dumps(
        {
            "label": found.label,
            "format": found.format,
            "width": found.width,
            "height": found.height,
            "detail": found.detail,
        }
    ).encode()
    return struct.pack(">I", len(head)) + head + found.preview
