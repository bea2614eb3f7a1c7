"""Options of the commands, and what their values may be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from freeflow import config


class Stages(click.ParamType):
    """How many stages a bridge has."""

    name = "auto|none|INT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str | None:
        """The number of stages, "auto", or None for no bridge."""
        if value in {"auto", "none"}:
            return value
        if isinstance(value, str) and value.isascii() and value.isdecimal():
            return int(value[:20])
        self.fail(f"{value!r} is not auto, none or a whole number.", param, ctx)


class Group(click.Group):
    """Commands that name the nearest one where there is no such command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when there is no such one."""
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"no such command {args[0]!r}; {config.suggest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, listed in this order."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


STOPPING = together(
    click.option("--target-error", type=float, help="Stop at this standard error [kT per atom]."),
    click.option("--max-samples", type=int, help="Stop after this many samples in any case."),
)
ROAD = together(
    click.option("--seed", type=int, help="Seed of the random numbers."),
    click.option(
        "--reference", type=click.Choice(["einstein", "harmonic", "self_consistent"]), help="Where samples start."
    ),
    click.option("--stages", type=Stages(), help="Stages of the bridge; none for no bridge."),
    click.option("--precision", type=click.Choice(["float32", "float64"]), help="Of the energy kernels."),
    click.option("--checkpoint", metavar="FILE", help="A trained flow: a file, the folder of a run, or shipped."),
)
FRAMES = together(
    click.option("--topology", metavar="FILE", help="Checked against the system; no format needs one."),
    click.option("--frames", metavar="START:STOP:STRIDE", help="Frames to use, as in Python."),
    click.option(
        "--sigma", type=click.Choice(["angstrom", "nm"]), help="What one sigma is stored as, if no cell tells."
    ),
)


class Temperatures(click.ParamType):
    """One temperature, a list or a range."""

    name = "T|T,T,...|START:STOP:STEP"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """One temperature or several, above zero."""
        if isinstance(value, tuple):
            return value
        try:
            found = config.temperature_range(value)
            numbers = found if isinstance(found, tuple) else tuple(float(part) for part in value.split(","))
        except ValueError:  # of either
            numbers = ()
        if not numbers or not all(0 < t < float("inf") for t in numbers):
            self.fail(f"{value!r} is no temperature, list or START:STOP:STEP; an example is 100:300:25.", param, ctx)
        return numbers


STATES = together(
    click.option("--temperature", type=Temperatures(), help="Instead of the file's; several are a series."),
    click.option(
        "--pressure",
        metavar="P|P,P,...|START:STOP:STEP",
        help="The same, in the file's unit or with one: '1 kbar', '0:20:2 GPa'; a fixed cell then moves.",
    ),
)
TABLE = together(
    click.option("--csv", metavar="OUT", help="Write the table of a series as CSV."),
    click.option("--plot", metavar="OUT", help="Draw it: .png, .pdf or .svg."),
)
OUTPUT = together(
    click.option("--json", "json_path", metavar="OUT", help="Write the result as JSON; - for stdout, without tables."),
    click.option("--quiet", is_flag=True, help="Print one line: the outcome and the verdict."),
    click.option("--cache/--no-cache", default=None, help="Keep compiled kernels between runs (the default)."),
)
REPORT = click.option("--report", metavar="OUT", help="Write an HTML page with plots, and their numbers as CSV.")
