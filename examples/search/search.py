"""Search a folder of images by text, with nothing but the exported files.

    dgmr-tp export MODEL -o files --formats onnx --text --normalised     # MODEL: a CLIP of open_clip's
    python examples/search/search.py files index IMAGES      # once; writes IMAGES.npz
    python examples/search/search.py files ask IMAGES "two blue squares"

MODEL stays where it is: its tokenizer is used. Needs onnxruntime, numpy, pillow, torchvision for the preprocessing and open_clip for
the tokenizer.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
from PIL import Image

BATCH = 32


def load(folder: Path, tower: str) -> tuple[onnxruntime.InferenceSession, str]:
    described = json.loads((folder / "export.json").read_text())["towers"][tower]
    return onnxruntime.InferenceSession(str(folder / described["files"]["onnx"]["file"])), described["input"]["name"]


def index(folder: Path, images: Path) -> None:
    bundle = json.loads((folder / "export.json").read_text())
    config = open_clip.transform.PreprocessCfg(**bundle["preprocess"])
    preprocess = open_clip.transform.image_transform_v2(config, is_train=False)
    session, name = load(folder, "image")
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    rows = []
    for start in range(0, len(files), BATCH):
        batch = np.stack([preprocess(Image.open(path).convert("RGB")).numpy() for path in files[start : start + BATCH]])
        rows.append(session.run(None, {name: batch})[0])
        print(f"\r{min(start + BATCH, len(files))}/{len(files)}", end="", flush=True)
    np.savez(f"{images}.npz", files=[str(path) for path in files], rows=np.concatenate(rows))
    print(f"\nwritten: {images}.npz")


def ask(folder: Path, images: Path, text: str, count: int = 5) -> None:
    model = json.loads((folder / "export.json").read_text())["model"]
    here = folder / model
    if not here.is_dir() and not model.startswith("open_clip:"):
        sys.exit(f"{here}, the model of these files, is not there: its tokenizer is needed")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{here}" if here.is_dir() else model.removeprefix("open_clip:"))
    session, name = load(folder, "text")
    [query] = session.run(None, {name: tokenizer([text]).numpy()})[0]
    known = np.load(f"{images}.npz")
    scores = known["rows"] @ query  # both have length 1: cosines
    for best in np.argsort(scores)[::-1][:count]:
        print(f"{scores[best]:.3f}  {known['files'][best]}")


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[2] not in ("index", "ask") or (sys.argv[2] == "ask") != (len(sys.argv) == 5):
        sys.exit(__doc__)
    files, images = Path(sys.argv[1]), Path(sys.argv[3].rstrip("/"))
    index(files, images) if sys.argv[2] == "index" else ask(files, images, sys.argv[4])
