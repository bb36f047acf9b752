"""Lines of Python as noisy pictures: what a recogniser reads, and a language model corrects.

python pipelines/ocr_lines.py --out data/ocr --lines 300

The lines are consecutive ones of the installed package `rich`. Those that the standard library holds, on
which the embedded teacher was trained, are left out. `truths.txt` has them, one a line; the pictures' noise
has three seeds, one for each third of the lines.
"""

import argparse
import importlib.util
import shutil
import sysconfig
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFilter, ImageFont

PACKAGE = "rich"
LENGTHS = range(16, 56)
SIZE = 22
NOISE, BLUR, SEEDS = 70.0, 0.9, 3


def unseen_lines(count: int) -> list[str]:
    """Consecutive lines of a package, without its comments and what is in the standard library."""
    seen: set[str] = set()
    for path in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"):
        seen.update(line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    found: list[str] = []
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            text = line.strip()
            plain = text.isascii() and not text.startswith(("#", '"', "'"))
            if plain and len(text) in LENGTHS and text not in seen:
                found.append(text)
    first = len(found) // 3  # not the first file's imports
    return found[first : first + count]


def picture(text: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> Image.Image:
    """Dark text on grey, blurred, with noise."""
    width = round(font.getlength(text)) + 16
    image = Image.new("L", (width, 34), 225)
    ImageDraw.Draw(image).text((8, 4), text, fill=50, font=font)
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR)), dtype=np.float32)
    noisy = blurred + NOISE * rng.standard_normal(blurred.shape, dtype=np.float32)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=300)
    given = parser.parse_args()
    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"), SIZE)
    lines = unseen_lines(given.lines)
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    (given.out / "truths.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    noise = [np.random.default_rng(seed) for seed in range(SEEDS)]
    for number, text in enumerate(lines):
        rng = noise[number * SEEDS // len(lines)]
        picture(text, font, rng).save(given.out / f"{number:04d}.png")


if __name__ == "__main__":
    main()
