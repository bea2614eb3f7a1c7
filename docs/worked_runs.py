"""Pages of the worked runs: the READMEs of examples/, with the files that they name, when the site is built."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

EXAMPLES = Path(__file__).parents[1] / "examples"
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)")


def on_files(files, config):
    """Add a page for every example, and its input files."""
    for readme in sorted(EXAMPLES.glob("*/README.md")):
        folder = readme.parent
        files.append(File.generated(config, f"examples/{folder.name}.md", content=page(readme)))
        for path in inputs(folder):
            files.append(File.generated(config, f"examples/{folder.name}/{path.name}", content=path.read_text("utf-8")))
    return files


def inputs(folder: Path) -> list[Path]:
    """What a reader needs to run an example."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")


def page(readme: Path) -> str:
    """A README as a page of the site: its links start elsewhere, and its input files are shown below."""
    name = readme.parent.name

    def moved(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(f"examples/{name}", match[1]))
        if target.startswith("docs/"):
            return f"../{target.removeprefix('docs/')}"
        return f"{name}/{match[1]}" if "/" not in match[1] else match[1]

    parts = [LINK.sub(moved, readme.read_text(encoding="utf-8")).strip(), "## Files"]
    kinds = {".yaml": "yaml", ".py": "python"}
    for path in inputs(readme.parent):
        shown = f"\n\n```{kinds[path.suffix]}\n{path.read_text('utf-8').strip()}\n```" if path.suffix in kinds else ""
        parts.append(f"[{path.name}]({name}/{path.name}){shown}")
    return "\n\n".join(parts) + "\n"
