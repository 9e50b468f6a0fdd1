"""Run by a launcher in every process: distillations of the demo CLIP, one after the other.

    torchrun --nproc_per_node 2 distill_worker.py FOLDER

``FOLDER/cases.json`` maps a name to what differs from the small recipe's distill section, or, with ``captions``, from ``TEXT``. ``model``
is a directory in place of the demo CLIP, ``images`` a folder, or one for each process. ``after`` names the case which it goes on, ``step``
the last checkpoint of that, ``damage`` one to damage, ``json`` is the content of a DeepSpeed file, ``features`` names the file of kept
features, ``lost`` a teacher that knows nothing any more. The weights come to ``FOLDER/NAME.safetensors``, the figures to
``FOLDER/NAME.figures``, an error to ``FOLDER/NAME.error``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path

from conftest import SMALL
from safetensors.torch import save_file
from torch import distributed

from dgmr_tp import prune
from dgmr_tp.data.captions import Captioned
from dgmr_tp.data.streams import find_images
from dgmr_tp.distillation.config import DistillSettings, TextSettings
from dgmr_tp.distillation.distill import distill
from dgmr_tp.distillation.engine import start_deepspeed, stop_deepspeed
from dgmr_tp.distillation.text import tune_text
from dgmr_tp.encoders import open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline.recipe import Distill, TuneText

TEXT = {"steps": 12, "batch_size": 8, "base_lr": 1e-2, "checkpoint_every": 4, "keep_checkpoints": 3, "log_every": 1}
SECTION = {**SMALL["distill"], "steps": 12, "checkpoint_every": 4, "keep_checkpoints": 3}


def main(folder: Path) -> None:
    logging.disable(logging.WARNING)
    start_deepspeed()
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        after, step, damage, features, lost = (
            case.pop(key, None) for key in ("after", "step", "damage", "features", "lost")
        )
        if after and os.environ["RANK"] == "0":
            shutil.copytree(folder / after, folder / name)
            for checkpoint in (folder / name / "checkpoints").glob("step*"):
                if step and int(checkpoint.name[4:]) > step:
                    shutil.rmtree(checkpoint)
                if damage == int(checkpoint.name[4:]):
                    next(checkpoint.glob("*model_states.pt")).write_bytes(b"damaged")
        if after:
            distributed.barrier()
        if content := case.pop("json", None):
            case["deepspeed"] = str(folder / f"{name}.json")
            Path(case["deepspeed"]).write_text(json.dumps(content))
        teacher = open_model(case.pop("model", "demo"))
        student = prune(teacher, criterion="l2", keep_ratio=0.25).model  # hidden = width, for the demo CLIP
        if lost:
            teacher.module.visual.transformer.apply(lambda module: [p.data.zero_() for p in module.parameters()])
        try:
            if "captions" in case:
                settings = TextSettings.of(TuneText(**{**TEXT, **case}).model_dump(), seed=0)
                done, trained = (
                    tune_text(student, Captioned.find(case["captions"]), settings, folder / name),
                    student.module,
                )
            else:
                source = case.pop("images", str(folder / "images"))
                images = find_images(source if isinstance(source, str) else source[distributed.get_rank()])
                settings = DistillSettings.of(Distill(**{**SECTION, **case}).model_dump(), seed=0)
                kept = folder / features if features else None
                done, trained = distill(teacher, student, images, settings, folder / name, kept), student.tower
            if done:
                save_file(trained.state_dict(), folder / f"{name}.safetensors")
                (folder / f"{name}.figures").write_text(json.dumps(done))
        except DgmrError as error:
            (folder / f"{name}.error").write_text(str(error))
    stop_deepspeed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
