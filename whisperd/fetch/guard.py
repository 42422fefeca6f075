"""What the fetch helper's process may reach: public addresses, and no programs but the JavaScript runtime.

Both are checked by an audit hook (PEP 578): Python calls it with what is about to happen, whichever library asks for
it, and what it raises stops that. An address is looked at where it is connected to, after every redirect and every
look-up of a name, so neither a redirect nor a name that points into the house gets by.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable, Collection
from typing import Any

from whisperd.protocol.errors import ErrorCode, WhisperdError

# Events with the socket first and the address second; a connected socket sends with the address None.
_ADDRESSED = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})
_PROGRAMS = frozenset({"subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn"})
_SHELLS = frozenset({"os.system", "os.fork", "os.forkpty", "pty.spawn"})
# RFC 6052: an IPv4 address in IPv6's clothes, which a translator on the network would take off.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Guard:
    """Refuses connections to addresses that are not `allowed`, and programs.

    `refused` is the first address that was refused.
    """

    def __init__(self, *, allowed: Callable[[Any], bool], programs: Collection[str] = ()) -> None:
        self._allowed = allowed
        self._programs = frozenset(programs)
        self.refused: str | None = None

    def install(self) -> None:
        """Watch this process from now on. There is no way back."""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _ADDRESSED:
            if arguments[1] is not None:
                self._check_address(arguments[1])
        elif event in _SHELLS or (event in _PROGRAMS and not self._is_allowed_program(arguments[0])):
            # yt-dlp looks for ffmpeg and its like, and does without them where they cannot be started.
            raise PermissionError(f"{event}: the fetch helper starts no programs")

    def _check_address(self, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if not self._allowed(host):
            self.refused = self.refused or str(host)
            # No OSError: that would be taken for a bad line, and the next address of the same name tried.
            raise forbidden_address(str(host))

    def _is_allowed_program(self, program: Any) -> bool:
        return isinstance(program, str | bytes | os.PathLike) and os.fsdecode(program) in self._programs


def is_public(host: Any) -> bool:
    """True for a literal address of the public internet.

    False for all else: private, loopback, link-local, multicast and reserved ones, addresses that carry such a one
    inside, names (they are looked up before), and Unix sockets.
    """
    if not isinstance(host, str):
        return False
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(not _is_global(carried) for carried in inner if carried is not None):
            return False
        if address.ipv4_mapped is not None:
            return True  # it is what it carries
    return _is_global(address)


def is_anything(host: Any) -> bool:
    """True: for intranets (setting fetch_allow_private)."""
    return True


def _is_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_global and not address.is_multicast and not address.is_reserved


def forbidden_address(host: str) -> WhisperdError:
    """Return the error for an address that is not of the public internet."""
    return WhisperdError(
        ErrorCode.FORBIDDEN,
        f"the address leads to {host}, which is not on the public internet: download the file and submit that, or ask "
        "an administrator for the setting fetch_allow_private",
    )
