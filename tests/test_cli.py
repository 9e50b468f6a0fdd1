"""The command line: every stage on its own, and user errors.

A user error prints one message, exits with 2 and leaves no partial output.
"""

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import typer
from conftest import call_command, run_command, write_recipe
from PIL import Image

import dgmr_tp
from dgmr_tp import cli, load_pruned
from dgmr_tp.cli import commands, evaluation, models, pruning, runs
from dgmr_tp.data import scenes
from dgmr_tp.data.scenes import Scene
from dgmr_tp.encoders.model import DEMO
from dgmr_tp.pruning import Plan


def refused(*arguments, message):
    """Assert that the command prints ``message``, without a traceback, and exits with 2."""
    result = call_command(*arguments)
    output = result.stdout + result.stderr
    assert result.returncode == 2, output
    assert message in " ".join(output.split()), output
    assert "Traceback" not in output


def test_a_mistake_ends_the_process_with_2():
    result = run_command("prune", "--model", "demo", "--keep", "0", "-o", "nowhere")
    assert (
        result.returncode == 2
        and "keep 1 to 512" in result.stderr
        and "Traceback" not in result.stderr
        and not result.stdout
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(30):
        Image.fromarray(Scene.draw(20, i).image()).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("hello")
    return folder


def test_prune_writes_a_directory_that_opens(images, tmp_path):
    result = call_command(
        "prune",
        "--model",
        "demo",
        "--mlp-ratio",
        "1",
        "--recover",
        images,
        "--calibration-images",
        "100",
        "-o",
        tmp_path / "out",
    )
    assert result.returncode == 0, result.stderr
    assert "skipped 1 images that do not decode and 1 files that are not images" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80 + len(str(tmp_path))
    assert {
        block.mlp.c_fc.out_features for block in load_pruned(tmp_path / "out").module.visual.transformer.resblocks
    } == {128}
    again = ("recover", tmp_path / "out", "--model", "demo", "--images", images, "-o", tmp_path / "again")
    result = call_command(*again, "--tune-blocks", "2")
    assert result.returncode == 0, result.stderr
    assert re.search(r"error cut +recovered +block +tuned", result.stdout)
    assert max(map(len, result.stdout.splitlines())) <= 80 + len(str(tmp_path))


def test_plan_prints_writes_and_can_be_edited_and_applied(tmp_path):
    result = call_command("plan", "--model", "demo", "--keep-ratio", "0.5", "-o", tmp_path / "plan.json")
    assert result.returncode == 0 and "transformer.resblocks.5.mlp" in result.stdout and "256" in result.stdout
    data = json.loads((tmp_path / "plan.json").read_text())
    data["sites"]["transformer.resblocks.2.mlp"]["kept"] = [1, 2, 3]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    result = call_command("prune", "--model", "demo", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert Plan.read(tmp_path / "out" / "plan.json").sites["transformer.resblocks.2.mlp"].kept == (1, 2, 3)


def test_inspect_and_eval(tmp_path):
    result = call_command("inspect", "demo")
    assert result.returncode == 0 and "512" in result.stdout and "GFLOPs" in result.stdout
    scenes.write_classification(tmp_path / "classes", 40, seed=30)
    result = call_command("eval", "demo", "--dataset", "wds/x", "--root", tmp_path / "classes", "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    accuracy = json.loads((tmp_path / "out" / "demo-wds_x-zeroshot_classification.json").read_text())["metrics"]["acc1"]
    assert f"{accuracy:.4f}" in result.stdout and accuracy > 0.2


def test_misspelt_recipe_key(tmp_path):
    refused(
        "run", write_recipe(tmp_path / "r.yaml", prun={"mlp_ratio": 1}), message="unknown key prun. Did you mean prune"
    )


def test_unknown_model(tmp_path):
    refused(
        "prune",
        "--model",
        "open_clip:ViT-g-15",
        "--pretrained",
        "x",
        "-o",
        tmp_path / "out",
        message="Did you mean ViT-g-14",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", ["0", "513"])
def test_impossible_keep_counts(tmp_path, keep):
    refused("prune", "--model", "demo", "--keep", keep, "-o", tmp_path / "out", message="keep 1 to 512")
    assert not (tmp_path / "out").exists()


def test_existing_output(tmp_path):
    refused("prune", "--model", "demo", "-o", tmp_path, message="exists already")


def test_image_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    for name, message in (
        ("empty", "contains no image (1 other files)"),
        ("broken", "none of the 1 images"),
        ("nowhere", "does not exist"),
    ):
        refused("prune", "--model", "demo", "--recover", tmp_path / name, "-o", tmp_path / "out", message=message)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_truncated_checkpoint(tmp_path):
    (tmp_path / "model").mkdir()
    for file in DEMO.iterdir():
        data = file.read_bytes()
        (tmp_path / "model" / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    refused("prune", "--model", tmp_path / "model", "-o", tmp_path / "out", message="open_clip_model.safetensors")


def test_memory_of_a_gpu_that_is_too_small(monkeypatch, tmp_path):
    def raise_out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr("dgmr_tp.compression.prune.prune", raise_out_of_memory)
    refused(
        "prune",
        "-o",
        tmp_path / "out",
        message="out of memory on the GPU: CUDA out of memory. Tried to allocate 9 GiB. Take fewer images",
    )


def test_evaluations_that_are_asked_for_by_half(tmp_path):
    for options in (
        ["--dataset", "wds/x"],
        ["--knn-train", "a", "--knn-test", "b", "--root", "c"],
        ["--knn-train", "a", "--head-test", "b"],
    ):
        refused(
            "eval",
            "demo",
            *options,
            "-o",
            tmp_path / "out",
            message="Give --dataset and --root, or --knn-train and --knn-test",
        )


def test_plan_for_another_model(tmp_path):
    (tmp_path / "plan.json").write_text('{"format": 1, "encoder": "x", "criterion": "y", "sites": {"nothing": []}}')
    refused(
        "prune",
        "--model",
        "demo",
        "--plan",
        tmp_path / "plan.json",
        "-o",
        tmp_path / "out",
        message="plan.json: this is not a plan",
    )
    refused(
        "prune",
        "--model",
        "demo",
        "--plan",
        tmp_path / "none.json",
        "-o",
        tmp_path / "out",
        message="cannot read the plan",
    )


def test_every_numeric_option_has_a_range_and_every_path_a_kind():
    commands = [command.callback for module in (runs, pruning, evaluation, models) for command in _commands(module.app)]
    assert len(commands) >= 15
    for command in commands:
        for name, hint in typing.get_type_hints(command, include_extras=True).items():
            if typing.get_origin(hint) is not typing.Annotated:
                continue
            annotation, option = typing.get_args(hint)[:2]
            types = {annotation, *typing.get_args(annotation)}
            where = f"{command.__name__}: {name}"
            if float in types:
                assert option.callback, f"{where} is not made by number_option"
            if int in types and name != "keep":  # the sites check it
                assert option.min is not None, f"{where} has no minimum"
            if {Path, list[Path]} & types:
                assert option.parser, f"{where} is not made by path_option"


def _commands(group: typer.Typer) -> list[typing.Any]:
    inner = [command for nested in group.registered_groups for command in nested.typer_instance.registered_commands]
    return [*group.registered_commands, *inner]


@pytest.mark.parametrize(
    ("missing", "code", "extra"),
    [
        ("open_clip", "dgmr_tp.open_model('open_clip:ViT-B-32', 'none')", "encoders"),
        ("timm", "dgmr_tp.open_model('timm:vit_tiny_patch16_224', 'none')", "encoders"),
        ("deepspeed", "import dgmr_tp.distillation.processes as l; l.launch([], 1, 1, None)", "distill"),
        (
            "onnxscript",
            "import torch; from dgmr_tp.export.bundle import export_bundle\n"
            "from dgmr_tp.export.towers import export_towers\n"
            "parts = export_towers(dgmr_tp.open_model('demo'), torch.rand(2, 3, 64, 64))\n"
            "export_bundle(parts, __import__('pathlib').Path('x'), model='demo', preprocess={})",
            "export",
        ),
        (
            "clip_benchmark",
            "from dgmr_tp.evaluation.zero_shot import evaluate\n"
            "evaluate(None, None, None, dataset='', root='', output=None, name='')",
            "eval",
        ),
    ],
)
def test_a_missing_extra_names_the_pip_command(missing, code, extra, tmp_path):
    program = f"import sys; sys.modules[{missing!r}] = None\nimport dgmr_tp\n{code}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert f"DgmrError: {missing} is not installed. Run: pip install 'dgmr-tp[{extra}]'" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, 1.0, 2.0, 3.0, 5.0, 8.0])
def test_ctrl_c_ends_the_process_with_130_at_any_moment(delay, images, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "dgmr_tp", "prune", "--recover", str(images), "-o", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    output = "".join(process.communicate(timeout=60))
    assert "Traceback" not in output and "KeyboardInterrupt" not in output, output
    assert process.returncode == 130 or (process.returncode == 0 and (tmp_path / "out").exists()), output
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_an_interrupt_is_not_swallowed_by_an_import(tmp_path):
    """A bare ``except:`` around an import, as in torch-pruning, and an import while an output is open."""
    (tmp_path / "slow_module.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsum(range(10**6))\n"
    )
    (tmp_path / "swallowing.py").write_text("try:\n    import slow_module\nexcept:\n    pass\nprint('imported')\n")
    program = (
        "import sys, pathlib, time\nfrom dgmr_tp.utils.interrupts import handle_interrupts\n"
        "from dgmr_tp.utils.files import staging_file\n"
        "with handle_interrupts():\n"
        "    if sys.argv[1] == 'closed':\n        import swallowing\n        print('lost')\n"
        "    try:\n"
        "        with staging_file(pathlib.Path('out')) as path:\n"
        "            import swallowing\n"
        "            time.sleep(30)\n"
        "    except KeyboardInterrupt:\n        sys.exit(131)\n"
    )
    for state, code, printed in (("closed", 130, ""), ("open", 131, "imported")):
        command = [sys.executable, "-c", program, state]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert (result.returncode, result.stdout.strip(), result.stderr) == (code, printed, "")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_version():
    result = call_command("--version")
    assert (result.returncode, result.stdout) == (0, f"dgmr-tp {dgmr_tp.__version__}\n")


def test_a_terminal_without_unicode_gets_ascii_after_the_work_is_done(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "argv", ["dgmr-tp", "plan", "-o", str(tmp_path / "plan.json")])
    with contextlib.redirect_stdout(terminal), pytest.raises(SystemExit) as exit_info:
        cli.main()
    terminal.flush()
    assert not exit_info.value.code and (tmp_path / "plan.json").exists()
    output = terminal.buffer.getvalue()
    assert b"1.24 M -> 0.65 M parameters" in output and b"demo - DGMR" in output


def test_characters_that_an_encoding_lacks_are_replaced_one_by_one():
    commands.register_ascii_errors()
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="dgmr_tp_ascii")
    stream.write("a → 模 \udce9.png")
    stream.flush()
    assert stream.buffer.getvalue() == b"a -> \\u6a21 \xe9.png"


def test_long_paths_stay_on_one_line_when_piped(tmp_path):
    folder = tmp_path / ("long" * 30) / ("er" * 50)
    folder.mkdir(parents=True)
    result = call_command("prune", "-o", folder / "out")
    assert str(folder / "out") in result.stdout.splitlines()[-1]
    result = call_command("recipes", "copy", "quickstart", folder / "r.yaml")
    assert result.stdout == f"written: {folder / 'r.yaml'}\n"


def test_a_tilde_after_an_equals_sign_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert call_command("plan", "--out=~/plan.json").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
