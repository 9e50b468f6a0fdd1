"""Outputs appear whole or not at all: concurrent writers, limits of the disk, and what a killed process left."""

import json
import os
import resource
import threading
from contextlib import contextmanager

import pytest
import torch
from conftest import call_command
from inputs import pictures

from dgmr_tp import DgmrError, load_pruned, open_model
from dgmr_tp.compression import amp_search, streaming
from dgmr_tp.compression.rankings import Rankings
from dgmr_tp.pruning import Ranking
from dgmr_tp.utils import files
from dgmr_tp.utils.files import (
    DirectoryLocked,
    atomic_write,
    check_output,
    check_room,
    read_json,
    staging_directory,
    staging_file,
    write_errors,
)


def test_of_two_saves_to_one_path_one_wins_whole_and_the_other_is_refused(tmp_path, monkeypatch):
    models = [open_model("demo"), open_model("demo")]
    for value, model in enumerate(models):
        torch.nn.init.constant_(model.tower.conv1.weight, float(value))
    entered, proceed = threading.Event(), threading.Event()
    finish = models[0].finish

    def slow_finish(*arguments):
        entered.set()
        assert proceed.wait(30)
        finish(*arguments)

    monkeypatch.setattr(models[0], "finish", slow_finish)
    first = threading.Thread(target=models[0].save, args=(tmp_path / "out",))
    first.start()
    assert entered.wait(30)
    with pytest.raises(DirectoryLocked, match="Wait for it"):
        models[1].save(tmp_path / "out")
    proceed.set()
    first.join()
    with pytest.raises(DgmrError, match="exists already"):
        models[1].save(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and not (tmp_path / "out" / "lock").exists()
    assert (load_pruned(tmp_path / "out").tower.conv1.weight == 0).all()


def test_many_writers_of_one_path_leave_one_of_their_texts_and_nothing_else(tmp_path):
    texts = [f"{index}" * 100_000 for index in range(8)]
    threads = [threading.Thread(target=atomic_write, args=(tmp_path / "f", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "f").read_text() in texts and os.listdir(tmp_path) == ["f"]


def test_many_writers_of_one_directory_leave_one_of_them(tmp_path):
    outcomes = []

    def write(index):
        try:
            with staging_directory(tmp_path / "out") as staging:
                for name in "ab":
                    (staging / name).write_text(str(index))
            outcomes.append(index)
        except DgmrError:
            pass

    threads = [threading.Thread(target=write, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1 and os.listdir(tmp_path) == ["out"]
    assert {name: (tmp_path / "out" / name).read_text() for name in os.listdir(tmp_path / "out")} == {
        "a": str(outcomes[0]),
        "b": str(outcomes[0]),
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, DgmrError("x"), OSError(28, "No space left on device")])
def test_an_interrupted_output_leaves_nothing(tmp_path, error):
    for context in (staging_directory, staging_file):
        with pytest.raises((KeyboardInterrupt, DgmrError)), context(tmp_path / "out"):
            raise error
    assert not os.listdir(tmp_path)


def test_a_journal_stays_after_an_error_and_the_rest_does_not(tmp_path):
    with pytest.raises(KeyboardInterrupt), staging_file(tmp_path / "out", resumable=("journal",)) as path:
        path.write_text("half")
        path.with_name("journal").write_text("1")
        raise KeyboardInterrupt
    with staging_file(tmp_path / "out", resumable=("journal",)) as path:
        assert path.with_name("journal").read_text() == "1" and not path.exists()
        path.write_text("whole")
    assert (tmp_path / "out").read_text() == "whole" and os.listdir(tmp_path) == ["out"]


@contextmanager
def largest_file(size):
    """Limit the size of files in this process, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        (1_000_000, ("prune", "-o", "out"), "MB, which"),
        (1_000_000, ("prune", "--stream", "-o", "out"), "MB, which"),
        (10_000, ("rank", "--images", "im", "--calibration-images", "12", "-o", "out"), "cannot write out: File too"),
        (1_000, ("plan", "-o", "out"), "cannot write out: File too large. Raise the limit"),
        (1_000_000, ("export", "demo", "-o", "out", "--formats", "torchscript"), "MB, which"),
    ],
)
def test_a_limit_of_the_disk_is_one_message_and_leaves_nothing(tmp_path, monkeypatch, size, arguments, message):
    pictures(tmp_path, [f"im/{i}.png" for i in range(12)])
    monkeypatch.chdir(tmp_path)
    with largest_file(size):
        result = call_command(*arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert message in result.stderr and "ulimit -f" in result.stderr, result.stderr
    assert not {"out", ".export.partial"} & set(os.listdir(tmp_path))
    assert not list(tmp_path.rglob("*.safetensors")) and ("--stream" in arguments or os.listdir(tmp_path) == ["im"])


def test_errors_of_safetensors_and_torch_name_the_path(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "a").touch()
    with pytest.raises(DgmrError, match=r"cannot write .*a/b: Not a directory"), write_errors(tmp_path / "a" / "b"):
        save_file({"x": torch.ones(2)}, tmp_path / "a" / "b")
    with largest_file(1000), pytest.raises(DgmrError, match="cannot write"), write_errors(tmp_path / "x"):
        torch.save(torch.ones(10_000), tmp_path / "x")
    with pytest.raises(RuntimeError, match="shape"), write_errors(tmp_path / "x"):
        raise RuntimeError("shape mismatch")


def test_names_that_a_file_system_cannot_hold_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsencode", lambda text: os.fspath(text).encode("ascii"))
    with pytest.raises(DgmrError, match="cannot be written in the encoding"):
        check_output(tmp_path / "模型")
    check_output(tmp_path / ("n" * 220))
    with pytest.raises(DgmrError, match="too long"):
        check_output(tmp_path / ("n" * 250))


def test_what_does_not_fit_is_refused(tmp_path):
    check_room(tmp_path, 1000, "the model")
    with pytest.raises(DgmrError, match=r"the model takes up to 1,000,000,000,000 MB, but .* MB are free\."):
        check_room(tmp_path, 10**18, "the model")
    assert not os.listdir(tmp_path)


def test_a_write_removes_the_temporary_file_of_a_killed_one(tmp_path):
    old, new = tmp_path / ".f.abc.partial", tmp_path / ".f.def.partial"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    atomic_write(tmp_path / "f", "text")
    assert sorted(os.listdir(tmp_path)) == [".f.def.partial", "f"]  # another process may be writing the new one


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"a": {}}', "[" * 100_000, "\xff", '{"a": "x"}'])
def test_damaged_json_is_named_with_what_to_do(tmp_path, content):
    path = tmp_path / "f.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DgmrError, match=r"f\.json is damaged: .*\. Make it again\."):
        read_json(path, lambda data: int(data["a"]), remedy="Make it again.")
    path.write_text(json.dumps({"a": 3}))
    assert read_json(path, lambda data: int(data["a"]), remedy="") == 3


@pytest.mark.parametrize("content", ["", "[1]", '{"request": 1}', '{"request": {}, "state": {"kept": []}, "plan": 3}'])
def test_a_damaged_journal_starts_the_work_again(tmp_path, content):
    (tmp_path / "journal").write_text(content)
    for read in (amp_search._read_journal, streaming._read_journal):
        assert read(tmp_path / "journal", {}) is None
    assert amp_search._read_journal(None, {}) is None


def test_rankings_with_impossible_numbers_are_damaged(tmp_path):
    order, error = torch.arange(4), torch.linspace(1, 0, 5, dtype=torch.float64)
    for ranking, message in (
        (Ranking(torch.tensor([0, 1, 2, 2]), error), "not a permutation"),
        (Ranking(order, torch.full((5,), torch.nan, dtype=torch.float64)), "not finite"),
        (Ranking(order, error, float("inf")), "not finite"),
    ):
        Rankings("x", "output", {"a": ranking}, {"a": "hash"}).save(tmp_path / "r")
        with pytest.raises(DgmrError, match=message):
            Rankings.read(tmp_path / "r")
    Rankings("x", "output", {"a": Ranking(order, error)}, {"a": "hash"}).save(tmp_path / "r")
    assert Rankings.read(tmp_path / "r").sites["a"].order.tolist() == [0, 1, 2, 3]
