"""Code that is specific to UNets is only in their folder and in modules that handle their files (ALLOWED)."""

import re
from pathlib import Path

import pytest
from diffusers.models.unets import unet_2d_blocks

PACKAGE = Path(__file__).parents[2] / "prunekit"
ALLOWED = (
    "denoisers/unet/",
    "export/",  # formats of UNets: stock form, LoRA, adapters, class file, graphs
    "export/importing/",  # foreign UNet checkpoints
    "jobs/import_aptp.py",  # the command that imports them
)
OF_AUTOENCODERS = re.compile("Encoder|Decoder")
BLOCKS = sorted(
    {"BasicTransformerBlock", "ResnetBlock2D"}
    | {
        name
        for name, value in vars(unet_2d_blocks).items()
        if isinstance(value, type) and value.__module__ == unet_2d_blocks.__name__ and not OF_AUTOENCODERS.search(name)
    }
)
NAMES = re.compile(
    rf"\b(UNet2DConditionModel|{'|'.join(BLOCKS)}|down_blocks|mid_block|up_blocks)\b|(?<!denoisers)\.unet\b"
)
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py")) if "assets" not in path.parts}
GENERIC = [name for name in FILES if not name.startswith(ALLOWED)]
SHARED = {"denoisers/pixart/denoiser.py": "BasicTransformerBlock"}  # PixArt uses the same blocks


def found(name):
    """Return the lines of a file that contain names of UNets or of their parts."""
    lines = FILES[name].read_text(encoding="utf-8").replace(SHARED.get(name, "\0"), "").splitlines()
    return [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if NAMES.search(line)]


@pytest.mark.parametrize("name", GENERIC)
def test_generic_code_names_no_part_of_a_unet(name):
    assert not found(name), "take it from the Denoiser (prunekit/core/denoiser.py), by denoiser_of or denoiser_in"


def test_the_test_sees_what_it_must_refuse():
    assert len(BLOCKS) > 20 and len(GENERIC) > 150
    for line in ("pipeline.unet.config", "unet.down_blocks[0]", "-> UNet2DConditionModel:", "isinstance(x, UpBlock2D)"):
        assert NAMES.search(line), line
    for line in ("from prunekit.denoisers.unet import x", "DownEncoderBlock2D", 'folder / "unet"', "candidate.models"):
        assert not NAMES.search(line), line
