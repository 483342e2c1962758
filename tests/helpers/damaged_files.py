"""Bytes of damaged or hostile files: tar headers with any field, PNG pictures of any size, text that is not UTF-8."""

import io
import struct
import tarfile
import zlib

from PIL import Image

BLOCK = tarfile.BLOCKSIZE
NOT_UTF8 = b"\xed\xa0\x80"  # how the lone surrogate U+D800 would be written


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a tar header with a valid checksum and any value of `size`."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT)


def with_checksum(block: bytes) -> bytes:
    """Return a tar header with its checksum corrected."""
    total = sum(block[:148]) + sum(block[156:BLOCK]) + 8 * ord(" ")
    return block[:148] + b"%06o\0 " % total + block[156:]


def tar_member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return tar_header(name, len(content), kind) + content + bytes(-len(content) % BLOCK)


def pax(kind: bytes = tarfile.XHDTYPE, **fields: str) -> bytes:
    """Return a PAX header of the next member; underscores in the names become dots."""
    records = b""
    for key, value in fields.items():
        record = f" {key.replace('_', '.')}={value}\n".encode()
        length = len(record) + 1
        while length != len(str(length)) + len(record):  # a record's length counts its own digits
            length += 1
        records += str(length).encode() + record
    return tar_member("pax", records, kind)


def sample_members(key: str, image: bytes, caption: str) -> bytes:
    return tar_member(f"{key}.jpg", image) + tar_member(f"{key}.txt", caption.encode())


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, bits: int = 8, color: int = 0) -> bytes:
    """Return a PNG. rows: uncompressed data, each row after its filter byte. color: 0 is gray, 2 is RGB."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
