"""One run at a time in a folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from freeflow.errors import InputError
from freeflow.folders import LOCK_FILE, alone_in

HOLD = """
import sys, time
from pathlib import Path
from freeflow.folders import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another run is at work there"), alone_in(tmp_path):
            pass
        assert other.poll() is None and (tmp_path / LOCK_FILE).exists()
        other.send_signal(signal.SIGKILL)  # and the lock is gone with it
        other.wait()
        with alone_in(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    for name in (".checkpoint.safetensors.0123abcd.tmp", "kept.tmp", ".kept"):
        (tmp_path / name).write_text("half")
    with alone_in(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".kept", LOCK_FILE, "kept.tmp"]
    assert sorted(os.listdir(tmp_path)) == [".kept", "kept.tmp"]


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be written: No such file or directory"), alone_in(tmp_path / "none"):
        pass
