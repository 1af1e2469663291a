"""A supervised process: what hangs, dies or is stopped costs its own result and no other."""

import sys

import pytest

from benchmarks.gpu_supervise import Journal, digest, supervise

# Does the pieces 0 to 4, badly where it is told to; imports nothing that takes time.
CHILD = """
import importlib.util, os, sys, time, pathlib
spec = importlib.util.spec_from_file_location("s", sys.argv[1])
s = importlib.util.module_from_spec(spec)
sys.modules["s"] = s
spec.loader.exec_module(s)
journal = s.Journal(pathlib.Path(sys.argv[2]))
bad = dict(pair.split(":") for pair in sys.argv[3:])
if "start" in bad:
    sys.exit("cannot start")
for i in range(5):
    def work():
        how = bad.get(str(i))
        if how == "hang":
            time.sleep(60)
        if how == "die":
            print("something broke", file=sys.stderr)
            os._exit(3)
        return i * i
    journal.once(str(i), work)
"""


def run(tmp_path, *bad, seconds=60.0, patience=5.0):
    import benchmarks.gpu_supervise as module

    path = tmp_path / "journal.jsonl"
    command = [sys.executable, "-c", CHILD, module.__file__, str(path), *bad]
    return supervise(command, path, seconds, patience).results


def test_what_hangs_or_dies_is_said_and_the_rest_is_done(tmp_path):
    results = run(tmp_path, "1:hang", "3:die")
    assert [results[str(i)] for i in (0, 2, 4)] == [0, 4, 16]
    assert results["1"] == {"died": "no answer in 5 seconds"}
    assert results["3"]["died"].startswith("exit status 3") and "broke" in results["3"]["died"]
    assert run(tmp_path, "0:die") == results  # all of it is in the journal


def test_time_is_kept_and_a_later_call_goes_on(tmp_path):
    results = run(tmp_path, "2:hang", seconds=4.0, patience=60.0)
    assert results == {"0": 0, "1": 1}
    assert run(tmp_path) == {str(i): i * i for i in range(5)}


def test_a_child_that_cannot_start_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="cannot start"):
        run(tmp_path, "start:no")


def test_a_line_that_was_cut_off_is_ignored(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    assert journal.once("a", lambda: 1) == 1 and journal.once("a", lambda: 2) == 1
    journal.begin("b")
    with path.open("a") as file:
        file.write('{"key": "b", "res')
    again = Journal(path)
    assert again.results == {"a": 1} and again.open == "b"


def test_kernels_are_named_by_their_files():
    assert digest(".py") == digest(".py") != digest(".none") and len(digest(".py")) == 12
