"""A helper of an earlier version; run as `python -m tests.old_helper`."""

from __future__ import annotations

import os
import socket
import sys
import time

from whisperd.protocol.channel import Channel
from whisperd.protocol.frames import MAX_REPLY_BYTES
from whisperd.protocol.helper_messages import HelperHello, to_wire

if __name__ == "__main__":
    channel = Channel(socket.socket(fileno=int(sys.argv[2])), max_bytes=MAX_REPLY_BYTES)
    channel.send(to_wire(HelperHello(role="odd", version="0.0.1", pid=os.getpid())))
    while channel.socket.recv(1):
        time.sleep(0)
