"""system.yaml: what is accepted, and one clear line for everything that is not."""

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from freeflow import config, flows
from freeflow.errors import InputError, UnstableCrystalError
from freeflow.types import FlowPlan, Plan, Published, TrainingPlan

pytestmark = pytest.mark.code("brief")

GOOD = """\
name: test
units: lj
temperature: 2.0
potential: {kind: lennard_jones, cutoff: 2.7}
crystal: {lattice: fcc, repeats: [4, 4, 4], number_density: 1.28}
estimate:
  target_error: 1e-4
"""
CRYSTAL = "crystal: {lattice: fcc, repeats: [4, 4, 4], number_density: 1.28}\n"
LJ = "kind: lennard_jones, cutoff: 2.7"
KINDS = "lennard_jones, stillinger_weber, wca, born_mayer, python, ase"
KEYS = (
    "name, units, temperature, boltzmann, pressure, cell_motion, potential, crystal, structure, thermal_wavelength, "
    "masses, estimate, published"
)


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(content):
        Path("s.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return config.read("s.yaml")[2]

    return read


def complaint(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD_VALUES = [
    ("temperature: 2.0", "temperature: two", "s.yaml:3: temperature: expected a number, got 'two'"),
    ("temperature: 2.0", "temperature: nan", "s.yaml:3: temperature: expected a number, got 'nan'"),
    ("temperature: 2.0", "temperature: .nan", "s.yaml:3: temperature: expected a finite number, got nan"),
    ("temperature: 2.0", "temperature: -.inf", "s.yaml:3: temperature: expected a finite number, got -inf"),
    ("temperature: 2.0", "temperature: 1e999", "s.yaml:3: temperature: expected a finite number, got inf"),
    ("temperature: 2.0", "temperature: -1", "s.yaml:3: temperature: must be greater than 0, got -1"),
    ("temperature: 2.0", "temperature: 0", "s.yaml:3: temperature: must be greater than 0, got 0"),
    ("temperature: 2.0", "temperature: true", "s.yaml:3: temperature: expected a number, got true"),
    ("temperature: 2.0", "temperature:", "s.yaml:3: temperature: expected a number, got nothing"),
    ("temperature: 2.0", "temperature: 1:30", "s.yaml:3: temperature: expected a number, got '1:30'"),
    ("temperature", "temprature", "s.yaml:3: temprature: unknown key; did you mean temperature?"),
    ("temperature: 2.0\n", "", "s.yaml:1: temperature: missing"),
    ("temperature", "T", f"s.yaml:3: T: unknown key; use one of {KEYS} (and 1 more)"),
    ("name: test", "name: 3", "s.yaml:1: name: expected text, got 3"),
    ("name: test", 'name: "a\\nb"', "s.yaml:1: name: expected one line of printable text, got 'a\\nb'"),
    ("name: test", 'name: ""', "s.yaml:1: name: expected one line of printable text, got ''"),
    ("name: test", "name: test\nseed: 3", "s.yaml:2: seed: unknown key here; it belongs in section estimate"),
    ("name: test", "<<: {a: 1}\nname: test", f"s.yaml:1: '<<': unknown key; use one of {KEYS}"),
    ("name: test", 'name: test\n? "{a}\\nb"\n: 1', f"s.yaml:2: '{{a}}\\nb': unknown key; use one of {KEYS}"),
    (
        "units: lj\n",
        "",
        "s.yaml:1: units: missing; choose lj (epsilon, sigma, epsilon/k_B), real (kcal/mol, angstrom, K), "
        "metal (eV, angstrom, K)",
    ),
    ("units: lj", "units: LJ", "s.yaml:2: units: unknown value 'LJ'; did you mean lj?"),
    ("units: lj", "units: si", "s.yaml:2: units: unknown value 'si'; use one of lj, real, metal"),
    ("units: lj", "units: lj\nboltzmann: 0", "s.yaml:3: boltzmann: must be greater than 0, got 0"),
    (
        "lennard_jones",
        "lennard-jones",
        "s.yaml:4: potential.kind: unknown potential 'lennard-jones'; did you mean lennard_jones?",
    ),
    (
        "kind: lennard_jones, ",
        "",
        f"s.yaml:4: potential.kind: missing; use one of {KINDS}",
    ),
    ("{" + LJ + "}", "lj", "s.yaml:4: potential: expected a section with the keys kind, ..., got 'lj'"),
    ("cutoff", "cutof", "s.yaml:4: potential.cutof: unknown key; did you mean cutoff?"),
    ("cutoff: 2.7", "cutoff: '2.7'", "s.yaml:4: potential.cutoff: expected a number, got '2.7'"),
    (", cutoff: 2.7", "", "s.yaml:4: potential.cutoff: missing"),
    ("2.7", "2.7, shift: yes", "s.yaml:4: potential.shift: expected true or false, got 'yes'"),
    ("2.7", "2.7, nearest_image_only: 1", "s.yaml:4: potential.nearest_image_only: expected true or false, got 1"),
    (
        LJ,
        "kind: wca, wca: 3",
        "s.yaml:4: potential.wca: unknown key; use one of kind, epsilon, sigma, nearest_image_only",
    ),
    (LJ, "kind: stillinger_weber, preset: mww", "s.yaml:4: potential.preset: unknown value 'mww'; did you mean mw?"),
    (
        LJ,
        "kind: stillinger_weber, preset: mw",
        "s.yaml:4: potential.preset: mw is in units real (kcal/mol, angstrom, K), but this file's units are lj",
    ),
    (
        LJ,
        "kind: stillinger_weber, a: 1.8",
        "s.yaml:4: potential: missing epsilon, sigma, lambda, gamma, cos_theta0, "
        "A, B, p, q; give every parameter, or a preset (mw, silicon)",
    ),
    (
        LJ,
        "kind: stillinger_weber, preset: mw, cos_theta0: -2",
        "s.yaml:4: potential.cos_theta0: must be at least -1, got -2",
    ),
    ("fcc", "fc", "s.yaml:5: crystal.lattice: unknown value 'fc'; did you mean fcc?"),
    ("fcc", "hexagonal", "s.yaml:5: crystal.lattice: unknown value 'hexagonal'; did you mean hexagonal_ice?"),
    ("[4, 4, 4]", "4", "s.yaml:5: crystal.repeats: expected three whole numbers like [2, 2, 2], got 4"),
    ("[4, 4, 4]", "[4, 4]", "s.yaml:5: crystal.repeats: expected three whole numbers like [2, 2, 2], got [4, 4]"),
    ("[4, 4, 4]", "[4, 4, 0]", "s.yaml:5: crystal.repeats[2]: must be at least 1, got 0"),
    ("[4, 4, 4]", "[4, -4, 4]", "s.yaml:5: crystal.repeats[1]: must be at least 1, got -4"),
    ("[4, 4, 4]", "[4, 4, 4.0]", "s.yaml:5: crystal.repeats[2]: expected a whole number, got 4.0"),
    (
        "[4, 4, 4]",
        "[100, 100, 100]",
        "s.yaml:5: crystal.repeats: 1000000 repeated cells are more than the 100000 that fit in memory",
    ),
    ("1.28", "-1.28", "s.yaml:5: crystal.number_density: must be greater than 0, got -1.28"),
    ("1.28", "0", "s.yaml:5: crystal.number_density: must be greater than 0, got 0"),
    ("1.28", "1.28, lattice_constant: 1.5", "s.yaml:5: crystal: give number_density or lattice_constant, not both"),
    (", number_density: 1.28", "", "s.yaml:5: crystal: give number_density or lattice_constant"),
    (CRYSTAL, "", "s.yaml:1: give crystal (a named lattice) or structure (a file)"),
    (CRYSTAL, CRYSTAL + "structure: {file: a.cif}\n", "s.yaml:6: structure: give crystal or structure, not both"),
    (CRYSTAL, "structure: {}\n", "s.yaml:5: structure.file: missing"),
    (
        CRYSTAL,
        "solution: {box_length: 6}\n",
        "s.yaml:4: potential: unknown key here; it belongs in section solution.solvent (and 2 more)",
    ),
    (
        "estimate:\n  target_error: 1e-4",
        "estimate: 3",
        "s.yaml:6: estimate: expected a section with the keys reference, "
        "flow, bridge, estimator, trajectory, target_error, max_samples, seed, precision, got 3",
    ),
    ("1e-4", "0", "s.yaml:7: estimate.target_error: must be greater than 0, got 0"),
    ("1e-4", "1_000", "s.yaml:7: estimate.target_error: expected a number, got '1_000'"),
    ("1e-4", "0x10", "s.yaml:7: estimate.target_error: expected a number, got '0x10'"),
    ("1e-4", "1e-4\n  seed: -1", "s.yaml:8: estimate.seed: must be at least 0, got -1"),
    ("1e-4", "1e-4\n  max_samples: 1e5", "s.yaml:8: estimate.max_samples: expected a whole number, got 100000.0"),
    ("1e-4", "1e-4\n  estimator: mbar", "s.yaml:8: estimate.estimator: unknown value 'mbar'; did you mean bar?"),
    (
        "1e-4",
        "1e-4\n  reference: harmonics",
        "s.yaml:8: estimate.reference: unknown value 'harmonics'; did you mean harmonic?",
    ),
    (
        "1e-4",
        "1e-4\n  precision: double",
        "s.yaml:8: estimate.precision: unknown value 'double'; use one of float32, float64",
    ),
    ("1e-4", "1e-4\n  bridge: auto", "s.yaml:8: estimate.bridge: expected a section with the keys stages, got 'auto'"),
    (
        "1e-4",
        "1e-4\n  bridge: {stages: 0}",
        "s.yaml:8: estimate.bridge.stages: expected auto or a whole number from 1 to 1000000, got 0",
    ),
    ("1e-4", "1e-4\n  bridge: {stage: 9}", "s.yaml:8: estimate.bridge.stage: unknown key; did you mean stages?"),
    *[
        ("1e-4", f"1e-4\n  flow: {flow}", f"s.yaml:8: estimate.flow{message}")
        for flow, message in [
            ("shipped", ": expected a section with the keys checkpoint, or architecture, ..., got 'shipped'"),
            ("{}", ": give checkpoint (a trained flow) or architecture (residual, atomic_solids)"),
            ("{checkpiont: a}", ".checkpiont: unknown key; did you mean checkpoint?"),
            ("{checkpoint: 3}", ".checkpoint: expected text, got 3"),
            ("{checkpoint: a, training: {}}", ".training: unknown key; use one of checkpoint"),
            ("{checkpoint: a, architecture: residual}", ".architecture: give checkpoint or architecture, not both"),
            ("{architecture: residul}", ".architecture: unknown value 'residul'; did you mean residual?"),
            ("{architecture: [a]}", ".architecture: unknown value ['a']; use one of residual, atomic_solids"),
            ("{architecture: residual, widht: 3}", ".widht: unknown key; did you mean width?"),
            ("{architecture: atomic_solids, n_layers: 0}", ".n_layers: must be greater than 0, got 0"),
            ("{architecture: residual, seed: 3}", ".seed: unknown key here; it belongs in section estimate"),
            (
                "{architecture: residual, max_steps: 3}",
                ".max_steps: unknown key here; it belongs in section estimate.flow.training",
            ),
            (
                "{architecture: residual, training: {max_minute: 3}}",
                ".training.max_minute: unknown key; did you mean max_minutes?",
            ),
            (
                "{architecture: residual, training: {learning_rate: 0}}",
                ".training.learning_rate: must be greater than 0, got 0",
            ),
            (
                "{architecture: residual, training: {loss: reverse}}",
                ".training.loss: unknown value 'reverse'; did you mean reverse_kl?",
            ),
            (
                "{architecture: residual, training: 5}",
                ".training: expected a section with the keys loss, max_steps, max_minutes, batch_size, learning_rate, "
                "clip, average, min_gain, got 5",
            ),
        ]
    ],
    (
        "1e-4",
        "1e-4\npublished: {beta_f_per_atom: 3, std_error: 0}",
        "s.yaml:8: published.std_error: must be greater than 0, got 0",
    ),
    (
        "1e-4",
        "-1\n  seed: -1\n  max_samples: 0",
        "s.yaml:7: estimate.target_error: must be greater than 0, got -1 (and 2 more)",
    ),
    ("name: test", "name: test\nname: again", "s.yaml:2: name: given twice (first on line 1)"),
    ("cutoff: 2.7", "cutoff: 2.7, cutoff: 3", "s.yaml:4: potential.cutoff: given twice (first on line 4)"),
    ("name: test", "name: &a test", "s.yaml:1: anchors and aliases (& and *) are not allowed; write the value out"),
    ("name: test", "name: *a", "s.yaml:1: anchors and aliases (& and *) are not allowed; write the value out"),
    (
        "name: test",
        "name: !!python/name:os.system x",
        "s.yaml:1: tags ('tag:yaml.org,2002:python/name:os.system') are not allowed",
    ),
    ("name: test", "? [a]\n: b", "s.yaml:1: a key must be a word"),
    *[
        ("name: test", f"name: test\n{lines}", f"s.yaml:2: {message}")
        for lines, message in [
            ("cell_motion: triclinic", "cell_motion: a cell moves under a pressure; give pressure, too (it may be 0)"),
            ("cell_motion: triclinik\npressure: 1", "cell_motion: unknown value 'triclinik'; did you mean triclinic?"),
            ("pressure: 1 kbar", "pressure: a number in epsilon/sigma^3 is expected in units lj, not kbar"),
            *[
                (
                    f"pressure: {value}",
                    "pressure: expected a number, or one with a unit (Pa, kPa, MPa, GPa, bar, kbar, Mbar, atm) "
                    f"like 1 kbar, got {shown}",
                )
                for value, shown in [
                    ("1 kbarr", "'1 kbarr'"),
                    ("[1, [2]]", "[2]"),
                    (".nan", "nan"),
                    ("nan bar", "'nan bar'"),
                ]
            ],
        ]
    ],
]


@pytest.mark.parametrize(("old", "new", "message"), BAD_VALUES)
def test_bad_values_are_named_with_their_line(read, old, new, message):
    assert old in GOOD
    assert complaint(read, GOOD.replace(old, new, 1)) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "s.yaml: the file is empty"),
        ("# nothing\n", "s.yaml: the file is empty"),
        ("- a\n- b\n", "s.yaml:1: expected keys and values (name: ...), got ['a', 'b']"),
        ("just words", "s.yaml:1: expected keys and values (name: ...), got 'just words'"),
        (b"name: x\nunits: \xff", "s.yaml:2: not UTF-8 text (byte 0xff)"),
        (b"name: x\nunits: \x00", "s.yaml:2: not text (character #x0000)"),
        ("name: b: c", "s.yaml:1: mapping values are not allowed here"),
        ("name: [1, 2", "s.yaml:1: expected ',' or ']', but got '<stream end>'"),
        ("name: x\n\tunits: lj", "s.yaml:2: found character '\\t' that cannot start any token"),
        ("name: " + "[" * 5000, "s.yaml:1: nested too deeply"),
        ("name: x\n---\nname: y\n", "s.yaml:2: expected a single document in the stream, but found another document"),
        (b"x" * 1_000_001, "s.yaml: larger than 1000000 bytes; this is no system.yaml"),
        (
            "name: x",
            "s.yaml:1: units: missing; choose lj (epsilon, sigma, epsilon/k_B), real (kcal/mol, angstrom, K), "
            "metal (eV, angstrom, K) (and 2 more)",
        ),
    ],
)
def test_bad_files(read, content, message):
    assert complaint(read, content) == message


def test_huge_numbers_are_refused_without_being_printed(read):
    assert complaint(read, GOOD.replace("[4,", "[1" + "0" * 5000 + ",")).startswith("s.yaml:5: crystal.repeats[0]: ")
    assert complaint(config.read, {**yaml.safe_load(GOOD), "temperature": 10**5000}).startswith("system: temperature: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    (),
    *[(key,) for key in [*KEYS.split(", "), "other"]],
    *[("potential", key) for key in ("kind", "preset", "cutoff", "shift", "other")],
    *[("crystal", key) for key in ("lattice", "repeats", "other")],
    *[("estimate", key) for key in ("bridge", "flow", "seed", "estimator", "other")],
    *[("estimate", "flow", key) for key in ("checkpoint", "architecture", "training", "width", "other")],
    *[("estimate", "flow", "training", key) for key in ("loss", "max_steps", "batch_size", "other")],
]


@given(place=st.sampled_from(PLACES), value=JSON)
@settings(deadline=None, max_examples=300, derandomize=True)
def test_nothing_but_input_errors_on_one_line(place, value):
    values = config.read("mw_cubic_64")[2].resolved()
    if "flow" in place[:-1]:
        values["estimate"]["flow"] = {"architecture": "residual", "training": {}}
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    if place:
        inner[place[-1]] = value
    try:
        config.read(value if not place and isinstance(value, dict) else values)
    except InputError as error:
        assert str(error).isprintable()


def test_paths_that_are_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    assert complaint(config.read, "nothing.yaml") == "nothing.yaml: no such file"
    assert complaint(config.read, "folder.yaml") == "folder.yaml: is a directory; give the system.yaml in it"
    assert complaint(config.read, Path("mw_cubic_64")) == (
        "mw_cubic_64: no such file; a system called mw_cubic_64 ships with freeflow"
    )
    assert (
        complaint(config.read, "a\0b") == "no file and no shipped system called 'a\\x00b'; 'freeflow systems' lists "
        "what ships"
    )
    assert complaint(config.read, "mw_cubc_64").endswith("'mw_cubc_64'; did you mean mw_cubic_64?")
    assert complaint(config.read, "x" * 300).startswith("no file and no shipped system")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(GOOD)
    path.chmod(0)
    assert complaint(config.read, path) == f"{path}: cannot be read: Permission denied"


@pytest.mark.parametrize("number", ["1e-4", "1.e-4", "1E-4", "+1e-04", ".1e-3", "0.0001"])
def test_every_spelling_of_a_number_is_a_number(read, number):
    assert read(GOOD.replace("1e-4", number)).estimate.target_error == 1e-4


def test_whole_numbers_pass_for_floats_and_defaults_are_filled_in(read):
    section = read("\ufeff" + GOOD.replace("2.0", "2E0").replace("1.28", "1"))
    assert section.temperature == 2.0 and section.crystal.number_density == 1.0
    assert section.potential.parameters() == {"epsilon": 1.0, "sigma": 1.0, "cutoff": 2.7, "shift": True}
    assert section.resolved_wavelength == 1.0
    assert section.unit_style.boltzmann == 1.0
    assert section.estimate.plan() == Plan()


def test_no_bridge(read):
    assert read(GOOD + "  bridge: null\n").estimate.plan().bridge is None
    assert read(GOOD + "  bridge: {stages: 12}\n").estimate.plan().bridge == 12


def test_flows(read, tmp_path):
    def flow(text):
        return read(GOOD + f"  flow: {text}\n").estimate.plan(Path("/folder")).flow

    assert flow("null") is None
    assert flow("{checkpoint: shipped}") == FlowPlan(checkpoint="shipped")
    assert flow("{checkpoint: runs/a}") == FlowPlan(checkpoint="/folder/runs/a")
    assert flow("{checkpoint: /runs/a}") == FlowPlan(checkpoint="/runs/a")
    assert flow("{architecture: residual}") == FlowPlan(architecture="residual")
    assert flow("{architecture: atomic_solids, n_layers: 3, training: {max_minutes: 5}}") == FlowPlan(
        architecture="atomic_solids", options={"n_layers": 3}, training=TrainingPlan(max_minutes=5.0)
    )


def test_flows_in_resolved_values(tmp_path):
    text = GOOD + "  flow: {architecture: atomic_solids, width: 8}\n"
    (tmp_path / "s.yaml").write_text(text)
    system = config.load(tmp_path / "s.yaml")
    flow = system.config["estimate"]["flow"]
    assert flow == system.plan.flow.values()
    assert (flow["width"], flow["training"]["max_steps"], "n_layers" in flow) == (8, None, False)
    assert config.read(system.config)[2].resolved() == system.config
    (tmp_path / "s.yaml").write_text(GOOD + "  flow: {checkpoint: a}\n")
    system = config.load(tmp_path / "s.yaml")
    assert system.config["estimate"]["flow"] == {"checkpoint": str(tmp_path / "a")} == system.plan.flow.values()


@pytest.mark.parametrize("name", ["atomic_solids", "residual"])
def test_options_are_those_of_the_builders(name):
    wanted = [
        key
        for key, parameter in inspect.signature(getattr(flows, name)).parameters.items()
        if parameter.default is not parameter.empty
    ]
    section = {"residual": config.ResidualSection, "atomic_solids": config.AtomicSolidsSection}[name]
    assert sorted(wanted) == sorted(set(section.model_fields) - {"architecture", "training"})


def test_presets_can_be_changed_in_part(read):
    potential = "{kind: stillinger_weber, preset: silicon, lambda: 25}"
    section = read(GOOD.replace("{" + LJ + "}", potential).replace("units: lj", "units: metal"))
    preset = {key: value for key, value in config.STILLINGER_WEBER_PRESETS["silicon"].items() if key != "units"}
    assert section.potential.parameters() == {**preset, "lambda": 25.0}
    assert section.resolved_wavelength == 2.0951


def test_sections_are_frozen(read):
    with pytest.raises(ValueError, match="frozen"):
        read(GOOD).temperature = 3.0


def test_mappings_are_checked_like_files():
    values = yaml.safe_load(GOOD)
    values["estimate"]["target_error"] = 1e-4
    assert config.read(values)[2].name == "test"
    message = complaint(config.read, {**values, "temperatur": 1.0})
    assert message == "system: temperatur: unknown key; did you mean temperature?"


def test_resolved_values_read_back_as_themselves(read):
    names = [system.name for system in config.shipped()]
    for source in [*names, config.read({**yaml.safe_load(GOOD), "name": "1e-4", "estimate": {"bridge": None}})[2]]:
        section = config.read(source)[2] if isinstance(source, str) else source
        values = section.resolved()
        assert config.read(values)[2].resolved() == values
        assert read(config.dump(values)).resolved() == values


# --------------------------------------------------------------------------- shipped systems

PUBLISHED = {  # REFERENCE: Wirnsberger et al., Mach. Learn.: Sci. Technol. 3, 025009 (2022)
    "lj_fcc_32": (None, None),
    "lj_fcc_256": (3.10798, 9e-5),
    "lj_fcc_500": (3.12262, 1e-4),
    "mw_cubic_8": (-25.8652, 3e-4),
    "mw_cubic_64": (-25.16306, 2e-4),
    "mw_cubic_216": (-25.08234, 5e-5),
    "mw_cubic_512": (-25.06156, 3e-5),
    "mw_cubic_1000": (None, None),
    "mw_cubic_8000": (None, None),
    "mw_hexagonal_64": (-25.18687, 2.6e-4),
    "mw_hexagonal_216": (-25.08975, 1.4e-4),
    "mw_hexagonal_512": (-25.0648, 4e-5),
    "silicon_diamond_64": (None, None),
}
ATOMS_PER_CELL = {"fcc": 4, "diamond": 8, "hexagonal_ice": 8}


def test_shipped_systems_and_their_published_values():
    *shipped, solution = config.shipped()
    assert (solution.name, solution.delta_f, solution.beta_f_per_atom) == ("solvation_wca", 33.4468, None)
    assert {s.name: (s.beta_f_per_atom, s.std_error) for s in shipped} == PUBLISHED
    assert [s.name for s in shipped] == list(PUBLISHED)  # small ones first
    assert all(s.description and (s.source or s.beta_f_per_atom is None) for s in shipped)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_files_are_named_after_their_content(name):
    section = config.read(name)[2]
    first, second, third = section.crystal.repeats
    assert section.name == name
    assert name.endswith(f"_{first * second * third * ATOMS_PER_CELL[section.crystal.lattice]}")
    assert section.potential.nearest_image_only == (name in {"mw_cubic_8", "lj_fcc_32"})


def test_the_folder_beside_the_code_comes_first(tmp_path, monkeypatch):
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "only.yaml").write_text("# Only one\n" + GOOD)
    monkeypatch.setattr(config.files, "__file__", str(tmp_path / "config" / "files.py"))
    assert [(s.name, s.description) for s in config.shipped()] == [("only", "Only one")]


# --------------------------------------------------------------------------- from file to system


def test_load_makes_the_system_that_the_file_describes():
    system = config.load("mw_cubic_8")
    assert (system.name, system.n_atoms, system.units.name) == ("mw_cubic_8", 8, "real")
    assert system.thermal_wavelength == 2.3925 and system.nearest_image_only
    assert system.plan == Plan(target_error=1e-4)
    assert system.published == Published(-25.8652, 3e-4, "Wirnsberger et al. 2022, flow")
    assert system.crystal.n_atoms / system.crystal.volume == pytest.approx(0.033567184, rel=1e-12)
    assert system.config == config.read("mw_cubic_8")[2].resolved()


def test_physics_level_problems_name_the_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(GOOD.replace("[4, 4, 4]", "[2, 2, 2]"))
    assert complaint(config.load, path).startswith(f"{path}: potential.cutoff: ")


def test_the_kind_of_error_survives(monkeypatch):
    def unstable(**_):
        raise UnstableCrystalError("2 imaginary modes")

    monkeypatch.setattr("freeflow.crystals.crystal_system", unstable)
    with pytest.raises(UnstableCrystalError, match=r"^system: 2 imaginary modes$"):
        config.load(config.read("mw_cubic_8")[2].resolved())


def test_structure_files_are_found_beside_the_system_file(tmp_path, monkeypatch):
    crystal = config.load("mw_cubic_64").crystal
    seen = []

    def structure_crystal(*arguments):
        seen.append(arguments)
        return crystal

    folder = tmp_path / "inside"
    folder.mkdir()
    text = GOOD.replace(CRYSTAL, "structure: {file: a.cif, repeats: [1, 2, 3]}\n")
    (folder / "s.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("freeflow.crystals.structure_crystal", structure_crystal)
    system = config.load("inside/s.yaml")
    assert system.crystal is crystal
    assert seen == [(Path("inside/a.cif"), (1, 2, 3))]
    assert system.config["structure"] == {"file": str(folder / "a.cif"), "repeats": [1, 2, 3]}


def test_a_missing_structure_file_is_one_line(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(GOOD.replace(CRYSTAL, "structure: {file: nowhere.cif}\n"))
    message = complaint(config.load, path)
    assert message.startswith(f"{path}: structure.file: ") and "nowhere.cif" in message


# --------------------------------------------------------------------------- changed plans


def test_revised_plans():
    plan = config.revise(Plan(), seed=7, bridge=None, target_error=3)
    assert plan == dataclasses.replace(Plan(), seed=7, bridge=None, target_error=3.0)
    assert config.revise(plan, bridge=40).bridge == 40
    with_flow = config.revise(plan, flow={"architecture": "residual", "training": {"max_steps": 9}})
    assert with_flow.flow == FlowPlan(architecture="residual", training=TrainingPlan(max_steps=9))
    assert config.revise(with_flow, seed=8).flow == with_flow.flow
    assert config.revise(with_flow, flow=None).flow is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_error": -1.0}, "target_error: must be greater than 0, got -1.0"),
        ({"max_samples": 1}, "max_samples: must be at least 2, got 1"),
        ({"seed": 2**32}, "seed: must be at most 4294967295, got 4294967296"),
        ({"seeds": 1}, "seeds: unknown key; did you mean seed?"),
        ({"flow": {"checkpoint": ""}}, "flow.checkpoint: expected one line of printable text, got ''"),
        (
            {"flow": {"architecture": "residual", "training": {"max_steps": 0}}},
            "flow.training.max_steps: must be at least 1, got 0",
        ),
        ({"bridge": "fast"}, "bridge.stages: expected auto or a whole number from 1 to 1000000, got 'fast'"),
    ],
)
def test_impossible_plans(changes, message):
    assert complaint(lambda: config.revise(Plan(), **changes)) == message


def test_importing_config_does_not_start_jax():
    code = "import sys, freeflow.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("units", "preset", "pressure", "value"),
    [("real", "mw", "1 kbar", 1e8 / 101325), ("real", "mw", "2.5", 2.5), ("metal", "silicon", "1.5 GPa", 15000.0)],
)
def test_pressures_may_have_a_unit(read, units, preset, pressure, value):
    text = f"""
name: pressed
units: {units}
temperature: 200
pressure: {pressure}
potential: {{kind: stillinger_weber, preset: {preset}}}
crystal: {{lattice: diamond, repeats: [2, 2, 2], number_density: 0.033}}
"""
    section = read(text)
    assert section.pressure == pytest.approx(value)
    assert section.cell_motion == "isotropic"
    resolved = section.resolved()
    assert resolved["pressure"] == pytest.approx(value) and resolved["cell_motion"] == "isotropic"


def test_flows_refuse_a_pressure(read):
    key = "flow: {checkpoint: shipped}"
    text = GOOD.replace("name: test", "name: test\npressure: 1", 1).replace("estimate:", f"estimate:\n  {key}", 1)
    message = "estimate.flow: for crystals in a fixed cell only; leave it out, or the pressure"
    assert complaint(read, text).endswith(message)
