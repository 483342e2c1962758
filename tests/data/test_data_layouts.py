"""Every published layout of captioned images is read with the correct pictures, captions and order."""

import json
import pickle
import re
import shutil
from pathlib import Path

import data_layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from data_layouts import COLORS, LAYOUTS, members, pairs, picture, write_tar
from pydantic import ValidationError

from prunekit.data.bad_samples import DataError
from prunekit.data.coco import coco_validation
from prunekit.data.config import READERS, DataConfig, data_size, load_data
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.pictures import Pictures

KINDS = ("jpeg", "png", "webp")
SAMPLES = [(picture(c, KINDS[i % 3]), f'a {c} square, "größe" {i}') for i, c in enumerate(COLORS)]
PAIRS = [(color, caption) for color, (_, caption) in zip(COLORS, SAMPLES, strict=True)]


def load(settings, **more):
    return load_data(DataConfig(**{**settings, **more}), seed=0)


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_every_layout_gives_its_pairs(write, tmp_path):
    settings = write(tmp_path / "ünï", SAMPLES)
    data = load(settings, holdout=0.25, verify=True)
    assert pairs(data) == PAIRS and not data.skipped
    assert data.names == [caption for _, caption in PAIRS]
    assert int(data.held_out.sum()) == 2 and len(data.training_pairs()) == 6
    assert data_size(DataConfig(**settings)) == (8, 8)
    assert [data.encoded[i] for i in range(-1, 1)] == [SAMPLES[-1][0], SAMPLES[0][0]]
    assert data.encoded[2:4] == [image for image, _ in SAMPLES[2:4]]


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_pictures_stay_on_disk(write, tmp_path):
    noise = np.random.default_rng(0).bytes(50_000)
    data = load(write(tmp_path / "data", [(image + noise, caption) for image, caption in SAMPLES]))
    assert isinstance(data.encoded, Pictures) and len(pickle.dumps(data.encoded)) < 3_000
    assert pickle.loads(pickle.dumps(data.encoded))[1] == SAMPLES[1][0] + noise
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match=r"cannot be read .*No such file"):
        pickle.loads(pickle.dumps(data.encoded))[0]


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_order_and_identity_do_not_depend_on_the_file_system(write, tmp_path):
    settings = write(tmp_path / "a", SAMPLES)
    (tmp_path / "b").mkdir()
    for path in sorted((p for p in (tmp_path / "a").rglob("*") if p.is_file()), reverse=True):
        copy = tmp_path / "b" / path.relative_to(tmp_path / "a")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    first = load(settings)
    moved = settings["path"].replace(str(tmp_path / "a"), str(tmp_path / "b"))
    second = load(settings, path=moved, report=str(tmp_path / "report"))
    assert (tmp_path / "report").read_text() == ""
    assert Fingerprint().add_data(first).key() == Fingerprint().add_data(second).key()


def test_shards_are_chosen_by_split(tmp_path):
    for split, color in (("train", "red"), ("validation", "blue")):
        for shard in range(2):
            content = members("000", picture(color, "jpeg"), f"{color} {shard}")
            write_tar(tmp_path / f"cc3m-{split}-{shard:04d}.tar", content)
    settings = {"kind": "webdataset", "path": str(tmp_path)}
    assert pairs(load(settings, split="train")) == [("red", "red 0"), ("red", "red 1")]
    assert pairs(load(settings, split="cc3m-validation")) == [("blue", "blue 0"), ("blue", "blue 1")]
    assert data_size(DataConfig(**settings, split="validation")) == (2, 2)
    with pytest.raises(DataError, match=r"several splits \(cc3m-train, cc3m-validation\): set data.split"):
        load(settings)
    with pytest.raises(DataError, match=r"no shard of the split 'tain' in .*: it holds cc3m-train"):
        load(settings, split="tain")
    one = load({"kind": "webdataset", "path": str(tmp_path / "cc3m-train-0001.tar")})
    assert pairs(one) == [("red", "red 1")]


def test_members_and_columns_can_be_named(tmp_path):
    red, blue = picture("red"), picture("blue", "jpeg")
    write_tar(tmp_path / "s" / "0.tar", [("a/0.x.png", red), ("a/0.jpg", blue), ("a/0.alt", b"a blue one")])
    named = {"image_column": "jpg", "text_column": "alt"}
    assert pairs(load({"kind": "webdataset", "path": str(tmp_path / "s")}, **named)) == [("blue", "a blue one")]
    table = data_layouts.write_csv(tmp_path / "c" / "t.csv", SAMPLES, "img", "alt")
    assert pairs(load(table, image_column="img", text_column="alt")) == PAIRS
    with pytest.raises(DataError, match=r"no column 'imgs'; did you mean 'img'\? \(it has alt, other, img\): set data"):
        load(table, image_column="imgs", text_column="alt")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "0.png").write_bytes(red)
    raw = pa.table({"pixels": [blue], "captions": [["one", "two"]]})
    pq.write_table(raw, tmp_path / "p" / "a.parquet")
    by_path = {"kind": "parquet", "path": str(tmp_path / "p" / "b.parquet")}
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "0.png"}], "caption": ["red"]}), by_path["path"])
    columns = {"image_column": "pixels", "text_column": "captions"}
    data = load({"kind": "parquet", "path": str(tmp_path / "p" / "a.parquet")}, **columns)
    assert pairs(data) == [("blue", "one"), ("blue", "two")] and data.image_index.tolist() == [0, 0]
    assert pairs(load(by_path)) == [("red", "red")]


def test_several_rows_of_a_picture_are_several_captions(tmp_path):
    settings = data_layouts.csv_table(tmp_path, SAMPLES[:3])
    with (tmp_path / "table.csv").open("a", encoding="utf-8") as file:
        file.write("again,x,絵 0.png\nred,x,絵 0.png\nred,x,絵 0.png\n")
    data = load(settings, max_bad_share=0.2)
    assert pairs(data) == [PAIRS[0], ("red", "again"), ("red", "red"), *PAIRS[1:3]]
    assert [(bad.sample, bad.reason) for bad in data.skipped] == [("table.csv:line 7", "repeats an earlier row")]


def test_coco_trains_on_all_captions(tmp_path):
    settings = data_layouts.coco(tmp_path, SAMPLES, captions_each=5, year="train2014")
    data = load(settings, holdout=0.1, holdout_by="captions")
    texts = [(c, text if copy == 0 else f"{text}, seen {copy}") for c, text in PAIRS for copy in range(5)]
    assert pairs(data) == texts and data.num_images == 8 and data.names == [text for _, text in PAIRS]
    assert data.image_index[data.held_out].unique().numel() == int(data.held_out.sum()) == 4
    assert data_size(DataConfig(**settings)) == (8, 40)
    shutil.move(tmp_path / "train2014", tmp_path / "elsewhere")
    own = {"kind": "coco", "path": str(tmp_path), "annotations": "annotations/captions_train2014.json"}
    assert pairs(load(own, images="elsewhere")) == texts
    with pytest.raises(DataError, match=r"no folder of pictures at .*train2014 or .*images/train2014"):
        load(settings)


def test_the_validation_protocol_is_the_published_one(tmp_path):
    annotations = [{"image_id": i % 7, "id": i, "caption": f"caption {i}"} for i in range(21)]
    np.random.seed(42)
    expected = [annotations[i] for i in np.random.choice(7, 4, replace=False)]
    assert coco_validation(annotations, count=4) == expected
    assert sorted(a["id"] for a in coco_validation(annotations)) == list(range(7))
    assert coco_validation(annotations, 4, seed=1) != expected
    settings = data_layouts.coco(tmp_path, SAMPLES, captions_each=5)
    content = json.loads((tmp_path / "annotations" / "captions_val2014.json").read_text())
    data = load(settings, split="val30k")
    assert data.captions == [entry["caption"] for entry in coco_validation(content["annotations"])]
    assert sorted(pairs(data)) == sorted(PAIRS)


def test_cc3m_rows_find_their_pictures(tmp_path):
    settings = data_layouts.cc3m_tsv(tmp_path, SAMPLES)
    names = sorted((tmp_path / "training").iterdir())
    names[0].rename(tmp_path / "training" / "000.jpg")  # only the row number, with leading zeros
    names[3].unlink()  # as if the link were dead
    names[5].rename(names[5].with_name("5_123"))  # the checksum of another link
    data = load(settings, max_bad_share=0.3)
    assert pairs(data) == [pair for index, pair in enumerate(PAIRS) if index not in (3, 5)]
    assert [bad.sample for bad in data.skipped] == ["Train_GCC-training.tsv:line 4", "Train_GCC-training.tsv:line 6"]
    assert "numbered 3" in data.skipped[0].reason and "checksum" in data.skipped[1].reason
    table = tmp_path / "paths.tsv"
    table.write_text("".join(f"{text}\tpart/{i}.png\n" for i, (_, text) in enumerate(SAMPLES)), encoding="utf-8")
    (tmp_path / "own" / "part").mkdir(parents=True)
    for index, (image, _) in enumerate(SAMPLES):
        (tmp_path / "own" / "part" / f"{index}.png").write_bytes(image)
    assert pairs(load({"kind": "cc3m_tsv", "path": str(table), "images": "own"})) == PAIRS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "coco", "path": "x"}, "needs data.split .*or data.annotations"),
        ({"kind": "coco", "path": "x", "split": "test"}, "choose one of train, val, val30k"),
        ({"kind": "coco", "path": "x", "annotations": "a.json"}, "needs data.images"),
        ({"kind": "folder", "path": "x", "split": "train"}, "data.split has no effect for data.kind=folder"),
        ({"kind": "emoji", "images": "x"}, "data.images has no effect for data.kind=emoji"),
        ({"kind": "csv", "path": "x", "max_bad_share": 2}, "max_bad_share"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, expected):
    with pytest.raises(ValidationError, match=expected):
        DataConfig(**settings)


@pytest.mark.parametrize("kind", ["webdataset", "cc3m_tsv", "coco", "folder", "parquet", "csv"])
def test_nothing_to_read_is_said(kind, tmp_path):
    split = {"split": "train"} if kind == "coco" else {}
    with pytest.raises(DataError, match=f"data.kind={kind} needs data.path, "):
        load({"kind": kind, **split})
    with pytest.raises(DataError, match=r"does not exist; give "):
        load({"kind": kind, "path": str(tmp_path / "nowhere"), **split})
    with pytest.raises(DataError, match=r"no sample|no shard|no COCO captions|is not a file"):
        load({"kind": kind, "path": str(tmp_path), **split})
    assert data_size(DataConfig(kind=kind, path="nowhere", **split)) is None


def test_every_setting_and_every_kind_is_described():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    shown = [DataConfig(**yaml.safe_load(block)["data"]) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert {config.kind for config in shown} == {"emoji", *READERS}
    for name, field in DataConfig.model_fields.items():
        assert field.description and f"`{name}`" in page, name
