"""Random mutations of the files that people bring: bytes flipped or cut, keys doubled, lines moved.

A command on a mutated file refuses it in one message, or succeeds. If the mutation does not change what the file says,
the command prints what it prints without the mutation.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass

import pytest
import yaml
from conftest import SMALL, call_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import picture, tar

from dgmr_tp.encoders.model import DEMO

pytestmark = pytest.mark.slow
EXAMPLES = 80
"""Mutations of each kind of file."""


@dataclass(frozen=True)
class Target:
    """A file that is mutated, and a command that reads it."""

    file: str
    command: str
    parse: Callable[[bytes], object] | None
    """What the file says, to recognize mutations that change nothing. None: any change of a byte may change it."""


def parse_yaml(data: bytes) -> object:
    return yaml.safe_load(data.decode())


TARGETS = {
    "recipe": Target("recipe.yaml", "run recipe.yaml --dry-run", parse_yaml),
    "plan": Target("plan.json", "prune --plan plan.json -o out", json.loads),
    "rankings": Target("rankings", "plan --rankings rankings --keep 64", None),
    "config": Target("model/open_clip_config.json", "plan -m model --criterion l2 --keep 64", json.loads),
    "sidecar": Target("model/dgmr_tp.json", "plan -m model --criterion l2 --keep 64", json.loads),
    "weights": Target("model/open_clip_model.safetensors", "plan -m model --criterion l2 --keep 64", None),
    "tar": Target("images.tar", "rank --images images.tar --calibration-images 12 --criterion activation -o out", None),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return a folder with one valid file of each kind, and the output of every command on it."""
    folder = tmp_path_factory.mktemp("originals")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SMALL))
    shutil.copytree(DEMO, folder / "model")
    (folder / "model" / "dgmr_tp.json").write_text(json.dumps({"format": 1, "library": "open_clip", "encoder": "x"}))
    tar(folder / "images.tar", {f"{i}.png": picture(i) for i in range(12)})
    rank = ("rank", "--images", folder / "images.tar", "--criterion", "activation", "-o", folder / "rankings")
    assert call_command(*rank).returncode == 0
    assert call_command("plan", "--keep", "64", "-o", folder / "plan.json").returncode == 0
    return folder


def run(folder, target):
    """Return exit code and output of the target's command in a copy of ``folder``, without what it writes."""
    with chdir(folder):
        result = call_command(*target.command.split())
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").unlink(missing_ok=True)
    return result


@st.composite
def mutations(draw):
    """Draw a function that changes bytes."""
    kind = draw(st.sampled_from(["flip", "cut", "double", "insert", "swap"]))
    place, length = draw(st.floats(0, 1)), draw(st.integers(1, 40))
    value = draw(st.integers(1, 255))

    def mutate(data: bytes) -> bytes:
        start = min(int(place * len(data)), max(0, len(data) - 1))
        if kind == "flip":
            return data[:start] + bytes([data[start] ^ value]) + data[start + 1 :]
        if kind == "cut":
            return data[:start]
        if kind == "insert":
            return data[:start] + bytes([value]) * length + data[start:]
        lines = data.splitlines(keepends=True)
        first = int(place * (len(lines) - 1))
        if kind == "double":
            return b"".join([*lines[: first + 1], *lines[first:]])
        other = value % len(lines)
        lines[first], lines[other] = lines[other], lines[first]
        return b"".join(lines)

    return mutate


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_refused_in_one_message_or_read_as_it_says(name, originals, tmp_path_factory):
    target = TARGETS[name]
    folder = tmp_path_factory.mktemp(name) / "case"
    shutil.copytree(originals, folder)
    whole = (originals / target.file).read_bytes()
    expected = run(folder, target)
    assert expected.returncode == 0, expected.stderr

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutate=mutations())
    def check(mutate):
        data = mutate(whole)
        (folder / target.file).write_bytes(data)
        result = run(folder, target)
        output = result.stdout + result.stderr
        assert "Traceback" not in output
        assert result.returncode in (0, 2), output
        if result.returncode == 2:
            [message] = [line for line in result.stderr.splitlines() if line.startswith("dgmr-tp: ")][-1:]
            assert len(message) > len("dgmr-tp: ") and not result.stdout
        elif data == whole or (target.parse is not None and target.parse(data) == target.parse(whole)):
            assert (result.stdout, result.returncode) == (expected.stdout, 0)
        assert not list(folder.glob(".*partial"))

    check()
