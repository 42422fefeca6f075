"""A helper that does what its test asks for. `CopyIn.folder` is the command; run as `python -m tests.odd_helper`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from whisperd import __version__
from whisperd.protocol import helper_messages
from whisperd.protocol.channel import Channel
from whisperd.protocol.frames import MAX_REPLY_BYTES
from whisperd.protocol.helper_messages import Copied, CopyIn, Failed, Finished, HelperHello, to_wire
from whisperd.protocol.helpers import HelperLink, start


def obey(link: HelperLink, message: CopyIn, descriptors: list[int]) -> None:
    """Carry out one command."""
    number = {"run": message.run, "generation": message.generation}
    command, _, argument = message.folder.partition(" ")
    if command == "read":
        text = os.pread(descriptors[0], 100, 0).decode()
        link.send(Copied(**number, sha256=text, size_bytes=len(descriptors)))
    elif command == "settings":
        link.send(Failed(**number, code="settings", message=str(link.settings["colour"])))
    elif command == "nice":
        link.send(Failed(**number, code="nice", message=str(os.nice(0))))
    elif command == "environment":
        link.send(Failed(**number, code="environment", message=",".join(sorted(os.environ))))
    elif command == "descriptors":
        open_ones = [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
        link.send(Failed(**number, code="descriptors", message=",".join(open_ones)))
    elif command == "finish":
        link.send(Finished(**number, transcript=b"t" * int(argument)))
    elif command == "exit":
        link.send(Failed(**number, code="last", message="words"))
        os._exit(int(argument))
    elif command == "signal":
        os.kill(os.getpid(), int(argument))
    elif command == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif command == "garbage":
        link._channel.socket.sendall(b"\0\0\0\1\xc1")
    elif command == "unknown":
        link._channel.send({"type": "Surprise"})
    for fd in descriptors:
        os.close(fd)


def main() -> None:
    """Say hello and obey, or, where the environment says so, begin wrongly."""
    wrong = os.environ.get("ODD_START")
    if wrong:
        channel = Channel(socket.socket(fileno=int(sys.argv[2])), max_bytes=MAX_REPLY_BYTES)
        if wrong == "exit":
            sys.exit(7)
        first: helper_messages.HelperMessage = Failed(run=1, generation=1, code="x", message="no hello")
        if wrong == "version":
            first = HelperHello(role="odd", version="0.0.1", pid=os.getpid())
        elif wrong == "hang-up":
            first = HelperHello(role="odd", version=__version__, pid=os.getpid())
        channel.send(to_wire(first))
        if wrong == "hang-up":
            channel.socket.shutdown(socket.SHUT_WR)
        time.sleep(3600)
    link = start("odd")
    while True:
        message, descriptors = link.next()
        assert isinstance(message, CopyIn), message
        obey(link, message, descriptors)


if __name__ == "__main__":
    main()
