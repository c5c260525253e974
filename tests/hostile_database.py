"""Something that answers at the database's address and is none: it speaks PostgreSQL's protocol 3.0 as it likes."""

import socket
import struct
import threading
from contextlib import contextmanager, suppress
from typing import BinaryIO

OBEYED = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202egnp\u2066\u200f\r\x08"
"""What a terminal would obey: it fills the clipboard, clears the screen, and turns the text around."""

SSL, GSS = 80_877_103, 80_877_104


def _message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("!i", len(content) + 4) + content


def _told(kind: bytes, state: str, text: str) -> bytes:
    fields = {"S": f"FATAL{OBEYED}", "V": "FATAL", "C": state, "M": text, "D": text, "H": text, "W": text}
    written = b"".join(name.encode() + value.encode() + b"\0" for name, value in fields.items())
    return _message(kind, written + b"\0")


NOTICE = _told(b"N", "01000", f"note {OBEYED}")
READY = _message(b"Z", b"I")


def _welcome(version: str) -> bytes:
    settings = {"server_version": version, "client_encoding": "UTF8", "standard_conforming_strings": "on"}
    told = b"".join(_message(b"S", name.encode() + b"\0" + value.encode() + b"\0") for name, value in settings.items())
    return _message(b"R", struct.pack("!i", 0)) + NOTICE + told + NOTICE + READY


def _row(text: str) -> bytes:
    """Return one row of one text, as the answer to whatever was asked, in both ways to ask."""
    column = f"col{OBEYED}".encode() + b"\0" + struct.pack("!ihihih", 0, 0, 25, -1, -1, 0)
    value = text.encode()
    described = _message(b"T", struct.pack("!h", 1) + column)
    row = _message(b"D", struct.pack("!hi", 1, len(value)) + value)
    return described + row + _message(b"C", b"SELECT 1\0")


REFUSES = "refuses the connection"
GARBAGE = "speaks another protocol"
NO_VERSION = "has a version of its own"
REFUSES_ALL = "refuses every statement"
STATE = "has states of its own"
WAYS = (REFUSES, GARBAGE, NO_VERSION, REFUSES_ALL, STATE)


def _answer(way: str, query: bytes) -> bytes:
    if way == NO_VERSION or b"version()" in query:
        return NOTICE + _row(f"PostgreSQL {OBEYED if way == NO_VERSION else '16.1'}")
    if query.upper().startswith((b"BEGIN", b"ROLLBACK")):
        return _message(b"C", b"BEGIN\0")
    return NOTICE + _told(b"E", f"4{OBEYED}" if way == STATE else "XX000", f"no {OBEYED}")


def _serve(connection: socket.socket, way: str) -> None:
    source = connection.makefile("rb")
    while _begin(source) in {SSL, GSS}:
        connection.sendall(b"N")
    if way == REFUSES:
        connection.sendall(_told(b"E", "28000", f"no {OBEYED}"))
    elif way == GARBAGE:
        connection.sendall(f"HTTP/1.1 400 {OBEYED}\r\n\r\n".encode())
    else:
        connection.sendall(_welcome(f"x{OBEYED}" if way == NO_VERSION else "16.1"))
        asked = b""
        while (kind := source.read(1)) not in {b"", b"X"}:
            (length,) = struct.unpack("!i", source.read(4))
            content = source.read(length - 4)
            asked = content if kind == b"Q" else content.split(b"\0")[1] if kind == b"P" else asked
            connection.sendall(_answer(way, asked) if kind in b"QE" else _DONE.get(kind, b""))
            connection.sendall(READY if kind in b"QS" else b"")


_DONE = {b"P": _message(b"1", b""), b"B": _message(b"2", b"")}


def _begin(source: BinaryIO) -> int:
    length, code = struct.unpack("!ii", source.read(8))
    source.read(length - 8)
    return code


@contextmanager
def hostile_database(way: str):
    """Serve on loopback in one of the `WAYS`, and hand out the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, suppress(OSError, struct.error):
                        _serve(connection, way)

        threading.Thread(target=serve, daemon=True).start()
        yield f"postgresql://me:hunter2@127.0.0.1:{listening.getsockname()[1]}/queue"
        listening.shutdown(socket.SHUT_RDWR)
