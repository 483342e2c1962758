"""List the files in a tar archive, in time and memory proportional to the archive's size, whatever its headers say.

Python's `tarfile` decodes each header here, but this module finds the next header. In several Python versions, a
negative size makes `tarfile` loop forever (CVE-2025-8194), and many extended headers make it recurse too deeply.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)  # PAX fields of the next file, or of all
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
CONTENT = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)  # files whose content the archive stores unchanged
WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
SPARSE = "GNU.sparse."  # prefix of the PAX fields of a sparse file
MOST_HEADER_BYTES = 2**20  # per extended header
BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """One file in an archive: its content is the `size` bytes from `offset` on."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO) -> Iterator[Member]:
    r"""Yield the regular files of an uncompressed archive, in its order, up to its end mark.

    Directories, links, devices and sparse files are left out. Each header lies after the content of the member before
    it, so contents do not overlap. Bytes of a name that are not UTF-8 become `\xNN`. The caller may move the file's
    position.

    Raises:
        tarfile.ReadError: a header is damaged, the file ends within a member, or there is no end mark.

    """
    size = file.seek(0, 2)
    position = 0
    common: dict[str, str] = {}  # PAX fields of all files that follow
    next_fields: dict[str, str] = {}  # PAX fields of the next file
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if block == bytes(BLOCK):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {position:,} of {size:,}") from error
        start = position + BLOCK
        if header.type == tarfile.GNUTYPE_SPARSE:
            start = _after_sparse_map(file, block)
        extends = header.type in EXTENDED or header.type in LONG_NAMES
        fields = {} if extends else common | next_fields
        name = fields.get("path", header.name).rstrip("/")
        count = 0 if header.type in WITHOUT_CONTENT else _size(fields.get("size", header.size), name)
        if start + count > size:
            raise tarfile.ReadError(f"the file ends within {name}")
        if extends:
            extension_fields = _extension(file, header.type, count)
            (common if header.type == tarfile.XGLTYPE else next_fields).update(extension_fields)
        else:
            next_fields = {}
            if header.type in CONTENT and SPARSE not in fields:
                yield Member(name, start, count)
        position = start + -(-count // BLOCK) * BLOCK


def _size(given: int | str, name: str) -> int:
    try:
        size = int(given)
    except ValueError:
        size = -1
    if size < 0:
        raise tarfile.ReadError(f"the size of {name} is not a number of bytes")
    return size


def _after_sparse_map(file: BinaryIO, block: bytes) -> int:
    """Return the position after the blocks that continue an old GNU sparse header; the file is at the first of them."""
    more = block[482]
    while more:
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise tarfile.ReadError("the file ends within the header of a sparse file")
        more = block[504]
    return file.tell()


def _extension(file: BinaryIO, kind: bytes, size: int) -> dict[str, str]:
    """Return the fields that an extended header sets; the file is at the header's content."""
    if size > MOST_HEADER_BYTES:
        raise tarfile.ReadError(f"an extended header has {size:,} bytes, more than {MOST_HEADER_BYTES:,}")
    content = file.read(size)
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {}
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(content.partition(b"\0")[0])}
    return _pax_fields(content)


def _pax_fields(content: bytes) -> dict[str, str]:
    r"""Return the path, size and sparse fields of a PAX header (POSIX.1-2001, pax): records `LENGTH KEY=VALUE\n`."""
    fields: dict[str, str] = {}
    position = 0
    while position < len(content) and content[position]:  # zeros may follow the last record
        digits = content[position : position + 20].partition(b" ")[0]
        end = position + int(digits) if digits.isdigit() else position
        key, equals, value = content[position + len(digits) + 1 : end].partition(b"=")
        if end > len(content) or not equals or not value.endswith(b"\n"):
            raise tarfile.ReadError("a PAX header has a record that is damaged")
        if key.startswith(SPARSE.encode()):
            fields[SPARSE] = ""
        elif key in (b"path", b"size"):
            fields[key.decode()] = _text(value[:-1])
        position = end
    return fields


def _text(content: bytes) -> str:
    return content.decode("utf-8", "backslashreplace")
