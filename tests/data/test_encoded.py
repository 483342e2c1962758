"""The encoded cache: several writers, kills, damage, keys, and no repeated encoding of cached parts."""

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import data_layouts
import pytest
import torch
from diffusers import DiffusionPipeline
from encode_world import BAD, COUNT, KEPT, encoded, write
from launching import finish, launch

from prunekit.data.bad_samples import DataError
from prunekit.data.cache import MANIFEST
from prunekit.data.cache_config import CacheConfig, cache_bytes
from prunekit.runtime.progress import console

SMALL = {"shard_size": 4}
WRITER = str(Path(__file__).parents[1] / "helpers" / "encode_world.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write(tmp_path_factory.mktemp("world"), data_layouts.webdataset)


@pytest.fixture(scope="module")
def pipeline(world):
    return DiffusionPipeline.from_pretrained(world / "model")


def results(cache: Path) -> dict[str, bytes]:
    """Return the contents of all cache files that belong to the result."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for part in cache.glob("*-*")
        for path in part.rglob("*")
        if path.is_file()
    }


def parts(cache: Path) -> dict[str, int]:
    """Return the number of parts of each kind in a cache."""
    return dict(Counter(path.name.split("-")[0] for path in cache.glob("*-*")))


def same(first, second, tolerance=0.0):
    """Check that two EncodedData have the same rows."""
    for name in ("latents", "text", "null_text", "prompts", "pooled", "null_pooled", "time_ids", "deviations"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one[:], other[:], rtol=tolerance, atol=tolerance)
    assert first.images.captions == second.images.captions
    return True


def test_a_cache_gives_what_memory_gives(world, pipeline, tmp_path):
    direct = encoded(world, None, pipeline)
    assert same(encoded(world, tmp_path, pipeline), direct)
    assert len(direct.latents) == len(direct.prompts) == KEPT and not list(tmp_path.rglob("*.lock"))
    half = encoded(world, tmp_path, pipeline, precision="float16", shard_size=4)
    assert same(half, direct, 1e-2) and half.latents[:].dtype == torch.float32
    assert parts(tmp_path) == {"latents": 2, "text": 2, "null": 2, "prompts": 2}, "the precision is part of the keys"


@pytest.mark.parametrize("kept", [{"latents": "moments"}, {"precision": "float16"}, {"text": False}])
def test_plan_computes_the_bytes(kept, world, pipeline, tmp_path):
    config = CacheConfig(**kept, **SMALL)
    data = encoded(world, tmp_path, pipeline, **kept, **SMALL)
    shapes = (tuple(data.latents.shape[1:]), tuple(data.text.shape[1:]), data.prompts.shape[1])
    for part, size in cache_bytes(KEPT, KEPT, *shapes, config).items():
        files = list(tmp_path.glob(f"{part}-*/*.safetensors"))
        assert size <= sum(path.stat().st_size for path in files) <= size + 300 * len(files), part
        assert bool(files) == (size > 0)


@pytest.mark.long
def test_writers_and_kills_change_no_byte(world, pipeline, tmp_path):
    """Two processes share the work and one of them is killed; the other's result equals that of a single process."""
    encoded(world, tmp_path / "alone", pipeline, shard_size=1)
    shared = tmp_path / "shared"
    program = [WRITER, world, shared, '{"shard_size": 1}']
    (doomed,), (other,) = launch(program), launch(program)
    deadline = time.monotonic() + 120
    while len(list(shared.glob("latents-*/*.safetensors"))) < 3:
        assert time.monotonic() < deadline and doomed.is_alive and other.is_alive
        time.sleep(0.001)
    doomed.send(signal.SIGKILL)
    assert len(results(shared)) < len(results(tmp_path / "alone")), "killed too late to show anything"
    doomed.wait()
    finish([other])
    assert results(shared) == results(tmp_path / "alone")
    assert not list(shared.rglob("*.lock"))


def test_what_a_kill_leaves_is_cleared_and_the_rest_kept(world, pipeline, whole, tmp_path):
    encoded(world, tmp_path, pipeline, **SMALL)
    (part,) = tmp_path.glob("text-*")
    manifest = json.loads((part / MANIFEST).read_text())
    del manifest["shards"]["00002.safetensors"]  # as after a kill between writing a shard and its record
    (part / MANIFEST).write_text(json.dumps(manifest))
    left = part / ".00002.safetensors.abcd.tmp"
    left.mkdir()
    (left / ".tmpabcdef").write_bytes(b"half a shard")
    others = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors") if path.stem != "00002"}
    encoded(world, tmp_path, pipeline, **SMALL)
    assert results(tmp_path) == whole
    assert others == {path: path.stat().st_mtime_ns for path in others}, "shards that were there were made again"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


DAMAGE = [
    ("latents-*/00001.safetensors", cut, "00001.safetensors has"),
    ("latents-*/00002.safetensors", flip, "(checksum)"),
    ("text-*/00000.safetensors", empty, "has 0 bytes"),
    ("null-*/00000.safetensors", flip, "(checksum)"),
    ("prompts-*/00003.safetensors", Path.unlink, "cannot be read"),
    (f"latents-*/{MANIFEST}", lambda path: path.write_bytes(path.read_bytes()[:200]), "manifest.json cannot be read"),
    (f"text-*/{MANIFEST}", Path.unlink, ""),
    (f"prompts-*/{MANIFEST}", lambda path: path.write_text('{"format": 0, "key": ""}'), "another format"),
    (f"text-*/{MANIFEST}", lambda path: path.write_text(path.read_text().replace("rows", "row")), "cannot be read"),
    ("digests.jsonl", cut, ""),
    ("digests.jsonl", lambda path: path.write_bytes(b"\xff{}\n[]\n"), ""),
    ("indexes/*.json", cut, ""),
]


@pytest.fixture(scope="module")
def whole(world, pipeline, tmp_path_factory):
    cache = tmp_path_factory.mktemp("whole")
    encoded(world, cache, pipeline, **SMALL)
    return results(cache)


@pytest.mark.parametrize(("pattern", "damage", "said"), DAMAGE)
def test_damage_is_found_and_mended(pattern, damage, said, world, pipeline, whole, tmp_path):
    encoded(world, tmp_path, pipeline, **SMALL)
    damage(next(iter(sorted(tmp_path.glob(pattern)))))
    with console.capture() as capture:
        encoded(world, tmp_path, pipeline, **SMALL)
    told = [line for line in capture.get().splitlines() if line.startswith("cache: ")]
    assert results(tmp_path) == whole
    assert len(told) == bool(said) and said in "".join(told)


def test_verify_finds_what_left_no_trace(world, pipeline, whole, tmp_path):
    """A failing disk changed bytes, but not the size and the time of the file."""
    encoded(world, tmp_path, pipeline, **SMALL)
    (path,) = tmp_path.glob("text-*/00001.safetensors")
    stat = path.stat()
    flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with console.capture() as capture:
        encoded(world, tmp_path, pipeline, **SMALL)
    assert results(tmp_path) != whole and "cache:" not in capture.get()
    with console.capture() as capture:
        encoded(world, tmp_path, pipeline, verify=True, **SMALL)
    assert results(tmp_path) == whole and "(checksum)" in capture.get()


def test_bad_pictures_stay_out_at_every_start(world, pipeline, tmp_path):
    for latents in ("means", "off", "means", "off"):
        report = tmp_path / "bad.jsonl"
        data = encoded(world, tmp_path / "cache", pipeline, {"report": str(report)}, latents=latents, **SMALL)
        assert data.images.num_images == len(data.latents) == KEPT
        (row,) = [json.loads(line) for line in report.read_text().splitlines()]
        assert row["sample"].endswith(f"{BAD:09d}.jpg") and "cannot be read" in row["reason"] and row["captions"] == 1
        assert Path(row["file"]).is_file()
        report.unlink()
    with pytest.raises(DataError, match=f"{BAD:09d}.jpg.* cannot be read .*1 of {COUNT} captions"):
        encoded(world, tmp_path / "cache", pipeline, {"max_bad_share": 0.0}, **SMALL)
    with pytest.raises(DataError, match=f"{BAD:09d}.jpg.* cannot be read .*1 of {COUNT} captions"):
        encoded(world, tmp_path / "other", pipeline, {"max_bad_share": 0.0}, **SMALL)


OPENED: list[str] = []
WATCHING = [False]


def _watch(event, arguments):
    if WATCHING[0] and event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(_watch)


@pytest.mark.parametrize(
    "layout", [data_layouts.webdataset, data_layouts.folder_txt], ids=lambda layout: layout.__name__
)
def test_a_second_start_opens_no_picture(layout, pipeline, tmp_path):
    world = write(tmp_path / "world", layout)

    def opened():
        OPENED.clear()
        WATCHING[0] = True
        try:
            encoded(world, tmp_path / "cache", pipeline, **SMALL)
        finally:
            WATCHING[0] = False
        data = f"{world / 'data'}{os.sep}"
        return [name for name in OPENED if name.startswith(data) and not name.endswith(".txt")]

    assert len(opened()) >= COUNT
    assert opened() == []
    changed = next(path for path in sorted((world / "data").rglob("*")) if path.is_file() and path.suffix != ".txt")
    content = changed.read_bytes()
    changed.write_bytes(content)  # writes the same content again
    again = opened()
    assert str(changed) in again
    assert len(list((tmp_path / "cache").glob("latents-*"))) == 1, "the key is the content, not the time"
    changed.write_bytes(content.replace(b"JFIF", b"jfif") + b"\0" * 512)
    opened()
    assert len(list((tmp_path / "cache").glob("latents-*"))) == 2
