"""Random damage to model directories: each loads or is refused in one line, and no code in them runs.

`PRUNEKIT_FUZZ=30 pytest tests/test_fuzz_models.py` tries 300 directories.
"""

import json
import os
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from fuzz_figures import Figures, shown
from fuzzing import HOSTILE, TIMEOUT, forked, fuzzed, measured, mutated
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_model import RECIPE, write_pipeline
from typer.testing import CliRunner

from prunekit.cli import app
from prunekit.core.discovery import discover
from prunekit.jobs.plan import Devices, plan
from prunekit.jobs.recipe import parse_recipe
from prunekit.models import load_pipeline
from prunekit.runtime.errors import UserError
from prunekit.slicing import slice_unet

pytestmark = TIMEOUT
CONFIGS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)
TOKENIZER = "tokenizer/tokenizer.json"
WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
CLASSES = (  # values that replace a class, a library and class, or any other value
    ["evil", "Evil"],
    ["diffusers", "evil.Evil"],
    ["os", "system"],
    ["builtins", "eval"],
    ["diffusers", "FluxTransformer2DModel"],
    ["transformers", "AutoModel"],
    ["pipeline", "Evil"],
    ["diffusers", "PrunedUNet2DConditionModel"],
    "evil.Evil",
    "DiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionInpaintPipeline",
    "PrunedUNet2DConditionModel",
    [None, None],
    {"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]},
)
KEYS = {  # settings with which an attacker might run code
    "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    "custom_pipeline": "evil",
    "trust_remote_code": True,
    "_name_or_path": "/dev/zero",
    "quantization_config": {"quant_method": "evil"},
    "pruning": {"version": 1, "architecture": {}},
    "class_name": "evil.Evil",
    "tokenizer_class": "Evil",
    "architectures": ["evil.Evil"],
    "model_type": "evil",
}
TEXT = (b"", b"{", b"[]", b"nul", b"\xff\xfe{}", b'{"a": ' * 5000, b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"x": NaN}')
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
CODE = ("evil.py", "pipeline.py", "unet/evil.py", "text_encoder/evil.py", "tokenizer/evil.py", "sitecustomize.py")


@cache
def whole(kind: str) -> Path:
    """Return a small pipeline's folder; its UNet is stock or pruned."""
    folder = Path(tempfile.mkdtemp(prefix="prunekit-fuzz-")) / kind
    write_pipeline(folder, layers=1)
    if kind == "pruned":
        unet = load_pipeline(folder).unet
        shutil.rmtree(folder / "unet")
        slice_unet(unet, discover(unet).random(0.7)).save_pretrained(folder / "unet")
        index = json.loads((folder / "model_index.json").read_text())
        index["unet"] = ["prunekit", "PrunedUNet2DConditionModel"]
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def read(path: Path) -> bytes:
    """Return a file's content; raise OSError for links to devices and for pipes, whose content may be endless."""
    if not path.is_file():
        raise OSError(f"{path} is not a file")
    return path.read_bytes()


def change_config(draw, folder: Path) -> None:
    path = folder / draw(st.sampled_from(CONFIGS))
    content = json.loads(read(path))
    if draw(st.integers(0, 2)) == 0:
        key = draw(st.sampled_from(sorted({*KEYS, *content})))
        content[key] = KEYS.get(key, draw(st.sampled_from(CLASSES)))
    else:
        content = draw(mutated(content, (*HOSTILE, *CLASSES)))
    path.write_text(json.dumps(content), encoding="utf-8")


def damage_text(draw, folder: Path) -> None:
    path = folder / draw(st.sampled_from((*CONFIGS, TOKENIZER)))
    content = read(path)
    cut = draw(st.integers(0, len(content)))
    path.write_bytes(draw(st.sampled_from((*TEXT, content[:cut], content[:cut] + b"\0\xff" + content[cut:]))))


def change_tokenizer(draw, folder: Path) -> None:
    path = folder / TOKENIZER
    content = json.loads(read(path))
    small = {key: value for key, value in content.items() if key != "model"}
    small["model"] = {key: value for key, value in content["model"].items() if not isinstance(value, dict | list)}
    changed = draw(mutated(small))
    if isinstance(changed.get("model"), dict):
        changed["model"] = {**content["model"], **changed["model"]}
    path.write_text(json.dumps(changed), encoding="utf-8")


def replace_file(draw, folder: Path) -> None:
    """Remove a file or folder, or put a link, a folder or another file in its place."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_symlink())
    path = folder / draw(st.sampled_from(files))
    kind = draw(st.sampled_from(("remove", "remove", "zero", "loop", "outside", "pipe", "folder", "other", "locked")))
    other = folder / draw(st.sampled_from(files))
    content = other.read_bytes() if other.is_file() else b""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "outside":
        path.symlink_to(folder.parent)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "other":
        path.write_bytes(content)
    elif kind == "locked":
        path.touch(mode=0)


def damage_weights(draw, folder: Path) -> None:
    path = folder / draw(st.sampled_from(WEIGHTS))
    content = read(path)
    length = int.from_bytes(content[:8], "little")
    kind = draw(st.sampled_from(("cut", "length", "header", "header", "empty", "pickle")))
    if kind == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif kind == "length":
        stated = draw(st.sampled_from((0, 1, length - 1, length + 1, 2**31, 2**63 - 1)))
        content = struct.pack("<Q", stated) + content[8:]
    elif kind == "header":
        header = json.loads(content[8 : 8 + length])
        chosen = dict(list(header.items())[:4])
        numbers = (0, -1, 1, 2**31, 2**40, 2**63, [2**40], [2**31, 2**31, 2**31], [0], [], "F32", "F64", "I8", "X")
        changed = json.dumps({**header, **draw(mutated(chosen, numbers))}).encode()
        content = struct.pack("<Q", len(changed)) + changed + content[8 + length :]
    else:
        content = b"" if kind == "empty" else b"\x80\x04cposix\nsystem\n(S'touch ran'\ntR."
    path.write_bytes(content)


def change_tensors(draw, folder: Path) -> None:
    path = folder / draw(st.sampled_from(WEIGHTS))
    read(path)
    try:
        tensors = load_file(path)
    except Exception:  # the file is already damaged
        return
    names = sorted(tensors)
    for _ in range(draw(st.integers(1, 3))):
        name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        kind = draw(st.sampled_from(("drop", "rename", "swap", "shape", "dtype", "values", "scalar")))
        tensor = tensors.get(name, torch.zeros(1))
        if kind == "drop":
            tensors.pop(name, None)
        elif kind == "rename":
            tensors[f"{name}.x"] = tensors.pop(name, tensor)
        elif kind == "swap":
            tensors[name] = tensors.get(other, tensor).clone()
        elif kind == "shape":
            tensors[name] = tensor.reshape(-1)[:-1].clone()
        elif kind == "dtype":
            tensors[name] = tensor.to(draw(st.sampled_from(DTYPES)))
        else:
            tensors[name] = torch.full((), float("nan")) if kind == "scalar" else torch.full_like(tensor, 1)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


KINDS = (change_config, change_config, change_config, damage_text, change_tokenizer, damage_weights, change_tensors)


@st.composite
def damage(draw, folder: Path) -> dict[str, str]:
    """Damage a copy of a pipeline in 1 to 3 ways; return the texts of changed files, for error messages."""
    before = texts(folder)
    for kind in draw(st.lists(st.sampled_from((*KINDS, replace_file, replace_file)), min_size=1, max_size=3)):
        try:
            kind(draw, folder)
        except (OSError, ValueError, AttributeError, TypeError):  # the file is already damaged
            continue
    return {name: text for name, text in texts(folder).items() if before.get(name) != text}


def texts(folder: Path) -> dict[str, str]:
    """Return the first 3,000 bytes of a pipeline's files as text, and "odd" for links and special files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        regular = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_bytes()[:3000].decode("utf-8", "replace") if regular else "odd"
    return found


def plant(folder: Path, mark: Path) -> None:
    """Put Python files into a directory that create the file `mark` when they are imported."""
    for name in CODE:
        if (folder / name).parent.is_dir():
            (folder / name).write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil: pass\n")


def look(folder: Path) -> bool:
    """Load a directory's pipeline, and run the commands `units` and `macs`; raise UserError if one refuses it."""
    faults = []
    for command in ("units", "macs"):
        result = CliRunner().invoke(app, [command, str(folder)])
        if result.exit_code != 0:
            if not isinstance(result.exception, SystemExit):
                raise result.exception
            assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("prunekit: "), result.stderr
            faults.append(result.stderr.strip())
    load_pipeline(folder)
    if faults:
        raise UserError(faults[0])
    return True


@cache
def seconds_of(kind: str) -> float:
    """Return the CPU time of `look` for an undamaged directory."""
    look(whole(kind))  # imports all modules
    outcome = forked(lambda: look(whole(kind)), 120)
    assert outcome.kind == "done", outcome.value
    return outcome.seconds


FIGURES = Figures("model directories")
figures = shown(FIGURES)


def check(change, kind: str = "stock") -> str:
    """Change a copy of a pipeline's directory and run `look` on it; return "done" or "refused"."""
    seconds = seconds_of(kind)
    with tempfile.TemporaryDirectory() as root:
        folder, mark = Path(root) / "model", Path(root) / "ran"
        shutil.copytree(whole(kind), folder)
        plant(folder, mark)
        changed = change(folder)
        before = sorted(Path(root).rglob("*"))
        outcome = measured(lambda: look(folder), seconds)
        with FIGURES.case(changed):
            FIGURES.check(outcome, seconds, [])
            assert not mark.exists() and sorted(Path(root).rglob("*")) == before
        return outcome.kind


@fuzzed(6)
@given(st.data(), st.sampled_from(("stock", "stock", "pruned")))
def test_a_damaged_directory_loads_or_is_refused(data, kind):
    check(lambda folder: data.draw(damage(folder)), kind)


SIZES = {  # invalid sizes, of which some once gave a traceback
    "unet/config.json": [
        *({"sample_size": value} for value in (None, [8], [8, 8, 8], "8", 8.0, True, 0, -8, [[8, 8], 8], 2**40)),
        *({"cross_attention_dim": [32, "x"]}, {"block_out_channels": [16, 32.5, 32, 32]}, {"norm_num_groups": 2**40}),
    ],
    "vae/config.json": [{"block_out_channels": value} for value in (None, 8, [], [8] * 5000, "wide", {"a": 1})],
    "tokenizer/tokenizer_config.json": [{"model_max_length": value} for value in (None, "x", 0, -1, 1e30, [77], True)],
}


@pytest.mark.parametrize(("name", "values"), SIZES.items(), ids=SIZES)
def test_sizes_that_are_none_are_refused_or_not_used(name, values, tmp_path):
    shutil.copytree(whole("stock"), tmp_path / "model")
    path = tmp_path / "model" / name
    content = json.loads(path.read_bytes())
    recipe = parse_recipe({**RECIPE, "model": str(tmp_path / "model")})
    for change in values:
        path.write_text(json.dumps({**content, **change}))
        for use in (lambda: look(tmp_path / "model"), lambda: plan(recipe, Devices(1, 1e12))):
            try:
                use()
            except UserError as error:
                assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("kind", ["stock", "pruned"])
def test_what_is_not_damaged_loads(kind):
    assert check(lambda folder: None, kind) == "done"
