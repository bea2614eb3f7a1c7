"""The command line: arguments in, text or JSON out, exit status.

Every bad input is one line on stderr and exit status 2. `commands` holds the subcommands, `options` what they take,
`inputs` what is made of it, `output` what they print.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

import click

from freeflow import config
from freeflow.cli.commands import INTERRUPTED, cli
from freeflow.cli.output import complain, drop_output, flush, say
from freeflow.errors import FreeflowError

__all__ = ["cli", "main"]

BROKEN_PIPE = 141  # what the shell reports for a process that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    # Loading cached code, XLA warns at length about processor features that are no features
    # ("prefer-no-gather"). What really goes wrong is raised, and shown.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with cli.make_context("freeflow", list(sys.argv[1:] if arguments is None else arguments)) as context:
            status = cli.invoke(context)
        flush()
        return int(status or 0)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.NoSuchOption as error:
        return complain(_no_such_option(error), 2)
    except click.ClickException as error:
        return complain(error.format_message(), 2)
    except BrokenPipeError:
        drop_output()
        return BROKEN_PIPE
    except FreeflowError as error:
        return complain(str(error), error.exit_status)
    except (KeyboardInterrupt, click.Abort):
        say("freeflow: interrupted before any sample was complete")
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("FREEFLOW_DEBUG") == "1":
            traceback.print_exc()
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return complain(f"internal error, please report it (FREEFLOW_DEBUG=1 shows where): {what}", 1)


def _no_such_option(error: click.NoSuchOption) -> str:
    command = error.ctx.command_path if error.ctx else "freeflow"
    known = [name for param in error.ctx.command.params for name in param.opts] if error.ctx else []
    near = config.nearest(error.option_name, [name for name in known if name.startswith("--")])
    return f"no such option {error.option_name}; " + (f"did you mean {near}?" if near else f"see '{command} --help'")
