"""One run of many, in a process of its own: `python -m freeflow.run_worker`; see freeflow.many_runs.

What to run comes as one line of JSON on standard input: the arguments of the command line. The process ends when its
input does: so nothing goes on computing after a parent that was killed.
"""

from __future__ import annotations

import json
import os
import sys
import threading


def main() -> int:
    """Carry out the command of the first line."""
    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from freeflow.cli import main as command_line

    return command_line(arguments)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(143)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the thread above still waits for its input
