"""The record around every event of an event file: ``length, crc(length), payload, crc(payload)``.

The checksum is CRC-32C, masked as TFRecord masks it. tensorboard's own, in pure Python, takes
1.6 ms for 8 kB; this one takes 55 µs, and google-crc32c, where it is installed, 0.6 µs.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["FRAME", "crc32c", "pack", "unpack"]

FRAME = 16  # bytes around a payload
_CHUNK = 256
_POLYNOMIAL = 0x82F63B78


def _tables() -> tuple[list[int], NDArray[np.uint32]]:
    """Return the byte table, and ``(256, 256)``: what byte b at place k of a chunk adds."""
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    step = np.array(table, np.uint32)
    places = np.empty((_CHUNK, 256), np.uint32)
    row = step
    for k in range(_CHUNK - 1, -1, -1):
        places[k] = row
        row = (row >> np.uint32(8)) ^ step[row & np.uint32(255)]
    return table, places


_TABLE, _PLACES = _tables()
_FLAT = _PLACES.ravel()
_S0, _S1, _S2, _S3 = (_PLACES[k].tolist() for k in range(4))
_OFFSETS = (np.arange(_CHUNK) * 256).astype(np.intp)


def _crc32c(data: bytes) -> int:
    crc, full = 0xFFFFFFFF, len(data) // _CHUNK
    if full:
        chunks = np.frombuffer(data, np.uint8, full * _CHUNK).reshape(full, _CHUNK)
        # A chunk's own part is independent of the checksum so far, which touches 4 bytes only.
        for part in np.bitwise_xor.reduce(_FLAT[chunks + _OFFSETS], axis=1).tolist():
            crc = (
                _S0[crc & 255] ^ _S1[crc >> 8 & 255] ^ _S2[crc >> 16 & 255] ^ _S3[crc >> 24] ^ part
            )
    for byte in data[full * _CHUNK :]:
        crc = _TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


try:
    from google_crc32c import value as crc32c  # pyright: ignore[reportMissingImports]
except ImportError:
    crc32c = _crc32c


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def pack(payload: bytes) -> bytes:
    """Return ``payload`` as one record."""
    length = struct.pack("<Q", len(payload))
    return length + _masked(length) + payload + _masked(payload)


def unpack(file: BinaryIO, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the payloads in ``file`` from byte ``at`` on, each with the position of its first byte.

    Stops before a tail that is torn or filled with zeros: it may be whole the next time.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(at)
    while at + FRAME <= end:
        header, masked = file.read(8), file.read(4)
        (length,) = struct.unpack("<Q", header)
        after = at + FRAME + length
        if after > end or masked != _masked(header):
            return
        payload, masked = file.read(length), file.read(4)
        # A disk that filled up, or a machine that died, spoils the end of a file.
        if after == end and masked != _masked(payload):
            return
        yield at + 12, payload
        at = after
