"""Rows stored in many files, and the size of a cache in bytes."""

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prunekit.data.cache_config import CacheConfig, cache_bytes
from prunekit.data.rows import MappedRows, stored_tensors


def write_rows(folder, lengths, row=(2, 3), dtype=torch.float32):
    """Write files with the given numbers of rows; return the files and all rows."""
    whole = torch.randn(sum(lengths), *row, generator=torch.Generator().manual_seed(0)).to(dtype)
    paths = []
    for number, part in enumerate(whole.split(lengths)):
        paths.append(folder / f"{number:05d}.safetensors")
        save_file({"other": torch.zeros(3), "values": part.clone()}, paths[-1])
    return paths, whole.float()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(sum))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_files_are_the_rows_of_one_tensor(data, lengths, dtype, tmp_path_factory):
    paths, whole = write_rows(tmp_path_factory.mktemp("rows"), lengths, dtype=dtype)
    rows, n = MappedRows(paths, "values"), len(whole)
    assert rows.shape == whole.shape and len(rows) == n
    index = torch.tensor(data.draw(st.lists(st.integers(-n, n - 1), max_size=20)), dtype=torch.long)
    assert torch.equal(rows[index], whole[index]) and rows[index].dtype == torch.float32
    first, last = data.draw(st.integers(-n, n)), data.draw(st.integers(-n, n))
    assert torch.equal(rows[first:last], whole[first:last]) and torch.equal(rows[:], whole)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    assert torch.equal(rows[mask], whole[mask]) and torch.equal(rows[n - 1], whole[n - 1])
    square = torch.arange(n).repeat(2, 1)
    assert torch.equal(rows[square], whole[square])
    for wrong in (n, -n - 1):
        with pytest.raises(IndexError, match=f"there are {n}"):
            rows[torch.tensor([0, wrong])]


def test_files_that_do_not_belong_together(tmp_path):
    paths, _ = write_rows(tmp_path, [2, 3])
    with pytest.raises(ValueError, match="holds other, values, no latents"):
        MappedRows(paths, "latents")
    save_file({"values": torch.zeros(2, 3, 3)}, paths[1])
    with pytest.raises(ValueError, match="unlike the files before it"):
        MappedRows(paths, "values")
    content = paths[0].read_bytes()
    for damaged in (content[:4], content[:50], content[:-1], b"x" * 100):
        paths[0].write_bytes(damaged)
        with pytest.raises(ValueError, match=r"header|does not hold|codec|JSON|Expecting"):
            stored_tensors(paths[0])


def test_memory_does_not_grow_with_what_was_read(tmp_path):
    paths, whole = write_rows(tmp_path, [512] * 16, (4, 32, 32))  # 128 MiB
    rows, process = MappedRows(paths, "values"), psutil.Process()
    del whole
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        rows[torch.randint(len(rows), (256,), generator=draw)]
    before = process.memory_info().rss
    for _ in range(60):
        rows[torch.randint(len(rows), (256,), generator=draw)]
    assert process.memory_info().rss - before < 32 * 2**20


CC3M = 2_905_954


def test_bytes_of_cc3m_at_256_pixels():
    def gigabytes(**settings):
        config = CacheConfig(precision="float16", **settings)
        sizes = cache_bytes(CC3M, CC3M, (4, 32, 32), (77, 1024), 768, config)
        return {part: size / 1e9 for part, size in sizes.items()}

    expected = {"latents": 24, "text": 458, "prompts": 4.5, "pooled": 0}
    assert gigabytes() == pytest.approx(expected, rel=0.02)
    assert gigabytes(latents="moments", text=False) == pytest.approx({**expected, "latents": 48, "text": 0}, rel=0.02)
    assert gigabytes(latents="off")["latents"] == 0
    full = CacheConfig(latents="moments")
    sizes = cache_bytes(10, 20, (4, 8, 8), (16, 32), 64, full, pooled_width=24)
    assert sizes == {"latents": 10 * 2 * 256 * 4, "text": 20 * 512 * 4, "prompts": 20 * 64 * 4, "pooled": 20 * 24 * 4}
