"""What a PNG, JPEG or WebP file holds besides its pixels, read byte by byte.

It shares no code and no library with the app: struct, zlib's checksum and an XML parser.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from xml.etree import ElementTree

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
TYPE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
TOOL = "{http://ns.adobe.com/xap/1.0/}CreatorTool"
PACKET = b"http://ns.adobe.com/xap/1.0/\0"
"""What the segment of a JPEG begins with that holds the packet."""

REQUEST, LEFT_OUT = "{urn:instep:}Request", "{urn:instep:}LeftOut"


def properties(data: bytes) -> dict[str, str]:
    """The XMP properties of a file by {namespace}name. Asserts that it is well made."""
    packets = {b"\x89PNG": png_xmp, b"\xff\xd8\xff\xe0": jpeg_xmp, b"RIFF": webp_xmp}[data[:4]](data)
    found: dict[str, str] = {}
    for packet in packets:
        for description in ElementTree.fromstring(packet.decode()).iter(f"{RDF}Description"):
            found |= {value.tag: value.text or "" for value in description}
    return found


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, body) of each chunk of a PNG; asserts the signature, the checksums, the order and that nothing follows."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    found, place = [], 8
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", data, place + 8 + length)[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        place += 12 + length
    assert (found[0][0], found[-1]) == (b"IHDR", (b"IEND", b""))
    return found


def png_xmp(data: bytes) -> Iterator[bytes]:
    for kind, body in chunks(data):
        if kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
            assert body[18:22] == b"\0\0\0\0"  # not compressed, no language, no translated keyword
            yield body[22:]


def segments(data: bytes) -> list[tuple[int, bytes]]:
    """(marker, body) of the segments of a JPEG before its scan."""
    assert data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9"
    found, place = [], 2
    while True:
        start, marker, length = struct.unpack_from(">BBH", data, place)
        assert start == 0xFF
        found.append((marker, data[place + 4 : place + 2 + length]))
        place += 2 + length
        if marker == 0xDA:
            return found


def jpeg_xmp(data: bytes) -> Iterator[bytes]:
    """The one packet."""
    bodies = [body for marker, body in segments(data) if marker == 0xE1]
    (packet,) = [body[len(PACKET) :] for body in bodies if body.startswith(PACKET)]
    yield packet


def webp_xmp(data: bytes) -> Iterator[bytes]:
    """The XMP chunk, which the flags of VP8X have to announce."""
    assert (data[:4], data[8:12]) == (b"RIFF", b"WEBP")
    assert struct.unpack_from("<I", data, 4)[0] == len(data) - 8
    place, flags = 12, 0
    while place < len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        body = data[place + 8 : place + 8 + length]
        if kind == b"VP8X":
            flags = body[0]
        elif kind == b"XMP ":
            assert flags & 0b100
            yield body
        place += 8 + length + length % 2
