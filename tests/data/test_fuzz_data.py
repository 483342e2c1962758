"""Random damage to data: shards, pictures and tables load or are refused in one line, and no other file is written.

`PRUNEKIT_FUZZ=30 pytest tests/data/test_fuzz_data.py` tries 300 files of each of 18 kinds.
"""

import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import data_layouts
import pytest
from damaged_files import BLOCK, pax, png_chunk, sample_members, saved, tar_member, with_checksum
from fuzz_figures import Figures, shown
from fuzzing import TIMEOUT, forked, fuzzed, measured
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prunekit.data.config import DataConfig, load_data
from prunekit.data.picture_files import decode, fault
from prunekit.runtime.errors import UserError

EXAMPLES = 6  # per kind
pytestmark = [TIMEOUT, pytest.mark.filterwarnings("ignore")]  # Pillow warns about the damage

TOKENS = (  # bytes that often confuse parsers
    b"\0",
    b"\xff\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b"\xed\xa0\x80",
    b'"',
    b"\r\n",
    b",",
    b"../",
    b"/dev/zero",
    b"GNU.sparse.map=",
    b"Exif\0\0",
    b"II*\0\x08\0\0\0\xff",
)
VALUES = (  # JSON values that replace a value of a table
    b"5",
    b"-1e999",
    b"9" * 5000,
    b"null",
    b"{}",
    b"[1]",
    b"[" * 5000 + b"]" * 5000,
    b'""',
    b'"/dev/zero"',
    b'"a\\ud800b"',
    b'"a\\u0000b"',
    b'"\xed\xa0\x80"',
)
JSON_VALUE = re.compile(rb'(?<=": )(?:"[^"\n]*"|\d+|\[[^\[\]{}]*\])')
FIELD = re.compile(rb"[^,\t\r\n]+")  # a field of CSV and TSV


@st.composite
def damage(draw, content: bytes, header: int = 0) -> bytes:
    """Overwrite, insert, drop and repeat bytes of a file at 1 to 3 places; the first `header` bytes stay."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(min(header, len(damaged)), len(damaged)))
        length = draw(st.sampled_from((1, 2, 4, 12, 100, 600)))
        new = draw(st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=3))
        kind = draw(st.sampled_from((*["overwrite"] * 5, "insert", "drop", "repeat")))
        if kind == "overwrite":
            damaged[start : start + len(new)] = new
        elif kind == "insert":
            damaged[start:start] = new
        elif kind == "drop":
            del damaged[start : start + length]
        else:
            damaged[start:start] = damaged[start : start + length]
    return bytes(damaged)


@st.composite
def damaged_table(draw, content: bytes) -> bytes:
    """Replace 1 to 3 values of a table by unexpected values, or damage it as `damage` does."""
    if draw(st.booleans()):
        return draw(damage(content))
    is_json = content[:1] in b"{["
    places = [found.span() for found in (JSON_VALUE if is_json else FIELD).finditer(content)]
    chosen = draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique=True))
    for start, stop in sorted(chosen, reverse=True):
        value = draw(st.sampled_from(VALUES))
        content = content[:start] + (value if is_json else value.strip(b'"')) + content[stop:]
    return content


def with_checksums(content: bytes) -> bytes:
    """Correct the checksums of all tar headers, so that damaged headers are read."""
    blocks = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
    return b"".join(with_checksum(block) if block[257:262] == b"ustar" else block for block in blocks)


def with_sums_of_chunks(content: bytes) -> bytes:
    """Correct the checksums of a PNG's chunks, so that damaged chunks are read."""
    position, parts = 8, [content[:8]]
    while position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        if position + 12 + length > len(content):
            break
        kind, body = content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        parts.append(png_chunk(kind, body))
        position += 12 + length
    return b"".join(parts) + content[position:]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


SETS, DECODED = Figures("data sets"), Figures("pictures")
figures = shown(SETS, DECODED)


@cache
def seconds_of(whole: Callable) -> float:
    """Return the CPU time of work on undamaged input."""
    whole()  # imports all modules
    outcome = forked(whole, 60)
    assert outcome.kind == "done", outcome.value
    return outcome.seconds


def load(root: Path, config: DataConfig) -> bool:
    """Load the data set at `root`/data, and decode its pictures."""
    paths = {"path": str(root / "data" / (config.path or "")), "report": str(root / "bad.jsonl")}
    home = Path.cwd()
    os.chdir(root / "work")
    try:
        data = load_data(config.model_copy(update=paths), seed=0)
        data.pixels(range(data.num_images), 8)
        assert all(caption == caption.strip() != "" and caption.encode() for caption in data.captions)
        return True
    finally:
        os.chdir(home)


@contextmanager
def written(write: Callable) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "work").mkdir()
        write(Path(folder) / "data")
        yield Path(folder)


def load_whole(write: Callable, config: DataConfig) -> bool:
    with written(write) as root:
        return load(root, config)


def look(content: bytes, write: Callable, whole: Callable, config: DataConfig) -> bool:
    """Load a data set that `write(folder)` writes, decode its pictures, and return whether this succeeded.

    The check fails unless the outcome is success or a one-line error, and no file but the report is changed.
    content: the damaged part, shown with a fault. whole: function that loads the undamaged data set.
    """
    seconds = seconds_of(whole)
    with written(write) as root, SETS.case(content):
        before = files_below(root)
        outcome = measured(lambda: load(root, config), seconds)
        SETS.check(outcome, seconds, [str(root)])
        after = files_below(root)
        report = after.pop(str(root / "bad.jsonl"), b"").decode()
        assert after == before
        assert all(set(json.loads(line)) == {"sample", "file", "reason", "captions"} for line in report.splitlines())
    return outcome.kind == "done"


SAMPLES = data_layouts.samples(4)
SHARD = b"".join(
    (
        sample_members("0", *SAMPLES[0]),
        pax(path="long/1.jpg") + tar_member("1.jpg", SAMPLES[1][0]),
        tar_member("x", b"long/1.txt\0", tarfile.GNUTYPE_LONGNAME) + tar_member("1.txt", b"caption"),
        pax(tarfile.XGLTYPE, comment="of all"),
        sample_members("2", *SAMPLES[2]),
        pax(GNU_sparse_map="0,1", GNU_sparse_size="1") + tar_member("s.txt", b"content"),
        sample_members("3", *SAMPLES[3]),
        bytes(2 * BLOCK),
    )
)
SHARES = st.sampled_from((0.0, 0.5, 1.0))


def write_shard(content: bytes, folder: Path) -> None:
    folder.mkdir()
    (folder / "0.tar").write_bytes(content)


SHARD_CONFIG = DataConfig(kind="webdataset", max_bad_share=0.3, verify=True)
WHOLE_SHARD = partial(load_whole, partial(write_shard, with_checksums(SHARD)), SHARD_CONFIG)


@fuzzed(EXAMPLES)
@given(damage(SHARD), st.booleans(), SHARES, st.booleans())
def test_a_damaged_shard_loads_or_is_refused(content, mended, share, verify):
    content = with_checksums(content) if mended else content
    config = DataConfig(kind="webdataset", max_bad_share=share, verify=verify)
    look(content, partial(write_shard, content), WHOLE_SHARD, config)


WORDS = json.dumps({"name": "a name", "keywords": ["one", "two"]}).encode()
EMOJI_CONFIG = DataConfig(kind="emoji")


def write_emoji(words: bytes, folder: Path) -> None:
    parts = ((".jpg", SAMPLES[0][0]), (".txt", b"caption"), (".json", words))
    members = [(f"{number}{suffix}", part) for number in range(2) for suffix, part in parts]
    data_layouts.write_tar(folder / "0.tar", members)


WHOLE_EMOJI = partial(load_whole, partial(write_emoji, WORDS), EMOJI_CONFIG)


@fuzzed(EXAMPLES)
@given(damaged_table(WORDS))
def test_a_damaged_emoji_shard_loads_or_is_refused(words):
    look(words, partial(write_emoji, words), WHOLE_EMOJI, EMOJI_CONFIG)


def pictures() -> dict[str, bytes]:
    ramp = Image.linear_gradient("L").resize((24, 16))
    color = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = color.copy()
    seen.putalpha(ramp)
    palette = color.convert("P", palette=Image.Palette.ADAPTIVE)
    return {
        "jpeg": saved(color, "jpeg", exif=exif, quality=90),
        "progressive jpeg": saved(color, "jpeg", progressive=True),
        "cmyk jpeg": saved(color.convert("CMYK"), "jpeg"),
        "png": saved(seen, "png", exif=exif),
        "palette png": saved(palette, "png", transparency=3),
        "webp": saved(color, "webp", exif=exif),
        "lossless webp": saved(seen, "webp", lossless=True),
        "gif": saved(palette, "gif", save_all=True, append_images=[palette.rotate(90)]),
        "tiff": saved(color, "tiff", compression="tiff_deflate", exif=exif),
        "16-bit tiff": saved(ramp.convert("I;16"), "tiff"),
        "bmp": saved(color, "bmp"),
    }


def decode_or_refuse(encoded: bytes) -> bool:
    """Decode a picture; check that `fault` agrees with the outcome, and return whether it succeeded."""
    reason = fault(encoded)
    try:
        assert decode(encoded, 8).shape == (3, 8, 8) and reason is None
        return True
    except UserError as error:
        assert str(error) == reason and len(reason.splitlines()) == 1 and reason.encode()
        return False


PICTURES = pictures()
WHOLE_PICTURES = {kind: partial(decode_or_refuse, encoded) for kind, encoded in PICTURES.items()}


@fuzzed(EXAMPLES)
@given(st.data(), st.booleans())
@pytest.mark.parametrize("kind", PICTURES)
def test_a_damaged_picture_is_decoded_or_refused(kind, data, mended):
    encoded = data.draw(damage(PICTURES[kind], header=40 if mended else 0))  # the header identifies the format
    encoded = with_sums_of_chunks(encoded) if mended and "png" in kind else encoded
    seconds = seconds_of(WHOLE_PICTURES[kind])
    with DECODED.case(encoded):
        DECODED.check(measured(lambda: decode_or_refuse(encoded), seconds), seconds, [])


TABLES = {  # function that writes a data set, and its file that is damaged
    "jsonl": (data_layouts.folder_jsonl, "metadata.jsonl"),
    "metadata.csv": (data_layouts.folder_csv, "metadata.csv"),
    "csv": (data_layouts.csv_table, "table.csv"),
    "tsv": (data_layouts.cc3m_tsv, "Train_GCC-training.tsv"),
    "coco": (data_layouts.coco, "annotations/captions_val2014.json"),
}


@cache
def whole_table(kind: str) -> tuple[DataConfig, bytes, Callable]:
    """Return a data set's config, the content of the file to damage, and a function that loads the undamaged set."""
    write, name = TABLES[kind]
    with tempfile.TemporaryDirectory() as folder:
        given = write(Path(folder) / "data", SAMPLES)
        content = (Path(folder) / "data" / name).read_bytes()
        start = str(Path(folder) / "data")
    given["path"] = given["path"].removeprefix(start).lstrip("/") or None
    config = DataConfig(**given, verify=True)
    return config, content, partial(load_whole, lambda target: write(target, SAMPLES), config)


@fuzzed(EXAMPLES)
@given(st.data(), SHARES, st.booleans())
@pytest.mark.parametrize("kind", TABLES)
def test_a_damaged_table_loads_or_is_refused(kind, data, share, verify):
    config, undamaged, whole = whole_table(kind)
    content = data.draw(damaged_table(undamaged))

    def write(folder: Path) -> None:
        TABLES[kind][0](folder, SAMPLES)
        (folder / TABLES[kind][1]).write_bytes(content)

    look(content, write, whole, config.model_copy(update={"max_bad_share": share, "verify": verify}))


def test_what_is_not_damaged_loads():
    shard = with_checksums(SHARD)
    assert look(shard, partial(write_shard, shard), WHOLE_SHARD, SHARD_CONFIG)
    assert all(fault(encoded) is None for encoded in PICTURES.values())
    assert with_sums_of_chunks(PICTURES["png"]) == PICTURES["png"]
