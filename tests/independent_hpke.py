"""Recipients, as docs/format.md has them: identities, ids, and opening a root key by HPKE."""

from __future__ import annotations

from base64 import b32decode, b32encode, urlsafe_b64decode, urlsafe_b64encode
from hashlib import sha3_256, sha256, shake_256
from hmac import digest

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

WHITE = " \t\n\v\f\r"


def decrypt(key: bytes, nonce: bytes, sealed: bytes) -> bytes | None:  # Conventions
    try:
        return AESGCM(key).decrypt(nonce, sealed, None)
    except InvalidTag:
        return None


def seed_of(text: str) -> bytes:  # Recipients, "Text of an identity"
    prefix, encoded = text[:18], text[18:]
    plain = b32decode(encoded + "======")
    checksum = sha256(prefix.encode() + plain[:32]).digest()[:4]
    canonical = b32encode(plain).decode().rstrip("=") == encoded
    if prefix != "SECIMG-IDENTITY-1:" or not canonical or plain[32:] != checksum:
        raise ValueError("not an identity")
    return plain[:32]


def put_right(typed: str) -> str:  # Recipients, "Both are canonical"
    if not typed.isascii():
        raise ValueError("not ASCII")
    head, colon, tail = typed.upper().strip(WHITE).partition(":")
    return head + colon + "".join(character for character in tail if character not in WHITE + "-")


def seeds_in(file: bytes) -> list[bytes]:  # Recipients, "Identity file"
    lines = [line.strip(WHITE) for line in file.decode("ascii").split("\n")]
    seeds = [seed_of(put_right(line)) for line in lines if line and not line.startswith("#")]
    if not seeds or len(file) > 65_536:
        raise ValueError("no identity, or too much")
    return seeds


def public_key_of(text: str) -> bytes:  # Recipients, "Text of a recipient"
    prefix, encoded = text[:19], text[19:]
    plain = urlsafe_b64decode(encoded + "=")
    checksum = sha256(prefix.encode() + plain[:1216]).digest()[:4]
    canonical = urlsafe_b64encode(plain).decode().rstrip("=") == encoded
    if prefix != "secimg-recipient-1:" or not canonical or plain[1216:] != checksum:
        raise ValueError("not a recipient")
    MLKEM768PublicKey.from_public_bytes(plain[:1184])  # "Encapsulation": both raise ValueError
    X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(plain[1184:1216]))
    return plain[:1216]


def key_pair(seed: bytes) -> tuple[MLKEM768PrivateKey, X25519PrivateKey, bytes]:  # Recipients
    stream = shake_256(seed).digest(96)
    dk_m = MLKEM768PrivateKey.from_seed_bytes(stream[:64])
    x = X25519PrivateKey.from_private_bytes(stream[64:])
    return dk_m, x, dk_m.public_key().public_bytes_raw() + x.public_key().public_bytes_raw()


def id_of(public: bytes) -> bytes:  # Derivations
    return sha256(b"secimg-watch/v1/recipient\0" + public).digest()[:16]


def recipient_id(seed: bytes) -> bytes:
    return id_of(key_pair(seed)[2])


def hpke_open(slot: bytes, core: bytes, seed: bytes) -> bytes | None:  # Recipients
    (dk_m, x, public), ct_m, ct_x = key_pair(seed), slot[20:1108], slot[1108:1140]
    try:
        ss_x = x.exchange(X25519PublicKey.from_public_bytes(ct_x))
    except ValueError:  # it would be all zeros
        return None
    secrets = dk_m.decapsulate(ct_m) + ss_x
    ss = sha3_256(secrets + ct_x + public[1184:] + bytes.fromhex("5c2e2f2f5e5c")).digest()
    prefix = b"HPKE-v1HPKE" + bytes.fromhex("647a00010002")
    info = b"secimg-watch/v1/recipient-slot\0" + slot[:20] + core

    def extract(salt: bytes, label: bytes, ikm: bytes) -> bytes:
        return digest(salt, prefix + label + ikm, "sha256")

    def expand256(label: bytes, length: int) -> bytes:  # up to 32 bytes it is one HMAC
        text = length.to_bytes(2) + prefix + label + context + b"\1"
        return digest(extract(ss, b"secret", b""), text, "sha256")[:length]

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    return decrypt(expand256(b"key", 32), expand256(b"base_nonce", 12), slot[1140:1188])
