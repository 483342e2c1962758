"""Damaged and hostile data give bad samples or a one-line error, never a hang, a traceback or high memory use."""

import json
import os
import re
import sys
import tarfile
from pathlib import Path

import data_layouts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaged_files import NOT_UTF8, pax, png, sample_members, saved, tar_header, tar_member, with_checksum
from data_layouts import color_of, members, pairs, picture, webdataset, write_tar
from PIL import Image

from prunekit.data.bad_samples import MOST_BYTES, DataError, printable
from prunekit.data.config import DataConfig, data_size, load_data
from prunekit.data.picture_files import MOST_PIXELS, decode, fault, open_picture
from prunekit.data.tar_index import index_shard
from prunekit.evaluation.generate import read_pictures
from prunekit.report.wall import data_uri
from prunekit.serving.bulk import read_metadata

RED, BLUE, LIME = (picture(color, "jpeg", quality=95) for color in ("red", "blue", "lime"))
SAMPLES = [(RED, "red"), (BLUE, "blue"), (LIME, "lime")]
END = bytes(2 * tarfile.BLOCKSIZE)
DEEP = "[" * 100_000  # deeper than any recursion limit


def load(settings, **more):
    return load_data(DataConfig(**{**settings, **more}), seed=0)


def left_out(settings, **more):
    """Check that a data set keeps red and lime, and that a lower tolerance gives an error; return the bad sample."""
    data = load(settings, max_bad_share=0.5, **more)
    assert pairs(data) == [("red", "red"), ("lime", "lime")]
    (bad,) = data.skipped
    with pytest.raises(DataError, match=r"data.max_bad_share allows 0.1$") as error:
        load(settings, max_bad_share=0.1, **more)
    assert len(str(error.value).splitlines()) == 1 and printable(bad.reason) in str(error.value)
    assert data_size(DataConfig(**settings)) == (2, 2) or settings["kind"] == "parquet"  # it counts all rows
    return bad


SPARSE_1_0 = {"GNU_sparse_major": "1", "GNU_sparse_minor": "0", "GNU_sparse_realsize": "9"}
CONTINUED = with_checksum(  # an old GNU sparse header whose map continues in a block that is missing
    (lambda block: block[:482] + b"\1" + block[483:])(tar_header("s.txt", 0, tarfile.GNUTYPE_SPARSE))
)
DAMAGE = {  # bytes after two complete samples in a shard, and a part of the error message
    "a negative size": (tar_header("x.txt", -512), "size of x.txt"),
    "a negative size that leads back": (tar_header("x.txt", -4096), "size of x.txt"),
    "a negative size of a header": (tar_header("x", -1024, tarfile.XHDTYPE), "size of x"),
    "a negative size in PAX": (pax(size="-1024") + tar_header("x.txt", 0), "size of x.txt"),
    "a size that is no number": (pax(size="many") + tar_header("x.txt", 0), "size of x.txt"),
    "a size of 2**60": (tar_header("x.txt", 2**60), "ends within x.txt"),
    "a name of 2**40 bytes": (tar_header("x", 2**40, tarfile.GNUTYPE_LONGNAME), "ends within x"),
    "a PAX header of 2 MiB": (tar_member("x", bytes(2**21), tarfile.XHDTYPE), "2,097,152 bytes"),
    "a PAX record of no length": (tar_member("x", b"0 path=a\n", tarfile.XHDTYPE), "PAX header"),
    "a PAX record that is too long": (tar_member("x", b"99 path=a\n", tarfile.XHDTYPE), "PAX header"),
    "a sparse file's map without end": (CONTINUED, "sparse"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_header_ends_a_shard(kind, tmp_path):
    damage, words = DAMAGE[kind]
    whole = sample_members("1", RED, "red") + sample_members("2", LIME, "lime")
    (tmp_path / "0.tar").write_bytes(whole + damage)
    bad = left_out({"kind": "webdataset", "path": str(tmp_path)})
    assert bad.sample == "0.tar" and "truncated or damaged" in bad.reason and words in bad.reason
    broken = sample_members("0", RED[:50], "cut") + whole + damage
    (tmp_path / "0.tar").write_bytes(broken)
    data = load({"kind": "webdataset", "path": str(tmp_path)}, max_bad_share=0.7, verify=True)
    assert [bad.sample for bad in data.skipped] == ["0.tar", "0.tar:0.jpg"]


SPARSE = {
    "map that is no list": pax(GNU_sparse_map="a,b") + tar_member("s.txt", b"content"),
    "size that is no number": pax(GNU_sparse_size="x", GNU_sparse_numblocks="1") + tar_member("s.txt", b"content"),
    "map that is not there": pax(**SPARSE_1_0) + tar_member("s.txt", b"no map"),
    "map that ends early": pax(**SPARSE_1_0) + tar_member("s.txt", b"3\n0\n"),
    "size of all that follows": pax(GNU_sparse_realsize="100000") + tar_member("s.txt", b"content"),
    "old format": tar_member("s.txt", b"content", tarfile.GNUTYPE_SPARSE),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_a_sparse_file_is_no_part_of_a_sample(kind, tmp_path):
    content = sample_members("1", RED, "red") + tar_member("s.jpg", BLUE) + SPARSE[kind]
    (tmp_path / "0.tar").write_bytes(content + sample_members("2", LIME, "lime") + END)
    bad = left_out({"kind": "webdataset", "path": str(tmp_path)})
    assert (bad.sample, bad.reason) == ("0.tar:s", "has no caption (s.txt is not there)")


def test_contents_of_a_shard_do_not_overlap(tmp_path):
    claim = pax(GNU_sparse_realsize="100000")
    path = tmp_path / "0.tar"
    path.write_bytes(b"".join(claim + tar_member(f"{i}.txt", b"x") for i in range(100)) + bytes(100_000))
    shard = index_shard(path)
    assert sum(map(len, shard.contents.values())) <= path.stat().st_size


def test_long_names_and_pax_headers_are_read(tmp_path):
    chain = tar_member("x", b"not this one.txt\0", tarfile.GNUTYPE_LONGNAME) * 3000  # deeper than the recursion limit
    long = "кадр/" + "a" * 200
    content = chain + tar_member("x", f"{long}.txt\0".encode(), tarfile.GNUTYPE_LONGNAME) + tar_member("1.txt", b"red")
    content += pax(path=f"{long}.jpg", size=str(len(RED))) + tar_header("2.jpg", 0) + RED + bytes(-len(RED) % 512)
    (tmp_path / "0.tar").write_bytes(content + pax(tarfile.XGLTYPE, comment="of all") + END)
    data = load({"kind": "webdataset", "path": str(tmp_path)})
    assert pairs(data) == [("red", "red")] and data.encoded.where(0)[0] == f"0.tar:{long}.jpg"


def test_names_that_are_not_text_are_escaped(tmp_path):
    latin, lines = b"gr\xf6\xdfe", "two\nlines"
    content = tar_member("1.jpg", RED[:50]) + tar_member("1.txt", b"red")
    content = content.replace(b"1.jpg" + bytes(4), latin + b".jpg").replace(b"1.txt" + bytes(4), latin + b".txt")
    blocks = [content[i : i + 512] for i in range(0, len(content), 512)]
    content = b"".join(with_checksum(block) if b"ustar" in block else block for block in blocks)
    (tmp_path / "0.tar").write_bytes(content + sample_members(lines, BLUE[:50], "blue") + END)
    settings = {"kind": "webdataset", "path": str(tmp_path), "report": str(tmp_path / "bad.jsonl")}
    images = load(settings)
    names = [images.encoded.where(index)[0] for index in range(2)]
    assert names == [r"0.tar:gr\xf6\xdfe.jpg", r"0.tar:two\nlines.jpg"]
    with pytest.raises(DataError) as error:
        load(settings, verify=True)
    assert len(str(error.value).splitlines()) == 1
    assert len((tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()) == 2


JUNK_EXIF = {
    "jpeg": lambda image: saved(image, "jpeg", quality=95, exif=b"Exif\0\0no TIFF header at all"),
    "png": lambda image: saved(image, "png", exif=b"no TIFF header at all"),
    "webp": lambda image: saved(image, "webp", exif=b"no TIFF header at all"),
    "webp, cut": lambda image: saved(image, "webp", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"),
}


@pytest.mark.parametrize("kind", JUNK_EXIF)
def test_a_picture_with_damaged_exif_is_decoded(kind):
    encoded = JUNK_EXIF[kind](Image.new("RGB", (16, 16), "red"))
    assert fault(encoded) is None and color_of(decode(encoded, 8)) == "red"


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_every_orientation_is_turned_upright(kind):
    upright = Image.new("RGB", (32, 32), "red")
    upright.paste("blue", (0, 0, 16, 32))
    upright.paste("lime", (16, 16, 32, 32))
    back = [None, *Image.Transpose]
    stored = {1: 0, 2: 1, 3: 4, 4: 2, 5: 6, 6: 3, 7: 7, 8: 5}  # orientation: how the picture is stored
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = upright if back[turn] is None else upright.transpose(back[turn])
        decoded = decode(saved(image, kind, exif=exif), 32)
        corners = decoded[:, 4:12, 4:12], decoded[:, 4:12, 20:28], decoded[:, 20:28, 20:28]
        assert [color_of(corner) for corner in corners] == ["blue", "red", "lime"], orientation


def test_other_formats_are_refused_unread():
    image = Image.new("RGB", (8, 8), "red")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    for encoded in (postscript, saved(image, "eps"), saved(image, "ppm"), saved(image, "ico"), saved(image, "tga")):
        assert "no picture in one of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF" in fault(encoded)
    for kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff"):
        assert fault(saved(image, kind)) is None


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path):
    side = 8192
    assert side * side == MOST_PIXELS
    row = bytes(1 + (side + 8) // 8)
    large = png(side + 8, side, row * side, bits=1)  # a valid picture
    assert len(large) < 20_000 and fault(large) == f"cannot be read (8,200 x 8,192 pixels, more than {MOST_PIXELS:,})"
    assert "pixels" in fault(png(30_000, 30_000, b"")) and "pixels" in fault(png(2**31 - 1, 2**31 - 1, b""))
    assert "pixels" not in fault(png(side, side, b""))  # a picture at the limit is allowed; this one has no content
    data = load(webdataset(tmp_path, [(RED, "red"), (large, "large"), (LIME, "lime")]), verify=True, max_bad_share=0.5)
    assert pairs(data) == [("red", "red"), ("lime", "lime")] and "8,200 x 8,192" in data.skipped[0].reason


def test_own_pictures_are_opened_in_the_same_way(tmp_path):
    (tmp_path / "a.png").write_bytes(png(30_000, 30_000, b""))
    (tmp_path / "b.webp").write_bytes(JUNK_EXIF["webp"](Image.new("RGB", (16, 16), "red")))
    for read in (open_picture, data_uri, read_metadata, lambda path: read_pictures([path])):
        with pytest.raises(DataError, match=r"a.png cannot be read .*pixels"):
            read(tmp_path / "a.png")
        with pytest.raises(DataError, match=r"c.png is missing"):
            read(tmp_path / "c.png")
    with pytest.raises(ValueError, match="not a picture of `prunekit generate`"):
        read_metadata(tmp_path / "b.webp")


def jsonl(folder: Path, *rows: str | bytes) -> dict:
    """Write metadata.jsonl with a row for red, the given rows, and a row for lime; blue.png is beside the folder."""
    red, blue, lime = data_layouts.write_pictures(folder, SAMPLES)
    (folder / blue).rename(folder.parent / "blue.png")
    lines = [row if isinstance(row, bytes) else row.encode() for row in (named(red, "red"), *rows, named(lime, "lime"))]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return {"kind": "folder", "path": str(folder)}


def named(name, text="blue") -> str:
    return json.dumps({"file_name": name, "text": text})


ROWS = {  # a row of metadata.jsonl, and a part of its error message
    "a surrogate": (named("../blue.png", "a \ud800 b"), "not UTF-8"),
    "bytes of a surrogate": (b'{"file_name": "../blue.png", "text": "' + NOT_UTF8 + b'"}', "not UTF-8"),
    "a surrogate in the path": (named("\ud800.png"), "a name that no file can have"),
    "NUL in the path": (named("\0.png"), "a name that no file can have"),
    "a long path": (named("a" * 5000), "is missing"),
    "a directory": (named("../" * 3), "is not a file"),
    "a number as path": (named(5), "a file_name of type int"),
    "a list as path": (named(["../blue.png"]), "a file_name of type list"),
    "a number as caption": (named("../blue.png", 5), "a caption of type int"),
    "a list as caption": (named("../blue.png", ["a", "b"]), "a caption of type list"),
    "a text": ('"file_name, text"', "is not JSON with file_name and text"),
    "deep": (DEEP, "is not JSON with file_name and text"),
    "deep within": ('{"file_name": "../blue.png", "text": ' + DEEP, "is not JSON with file_name and text"),
    "a number of 10,000 digits": (
        '{"file_name": "../blue.png", "text": ' + "9" * 10_000 + "}",
        "is not JSON with|of type int",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row_of_jsonl_is_named(kind, tmp_path):
    row, words = ROWS[kind]
    bad = left_out(jsonl(tmp_path / "data", row) | {"report": str(tmp_path / "bad.jsonl")})
    assert bad.sample == "metadata.jsonl:line 2" and any(word in bad.reason for word in words.split("|")), bad.reason
    (row,) = (json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["sample"] == bad.sample and row["file"] == bad.file and row["reason"] == bad.reason


@pytest.mark.parametrize("content", [NOT_UTF8, b"gr\xf6\xdfe"], ids=["surrogate", "latin-1"])
@pytest.mark.parametrize("write", [data_layouts.csv_table, data_layouts.folder_csv, data_layouts.cc3m_tsv])
def test_a_line_that_is_not_utf_8_is_named(write, content, tmp_path):
    settings = write(tmp_path, SAMPLES)
    table = tmp_path / "metadata.csv" if settings["kind"] == "folder" else Path(settings["path"])
    lines = table.read_bytes().splitlines(keepends=True)
    number = next(number for number, line in enumerate(lines) if b"blue" in line)
    lines[number] = lines[number].replace(b"blue", content)
    table.write_bytes(b"".join(lines))
    bad = left_out(settings)
    assert bad.sample == f"{table.name}:line {number + 1}" and "not UTF-8" in bad.reason


def test_a_link_that_is_not_utf_8_is_a_bad_row(tmp_path):
    settings = data_layouts.cc3m_tsv(tmp_path, SAMPLES)
    table = Path(settings["path"])
    table.write_bytes(table.read_bytes().replace(b"pictures/1", NOT_UTF8))
    assert left_out(settings).sample == f"{table.name}:line 2"


def test_captions_of_shards_that_are_not_utf_8(tmp_path):
    content = [*members("1", RED, "red"), ("2.jpg", BLUE), ("2.txt", NOT_UTF8), *members("3", LIME, "lime")]
    write_tar(tmp_path / "0.tar", content)
    bad = left_out({"kind": "webdataset", "path": str(tmp_path)})
    assert bad.sample == "0.tar:2" and "not UTF-8" in bad.reason


COCO = {  # place in the JSON, bad value, name of the bad sample, and a part of the error message
    "a surrogate": (("annotations", 1, "caption"), "a \ud800 b", "image 999", "not UTF-8"),
    "a number as caption": (("annotations", 1, "caption"), 5, "image 999", "a caption of type int"),
    "a list as id": (("annotations", 1, "id"), [1], "annotations[1]", "wrong type"),
    "a list as image": (("annotations", 1, "image_id"), [1], "annotations[1]", "wrong type"),
    "a surrogate as image": (("annotations", 1, "image_id"), "\ud800", "annotation 1", "does not list"),
    "NUL in the path": (("images", 1, "file_name"), "a\0b", "image 999", "a name that no file can have"),
}


@pytest.mark.parametrize("kind", COCO)
def test_bad_entries_of_coco(kind, tmp_path):
    (part, index, key), value, sample, words = COCO[kind]
    settings = data_layouts.coco(tmp_path, SAMPLES)
    path = tmp_path / "annotations" / "captions_val2014.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content[part][index][key] = value
    if key in ("id", "image_id"):
        del content["images"][1]
    path.write_text(json.dumps(content), encoding="utf-8")
    bad = left_out(settings)
    assert bad.sample == sample and words in bad.reason
    assert pairs(load(settings, split="val30k", max_bad_share=0.5)) in (
        [("red", "red"), ("lime", "lime")],
        [("lime", "lime"), ("red", "red")],
    )


def test_coco_images_of_a_wrong_type(tmp_path):
    settings = data_layouts.coco(tmp_path, SAMPLES)
    path = tmp_path / "annotations" / "captions_val2014.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in (("file_name", 5), ("id", [7])):
        images = [dict(image) for image in content["images"]]
        images[1][key] = value
        path.write_text(json.dumps({**content, "images": images}), encoding="utf-8")
        data = load(settings, max_bad_share=0.5)
        assert pairs(data) == [("red", "red"), ("lime", "lime")]
        assert [(bad.sample, bad.captions) for bad in data.skipped] == [("images[1]", 0), ("annotation 1", 1)]
    for images in (5, "text", [5], [[]], {"id": 1}):
        path.write_text(json.dumps({**content, "images": images}), encoding="utf-8")
        with pytest.raises(DataError, match="is not a JSON file of COCO captions"):
            load(settings)
    content["annotations"][1]["image_id"] = "text"
    path.write_text(json.dumps({"annotations": content["annotations"]}), encoding="utf-8")
    assert left_out(settings).sample == "annotations[1]"
    for text in (DEEP, "[]", "5", '"annotations"', '{"annotations": ' + "9" * 10_000 + "}"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="is not a JSON file of COCO captions") as error:
            load(settings)
        assert len(str(error.value).splitlines()) == 1


def parquet(folder: Path, images: list, captions) -> dict:
    folder.mkdir()
    pq.write_table(pa.table({"image": images, "text": captions}), folder / "a.parquet")
    return {"kind": "parquet", "path": str(folder)}


def utf8_unchecked(texts: list[bytes]) -> pa.Array:
    """Return a column of text without a check of its bytes."""
    binary = pa.array(texts, pa.binary())
    return pa.StringArray.from_buffers(len(texts), *binary.buffers()[1:])


def test_bad_captions_in_parquet(tmp_path):
    images = [{"bytes": image, "path": None} for image, _ in SAMPLES]
    bad = left_out(parquet(tmp_path / "a", images, utf8_unchecked([b"red", NOT_UTF8, b"lime"])))
    assert bad.sample == "a.parquet:row 1" and "utf-8" in bad.reason
    lists = pa.array([["red"], [None], ["lime"]])
    assert left_out(parquet(tmp_path / "b", images, lists)).reason == "has an empty caption"
    with pytest.raises(DataError, match="a caption of type int, not text"):
        load(parquet(tmp_path / "c", images, [1, 2, 3]))


def test_a_parquet_file_without_the_columns_is_damaged(tmp_path):
    settings = data_layouts.parquet(tmp_path, SAMPLES[:2])
    other = tmp_path / "data" / "train-00001-of-00001.parquet"
    for name in ("text", "image"):
        pq.write_table(pa.table({name: ["a", "b"]}), other)
        data = load(settings, max_bad_share=0.7, verify=True)
        assert pairs(data) == [("red", "red"), ("blue", "blue")] and len(data.skipped) >= 1


OUTSIDE = {  # a path, and a part of its error message
    "device": ("/dev/zero", "is not a file"),
    "directory": ("..", "is not a file"),
    "pipe": ("../pipe", "is not a file"),
    "missing": ("nothing.png", "is missing"),
    "too long": ("a" * 5000, "is missing"),
    "too large": ("../large.png", f"has {MOST_BYTES + 1:,} bytes, more than {MOST_BYTES:,}"),
    "NUL": ("a\0b", "has a name that no file can have"),
}


def table_of(layout: str, folder: Path, rows: list[tuple[str, str]]) -> dict:
    """Write (path, caption) rows in a layout; return the settings of the data."""
    if layout == "parquet":
        return parquet(folder, [{"bytes": None, "path": path} for path, _ in rows], [caption for _, caption in rows])
    folder.mkdir()
    name, kind = {"csv": ("0.csv", "csv"), "tsv": ("0.tsv", "cc3m_tsv"), "jsonl": ("metadata.jsonl", "folder")}[layout]
    lines = {
        "csv": ["path,caption", *(f"{path},{caption}" for path, caption in rows)],
        "tsv": [f"{caption}\t{path}" for path, caption in rows],
        "jsonl": [named(path, caption) for path, caption in rows],
    }
    (folder / name).write_text("\n".join(lines[layout]))
    return {"kind": kind, "path": str(folder if kind == "folder" else folder / name)}


@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.parametrize("layout", ["parquet", "csv", "tsv", "jsonl"])
def test_a_path_that_leads_to_no_picture_is_a_bad_sample(layout, kind, tmp_path):
    path, words = OUTSIDE[kind]
    if (layout, kind) == ("csv", "NUL") and sys.version_info < (3, 11):
        words = "cannot be read as CSV"  # error of the module csv
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # a sparse file, which takes no space
    (tmp_path / "red").write_bytes(RED)
    (tmp_path / "lime").write_bytes(LIME)
    settings = table_of(layout, tmp_path / "data", [("../red", "red"), (path, "blue"), ("../lime", "lime")])
    with pytest.raises(DataError, match=re.escape(words)) as error:
        load(settings, verify=True)
    assert len(str(error.value).splitlines()) == 1
    if words != "cannot be read as CSV":
        data = load(settings, max_bad_share=0.5, verify=True)
        assert pairs(data) == [("red", "red"), ("lime", "lime")] and words in data.skipped[0].reason


def test_shards_and_captions_that_are_no_files(tmp_path):
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s" / "a.tar", [*members("1", RED, "red"), *members("2", LIME, "lime")])
    os.mkfifo(tmp_path / "s" / "b.tar")
    bad = left_out({"kind": "webdataset", "path": str(tmp_path / "s")})
    assert (bad.sample, bad.reason) == ("b.tar", "is not a file")
    parquet(tmp_path / "p", [RED, LIME], ["red", "lime"])
    os.mkfifo(tmp_path / "p" / "b.parquet")
    data = load({"kind": "parquet", "path": str(tmp_path / "p")}, max_bad_share=0.5)
    assert pairs(data) == [("red", "red"), ("lime", "lime")] and "is not a file" in data.skipped[0].reason
    folder = tmp_path / "f"
    folder.mkdir()
    for name, image in (("a", RED), ("b", BLUE), ("c", LIME)):
        (folder / f"{name}.jpg").write_bytes(image)
    (folder / "a.txt").write_text("red")
    (folder / "c.txt").write_text("lime")
    (folder / "metadata.jsonl").mkdir()
    os.mkfifo(folder / "b.txt")
    assert "is not a file" in left_out({"kind": "folder", "path": str(folder)}).reason
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to("/dev/zero")
    assert "is not a file" in left_out({"kind": "folder", "path": str(folder)}).reason


def test_a_picture_of_a_wrong_type_in_parquet(tmp_path):
    for number, column in enumerate(([1, 2], ["text", "text"], [[1], [2]], [{"bytes": "text", "path": 5}] * 2)):
        settings = parquet(tmp_path / str(number), column, ["red", "lime"])
        with pytest.raises(DataError, match=r"cannot be read \(it is of type (int|str|list), not bytes\)"):
            load(settings, verify=True)
    images = pa.array([{"bytes": None, "path": 5}, {"bytes": RED, "path": 5}])
    data = load(parquet(tmp_path / "path", images, ["none", "red"]), max_bad_share=0.5, verify=True)
    assert pairs(data) == [("red", "red")]


EMOJI = {
    "deep": (DEEP, "a json that cannot be read"),
    "a list": ("[1]", "a json that is of type list"),
    "a number": ("5", "a json that is of type int"),
    "a surrogate": (json.dumps({"name": "\ud800"}), "not UTF-8"),
    "a surrogate in keywords": (json.dumps({"name": "red", "keywords": ["a", "\ud800"]}), "not UTF-8"),
    "a number as name": (json.dumps({"name": 5}), "a caption of type int"),
    "numbers as keywords": (json.dumps({"name": "red", "keywords": [1, 2]}), "not a list of texts"),
    "a number for keywords": (json.dumps({"name": "red", "keywords": 5}), "not a list of texts"),
}


@pytest.mark.parametrize("kind", EMOJI)
def test_bad_emoji_shards_are_refused(kind, tmp_path):
    text, words = EMOJI[kind]
    write_tar(tmp_path / "0.tar", [("1.jpg", RED), ("1.txt", b"red"), ("1.json", text.encode())])
    with pytest.raises(DataError, match=f"0.tar:1 .*{words}") as error:
        load({"kind": "emoji", "path": str(tmp_path)})
    assert len(str(error.value).splitlines()) == 1
