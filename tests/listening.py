"""Where a process and all that it has started listen, as Linux tells it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"


def listening(process_id: int) -> set[tuple[int, str]]:
    """Port and IP address of every TCP socket on which the process or a descendant of it listens."""
    sockets = {inode for one in _family(process_id) for inode in _sockets(one)}
    found = set()
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    for table in (table for table in tables if table.exists()):  # the second is not, where IPv6 is off
        for line in table.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in sockets:
                address, _, port = fields[1].partition(":")
                found.add((int(port, 16), _address(address)))
    return found


def elsewhere(process_id: int) -> set[tuple[int, str]]:
    """Of `listening`, what others than this machine can reach."""
    loopback = ("127.", "::1", "::ffff:127.")
    return {(port, ip) for port, ip in listening(process_id) if not ip.startswith(loopback)}


def _family(process_id: int) -> Iterator[int]:
    yield process_id
    for task in Path(f"/proc/{process_id}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has ended
            continue
        for child in children:
            yield from _family(int(child))


def _sockets(process_id: int) -> Iterator[str]:
    try:
        handles = os.listdir(f"/proc/{process_id}/fd")
    except OSError:
        return
    for handle in handles:
        try:
            target = os.readlink(f"/proc/{process_id}/fd/{handle}")
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]


def _address(text: str) -> str:
    """Hexadecimal, in words of 32 bits in the machine's byte order."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
