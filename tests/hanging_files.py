"""A file system of one file, `talk`, that stops answering when it is told to (FUSE; needs root and /dev/fuse).

Run as `python tests/hanging_files.py FOLDER FLAG`: mounts itself on FOLDER, and is mute once the file FLAG exists.
The protocol is that of linux/fuse.h, in its oldest shape that today's kernels speak.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 18, 25, 26
_ROOT, _FILE = 1, 2
_SIZE_BYTES = 1000


def _attributes(node: int) -> bytes:
    mode = 0o40755 if node == _ROOT else 0o100644
    return struct.pack("<6Q10I", node, _SIZE_BYTES, 2, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def _answer(operation: int, node: int) -> bytes | None:
    """Return what an operation is answered with, nothing kept in the kernel's caches; None where it is unknown."""
    if operation == INIT:
        return struct.pack("<4I2H2I2H8I", 7, 31, 65536, 0, 12, 10, 65536, 1, 0, 0, *[0] * 8)
    if operation == LOOKUP:
        return struct.pack("<4Q2I", _FILE, 0, 0, 0, 0, 0) + _attributes(_FILE)
    if operation == GETATTR:
        return struct.pack("<Q2I", 0, 0, 0) + _attributes(node)
    if operation == OPEN:
        return struct.pack("<Q2I", 1, 0, 0)
    if operation == READ:
        return b"x" * 100
    return b"" if operation in (FLUSH, RELEASE) else None


def serve(folder: str, flag: str) -> None:
    """Mount and answer until the process is killed, which makes all that waits fail."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"hanging", folder.encode(), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    while True:
        _, operation, unique, node = struct.unpack_from("<2I2Q", os.read(device, 1 << 20))
        if operation == FORGET or os.path.exists(flag):
            continue
        body = _answer(operation, node)
        error = -38 if body is None else 0  # ENOSYS
        os.write(device, struct.pack("<IiQ", 16 + len(body or b""), error, unique) + (body or b""))


if __name__ == "__main__":
    serve(*sys.argv[1:])
