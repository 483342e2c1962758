"""Training excludes held-out pictures with all their captions, duplicates, and pictures that share a caption."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from data_layouts import LAYOUTS, emoji, webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_data import encoded_for, stub
from unets import build

from prunekit.data import holdout
from prunekit.data.config import DataConfig, load_data
from prunekit.data.encoded import EncodedData
from prunekit.data.holdout import NEAR, duplicate_groups, held_out_captions, hold_out, near_pairs
from prunekit.data.pictures import FilePictures
from prunekit.methods import APTP, Norm, TaylorSP, UniArch
from prunekit.recovery.fine_tuning import FineTuneConfig, fine_tune

SEARCH = {"steps": 2, "batch_size": 4, "learning_rate": 0.1}


def noise(seed, shift=0):
    """Return a PNG of 8 x 8 random blocks; `shift` changes its brightness slightly for a near duplicate."""
    import io

    blocks = np.random.default_rng(seed).integers(0, 200, (8, 8, 3)) + shift
    buffer = io.BytesIO()
    Image.fromarray(blocks.astype(np.uint8)).resize((32, 32), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def samples():
    """Return 40 pictures: 30 different ones, 4 exact duplicates, 3 near duplicates, 3 with the caption of another."""
    made = [(noise(index), f"picture {index}") for index in range(30)]
    made += [(noise(index), f"the same as {index}") for index in range(4)]
    made += [(noise(index, shift=3), f"nearly {index}") for index in range(4, 7)]
    return made + [(noise(100 + index), f"picture {index}") for index in range(7, 10)]


TWINS = (
    {30 + index: index for index in range(4)} | {34 + i: 4 + i for i in range(3)} | {37 + i: 7 + i for i in range(3)}
)


@pytest.mark.parametrize("write", [*LAYOUTS, emoji], ids=lambda write: write.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_is_held_out_is_in_training_in_any_layout(write, seed, tmp_path):
    hyphen = "-" if write is emoji else " "  # there, the first word is a keyword, which must differ
    written = [(image, caption.replace(" ", hyphen)) for image, caption in samples()]
    config = {**write(tmp_path, written), "holdout": 0.3, "holdout_by": "pictures"}
    data = load_data(DataConfig(**config), seed)
    held = data.held_out_pictures().tolist()
    training = sorted(set(range(data.num_images)) - set(held))
    assert len(held) == 12
    assert all((twin in held) == (index in held) for index, twin in TWINS.items())
    assert not {data.encoded[i] for i in held} & {data.encoded[i] for i in training}
    seen = {data.captions[pair] for pair in data.training_pairs().tolist()}
    assert not seen & {data.captions[pair] for pair in torch.nonzero(data.held_out).flatten().tolist()}
    thumbnails = data.pixels(range(data.num_images), 16).flatten(1).double() / 255
    distances = torch.cdist(thumbnails[held], thumbnails[training]) / thumbnails.shape[1] ** 0.5
    assert distances.min() > NEAR


def test_where_all_pictures_hang_together_none_can_be_held_out(tmp_path):
    config = webdataset(tmp_path, [(noise(index), "the same caption") for index in range(4)])
    data = load_data(DataConfig(**config, holdout=0.3), 0)
    assert data.num_images == 4 and not data.held_out.any() and not data.holds_pictures


SPLIT_LAYOUTS = {
    "webdataset": ({"split": "train"}, {"split": "validation"}, "validation"),
    "parquet": ({}, {"split": "validation"}, "validation"),
    "coco": ({"year": "train2014"}, {"year": "val2014"}, "val"),
}


@pytest.mark.parametrize("kind", SPLIT_LAYOUTS)
def test_a_split_of_its_own_is_held_out_with_what_resembles_it(kind, tmp_path):
    first, second, name = SPLIT_LAYOUTS[kind]
    write = next(layout for layout in LAYOUTS if layout.__name__.startswith(kind))
    config = write(tmp_path, [(image, f"training {caption}") for image, caption in samples()[:30]], **first)
    write(tmp_path, [(noise(3), "three again"), (noise(200), "training picture 5"), (noise(201), "new")], **second)
    config |= {"split": config.get("split") or "train", "holdout_split": name}
    data = load_data(DataConfig(**config), 0, tmp_path / "cache")
    assert data.num_images == 33 and data.holds_pictures
    assert data.held_out_pictures().tolist() == sorted({*range(30, 33), *_of(data, 3, 5)}) and data.held_by_closure == 2


def _of(data, *numbers):
    """Return the indices of the training pictures with these numbers; layouts differ in order."""
    captions = {f"training picture {number}" for number in numbers}
    pairs = [p for p, caption in enumerate(data.captions) if caption in captions and data.image_index[p] < 30]
    return {int(data.image_index[pair]) for pair in pairs}


def test_groups_join_through_others():
    encoded = [noise(0), noise(1), noise(0), noise(2), noise(1, shift=2)]
    groups = duplicate_groups(encoded, ["a", "b", "B ", "c", "d"], torch.arange(5)).tolist()
    assert groups[0] == groups[2] == groups[1] == groups[4] != groups[3]
    assert near_pairs([*encoded, b"no picture"]) == [(0, 2), (1, 4)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    captions=st.lists(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=3), min_size=4, max_size=30),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 100),
)
def test_the_share_is_exceeded_by_one_group_at_most_and_texts_are_apart(captions, share, seed):
    texts = [text for own in captions for text in own]
    index = torch.tensor([picture for picture, own in enumerate(captions) for _ in own])
    encoded = [bytes([i]) for i in range(len(captions))]
    sizes = torch.bincount(duplicate_groups(encoded, texts, index))
    held = hold_out("pictures", encoded, texts, index, share, seed)
    assert held.pictures <= max(round(share * len(captions)), int(sizes.min())) * bool(share)
    assert bool(held.pictures) == bool(share and (len(sizes) > 1 or round(share * len(captions)) == len(captions)))
    assert 0 <= held.by_closure <= held.pictures
    mask = held.pairs.tolist()
    assert not {t for t, m in zip(texts, mask, strict=True) if m} & {
        t for t, m in zip(texts, mask, strict=True) if not m
    }
    assert len({i for i, m in zip(index.tolist(), mask, strict=True) if m}) == held.pictures


@pytest.mark.parametrize("is_cached", [False, True])
def test_equal_bytes_are_grouped_in_data_of_any_size(is_cached, tmp_path, monkeypatch):
    monkeypatch.setattr(holdout, "MOST_COMPARED", 4)
    encoded = [noise(0), noise(1), noise(0), noise(1, shift=2), noise(2)]
    given = (["a", "b", "c", "d", "e"], torch.arange(5), tmp_path if is_cached else None)
    for _ in range(2):
        groups = duplicate_groups(encoded, *given).tolist()
        assert groups[0] == groups[2] and len(set(groups)) == 4  # there is no search for near duplicates
    monkeypatch.setattr(holdout, "MOST_COMPARED", 5)
    assert len(set(duplicate_groups(encoded, *given).tolist())) == 3


def test_a_picture_that_cannot_be_read_does_not_end_the_search(tmp_path):
    (tmp_path / "0.png").write_bytes(noise(0))
    (tmp_path / "1.png").write_bytes(noise(0))
    files = [str(tmp_path / name) for name in ("0.png", "1.png", "gone.png")]
    pictures = FilePictures(files, np.array([[i, 0, len(noise(0))] for i in (2, 0, 1)]))
    assert duplicate_groups(pictures, ["a", "b", "c"], torch.arange(3)).tolist() == [0, 1, 1]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    captions=st.lists(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=4), min_size=2, max_size=20),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 100),
)
def test_a_held_out_caption_is_in_no_training_pair_and_every_picture_keeps_one(captions, share, seed):
    texts = [text for own in captions for text in own]
    index = torch.tensor([picture for picture, own in enumerate(captions) for _ in own])
    held = held_out_captions(texts, index, share, seed)
    assert not {texts[p] for p in held.nonzero()} & {texts[p] for p in (~held).nonzero()}
    assert set(index[~held].tolist()) == set(range(len(captions)))


def test_captions_of_pictures_with_one_caption_are_held_out_by_pictures():
    encoded = [noise(index % 5) for index in range(10)]  # two of each picture
    captions = [f"picture {index}" for index in range(10)]
    held = hold_out("captions", encoded, captions, torch.arange(10), 0.4, 0)
    assert held.pairs[:5].tolist() == held.pairs[5:].tolist() and held.pictures == int(held.pairs.sum()) == 4


class Watched(EncodedData):
    """Encoded data that records which pairs were requested."""

    def conditions(self, pairs, *arguments, **options):
        WATCHED.update(pairs.tolist())
        return super().conditions(pairs, *arguments, **options)


WATCHED = set()


def watched(unet):
    data = encoded_for(unet, num=12)
    held = torch.zeros(12, dtype=torch.bool)
    held[[1, 4, 9]] = True
    content = {name: getattr(data, name) for name in data.__dataclass_fields__}
    return Watched(**{**content, "images": replace(data.images, held_out=held)})


METHODS = {
    "norm": Norm(budget=0.6),
    "taylor_sp": TaylorSP(budget=0.6, samples=9, batch_size=3, num_timesteps=2),
    "uniarch": UniArch(budget=0.6, search=SEARCH),
    "aptp": APTP(budget=0.6, experts=2, warmup=1, search=SEARCH),
}


@pytest.mark.parametrize("name", METHODS)
def test_calibration_and_search_see_training_pairs_only(name):
    unet = build("sd2")
    data = watched(unet)
    WATCHED.clear()
    METHODS[name].prune(stub(unet), data)
    assert not WATCHED & {1, 4, 9}
    assert name == "norm" or WATCHED


def test_fine_tuning_sees_training_pairs_only(tmp_path):
    unet = build("sd2")
    data = watched(unet)
    WATCHED.clear()
    config = FineTuneConfig(steps=6, batch_size=6, learning_rate=1e-4)
    fine_tune(build("sd2"), unet, data, config, tmp_path, scheduler=stub(unet).scheduler)
    assert set(range(12)) - {1, 4, 9} == WATCHED
