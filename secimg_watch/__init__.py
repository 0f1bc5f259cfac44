"""Watches folders, seals arriving images into an encrypted vault, deletes the plaintext.

As a library it offers the classic calls of a password-based image encryptor::

    image_data = image_to_bytes("example.png")
    encrypted_data, tag, iv, salt = encrypt_image(image_data, password)
    decrypted = decrypt_image(encrypted_data, tag, iv, salt, password)
    bytes_to_image(decrypted, "out.png")

The service is the command ``secimg-watch``; see the documentation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secimg_watch.errors import NotAnImageError, SecimgError, TamperedError

if TYPE_CHECKING:
    from secimg_watch.classic import decrypt_image, encrypt_image, generate_key
    from secimg_watch.images import bytes_to_image, image_to_bytes

__version__ = "0.1.0"

__all__ = [
    "NotAnImageError",
    "SecimgError",
    "TamperedError",
    "bytes_to_image",
    "decrypt_image",
    "encrypt_image",
    "generate_key",
    "image_to_bytes",
]


def __getattr__(name: str) -> Any:
    """Load the calls when they are asked for: the inspector's child must never load them."""
    from importlib import import_module  # noqa: PLC0415 - as the calls themselves

    if name in __all__:
        module = "images" if name in {"bytes_to_image", "image_to_bytes"} else "classic"
        return getattr(import_module(f"secimg_watch.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
