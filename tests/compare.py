"""Every script's demo on this machine: a table of what pre-training brought, and a picture.

    python -m tests.compare [--seed N] [--output DIR] [--picture FILE]

Run by hand, a quarter of an hour on two cores; started again, it goes on with the demos that have
not ended. All pre-train on the same 8,192 built-in images and fine-tune on the same 1,000 labels;
networks, steps and rates are each script's own, so rows do not rank the methods: one says what
pre-training gained over its own start. The picture shows two images that none was trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from PIL import Image, ImageDraw

from common import data
from tests.scripts import SCRIPTS

IMAGES = 2  # MixMAE mixes the first with the last
TILE, LABEL, MARGIN, GAP = 128, 16, 72, 16  # pixels
SHOWN = {  # name, folder of what is shown, columns of its picture and what to call them
    "greenmim": ("GreenMIM", "pretrain", {0: "image", 1: "visible", 2: "reconstruction"}),
    "mixmae": ("MixMAE", "pretrain", {1: "mixed", 2: "reconstruction", 3: "the other image"}),
    "fastmim": ("FastMIM", "pretrain", {1: "painted", 2: "HOG of the image", 3: "predicted"}),
    "hpvit": ("HPViT", "pretrain", {0: "image", 1: "visible", 2: "reconstruction"}),
    "distill_lite": ("D2-MAE", "distilled", {0: "image", 1: "visible", 2: "reconstruction"}),
}


def write_table(results: dict[str, dict]) -> str:
    """Markdown: top-1 from scratch and pre-trained, points gained, seconds of the whole demo; of
    distill_lite its student without a teacher, too."""
    lines = ["| method | from scratch | pre-trained | gain | seconds |", "|---|--:|--:|--:|--:|"]
    for script, result in results.items():
        rows, scratch = [(SHOWN[script][0], "pretrained_acc1")], result["scratch_acc1"]
        if "distilled_acc1" in result:
            rows = [("MAE-Lite, no teacher", "pretrained_acc1"), ("D2-MAE", "distilled_acc1")]
        lines += [f"| {name} | {scratch:.1f} | {result[key]:.1f} | {result[key] - scratch:+.1f} | "
                  f"{result['seconds']:.0f} |" for name, key in rows]  # fmt: skip
    return "\n".join(lines)


def cut(picture: Image.Image, column: int) -> list[Image.Image]:
    """Tiles of a column, from the top, of a picture of IMAGES rows by `data.draw_columns`."""
    side = (picture.height - LABEL) // IMAGES
    strip = picture.crop((column * side, LABEL, (column + 1) * side, picture.height))
    strip = strip.resize((TILE, IMAGES * TILE), Image.Resampling.BOX)
    return [strip.crop((0, i * TILE, TILE, (i + 1) * TILE)) for i in range(IMAGES)]


def side_by_side(pictures: dict[str, Image.Image]) -> Image.Image:
    """A method a row, an image a group of three columns."""
    width = MARGIN + IMAGES * (3 * TILE + GAP) - GAP
    sheet = Image.new("RGB", (width, len(pictures) * (TILE + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (script, picture) in enumerate(pictures.items()):
        (name, _, columns), y = SHOWN[script], row * (TILE + LABEL)
        draw.text((4, y + LABEL + TILE // 2 - 6), name, fill="black")
        for k, (column, label) in enumerate(columns.items()):
            for image, tile in enumerate(cut(picture, column)):
                x = MARGIN + image * (3 * TILE + GAP) + k * TILE
                draw.text((x + 4, y + 2), label, fill="black")
                sheet.paste(tile, (x, y + LABEL))
    return sheet


def run_demo(script: ModuleType, output: Path, seed: int) -> dict:
    """What the demo printed; it runs only if no earlier one ended here."""
    ended = output / "result.json"
    if not ended.exists():
        result = script.demo(script.configure("demo", seed=seed, output=str(output)))
        data.save_file(ended, lambda file: file.write(json.dumps(result).encode()))
    return json.loads(ended.read_text())


def show(script: ModuleType, output: Path, images: Path, seed: int) -> Image.Image:
    """The script's own picture of these images, by the demo's last checkpoint of pre-training."""
    weights, picture = output / SHOWN[script.SCRIPT][1] / "checkpoint-last.pth", output / "seen.png"
    script.reconstruct(script.configure("reconstruct", weights=str(weights), seed=seed,
                                        data_path=str(images), output=str(picture)))  # fmt: skip
    return Image.open(picture)


def main(argv: Sequence[str]) -> int:
    """Run the demos that have no result yet, print the table, write the picture."""
    parser = argparse.ArgumentParser(prog="python -m tests.compare", allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="of the demos [%(default)s]")
    parser.add_argument("--output", type=Path, default="output/compare", help="[%(default)s]")
    parser.add_argument("--picture", type=Path, default="docs/compare.png", help="[%(default)s]")
    args = parser.parse_args(argv)
    folder = args.output / f"seed-{args.seed}"
    for index in range(IMAGES):
        unseen = data.DrawnImages("val", IMAGES).open(index)
        data.save_picture(unseen, folder / "images" / f"{index}.png")
    results = {s.SCRIPT: run_demo(s, folder / s.SCRIPT, args.seed) for s in SCRIPTS}
    shown = {s.SCRIPT: show(s, folder / s.SCRIPT, folder / "images", args.seed) for s in SCRIPTS}
    data.save_picture(side_by_side(shown), args.picture)
    print(f"\n{write_table(results)}\n\nwrote {args.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
