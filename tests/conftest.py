"""Shared test fixtures: small towers with random parameters, random images, and one finished run of a small recipe."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests use no network; without this, every refusal waits for retries

import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from dgmr_tp.cli import main
from dgmr_tp.encoders import adapt
from dgmr_tp.pipeline.recipe import parse_recipe

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would children


def pytest_runtest_setup() -> None:
    """Seed torch before each test."""
    torch.manual_seed(0)


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter to a random value and return the module in eval mode.

    With freshly initialized LayerScales, norms and biases, an MLP hardly changes the output. A test would then pass
    even if the MLP were wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            else:
                parameter.copy_(0.5 + 0.5 * torch.rand(parameter.shape, generator=generator))
    return module.eval()


def open_clip_tower(layers: int = 3) -> nn.Module:
    return VisionTransformer(32, 8, 48, layers, 3, 4.0, ls_init_value=0.1, output_dim=24)


def timm_tower(layers: int = 3, **kwargs: object) -> nn.Module:
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": layers,
        "num_heads": 3,
        "num_classes": 10,
        "init_values": 0.1,
        **kwargs,
    }
    return timm.models.VisionTransformer(**options)


TOWERS = {"open_clip": open_clip_tower, "timm": timm_tower}


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest) -> nn.Module:
    """Return a small ViT in eval mode, in which zeroing the first MLP changes the output by more than 1 %."""
    module = redraw(TOWERS[request.param]())
    images = pictures(4)
    with torch.no_grad():
        before = module(images)
        block = adapt(module).blocks()[0].module
        linear = [layer for layer in block.mlp.modules() if isinstance(layer, nn.Linear)][-1]
        weight = linear.weight.clone()
        linear.weight.zero_()
        change = (module(images) - before).norm() / before.norm()
        linear.weight.copy_(weight)
    assert change > 0.01, f"zeroing an MLP changes the output by only {change:.2%}, too little for the tests to detect"
    return module


def pictures(count: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    """Return random images ``[count, 3, size, size]``."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


SMALL = {
    "name": "small",
    "model": "demo",
    "scenes": {"images": 200, "classes": 60, "captions": 40},
    "images": "scenes:images",
    "prune": {"mlp_ratio": 1},
    "recover": {"images": 60, "tune_steps": 2},
    "distill": {"processes": 2, "steps": 24, "batch_size": 8, "base_lr": 1e-3, "checkpoint_every": 3, "log_every": 1},
    "evaluate": {
        "datasets": [
            {"dataset": "wds/scenes", "root": "scenes:classes"},
            {"dataset": "wds/captions", "root": "scenes:captions"},
        ]
    },
    "compare": {"images": "scenes:images", "classes": "scenes:classes"},
    "export": {"formats": ["onnx"]},
}
BIN = Path(sys.executable).parent
BEFORE_DISTILLATION = ("scenes", "prune", "recover")


def recipe(**changes):
    """Return the small recipe with some of its sections replaced."""
    return parse_recipe({**SMALL, **changes}, Path("test"))


def write_recipe(path: Path, **changes) -> Path:
    """Write the small recipe with some of its sections replaced, and return ``path``."""
    path.write_text(json.dumps({**SMALL, **changes}))  # JSON is YAML
    return path


def command(*arguments: object) -> list[str]:
    """Return the argument list that starts ``dgmr-tp ARGUMENTS``."""
    return [str(BIN / "dgmr-tp"), *map(str, arguments)]


def run_command(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Run ``dgmr-tp ARGUMENTS`` in a new process."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=900, **options)


def call_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``dgmr-tp ARGUMENTS`` in this process, which saves the ten seconds that the imports take in a new one."""
    out, err = io.StringIO(), io.StringIO()
    arguments = ("dgmr-tp", *map(str, arguments))
    level = logging.getLogger().level
    with (
        mock.patch.object(sys, "argv", list(arguments)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as exit_info,
    ):
        main()
    logging.getLogger().setLevel(level)
    return subprocess.CompletedProcess(arguments, exit_info.value.code or 0, out.getvalue(), err.getvalue())


def copy_finished_stages(run: Path, directory: Path, stages: Iterable[str] = BEFORE_DISTILLATION) -> Path:
    """Copy the recipe and the finished ``stages`` of the run directory ``run`` to ``directory``, and return it."""
    directory.mkdir()
    shutil.copy(run / "recipe.json", directory)
    for stage in stages:
        shutil.copytree(run / stage, directory / stage)
    return directory


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Run the small recipe once from the command line, without a compiler on PATH.

    Returns:
        The run directory and the standard output.
    """
    root = tmp_path_factory.mktemp("small")
    path = write_recipe(root / "small.yaml")
    assert shutil.which("gcc", path=str(BIN)) is None and shutil.which("c++", path=str(BIN)) is None
    extensions = root / "torch_extensions"
    extensions.mkdir()
    environment = {**os.environ, "PATH": str(BIN), "TORCH_EXTENSIONS_DIR": str(extensions)}
    result = run_command("run", path, "-o", root / "run", env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert not list(extensions.iterdir()), "something was compiled"
    return root / "run", result.stdout
