"""Search a folder of images by text, using only the exported files.

    dgmr-tp export MODEL -o files --formats onnx --text --normalized     # MODEL: a CLIP of open_clip
    python examples/search/search.py files index IMAGES      # once; writes IMAGES.npz
    python examples/search/search.py files ask IMAGES "two blue squares"

The tokenizer is read from MODEL, so do not move it. Needs onnxruntime, numpy, pillow, torchvision for the
preprocessing, and open_clip for the tokenizer.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
from PIL import Image

BATCH_SIZE = 32
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def load(folder: Path, tower: str) -> tuple[onnxruntime.InferenceSession, str]:
    """Open a tower's ONNX file. Return the session and the name of its input."""
    entry = json.loads((folder / "export.json").read_text("utf-8"))["towers"][tower]
    return onnxruntime.InferenceSession(str(folder / entry["files"]["onnx"]["file"])), entry["input"]["name"]


def index(folder: Path, images: Path) -> None:
    """Embed all images of a folder and store the embeddings."""
    bundle = json.loads((folder / "export.json").read_text("utf-8"))
    config = open_clip.transform.PreprocessCfg(**bundle["preprocess"])
    preprocess = open_clip.transform.image_transform_v2(config, is_train=False)
    session, name = load(folder, "image")
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)
    rows = []
    for start in range(0, len(files), BATCH_SIZE):
        paths = files[start : start + BATCH_SIZE]
        batch = np.stack([preprocess(Image.open(path).convert("RGB")).numpy() for path in paths])
        rows.append(session.run(None, {name: batch})[0])
        print(f"\r{start + len(paths)}/{len(files)}", end="", flush=True)
    np.savez(f"{images}.npz", files=[str(path) for path in files], rows=np.concatenate(rows))
    print(f"\nwritten: {images}.npz")


def ask(folder: Path, images: Path, text: str, count: int = 5) -> None:
    """Print the images whose embeddings are closest to the text's."""
    model = json.loads((folder / "export.json").read_text("utf-8"))["model"]
    model_dir = folder / model
    if not model_dir.is_dir() and not model.startswith("open_clip:"):
        sys.exit(f"{model_dir}, the model of these files, does not exist. Restore it: its tokenizer is needed.")
    tokenizer_name = f"local-dir:{model_dir}" if model_dir.is_dir() else model.removeprefix("open_clip:")
    tokenizer = open_clip.get_tokenizer(tokenizer_name)
    session, name = load(folder, "text")
    [query] = session.run(None, {name: tokenizer([text]).numpy()})[0]
    stored = np.load(f"{images}.npz")
    scores = stored["rows"] @ query  # cosines, because both have length 1
    for best in np.argsort(scores)[::-1][:count]:
        print(f"{scores[best]:.3f}  {stored['files'][best]}")


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[2] not in ("index", "ask") or (sys.argv[2] == "ask") != (len(sys.argv) == 5):
        sys.exit(__doc__)
    files, images = Path(sys.argv[1]), Path(sys.argv[3].rstrip("/"))
    if sys.argv[2] == "index":
        index(files, images)
    else:
        ask(files, images, sys.argv[4])
