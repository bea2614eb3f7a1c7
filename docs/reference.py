"""Pages of the reference, made from the code when the site is built."""

import importlib
import inspect
import textwrap

import click
from mkdocs.structure.files import File

import freeflow
from freeflow import cli
from freeflow.config import schema

MODULES = ("freeflow.estimators", "freeflow.bijectors", "freeflow.networks", "freeflow.observables", "freeflow.units")


def on_files(files, config):
    """Add the generated pages."""
    for name, make in (("commands", commands), ("keys", keys), ("api", api)):
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _code(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.strip()}\n```"


# ------------------------------------------------------------------------------ commands


def commands() -> str:
    """Every command with its options and examples."""
    parts = ["# Commands", textwrap.dedent(cli.cli.help or "").strip(), _epilog(cli.cli)]
    for name in sorted(cli.cli.commands):
        command = cli.cli.commands[name]
        context = click.Context(command, info_name=f"freeflow {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        parts += [f"## freeflow {name}", _code(f"freeflow {name} {usage}"), inspect.cleandoc(command.help or "")]
        rows = [_row("option", "meaning"), _row("---", "---")]
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if record is not None:
                rows.append(_row(f"`{record[0]}`", record[1]))
        parts += ["\n".join(rows), _epilog(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _epilog(command: click.Command) -> str:
    text = (command.epilog or "").replace("\b\n", "").strip()
    examples, _, rest = text.partition("\n\n")
    return "\n\n".join(
        part for part in (_code(examples.removeprefix("Examples:"), "sh") if examples else "", rest) if part
    )


# ------------------------------------------------------------------------------ keys of system.yaml


def keys() -> str:
    """Every section of a system file with its keys, types, defaults and bounds."""
    parts = [
        "# Keys of a system file",
        "Unknown keys and impossible values are errors that name the line. Numbers are in the file's unit style. "
        "`freeflow validate SYSTEM` prints a file with every default filled in.",
    ]
    seen = []
    for group in (schema.SECTIONS, schema.SOLUTION_SECTIONS):
        for path, section in group.items():
            if section in seen:
                continue
            seen.append(section)
            solution = " of a solution" if group is schema.SOLUTION_SECTIONS else ""
            parts += _section(".".join(path) or f"the file{solution}", section)
    for title, kinds in (("potential, kind", schema.POTENTIALS), ("estimate.flow,", schema.FLOWS)):
        for kind, section in kinds.items():
            parts += _section(f"{title} {kind}", section)
    return "\n\n".join(parts) + "\n"


def _section(title: str, section: type) -> list[str]:
    rows = [_row("key", "type", "default", "meaning"), _row("---", "---", "---", "---")]
    properties = section.model_json_schema(by_alias=True).get("properties", {})
    for name, field in section.model_fields.items():
        key = field.alias or name
        default = "required" if field.is_required() else f"`{_default(field)}`"
        rows.append(_row(f"`{key}`", _type(properties.get(key, {})), default, field.description or ""))
    return [f"## {title}", inspect.cleandoc(section.__doc__ or ""), "\n".join(rows)]


def _default(field) -> str:
    value = field.get_default(call_default_factory=True)
    if hasattr(value, "model_dump"):
        return "section, see below"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type(field: dict) -> str:
    if "enum" in field:
        return ", ".join(str(value) for value in field["enum"])
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field or "oneOf" in field:
        return " or ".join(dict.fromkeys(_type(one) for one in field.get("anyOf", field.get("oneOf"))))
    if "$ref" in field:
        return "section"
    bounds = {"exclusiveMinimum": "> ", "minimum": ">= ", "maximum": "<= ", "exclusiveMaximum": "< "}
    limits = ", ".join(f"{sign}{field[name]:g}" for name, sign in bounds.items() if name in field)
    names = {
        "number": "number",
        "integer": "whole number",
        "string": "text",
        "boolean": "true or false",
        "array": "list",
    }
    name = names.get(field.get("type", ""), field.get("type", "any"))
    return f"{name} {limits}".strip()


# ------------------------------------------------------------------------------ Python


def api() -> str:
    """Public names with signature and docstring."""
    parts = ["# Python", "`import freeflow as ff` starts nothing; names are looked up on first use."]
    parts += _names("freeflow", freeflow, [name for name in freeflow.__all__ if not name.startswith("_")])
    for name in MODULES:
        module = importlib.import_module(name)
        parts += [f"# {name}", inspect.cleandoc(module.__doc__ or "")]
        parts += _names(name, module, _public(module))
    return "\n\n".join(parts) + "\n"


def _public(module) -> list[str]:
    named = getattr(module, "__all__", None)
    if named is not None:
        return list(named)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def _names(home: str, module, names: list[str]) -> list[str]:
    parts = []
    for name in names:
        value = getattr(module, name)
        if not callable(value) or not inspect.getdoc(value):
            continue
        try:
            signature = str(inspect.signature(value))
        except (TypeError, ValueError):
            signature = ""
        parts += [f"## {home}.{name}", _code(f"{name}{signature}", "python"), _code(inspect.getdoc(value) or "")]
    return parts
