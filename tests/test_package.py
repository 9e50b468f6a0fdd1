"""The package as pip installs it, and the modules that its import loads."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_import_loads_nothing_heavy_and_the_pruner_torch_torch_pruning_and_scipy_only():
    program = "import dgmr_tp, sys; print([m for m in ('torch', 'scipy', 'pydantic') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )
    heavy = [
        "open_clip",
        "timm",
        "transformers",
        "deepspeed",
        "clip_benchmark",
        "onnx",
        "onnxruntime",
        "torchvision",
        "pydantic",
        "typer",
        "yaml",
        "PIL",
    ]
    before = "import sys, torch, torch_pruning, scipy.linalg; before = set(sys.modules)\n"
    program = (
        before
        + f"import dgmr_tp; dgmr_tp.MLPPruner; print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(target.glob("*.whl"))


def test_the_wheel_holds_all_rooms_as_real_files(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "dgmr_tp/export/bundle.py",
        "dgmr_tp/recipes/quickstart.yaml",
        "dgmr_tp/pipeline/templates/report.html.j2",
        "dgmr_tp/data/demo_clip/open_clip_model.safetensors",
        "dgmr_tp/data/demo_clip/README.md",
        "dgmr_tp/py.typed",
    ):
        assert name in names, name
    assert not any(name.startswith(("export/", "recipes/", "tests/", "benchmarks/")) for name in names)


def test_the_installed_wheel_imports_from_another_directory(wheel, tmp_path):
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import dgmr_tp, dgmr_tp.export, dgmr_tp.recipes, dgmr_tp.pipeline.run, dgmr_tp.cli\n"
        f"assert dgmr_tp.__file__.startswith({str(tmp_path)!r}), dgmr_tp.__file__\n"
        "print(len(dgmr_tp.open_model('demo').adapter.blocks()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "6", done.stderr
