"""Program for every process of a launcher: trainings of the demo CLIP, one after the other.

    torchrun --nproc_per_node 2 distill_worker.py FOLDER

``FOLDER/cases.json`` maps the name of a case to the keys that differ from the small recipe's distill section, or, with
``captions``, from ``TEXT``. Further keys of a case:

- ``model``: a directory, instead of the demo CLIP; ``images``: a folder, or one for each process
- ``after``: the case that this one resumes; ``step``: the last checkpoint of it to use; ``damage``: a checkpoint to
damage
- ``json``: content of a DeepSpeed file
- ``features``: file name of the feature cache; ``lost``: set the teacher's weights to zero

The weights are written to ``FOLDER/NAME.safetensors``, the figures to ``FOLDER/NAME.figures``, an error to
``FOLDER/NAME.error``.
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
from dgmr_tp.data.captions import CaptionedImages
from dgmr_tp.data.streams import find_images
from dgmr_tp.distillation.config import DistillConfig, TuneTextConfig
from dgmr_tp.distillation.distill import distill
from dgmr_tp.distillation.engine import start_deepspeed, stop_deepspeed
from dgmr_tp.distillation.text import tune_text
from dgmr_tp.encoders import open_model
from dgmr_tp.errors import DgmrError

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
                pairs, config = CaptionedImages.find(case["captions"]), TuneTextConfig(**{**TEXT, **case})
                figures, trained = tune_text(student, pairs, config, folder / name), student.module
            else:
                source = case.pop("images", str(folder / "images"))
                images = find_images(source if isinstance(source, str) else source[distributed.get_rank()])
                config, file = DistillConfig(**{**SECTION, **case}), folder / features if features else None
                figures = distill(teacher, student, images, config, folder / name, features=file)
                trained = student.tower
            if figures:
                save_file(trained.state_dict(), folder / f"{name}.safetensors")
                (folder / f"{name}.figures").write_text(json.dumps(figures))
        except DgmrError as error:
            (folder / f"{name}.error").write_text(str(error))
    stop_deepspeed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
