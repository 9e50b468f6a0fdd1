"""Run directories: reuse of finished steps, refused requests, and killed runs.

A run that was killed and resumed must give the same result as an uninterrupted one.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import BIN, SMALL, command, copy_finished_stages, recipe, run_command, write_recipe
from safetensors.torch import load_file

from dgmr_tp.errors import DgmrError
from dgmr_tp.pipeline import run_directory
from dgmr_tp.pipeline.preflight import run_preflight
from dgmr_tp.pipeline.run import Run
from dgmr_tp.pipeline.run_directory import RunDirectory, Step, package_versions
from dgmr_tp.pipeline.stages.distill import DistillStage
from dgmr_tp.utils.cpus import available_cpus
from dgmr_tp.utils.files import lock_directory


def weights(run: Path, stage: str = "distill"):
    """Return the tensors of the model that a stage wrote."""
    return load_file(run / stage / "mlp_ratio-1" / "model" / "open_clip_model.safetensors")


def same(a, b):
    """Return True if two dictionaries have the same tensors, bit for bit."""
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


def test_a_run_leaves_every_stage_and_a_table(small_run):
    directory, printed = small_run
    for key in (
        "scenes/all",
        "prune/mlp_ratio-1",
        "recover/mlp_ratio-1",
        "distill/mlp_ratio-1",
        "evaluate/dense",
        "export/mlp_ratio-1",
    ):
        assert (directory / key / "manifest.json").exists(), key
    assert not list(directory.rglob("*.partial"))
    for model in directory.glob("*/*/model"):
        assert f"'local-dir:{model}'" in (model / "README.md").read_text(), "the README names another directory"
    for word in ("dense", "pruned", "recovered", "distilled", "onnx", "top-1", "report.html", "a checkpoint is"):
        assert word in printed
    assert max(map(len, printed.splitlines())) <= 80 + len(str(directory))
    assert "Traceback" not in printed


def test_distillation_trains_the_student_and_only_what_the_features_need(small_run):
    directory, _ = small_run
    before, after = weights(directory, "recover"), weights(directory)
    changed = {name for name in before if not (before[name] == after[name]).all()}
    assert "visual.transformer.resblocks.5.mlp.c_fc.weight" in changed and "visual.conv1.weight" in changed
    assert not any(
        name.startswith(("visual.ln_post", "visual.proj", "transformer", "token_embedding", "logit_scale"))
        for name in changed
    )
    manifest = json.loads((directory / "distill/mlp_ratio-1/manifest.json").read_text())
    losses = [loss for _, loss in manifest["figures"]["losses"]]
    assert [step for step, _ in manifest["figures"]["losses"]] == list(range(1, 25)) and manifest["figures"][
        "processes"
    ] == 2
    assert all(loss > 0 for loss in losses)


def test_clip_benchmarks_own_files_are_kept_and_the_onnx_file_scores_what_the_model_scores(small_run):
    directory, _ = small_run
    names = {path.name for path in directory.glob("evaluate/*/*.json")} | {
        path.name for path in directory.glob("export/*/onnx-*.json")
    }
    assert {
        f"{label}-wds_{name}.json"
        for label in ("dense", "pruned", "recovered", "distilled", "onnx")
        for name in ("scenes", "captions")
    } <= names
    read = lambda path: json.loads((directory / path).read_text())["metrics"]  # noqa: E731
    distilled, onnx = (
        read("evaluate/mlp_ratio-1/distilled-wds_scenes.json"),
        read("export/mlp_ratio-1/onnx-wds_scenes.json"),
    )
    assert distilled["acc1"] == onnx["acc1"] and distilled.keys() == onnx.keys()


def test_the_same_again_does_nothing(small_run):
    directory, _ = small_run
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("manifest.json")}
    lines = []
    Run(recipe(), directory).run(say=lines.append)
    assert len(lines) == len(before) and all(line.endswith("done before") for line in lines)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("manifest.json")} == before


def test_what_changed_is_named_with_the_two_ways_on(small_run):
    directory, _ = small_run
    with pytest.raises(DgmrError, match=r"recover/mlp_ratio-1 .*images: 60 → 61.*--redo recover.*-o"):
        Run(recipe(recover={"images": 61}), directory).run()
    with pytest.raises(DgmrError, match=r"scenes/all .*captions: 40 → 41.*--redo scenes"):
        Run(recipe(scenes={**SMALL["scenes"], "captions": 41}), directory).run()


def installed(**versions):
    """Return a stand-in for package_versions, with other versions of some packages; None: not installed."""
    real = package_versions

    def fake(packages):
        found = {**real(packages), **{name: version for name, version in versions.items() if name in packages}}
        return {name: version for name, version in found.items() if version is not None}

    return fake


def test_versions_matter_to_the_stages_that_use_the_package(small_run, monkeypatch, tmp_path):
    directory = shutil.copytree(small_run[0], tmp_path / "run")
    for harmless in ({"onnxruntime": None}, {"transformers": "0.1"}):
        monkeypatch.setattr(run_directory, "package_versions", installed(**harmless))
        Run(recipe(), directory).run(say=lambda line: None)
    monkeypatch.setattr(run_directory, "package_versions", installed(onnxruntime="0.1"))
    with pytest.raises(DgmrError, match=r"^export/dense .*other versions: onnxruntime: .* → 0\.1.*--accept-versions"):
        Run(recipe(), directory).run()
    monkeypatch.setattr(run_directory, "package_versions", installed(deepspeed="0.1"))
    with pytest.raises(DgmrError, match=r"^distill/mlp_ratio-1 .*deepspeed: .* → 0\.1.*--redo distill.*-o"):
        Run(recipe(), directory).run()
    lines = []
    Run(recipe(), directory).run(say=lines.append, accept_versions=True)
    assert all(line.endswith("done before") for line in lines)
    [entry] = json.loads((directory / "accepted_versions.json").read_text())
    assert entry["step"] == "distill/mlp_ratio-1" and entry["changes"][0].endswith("→ 0.1")
    assert entry["by"] == getpass.getuser() and entry["date"].startswith("20")
    Run(recipe(), directory).run(say=lines.append)  # accepted once, the change is known
    monkeypatch.setattr(run_directory, "package_versions", installed(deepspeed="0.2"))
    with pytest.raises(DgmrError, match=r"deepspeed: .* → 0\.2"):
        Run(recipe(), directory).run()


def test_an_unfinished_distillation_resumes_under_accepted_versions(small_run, monkeypatch, tmp_path):
    directory = copy_finished_stages(small_run[0], tmp_path / "run")
    run = Run(recipe(), directory)
    step = next(step for step in run.steps if step.stage == "distill")
    checkpoint = run.run_directory.prepare(step) / "checkpoints" / "step00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    monkeypatch.setattr(run_directory, "package_versions", installed(torchvision="0.1"))
    with pytest.raises(DgmrError, match=r"torchvision: .* → 0\.1.*--accept-versions"):
        run.run_directory.check_unchanged(step)
    run.run_directory.check_unchanged(step, accept_versions=True)
    assert run.run_directory.prepare(step) and checkpoint.exists()
    monkeypatch.setattr(run_directory, "package_versions", installed(torchvision="0.2"))
    assert run.run_directory.prepare(step) and not checkpoint.exists()


def test_another_crop_scheme_is_another_distillation(small_run, monkeypatch):
    monkeypatch.setattr("dgmr_tp.pipeline.stages.distill.CROP_SCHEME", 2)
    with pytest.raises(DgmrError, match=r"distill/mlp_ratio-1 .*crop_scheme: 1 → 2"):
        Run(recipe(), small_run[0]).run()


def test_an_unfinished_distillation_is_not_thrown_away_for_another_learning_rate(small_run, tmp_path):
    directory = copy_finished_stages(small_run[0], tmp_path / "run")
    run = Run(recipe(), directory)
    step = next(step for step in run.steps if step.stage == "distill")
    checkpoint = run.run_directory.prepare(step) / "checkpoints" / "step00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    with pytest.raises(DgmrError, match=r"distill\.base_lr: 0\.001 → 0\.002.*--redo distill"):
        Run(recipe(distill={**SMALL["distill"], "base_lr": 2e-3}), directory).run()
    assert checkpoint.exists()


def test_two_runs_do_not_work_in_one_directory(small_run):
    directory, _ = small_run
    with (
        lock_directory(directory, "dgmr-tp run is working"),
        pytest.raises(DgmrError, match="another dgmr-tp run is working"),
    ):
        Run(recipe(), directory).run()


def test_what_the_last_stage_needs_is_missed_before_the_first(tmp_path):
    missing = {"datasets": [{"dataset": "wds/x", "root": str(tmp_path / "nowhere")}]}
    with pytest.raises(DgmrError, match=r"evaluate\.datasets\.0\.root: .*nowhere does not exist"):
        Run(recipe(evaluate=missing), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_machines_that_cannot_be_reached_are_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(BIN))  # without pdsh
    hosts = tmp_path / "hosts"
    distill = {**SMALL["distill"], "hostfile": str(hosts)}
    for content, message in (
        ("one slots=1\ntwo slots=1\n", "by pdsh, which is not installed"),
        ("one\n", "bad entry: one.*It takes lines such as node1 slots=8"),
    ):
        hosts.write_text(content)
        with pytest.raises(DgmrError, match=rf"distill\.hostfile: .*hosts: .*{message}"):
            Run(recipe(distill=distill), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()
    hosts.write_text("# this machine\nlocalhost slots=2\n")
    run_preflight(Run(recipe(distill=distill), tmp_path / "run").context)


def test_what_is_finished_is_not_done_again_after_a_kill_in_its_last_moment(tmp_path, monkeypatch):
    calls = []
    step = Step("prune", "a", dict, (), lambda folder: calls.append(folder) or {"figure": 1})

    def kill_now(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", kill_now)
    with pytest.raises(KeyboardInterrupt):
        RunDirectory(tmp_path).run_step(step)
    monkeypatch.undo()
    (tmp_path / "prune" / "a").mkdir()  # an output directory that has lost its manifest
    run = RunDirectory(tmp_path)
    run.run_step(step)
    assert (
        len(calls) == 1
        and run.figures("prune/a") == {"figure": 1}
        and [path.name for path in (tmp_path / "prune").iterdir()] == ["a"]
    )
    run.run_step(Step("prune", "a", lambda: {"other": 1}, (), step.work))
    assert len(calls) == 2, "a changed recipe section runs the step again"


def test_a_directory_that_was_only_locked_is_begun(tmp_path):
    (tmp_path / "lock").touch()
    Run(recipe(), tmp_path)
    (tmp_path / "other").touch()
    with pytest.raises(DgmrError, match="is not a run directory"):
        Run(recipe(), tmp_path)


def test_impossible_sizes_are_refused_before_anything_runs(tmp_path):
    for prune, message in (
        ({"mlp_ratio": 100}, r"prune, mlp_ratio-100: mlp_ratio = 100.* keeps 12800 neurons"),
        ({"criterion": "output", "budget": {"params": 0.1}}, r"prune, params-0.1: budget params = 0.1 cannot be met"),
    ):
        with pytest.raises(DgmrError, match=message):
            Run(recipe(prune=prune), tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_redo_checks_before_it_drops(small_run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(small_run[0], directory)
    with pytest.raises(DgmrError, match="--redo recover"):
        Run(recipe(recover={"images": 61}), directory).run(redo="evaluate")
    assert (directory / "evaluate/dense/manifest.json").exists()


def test_redo_drops_the_stage_and_those_after_it(small_run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(small_run[0], directory)
    lines = []
    changed = recipe(evaluate={"datasets": SMALL["evaluate"]["datasets"][:1]})
    Run(changed, directory).run(redo="evaluate", until="evaluate", say=lines.append)
    assert [line for line in lines if line.endswith("done before")] == [
        f"{key}: done before"
        for key in ("scenes/all", "prune/mlp_ratio-1", "recover/mlp_ratio-1", "distill/mlp_ratio-1")
    ]
    assert not (directory / "evaluate/dense/dense-wds_captions.json").exists()
    with pytest.raises(DgmrError, match="unknown stage"):
        Run(changed, directory).run(redo="everything")


def test_a_folder_that_is_no_run_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = run_command("run", write_recipe(tmp_path / "r.yaml"), "-o", tmp_path / "mine")
    assert result.returncode == 2 and "not a run directory" in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    result = run_command("report", tmp_path / "mine")
    assert result.returncode == 2 and "not a run directory" in result.stderr


def kill_when(arguments: list[str], reached, log: Path, wait: float = 0.0, victim=lambda process: process) -> int:
    """Start a command, kill it when a condition holds, and return its exit code.

    Args:
        arguments: the command.
        reached: returns True when the process is to be killed. It is polled for up to five minutes.
        log: file for the command's output.
        wait: seconds between the condition and the kill.
        victim: maps the started process to the process that is killed.
    """
    with log.open("w") as stream:
        process = psutil.Popen(arguments, stdout=stream, stderr=stream, start_new_session=True)
        deadline = time.monotonic() + 300
        while not reached():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(wait)
        victim(process).send_signal(signal.SIGKILL)
        return process.wait()


def wait_for_the_end_of_workers(directory: Path) -> None:
    """Wait until the processes that a killed run had launched have ended. They do so on their own, within seconds."""
    deadline = time.monotonic() + 20
    while True:
        if not any(str(directory) in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])):
            return
        assert time.monotonic() < deadline, "a process of the killed run is still running"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trace",
    [
        "scenes/.all.partial/images/test",
        "prune/.mlp_ratio-1.partial/made_from.json",
        "recover/.mlp_ratio-1.partial/made_from.json",
        "distill/.mlp_ratio-1.partial/lock",  # test_distillation.py tests kills after the first step
        "distill/.mlp_ratio-1.partial/figures.json",
        "evaluate/.mlp_ratio-1.partial/pruned-wds_scenes.json",
        "export/.mlp_ratio-1.partial/model.onnx",
    ],
)
def test_a_run_killed_in_any_stage_ends_as_an_unbroken_one(small_run, tmp_path, trace):
    reference_directory, _ = small_run
    directory, path = tmp_path / "run", write_recipe(tmp_path / "small.yaml")
    stage = trace.split("/")[0]
    done_stages = ["scenes", "prune", "recover", "distill", "evaluate", "export"]
    if stage != "scenes":  # the stages before this one are finished already
        copy_finished_stages(reference_directory, directory, done_stages[: done_stages.index(stage)])
    kill_when(command("run", path, "-o", directory), (directory / trace).exists, tmp_path / "killed.log")
    assert not (directory / stage / trace.split("/")[1].removeprefix(".").removesuffix(".partial")).exists()
    wait_for_the_end_of_workers(directory)
    # Kills before the distillation compare its starting weights bit for bit, so the training need not run again.
    last = "recover" if stage in ("scenes", "prune") else stage
    result = run_command("run", path, "-o", directory, "--until", last)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    if trace.endswith("figures.json"):  # the training was complete, but its directory was not yet in place
        assert "resumes at step" not in result.stdout
    models = [name for name in ("prune", "recover", "distill") if done_stages.index(name) <= done_stages.index(last)]
    for name in models:
        assert same(weights(directory, name), weights(reference_directory, name)), name
    assert not same(weights(directory, models[-1]), weights(directory, models[-2]))
    if stage in ("evaluate", "export"):
        ours, reference = (
            json.loads((root / stage / "mlp_ratio-1/manifest.json").read_text())["figures"]
            for root in (directory, reference_directory)
        )
        assert ours == reference if stage == "evaluate" else ours["metrics"] == reference["metrics"]


@pytest.mark.slow
def test_a_run_told_to_stop_between_trainings_says_so(small_run, tmp_path):
    directory, path = (
        copy_finished_stages(small_run[0], tmp_path / "run", ("scenes", "prune")),
        write_recipe(tmp_path / "small.yaml"),
    )
    with (tmp_path / "log").open("w") as stream:
        process = subprocess.Popen(command("run", path, "-o", directory), stdout=stream, stderr=stream)
        while not (directory / "evaluate" / ".dense.partial").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    output = (tmp_path / "log").read_text()
    assert "preempted. Run again to resume" in output and "Traceback" not in output
    assert not (directory / "evaluate" / "dense").exists()


@pytest.mark.slow
def test_sizes_that_share_the_originals_features_end_where_each_alone_does(small_run, tmp_path):
    changes = {"prune": {"mlp_ratio": [0.5, 1]}, "distill": {**SMALL["distill"], "keep_features": True}}
    path, directory = write_recipe(tmp_path / "small.yaml", **changes), tmp_path / "run"
    result = run_command("run", path, "-o", directory, "--until", "distill")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    files = re.findall(r"the teacher's features are cached in (\S+),", result.stdout)
    assert len(files) == 2 and files[0] == files[1] and not list(directory.glob("distill/.features-*"))
    assert same(weights(directory), weights(small_run[0]))


@pytest.mark.slow
def test_the_distillation_can_be_started_by_hand(small_run, tmp_path):
    directory, path = tmp_path / "run", write_recipe(tmp_path / "small.yaml")
    result = run_command("run", path, "-o", directory, "--until", "recover")
    assert result.returncode == 0 and not (directory / "distill").exists()
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, available_cpus() // 2)),
    }
    arguments = [
        "deepspeed",
        "--num_accelerators",
        "2",
        "--no_local_rank",
        "--module",
        "dgmr_tp",
        "distill",
        str(directory),
    ]
    launch = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600)
    assert launch.returncode == 0, launch.stdout[-3000:] + launch.stderr[-3000:]
    result = run_command("run", path, "-o", directory, "--until", "distill")
    assert result.returncode == 0, result.stdout + result.stderr
    assert same(weights(directory), weights(small_run[0]))


def test_launched_processes_read_shell_commands_only_in_a_trusted_recipe(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("dgmr_tp.pipeline.stages.training.launch", lambda arguments, *_: started.append(arguments))
    for trusted in (False, True):
        run = Run(recipe(images="pipe:cat a.tar"), tmp_path / "run", trusted=trusted)
        with pytest.raises(DgmrError, match="the deepspeed launcher was killed"):
            DistillStage().launch(run.context, "mlp_ratio-1", tmp_path)
        message = "is not finished" if trusted else "images: pipe:cat a.tar runs a shell command on this machine"
        with pytest.raises(DgmrError, match=message):
            run.train_worker("distill", "mlp_ratio-1")
    assert ["--trust-recipe" in arguments for arguments in started] == [False, True]
