"""Faults of published data: correct counts and pairs, a clear report; unusual pictures decode to correct colors."""

import json
import struct

import data_layouts
import numpy as np
import pytest
import torch
from damaged_files import png, saved
from data_layouts import LAYOUTS, color_of, members, pairs, picture, webdataset, write_tar
from diffusers import DiffusionPipeline
from PIL import Image
from small_model import write_pipeline

from prunekit.data.bad_samples import DataError
from prunekit.data.config import DataConfig, data_size, load_data
from prunekit.data.encoded import encode
from prunekit.data.picture_files import decode, fault
from prunekit.data.prompt_encoder import load_prompt_encoder


def load(settings, **more):
    return load_data(DataConfig(**{**settings, **more}), seed=0)


def report_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def jpeg(color: str) -> bytes:
    return picture(color, "jpeg", quality=95)


def png_16_bit(rgb: tuple[int, int, int], side: int = 8) -> bytes:
    """Return a PNG with 16 bits per channel, which Pillow can read but not write."""
    return png(side, side, (b"\0" + struct.pack(">3H", *rgb) * side) * side, bits=16, color=2)


def see_through(mode: str) -> Image.Image:
    """Return a black picture that is fully transparent."""
    return Image.new(mode, (8, 8), 0)


def transparent_palette() -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return saved(image, "png", transparency=1)


def animation() -> bytes:
    frames = [Image.new("RGB", (8, 8), color) for color in ("blue", "red", "lime")]
    return saved(frames[0], "gif", save_all=True, append_images=frames[1:])


ODD_PICTURES = {
    "CMYK jpeg": (picture("red", "jpeg", "CMYK", quality=95), "red"),
    "CMYK tiff": (picture("blue", "tiff", "CMYK"), "blue"),
    "palette": (picture("yellow", "png", "P"), "yellow"),
    "palette with transparency": (transparent_palette(), "white"),
    "1 bit": (picture("white", "png", "1"), "white"),
    "16-bit gray": (saved(Image.fromarray(np.full((8, 8), 65535, np.uint16)), "png"), "white"),
    "16-bit gray tiff": (saved(Image.fromarray(np.full((8, 8), 12, np.uint16)), "tiff"), "black"),
    "16-bit color": (png_16_bit((65535, 0, 65535)), "magenta"),
    "alpha": (saved(see_through("RGBA"), "png"), "white"),
    "gray with alpha": (saved(see_through("LA"), "png"), "white"),
    "alpha, opaque": (picture("cyan", "webp", "RGBA", lossless=True), "cyan"),
    "animated": (animation(), "blue"),
}


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_odd_pictures_have_the_right_colors(name):
    encoded, color = ODD_PICTURES[name]
    assert color_of(decode(encoded, 8)) == color and fault(encoded) is None


def test_16_bit_gray_is_scaled_and_half_alpha_mixed():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    decoded = decode(saved(Image.fromarray(ramp), "png"), 16)
    assert torch.equal(decoded[0].flatten().int(), torch.arange(256).int())
    half = saved(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "png")
    assert (decode(half, 8)[:, 0, 0].int() - torch.tensor([255, 127, 127])).abs().max() <= 1


def test_a_turned_picture_is_upright():
    image = Image.new("RGB", (32, 32), "red")
    image.paste("blue", (0, 0, 16, 32))  # the left half is blue, the right half red
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise, so that the left half is on top
    decoded = decode(saved(image, "png", exif=exif), 32)
    assert color_of(decoded[:, :16]) == "blue" and color_of(decoded[:, 16:]) == "red"


BAD = {
    "truncated": lambda: jpeg("blue")[:-200],
    "zero bytes": lambda: b"",
    "no picture at all": lambda: b"<html>404 Not Found</html>",
    "header only": lambda: jpeg("blue")[:30],
}


WITHIN_FILES = (webdataset, data_layouts.parquet)  # layouts whose pictures are not separate files
CASES = [
    pytest.param(write, kind, id=f"{write.__name__}-{kind}")
    for write in LAYOUTS
    for kind in (*BAD, "empty caption", "missing")
    if kind != "missing" or write not in WITHIN_FILES
]


@pytest.mark.parametrize(("write", "kind"), CASES)
def test_a_bad_sample_is_left_out_with_its_caption(write, kind, tmp_path):
    image = BAD[kind]() if kind in BAD else jpeg("blue")
    marked = image + b"MARK" if kind == "missing" else image
    samples = [(jpeg("red"), "red"), (marked, " " if kind == "empty caption" else "blue"), (jpeg("lime"), "lime")]
    settings = write(tmp_path / "data", samples)
    if kind == "missing":
        next(p for p in (tmp_path / "data").rglob("*") if p.is_file() and p.read_bytes() == marked).unlink()
    report = tmp_path / "out" / "bad.jsonl"
    data = load(settings, verify=True, max_bad_share=0.34, report=str(report))
    assert pairs(data) == [("red", "red"), ("lime", "lime")] and data.image_index.tolist() == [0, 1]
    (row,) = report_of(report)
    assert set(row) == {"sample", "file", "reason", "captions"} and row["captions"] == 1 and row["file"]
    words = {"empty caption": "empty caption", "missing": "missing|no picture|without a picture"}
    assert any(word in row["reason"] for word in words.get(kind, "cannot be read|zero bytes").split("|")), row
    data.write_report(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == report.read_bytes()
    with pytest.raises(DataError, match=r"1 of 3 captions cannot be used .*data.max_bad_share allows 0.3$") as error:
        load(settings, verify=True, max_bad_share=0.3, report=str(report))
    assert row["sample"] in str(error.value) and "\n" not in str(error.value)


def test_a_bad_picture_takes_all_its_captions(tmp_path):
    samples = [(jpeg("red"), "red"), (jpeg("blue")[:50], "blue"), (jpeg("lime"), "lime")]
    settings = data_layouts.coco(tmp_path, samples, captions_each=5)
    data = load(settings, verify=True, max_bad_share=0.34)
    assert data.num_images == 2 and data.num_pairs == 10 and [bad.captions for bad in data.skipped] == [5]
    assert {color for color, _ in pairs(data)} == {"red", "lime"}
    with pytest.raises(DataError, match="5 of 15 captions"):
        load(settings, verify=True)


def test_bad_entries_of_a_captions_file(tmp_path):
    settings = data_layouts.coco(tmp_path, [(jpeg("red"), "red"), (jpeg("blue"), "blue")], captions_each=2)
    path = tmp_path / "annotations" / "captions_val2014.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["caption"] = ""
    content["annotations"] += [content["annotations"][0], {"id": 9, "image_id": 5, "caption": "of nothing"}]
    path.write_text(json.dumps(content))
    data = load(settings, max_bad_share=0.6)
    assert pairs(data) == [("red", "red"), ("red", "red, seen 1"), ("blue", "blue, seen 1")]
    assert [bad.reason for bad in data.skipped] == [
        "comes twice",
        "belongs to image 5, which the file does not list",
        "has an empty caption",
    ]
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match="is not a JSON file of COCO captions"):
        load(settings)


@pytest.mark.parametrize("order", ["one after another", "mixed"])
def test_duplicate_keys_in_a_shard_keep_the_first(order, tmp_path):
    first, second = members("7", jpeg("red"), "red"), members("7", jpeg("blue"), "blue")
    mixed = [member for both in zip(first, second, strict=True) for member in both]
    both = first + second if order == "one after another" else mixed
    write_tar(tmp_path / "0.tar", both + members("8", jpeg("lime"), "lime"))
    data = load({"kind": "webdataset", "path": str(tmp_path)}, max_bad_share=0.34)
    assert pairs(data) == [("red", "red"), ("lime", "lime")]
    (bad,) = data.skipped
    assert bad.sample == "0.tar:7" and bad.reason == "has a key that occurs earlier in its shard"


def test_incomplete_samples_and_other_members(tmp_path):
    content = [
        ("no picture.txt", b"text"),
        ("no caption.jpg", jpeg("red")),
        ("latin.jpg", jpeg("red")),
        ("latin.txt", "größe".encode("latin-1")),
        ("._mac.jpg", b"x"),
        ("кадр/名前.JPEG", jpeg("blue")),
        ("кадр/名前.txt", "голубой квадрат ".encode()),
        ("checksums", b"x"),
    ]
    write_tar(tmp_path / "données 0.tar", content)
    data = load({"kind": "webdataset", "path": str(tmp_path)}, max_bad_share=0.8)
    assert pairs(data) == [("blue", "голубой квадрат")]
    reasons = {bad.sample.split(":")[1]: bad.reason.split(" (")[0] for bad in data.skipped}
    assert reasons == {
        "no picture": "has no picture",
        "no caption": "has no caption",
        "latin": "has a caption that is not UTF-8",
    }


SIX = [(jpeg(color), color) for color in ("red", "lime", "blue", "yellow", "cyan", "magenta")]


def test_a_missing_shard_counts_as_many_as_the_others_hold(tmp_path):
    settings = webdataset(tmp_path / "data", SIX, per_shard=2)
    (tmp_path / "data" / "cc3m-train-0001.tar").unlink()
    with pytest.raises(DataError, match=r"cc3m-train-0001.tar is missing from the numbered shards; 2 of 6 captions"):
        load(settings)
    data = load(settings, max_bad_share=0.34)
    assert pairs(data) == [(color, color) for color in ("red", "lime", "cyan", "magenta")]
    assert data_size(DataConfig(**settings)) == (4, 4)


def test_a_missing_or_damaged_parquet_file(tmp_path):
    settings = data_layouts.parquet(tmp_path, SIX, per_file=2)
    files = sorted((tmp_path / "data").iterdir())
    files[2].unlink()  # the last file; only `of-00003` in the other names shows that it is missing
    files[1].write_bytes(files[1].read_bytes()[:-20])
    data = load(settings, max_bad_share=0.7)
    assert pairs(data) == [("red", "red"), ("lime", "lime")]
    assert [(bad.sample, bad.captions) for bad in data.skipped] == [(files[1].name, 2), (files[2].name, 2)]
    files[0].unlink()
    with pytest.raises(DataError, match="no Parquet file can be read"):
        load(settings)


def test_a_tar_cut_short_anywhere_gives_what_came_before(tmp_path):
    settings = webdataset(tmp_path / "data", SIX, per_shard=6)
    path = tmp_path / "data" / "cc3m-train-0000.tar"
    whole = path.read_bytes()
    (tmp_path / "data" / "cc3m-train-0001.tar").write_bytes(whole)
    used = set()
    for size in (0, 1, 511, 512, 700, 1024, *range(2048, len(whole) - 9000, 1777)):
        path.write_bytes(whole[:size])
        data = load(settings, max_bad_share=0.9)
        found = pairs(data)
        assert found[-6:] == [(color, color) for _, color in SIX]
        assert found[:-6] == found[-6:][: len(found) - 6]  # a prefix of the pairs
        (cut,) = (bad for bad in data.skipped if bad.sample == path.name)
        assert "truncated or damaged" in cut.reason
        used.add(len(found))
    assert used >= {6, 7, 8, 9, 10, 11}
    with pytest.raises(DataError, match=r"cc3m-train-0000.tar"):
        load(settings)


def test_damage_within_a_tar_is_found(tmp_path):
    settings = webdataset(tmp_path, SIX, per_shard=6)
    path = tmp_path / "cc3m-train-0000.tar"
    content = bytearray(path.read_bytes())
    second = content.index(b"000000001.jpg")
    content[second : second + 512] = b"\xff" * 512
    path.write_bytes(content)
    data = load(settings, max_bad_share=0.9)
    assert pairs(data) == [("red", "red")] and "truncated or damaged" in data.skipped[0].reason
    path.write_bytes(b"<html>Too many requests</html>" * 100)
    with pytest.raises(DataError, match=r"cc3m-train-0000.tar is truncated or damaged"):
        load(settings, max_bad_share=1)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return DiffusionPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model")))


def test_pictures_that_were_not_verified_are_left_out_when_encoded(pipeline, tmp_path):
    samples = [(image[:50] if color == "blue" else image, f"a {color} square") for image, color in SIX]
    settings = webdataset(tmp_path / "data", samples) | {"report": str(tmp_path / "bad.jsonl"), "max_bad_share": 0.2}
    images, prompts = load(settings), load_prompt_encoder("emoji")
    assert images.num_images == 6 and not images.skipped and report_of(tmp_path / "bad.jsonl") == []
    data = encode(pipeline, images, prompts, 16, tmp_path / "cache")
    (row,) = report_of(tmp_path / "bad.jsonl")
    assert row["sample"] == "cc3m-train-0000.tar:000000002.jpg" and "cannot be read" in row["reason"]
    expected = [(color, f"a {color} square") for _, color in SIX if color != "blue"]
    assert pairs(data.images) == expected and len(data.latents) == len(data.text) == len(data.prompts) == 5
    (tmp_path / "bad.jsonl").unlink()
    again = encode(pipeline, images, prompts, 16, tmp_path / "cache")
    assert torch.equal(again.latents[:], data.latents[:]) and pairs(again.images) == expected
    assert report_of(tmp_path / "bad.jsonl") == [row]
    verified = encode(pipeline, load(settings, verify=True), prompts, 16)
    assert torch.allclose(verified.latents, data.latents[:], atol=1e-5) and pairs(verified.images) == expected
    with pytest.raises(DataError, match=r"cc3m-train-0000.tar:000000002.jpg cannot be read .*1 of 6 captions"):
        encode(pipeline, load(settings, max_bad_share=0.1), prompts, 16)
