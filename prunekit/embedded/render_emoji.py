"""Render Emoji-64, the embedded data set, from two Debian packages (both needed only to make it again).

    apt install fonts-noto-color-emoji unicode-cldr-core
    python -m prunekit.embedded.render_emoji OUT_DIRECTORY

Pictures: Noto Color Emoji (SIL Open Font License 1.1), every emoji without a skin-tone variant, on white, 64x64.
Captions: the names and keywords of Unicode CLDR's English annotations (Unicode License v3).
Layout: WebDataset shards; one sample is `KEY.png`, `KEY.txt` (the name) and `KEY.json`
(emoji, name, keywords). The output is a function of the two packages alone: same bytes every time.
"""

import argparse
import io
import json
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common")
PACKAGES = {"fonts-noto-color-emoji": FONT, "unicode-cldr-core": ANNOTATIONS}  # Debian's
STRIKE = 109  # the only bitmap size in the font, in pixels
SIZE = 64
SAMPLES_PER_SHARD = 1000
SKIN_TONES = range(0x1F3FB, 0x1F400)
JOINERS = {0x200D, 0xFE0F}  # zero-width joiner, variation selector 16


def annotations(directory: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (emoji, name, keywords) of CLDR's English annotations, in the files' order, the base file first."""
    for part in ("annotations", "annotationsDerived"):
        keywords: dict[str, list[str]] = {}
        for node in ElementTree.parse(directory / part / "en.xml").iter("annotation"):
            character, text = node.attrib["cp"], node.text or ""
            if node.attrib.get("type") == "tts":
                yield character, text, keywords.get(character, [])
            else:
                keywords[character] = [word.strip() for word in text.split("|")]


def samples(font_path: Path, directory: Path) -> Iterator[tuple[dict, bytes]]:
    """Yield (metadata, PNG bytes) of every emoji that the font draws as one glyph."""
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont, features

    if not features.check("raqm"):
        raise RuntimeError("Pillow has no Raqm: joined emoji would fall apart; install libfribidi0")
    covered = set(TTFont(font_path).getBestCmap())
    font = ImageFont.truetype(str(font_path), STRIKE)
    advance = font.getlength("\N{GRINNING FACE}")
    for character, name, keywords in annotations(directory):
        points = {ord(c) for c in character}
        if points & set(SKIN_TONES) or not (points - JOINERS) <= covered or font.getlength(character) != advance:
            continue
        left, top, right, bottom = font.getbbox(character)
        if right <= left or bottom <= top or (len(character) == 1 and character.isascii()):
            continue
        glyph = Image.new("RGBA", (int(right - left), int(bottom - top)))
        ImageDraw.Draw(glyph).text((-left, -top), character, font=font, embedded_color=True)
        side = max(glyph.size)
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        buffer = io.BytesIO()
        square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(buffer, "PNG", optimize=True)
        kept = [word for word in keywords if word.lower() != name.lower()]
        yield {"emoji": character, "name": name, "keywords": kept}, buffer.getvalue()


def write_shards(output: Path, font_path: Path = FONT, directory: Path = ANNOTATIONS) -> int:
    """Write `emoji64-00000.tar` … into `output`; return the number of samples."""
    output.mkdir(parents=True, exist_ok=True)
    by_picture: dict[bytes, dict] = {}
    for metadata, png in samples(font_path, directory):  # of the names of one picture (flags), keep the shortest
        known = by_picture.get(png)
        if known is None or len(metadata["name"]) < len(known["name"]):
            by_picture[png] = metadata
    everything = [(metadata, png) for png, metadata in by_picture.items()]
    for shard, first in enumerate(range(0, len(everything), SAMPLES_PER_SHARD)):
        with tarfile.open(output / f"emoji64-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for offset, (metadata, png) in enumerate(everything[first : first + SAMPLES_PER_SHARD]):
                text = json.dumps(metadata, ensure_ascii=False)
                for suffix, body in (("png", png), ("txt", metadata["name"].encode()), ("json", text.encode())):
                    entry = tarfile.TarInfo(f"{first + offset:06d}.{suffix}")
                    entry.size = len(body)
                    tar.addfile(entry, io.BytesIO(body))
    return len(everything)


def main() -> None:
    """Write the shards and print how many emoji they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    for package, path in PACKAGES.items():
        if not path.exists():
            raise SystemExit(f"{path} is missing: apt install {package}")
    print(f"{write_shards(output)} emoji -> {output}")


if __name__ == "__main__":
    main()
