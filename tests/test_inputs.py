"""Every input of ``tests/inputs`` through the command line: exit code, message, and what is on disk afterwards."""

import shlex

import pytest
from conftest import call_command
from inputs import all_cases

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_input(case, tmp_path, monkeypatch):
    case.make(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    result = call_command(*shlex.split(case.command))
    output = " ".join((result.stdout + result.stderr).split())
    assert result.returncode == case.code, output
    assert case.says in output
    assert "Traceback" not in output
    assert {path.name for path in tmp_path.iterdir()} - before == set(case.leaves)


def test_case_names_are_distinct():
    assert len({case.name for case in CASES}) == len(CASES)
