"""Nonsense as input: every case ends cleanly or with exit status 2 and one line, never with a traceback.

System files are mutated as values and as bytes, command lines are put together from their own words and odd values,
and trajectory files are cut, flipped, overwritten and mixed. The command line runs in this process, up to where it
would begin to compute. A few hundred cases belong to the fast tests; `make slow ARGS=tests/faults` runs thousands.
"""

import contextlib
import copy
import functools
import io
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from freeflow import cli, config, preparation, trajectories
from freeflow.errors import FreeflowError
from freeflow.trajectories import writing

MAX_SECONDS = 60  # for a case; more is a hang


def sizes(few: int, many: int):
    """So many cases in the fast tests, and so many in the slow ones."""
    slow = pytest.mark.slow, pytest.mark.timeout(3600)
    return pytest.mark.parametrize("n_cases", [few, pytest.param(many, marks=slow)])


def campaign(n_cases: int, **strategies):
    """A Hypothesis test of so many cases, the same ones every time; nothing is shrunk, so that failures show soon."""
    quick = settings(
        max_examples=n_cases, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda test: quick(given(**strategies)(test))()


class Ended(NamedTuple):
    """How a command line ended."""

    status: int
    out: str
    err: str


def ended(arguments: list[str]) -> Ended:
    """Run the command line here, on a short leash."""

    def hangs(*_):
        raise RuntimeError(f"still at it after {MAX_SECONDS} s")

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(MAX_SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(arguments)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Ended(status, out.getvalue(), err.getvalue())


def refused(end: Ended) -> bool:
    """Whether it was refused as it should be; anything else must be clean.

    Raises:
        AssertionError: If it ended neither cleanly nor with exit status 2 (or 3: no frame is the crystal) and one line.
    """
    assert end.status in {0, 2, 3}, end
    if end.status == 0:
        assert "Traceback" not in end.out + end.err, end
        return False
    assert end.out == "", end
    assert end.err.startswith("freeflow: error: ") and end.err.count("\n") == 1 and end.err.endswith("\n"), end
    assert end.err.rstrip("\n").isprintable(), end
    assert "internal error" not in end.err and "Traceback" not in end.err, end
    return True


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Somewhere else, with kernels where the tests keep them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "enable_compilation_cache", lambda folder: None)
    monkeypatch.setenv("FREEFLOW_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------ system files

LJ = {
    "name": "tiny",
    "units": "lj",
    "temperature": 2.0,
    "potential": {"kind": "lennard_jones", "cutoff": 2.7, "shift": True, "nearest_image_only": True},
    "crystal": {"lattice": "fcc", "species": "Ar", "repeats": [2, 2, 2], "number_density": 1.28},
    "estimate": {
        "reference": "self_consistent",
        "bridge": {"stages": "auto"},
        "estimator": "fep",
        "target_error": 1e-3,
        "max_samples": 1000,
        "seed": 0,
        "precision": "float32",
    },
    "published": {"beta_f_per_atom": 3.1, "std_error": 0.1, "source": "nobody"},
}
MW = {
    "name": "ice",
    "units": "real",
    "temperature": [180, 200],
    "potential": {"kind": "stillinger_weber", "preset": "mw", "lambda": 23.15, "nearest_image_only": True},
    "crystal": {"lattice": "diamond", "repeats": [1, 1, 1], "lattice_constant": 6.2},
    "thermal_wavelength": 2.4,
    "estimate": {"flow": {"architecture": "residual", "width": 8, "training": {"max_steps": 5, "batch_size": 4}}},
}
SALT = {
    "name": "salt",
    "units": "metal",
    "temperature": "300:400:50",
    "pressure": "1 kbar",
    "cell_motion": "isotropic",
    "potential": {
        "kind": "born_mayer",
        "cutoff": 2.7,
        "pairs": {f"{pair}": {"A": 1000.0, "rho": 0.3, "C": 1.0} for pair in ("Na-Na", "Na-Cl", "Cl-Cl")},
    },
    "crystal": {"lattice": "rocksalt", "species": ["Na", "Cl"], "repeats": [1, 1, 1], "lattice_constant": 5.64},
    "masses": {"Na": 22.99, "Cl": 35.45},
}
WCA = {
    "name": "solute",
    "units": "lj",
    "temperature": [3.2, 3.2],
    "solution": {
        "box_length": 6.29,
        "solvent": {"count": 125, "potential": {"kind": "lennard_jones", "cutoff": "half_box"}},
        "solute": {"kind": "wca", "sigma": [2.59, 2.84]},
        "trajectories": {"A": ["a.dcd"], "B": ["b.dcd"]},
    },
    "estimate": {"methods": ["bridge", "lbar"], "target_error": 0.1, "map": {"kind": "field", "folds": 2}},
}
OTHERS = {
    "structure": {**LJ, "crystal": None, "structure": {"file": "../x.cif", "repeats": [1, 1, 1]}},
    "python": {**LJ, "potential": {"kind": "python", "function": "nowhere:energy", "arguments": {"a": [1, {"b": 2}]}}},
    "ase": {**LJ, "potential": {"kind": "ase", "calculator": "nowhere:factory", "workers": 1, "folder": "."}},
    "wca": {**LJ, "potential": {"kind": "wca", "epsilon": 1.0, "sigma": 1.0}},
    "stored": {**LJ, "estimate": {"flow": {"checkpoint": "shipped"}, "trajectory": {"file": "a", "frames": "1:9:2"}}},
}
BASES = [LJ, MW, SALT, WCA, *({k: v for k, v in values.items() if v is not None} for values in OTHERS.values())]

ODD_TEXT = [
    "", " ", "x", "0", "-1", "1e999", "nan", "null", "auto", "shipped", "yes", "é" * 200, "a\nb", "\x00", "\u202e",
    "\ud800", "../../etc/passwd", "/dev/null", "/dev/zero", "C:\\x", "~", "$HOME", "%s{0}", "{x}", "1:2", "1:2:0",
    "1:1e9:1e-9", "a" * 3000, "1 kbar", "inf bar", "os:system", "a:b", "Na-Cl", "Zz", "half_box", "%", "*", "&a",
    "[", "٣",
]  # fmt: skip
ODD = st.one_of(
    st.sampled_from(ODD_TEXT),
    st.sampled_from(
        [0, -1, 1, 2, 3, 7, 1000, 99_999, 10**6, 2**31, 2**63, 2**64, -(2**70), 10**40, 10**400, True, False, None]
    ),
    st.sampled_from([0.0, -0.0, 0.5, 1.5, 1e-320, 1e-300, 1e-30, 1e-9, 1e9, 1e30, 1e150, 1e308, -2.5]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(
        [[], {}, [[]], [1], [1, 2], [1, 2, 3], [0, 1, 1], [10**9] * 3, ["X"], [None], {"kind": "wca"}, {"a": {}}]
    ),
    st.floats(),
    st.integers(),
    st.text(max_size=12),
)


def places(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to everything inside."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated_values(draw):
    """A system file's values with one to four changes."""
    values = copy.deepcopy(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 4))):
        known = list(places(values))
        if not known:
            break
        *parents, key = draw(st.sampled_from(known))
        inner = values
        for step in parents:
            inner = inner[step]
        kind = draw(st.sampled_from(["odd", "odd", "odd", "gone", "scaled", "other", "typo", "wrapped", "new"]))
        if kind == "odd":
            inner[key] = copy.deepcopy(draw(ODD))  # or the next mutations would change what later cases draw
        elif kind == "gone":
            del inner[key]
        elif kind == "scaled" and isinstance(inner[key], int | float) and abs(inner[key]) < 1e300:
            inner[key] = inner[key] * draw(st.sampled_from([-1, 0, 2, 10, 0.1, 1e3, 1e-3, 1e12, 1e-12]))
        elif kind == "other":  # what stands elsewhere, perhaps in another file
            source = draw(st.sampled_from(BASES))
            *above, last = draw(st.sampled_from(list(places(source))))
            for step in above:
                source = source[step]
            inner[key] = copy.deepcopy(source[last])
        elif kind == "typo" and isinstance(inner, dict):
            inner[f"{key}{draw(st.sampled_from(['s', '_', ' ', 'é']))}"] = inner.pop(key)
        elif kind == "wrapped":
            inner[key] = [inner[key]]
        elif isinstance(inner, dict):
            inner[
                draw(st.one_of(st.sampled_from(["name", "kind", "seed", "flow", "<<", "pairs"]), st.text(max_size=9)))
            ] = copy.deepcopy(draw(ODD))
    return values


def written(values: Any) -> bytes:
    """As YAML; half surrogates as they are, which is no UTF-8."""
    text = yaml.dump(values, allow_unicode=True, sort_keys=False, Dumper=config.yaml_lines.Dumper)
    return text.encode("utf-8", "surrogatepass")


def only_known_files(folder: Path, *names: str) -> None:
    """Nothing was written beside what was there."""
    assert {path.name for path in folder.iterdir()} <= {*names, "cache"}


@sizes(60, 900)
def test_mutated_system_files(n_cases, tmp_path):
    accepted = 0

    @campaign(n_cases, values=mutated_values())
    def case(values):
        nonlocal accepted
        Path("s.yaml").write_bytes(written(values))
        if not refused(end := ended(["validate", "s.yaml"])):
            accepted += 1
            # What is printed is the same system again.
            Path("again.yaml").write_text(end.out, encoding="utf-8", errors="surrogatepass")
            again = ended(["validate", "again.yaml"])
            assert again.status == 0 and again.out == end.out

    only_known_files(tmp_path, "s.yaml", "again.yaml")
    assert n_cases / 50 < accepted < n_cases


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = [
    b"", b"\n", b"#", b"---\n---\n", b"null", b"[]", b"- a\n- b", b"{" * 5000, b"[" * 100_000, b"a: " * 3000,
    b"? " * 2000, b"- " * 9000, BOMB.encode(), b"a: &a {b: *a}", b"<<: *x",
    b"!!python/object/apply:os.system ['true']", b"!!binary aGk=", b"%YAML 9.9\n---\na: 1",
    b"\xef\xbb\xbf" + written(LJ), written(LJ).decode().encode("utf-16"), written(LJ).decode().encode("utf-32"),
    written(LJ).replace(b"tiny", "é".encode("latin-1")), written(LJ).replace(b"\n", b"\r\n"),
    written(LJ).replace(b"\n", b"\r"), written(LJ) + written(LJ), written(LJ) + b"\n---\n" + written(LJ),
    written(LJ) + b"...\nname: other\n", written(LJ) * 2000, b"name: " + b"9" * 200_000,
    b"temperature: 1" + b"0" * 5000, b"x" * 2_000_000, bytes(range(256)), b"\0" * 1000, b"\t" + written(LJ),
    b'name: "\\x00"\n', b'name: "\\ud800"\n', b"name: |\n  a\n  b\n", b"? [a, b]\n: c", b"a: b: c", b"a: 'b",
    b'"\\N"', b"a: 1_000", b"a: 0x10", b"temperature: 190:30:00", b"=: 1", b"1: 2", b"null: 1", b"~: 1",
    b"true: false", b"2001-01-01: 2001-01-01",
]  # fmt: skip

INSERTED = [
    b"\n", b"  ", b"\t", b":", b": ", b"-", b"{", b"]", b"'", b'"', b"#", b"&a", b"*a", b"!t", b"\0", b"\xff",
    b"\xc3", b"9" * 30, b"e9", b".", b"\xe2\x80\xa8", b"%", b"@", b"|", b">", b"?",
]  # fmt: skip


@st.composite
def mutated_bytes(draw):
    """A system file with bytes changed, cut, doubled or moved; or something that was never one."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(st.sampled_from(TEXTS), st.binary(max_size=300)))
    data = bytearray(written(draw(st.sampled_from(BASES))))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        stop = min(len(data), at + draw(st.integers(1, 30)))
        kind = draw(st.sampled_from(["flip", "put", "cut", "double", "end", "other"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "put":
            data[at:at] = draw(st.sampled_from(INSERTED))
        elif kind == "cut":
            del data[at:stop]
        elif kind == "double":
            data[at:at] = data[at:stop]
        elif kind == "end":
            del data[at:]
        else:
            data[at:stop] = written(draw(st.sampled_from(BASES)))[at:stop]
    return bytes(data)


@sizes(60, 900)
def test_mutated_bytes_of_system_files(n_cases, tmp_path):
    @campaign(n_cases, data=mutated_bytes())
    def case(data):
        Path("s.yaml").write_bytes(data)
        refused(ended(["validate", "s.yaml"]))

    only_known_files(tmp_path, "s.yaml")


@pytest.mark.parametrize("k", range(len(TEXTS)))
def test_texts_that_are_no_system_files(k, tmp_path):
    Path("s.yaml").write_bytes(TEXTS[k])
    accepted = not refused(ended(["validate", "s.yaml"]))
    assert not accepted or TEXTS[k].lstrip(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n") == written(LJ)


# ------------------------------------------------------------------------------ command lines


class Reached(FreeflowError):
    """Stands for the work: the command line was understood."""

    exit_status = 0


@pytest.fixture
def no_work(monkeypatch):
    """Commands end where they would begin to compute."""
    import freeflow.comparison
    import freeflow.many_runs
    import freeflow.phases
    import freeflow.pipeline
    import freeflow.sampling
    import freeflow.series
    import freeflow.solvation
    import freeflow.training_run

    def reached(*_, **__):
        raise Reached("the work begins")

    for module, name in [
        (freeflow.comparison, "compare"), (freeflow.many_runs, "run_all"), (freeflow.phases, "compare_phases"),
        (freeflow.pipeline, "estimate"), (freeflow.sampling, "sample"), (freeflow.series, "estimate_series"),
        (freeflow.solvation, "estimate_difference"), (freeflow.training_run, "train"),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, reached)


WORDS = [
    *ODD_TEXT, "mw_cubic_8", "mw_cubic_8", "lj_fcc_32", "solvation_wca", "s.yaml", "none.yaml", "t.xyz", "folder",
    "none/x.json", "out.json", "out.csv", "out.png", "out.html", "out.parquet", "-", "--", "-n", "-o", "12", "1e-3",
    "100:300:50", "100,200", "200", "0:0:0", "::", "3:1", "bar", "fep", "bar,fep", "radial", "lbar", "einstein",
    "float64", "residual", "mcmc", "localhost:1,2,0", "tcp://x", "@", "99999999999999999999999", "list.txt",
]  # fmt: skip
WORKING = sorted({*cli.cli.commands} - {"systems", "validate"})
OPTIONS = sorted(
    {
        name
        for command in cli.cli.commands.values()
        for option in command.params
        for name in option.opts
        if name.startswith("-")
    }
    - {"--distributed", "--help"}
)


def suited(option: click.Parameter) -> list[str]:
    """Values of the kind that the option takes; what they are worth, it must see for itself."""
    if isinstance(option.type, click.Choice):
        return [str(choice) for choice in option.type.choices]
    if isinstance(option.type, click.types.IntParamType):
        return ["1", "40", "1000"]
    if isinstance(option.type, click.types.FloatParamType):
        return ["1e-3", "0.5", "30"]
    return ["out.json", "200", "100:300:50", "mcmc", "t.xyz"]


def command_line(draw: random.Random) -> list[str]:
    """A command, mostly with what it needs, and options with values that may or may not suit them."""

    def odd() -> str:
        letters = "".join(chr(draw.randrange(1, 0x2FF)) for _ in range(draw.randrange(8)))
        return draw.choice(
            [
                *draw.choices(WORDS, k=3),
                letters,
                str(int(draw.gauss(0, 1) * 10 ** draw.randrange(20))),
                repr(draw.gauss(0, 1e3)),
            ]
        )

    def one_in(n: int) -> bool:
        return draw.randrange(n) == 0

    name = draw.choice([*cli.cli.commands, *WORKING, "estimat", ""])
    command = cli.cli.commands.get(name)
    words = [] if one_in(20) else [name]
    for parameter in command.params if command is not None and not one_in(10) else ():
        if parameter.param_type_name == "argument":
            words.append(odd() if one_in(5) else draw.choice(["mw_cubic_8", "lj_fcc_32", "solvation_wca", "s.yaml"]))
        elif parameter.required:
            words += [parameter.opts[0], odd() if one_in(5) else draw.choice(["3", "30", "out.xyz", "out"])]
    takes = {
        name: parameter
        for parameter in (command.params if command else ())
        for name in parameter.opts
        if name.startswith("-")
    }
    own = list(takes) or OPTIONS
    for _ in range(max(0, draw.randint(-2, 4))):  # none at all, often
        option = draw.choice([*own, *own, *own, *OPTIONS, "--nothing", "--seed"])
        if option in takes and getattr(takes[option], "is_flag", False) and not one_in(3):
            words.append(option)
            continue
        value = odd() if option not in takes or one_in(3) else draw.choice(suited(takes[option]))
        words += draw.choice([[option, value], [option, value], [f"{option}={value}"], [option]])
    if one_in(10):
        words.insert(draw.randint(0, len(words)), odd())
    return [word for word in words if word not in {"-h", "--help", "--version", "--distributed", "--dask"}]


@sizes(100, 900)
def test_command_lines(n_cases, tmp_path, no_work):
    # A plain generator: what Hypothesis makes of so many choices is the same few command lines over and over.
    Path("s.yaml").write_bytes(written(LJ))
    Path("list.txt").write_text("s.yaml\nmw_cubic_8\n")
    Path("t.xyz").write_text("1\n\nAr 0 0 0\n")
    Path("folder").mkdir()
    reached = 0
    for case in range(n_cases):
        words = command_line(random.Random(case))
        print(case, words)  # shown if it fails
        end = ended(words)
        if end.status == 0 and end.err:
            assert end.err.endswith("freeflow: error: the work begins\n"), (words, end)
            reached += 1
        else:
            refused(end)
    only_known_files(tmp_path, "s.yaml", "list.txt", "t.xyz", "folder")
    assert reached > n_cases / 20


# ------------------------------------------------------------------------------ trajectory files

FORMATS = [".lammpstrj", ".extxyz", ".extxyz.gz", ".pdb", ".traj", ".xtc", ".trr", ".dcd", ".h5"]
N_FRAMES = 5
loaded = functools.cache(config.load)  # what a case is about is the trajectory


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    """Bytes of sound trajectories by ending, with 1 to N_FRAMES frames; those of another system under "other"."""
    folder = tmp_path_factory.mktemp("sound")
    known: dict[str, dict[Any, bytes]] = {}
    for ending in FORMATS:
        known[ending] = {}
        for key, name in [*((n, "lj_fcc_32") for n in range(1, N_FRAMES + 1)), ("other", "mw_cubic_8")]:
            system = loaded(name)
            n = N_FRAMES if key == "other" else key
            u = 0.02 * np.random.default_rng(0).standard_normal((N_FRAMES, system.n_atoms, 3))[:n]
            writing.write(folder / f"t{ending}", system, u)
            known[ending][key] = (folder / f"t{ending}").read_bytes()
    return known


@st.composite
def damage(draw):
    """What to do to a file: kind, format, and three fractions."""
    kinds = [
        "truncated", "truncated", "flipped", "flipped", "zeroed", "noise", "doubled", "lines", "mixed", "renamed",
        "other", "joined",
    ]  # fmt: skip
    fraction = st.floats(0, 1, exclude_max=True)
    return (
        draw(st.sampled_from(kinds)),
        draw(st.sampled_from(FORMATS)),
        draw(fraction),
        draw(fraction),
        draw(st.integers(0, 2**32 - 1)),
    )


def damaged(sound: dict[str, dict[Any, bytes]], kind: str, ending: str, a: float, b: float, seed: int) -> bytes:
    """The bytes of a damaged file."""
    rng = np.random.default_rng(seed)
    data = bytearray(sound[ending][N_FRAMES])
    at = int(a * len(data))
    stop = min(len(data), at + 1 + int(b * 64))
    another = sound[str(rng.choice(FORMATS))][N_FRAMES]
    match kind:
        case "truncated":
            return bytes(data[:at])
        case "flipped":
            for where in rng.integers(0, len(data), rng.choice([1, 1, 1, 4, 30])):
                data[where] ^= 1 << int(rng.integers(8))
        case "zeroed":
            data[at:stop] = bytes(stop - at)
        case "noise":
            data[at:stop] = rng.bytes(stop - at)
        case "doubled":
            data[at:at] = data[at:stop]
        case "lines":  # some are lost, doubled or swapped
            lines = bytes(data).splitlines(keepends=True)
            for k in rng.integers(0, len(lines), 2):
                lines[k : k + 1] = [[], [lines[k]] * 2, [lines[int(rng.integers(len(lines)))]]][
                    int(rng.integers(3))
                ] or [b""]
            return b"".join(lines)
        case "mixed":
            return bytes(data[:at]) + another[int(b * len(another)) :]
        case "renamed":
            return another
        case "other":
            return sound[ending]["other"]
        case "joined":
            return bytes(data) + sound[ending]["other"]
    return bytes(data)


@sizes(40, 1500)
def test_damaged_trajectories(n_cases, sound_files, monkeypatch):
    """Read whole, as for a comparison: what is accepted is finite, and of a cut file only whole frames are."""
    import freeflow.comparison

    seen = []

    def read_alone(system, trajectory, plan, report):
        found = preparation.read_trajectory(system, trajectory, report or (lambda _: None))
        seen.append((system, found.series))
        raise Reached("the work begins")

    monkeypatch.setattr(freeflow.comparison, "compare", read_alone)
    monkeypatch.setattr(config, "load", loaded)
    accepted = 0

    @campaign(n_cases, what=damage())
    def case(what):
        nonlocal accepted
        kind, ending, *rest = what
        data = damaged(sound_files, kind, ending, *rest)
        path = Path(f"t{ending}")
        path.write_bytes(data)
        seen.clear()
        end = ended(["compare", "lj_fcc_32", str(path), "--quiet"])
        if not (end.status == 0 and end.err.endswith("the work begins\n")):
            assert refused(end)
            return
        accepted += 1
        _, series = seen[0]
        assert np.isfinite(series.displacements).all() and np.isfinite(series.energies[series.sound]).all()
        assert series.n_frames >= 1
        if kind == "truncated":
            # The end of a format's last line or directory may be missing, but no frame may be in part.
            whole = sound_files[ending].get(series.n_frames, b"")
            assert len(data) >= 0.9 * len(whole), (what, series.n_frames)
            assert series.n_frames <= N_FRAMES
        # What stands behind the last frame of a file with a directory of its own is no part of it.
        assert kind != "other" and (kind != "joined" or (ending in {".h5", ".traj"} and series.n_frames == N_FRAMES))

    assert accepted < n_cases / 2


@sizes(8, 400)
def test_damaged_xtc_frames(n_cases, sound_files):
    """Flipped, cut and overwritten in what is compressed, where headers are sound: the reader in C is led astray there.

    It may end by a signal, but not this process with it; what is accepted lies in the box that its header names.
    """
    system, sound = loaded("lj_fcc_32"), sound_files[".xtc"][N_FRAMES]
    head, length = 92, len(sound) // N_FRAMES
    rng, refusals = np.random.default_rng(17), []
    for _ in range(n_cases):
        data = bytearray(sound)
        frame = int(rng.integers(N_FRAMES))
        begin, end = frame * length + head, (frame + 1) * length
        kind = rng.choice(["flipped", "flipped", "noise", "ones", "cut"])
        if kind == "flipped":
            for where in rng.integers(begin, end, rng.choice([1, 1, 4, 30])):
                data[where] ^= 1 << int(rng.integers(8))
        else:
            at = int(rng.integers(begin, end))
            stop = min(end, at + int(rng.integers(1, 64)))
            data[at:stop] = {"noise": rng.bytes(stop - at), "ones": b"\xff" * (stop - at), "cut": b""}[kind]
        Path("t.xtc").write_bytes(data)
        try:
            found = np.concatenate([frames.positions for frames in trajectories.read("t.xtc", system)])
        except FreeflowError as error:
            assert "\n" not in str(error) and "corrupted" in str(error), error
            refusals.append(str(error))
        else:
            assert kind != "cut" and found.shape == (N_FRAMES, system.n_atoms, 3)
            # Headers name the corners of the box around the atoms.
            assert np.isfinite(found).all() and np.ptp(found, axis=(1, 2)).max() < 1.1 * system.crystal.cell[0, 0]
    assert len(refusals) > n_cases / 2


def test_sound_trajectories_are_accepted(sound_files):
    """Lest the campaign should pass because everything is refused."""
    system = loaded("lj_fcc_32")
    for ending in FORMATS:
        path = Path(f"t{ending}")
        path.write_bytes(sound_files[ending][N_FRAMES])
        assert sum(len(frames.positions) for frames in trajectories.read(path, system)) == N_FRAMES


# ------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name", ["../../x", "..", "/etc/x", "a/b", "CON", "-rf", "名" * 100, "x" * 100, ".", "~/x", "%2e%2e"]
)
def test_results_of_many_runs_stay_in_their_folder(name, tmp_path):
    from freeflow import many_runs

    Path("inside").mkdir()
    many_runs.keep(Path("inside"), many_runs.Outcome(name, "0123456789abcdef", "converged", "", 1, {"beta_f": 1.0}))
    only_known_files(tmp_path, "inside")
    assert len(os.listdir("inside")) == 2
    assert many_runs.recalled(Path("inside"))["0123456789abcdef"].name == name
