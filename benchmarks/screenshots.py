"""Pictures of a report's page at the width of a screen and of a phone, by a headless Chromium.

python benchmarks/screenshots.py data/pythia-tiny/report.html --out docs/images
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

#: Width and height of each picture, in pixels of the page.
SIZES = {"report": (1400, 1500), "report-phone": (400, 1300)}

#: Chromium makes no narrower window; the page then stands in a narrower frame.
NARROWEST = 520

#: Colours of a picture: enough for a page of text and charts, and a third of the bytes.
COLOURS = 128


def picture(page: Path, width: int, height: int, out: Path) -> None:
    """Write one picture, of the page's upper end.

    Parameters
    ----------
    page
        The HTML file.
    width, height
        In pixels.
    out
        The PNG.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("error: given: no Chromium / expected: one on PATH / do: apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        frame, raw = Path(folder) / "frame.html", Path(folder) / "raw.png"
        style = f"border:0;width:{width}px;height:{height}px"
        frame.write_text(f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" style="{style}">')
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=5000",
        ]
        options += [
            f"--user-data-dir={folder}/profile",
            f"--window-size={max(width, NARROWEST)},{height + 200}",
        ]
        command = [browser, *options, f"--screenshot={raw}", frame.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        shot = Image.open(raw).convert("RGB").crop((0, 0, width, height))
        shot.quantize(COLOURS).save(out, optimize=True)


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    for name, (width, height) in SIZES.items():
        out = options.out / f"{name}.png"
        picture(options.page, width, height, out)
        print(f"{out}: {width} x {height}, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
