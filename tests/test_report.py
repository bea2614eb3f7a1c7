"""Reports: pages that parse and tell the numbers, and CSV files that hold what is drawn."""

import csv
import math
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from fake_results import fake_result, fake_system
from scipy.special import expit

from freeflow import estimators
from freeflow.comparison import Check, Comparison, Distribution
from freeflow.errors import InputError
from freeflow.observables import Average
from freeflow.observers import Profile
from freeflow.report import drawing, markup, of_estimates, write_comparison_report, write_estimate_report
from freeflow.result import format_with_error
from freeflow.trajectories import EnergyComparison, FrameSeries
from freeflow.types import Plan, Published, Work
from freeflow.units import unit_style

NAN, INF = math.nan, math.inf
CONSTANT = -1613.25  # the part of beta F that is not work [kT]


class Page(HTMLParser):
    """Follows a page's elements: each must be closed in its turn, and nothing may come from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.ids, self.links, self.words, self.labels = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))
        assert not {"script", "link", "iframe", "img", "object"} & set(self.names)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value)
            if name == "aria-label":
                self.labels.append(value)
            if name.endswith("href"):
                assert value.startswith(("#", "./"))
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and "svg" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read_page(files):
    text = files[0].read_text()
    assert len(text) < 2e6
    assert "http" not in text.replace('xmlns="http://www.w3.org', "")
    page = Page(text)
    assert [link for link in page.links if link.endswith(".csv")] == [f"./{file.name}" for file in files[1:]]
    assert page.names.count("svg") == len(files) - 1 == len(page.labels)
    return page


def read_csv(files, name):
    (file,) = [file for file in files if file.name.endswith(f".{name}.csv")]
    rows = list(csv.DictReader(file.open()))
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {
        key: column if key == "side" else np.array([float(cell or "nan") for cell in column])
        for key, column in columns.items()
    }


def crooks_work(n_forward, n_reverse, delta_f=3.0, variance=1.0, seed=0):
    """Gaussian work of a process and its reverse that obey Crooks' theorem."""
    rng = np.random.default_rng(seed)
    spread = math.sqrt(variance)
    forward = rng.normal(delta_f + variance / 2, spread, n_forward)
    return Work(forward, -rng.normal(delta_f - variance / 2, spread, n_reverse))


def result_of(work, estimator="fep", inefficiency=1.0, **changes):
    """A result with the answer that the estimator gives, or none where it gives none."""
    try:
        answer = estimators.bar(work, (1.0, inefficiency)) if estimator == "bar" else estimators.fep(work)
        value, error, ess = (float(x) for x in answer)
    except InputError:
        value = error = ess = NAN
    if not math.isfinite(value):
        value = error = NAN
    changes = {
        "estimator": estimator,
        "work": work,
        "delta_f": value,
        "delta_f_std_error": error,
        "components": {"lattice energy": CONSTANT, "work": value},
        "beta_f": CONSTANT + value,
        "beta_f_std_error": error,
        "n_samples": len(work.forward),
        "ess_fraction": ess,
    } | changes
    return fake_result(**changes)


# --------------------------------------------------------------------------- estimates


def test_estimate_page_tells_the_result(tmp_path):
    result = result_of(crooks_work(1000, 0), warnings=("one", "two"))
    files = write_estimate_report(result, tmp_path / "run.html")
    assert [file.name for file in files] == ["run.html", "run.work.csv", "run.weights.csv", "run.running.csv"]
    page = read_page(files)
    for text in (
        "mw_cubic_64",
        "diamond, 2 x 2 x 2 cells, 64 atoms",
        f"βF / N = {format_with_error(result.beta_f_per_atom, result.beta_f_per_atom_std_error)} kT per atom",
        result.verdict,
        "Wirnsberger et al. 2022, MBAR",
        "0.0019872067 kcal/mol/K",
        "1 000 samples forward",
        "one",
        "two",
        "jax 0.10.1",
        '"name": "mw_cubic_64"',
    ):
        assert text in page.text
    assert 'class="verdict good"' in files[0].read_text()


def test_verdict_has_its_colour(tmp_path):
    result = result_of(crooks_work(20, 0), status="unreliable", warnings=("bad luck",))
    text = write_estimate_report(result, tmp_path / "run.html")[0].read_text()
    assert 'class="verdict poor"' in text
    assert "Not reliable: bad luck" in Page(text).text


def test_work_csv_is_the_histogram(tmp_path):
    work = crooks_work(2000, 500)
    files = write_estimate_report(result_of(work, "bar"), tmp_path / "run.html")
    table = read_csv(files, "work")
    edges = np.append(table["low [kT]"], table["high [kT]"][-1])
    width = np.diff(edges)
    for name, x in (("forward", work.forward), ("reverse", -work.reverse)):
        counts, _ = np.histogram(x, edges)
        assert counts.sum() >= 0.99 * len(x)
        np.testing.assert_allclose(table[f"{name} density [1/kT]"], counts / len(x) / width)
        np.testing.assert_allclose(table[f"{name} standard error [1/kT]"], np.sqrt(counts) / len(x) / width)


def test_samples_that_are_not_drawn_are_counted(tmp_path):
    forward = np.concatenate([crooks_work(500, 0).forward, [1e9, INF, INF, NAN]])
    page = read_page(write_estimate_report(result_of(Work(forward, np.zeros(0))), tmp_path / "run.html"))
    assert "2 with infinite work (an atom left its site) not shown" in page.text
    assert "1 without a valid work value" in page.text
    assert "1 beyond the axis" in page.text


def test_weights_csv_is_their_cumulated_share(tmp_path):
    work = crooks_work(5000, 0)
    table = read_csv(write_estimate_report(result_of(work), tmp_path / "run.html"), "weights")
    weights = np.sort(np.exp(-work.forward))[::-1]
    for share, weight in zip(table["share of samples"], table["share of weight"], strict=True):
        n = round(share * 5000)
        assert share == n / 5000
        assert weight == pytest.approx(weights[:n].sum() / weights.sum())
    assert table["share of samples"][[0, -1]].tolist() == [1 / 5000, 1.0]


def test_weights_of_bar_are_its_fermi_functions(tmp_path):
    work = crooks_work(800, 200)
    result = result_of(work, "bar")
    table = read_csv(write_estimate_report(result, tmp_path / "run.html"), "weights")
    shift = result.delta_f - math.log(4)
    for name, w in (("forward", expit(shift - work.forward)), ("reverse", expit(-shift - work.reverse))):
        first = table["side"].index(name)
        assert table["share of weight"][first] == pytest.approx(w.max() / w.sum())


@pytest.mark.parametrize("estimator", ["fep", "bar"])
def test_running_estimate_is_that_of_parts(tmp_path, estimator):
    work = crooks_work(400, 200)
    result = result_of(work, estimator)
    table = read_csv(write_estimate_report(result, tmp_path / "run.html"), "running")
    assert table["share"][-1] == 1.0
    for part in ("first", "last"):
        assert table[f"{part} samples [kT per atom]"][-1] == pytest.approx(result.beta_f_per_atom, abs=1e-10)
        assert table[f"{part} samples standard error"][-1] == pytest.approx(result.beta_f_per_atom_std_error)
    row = table["share"].tolist().index(0.25)
    assert table["samples forward"][row] == 100
    for part, some in (
        ("first", Work(work.forward[:100], work.reverse[:50])),
        ("last", Work(work.forward[300:], work.reverse[150:])),
    ):
        answer = estimators.ESTIMATORS[estimator](some)
        expected = (CONSTANT + float(answer.delta_f)) / 64
        assert table[f"{part} samples [kT per atom]"][row] == pytest.approx(expected, abs=1e-10)
        assert table[f"{part} samples standard error"][row] == pytest.approx(float(answer.std_error) / 64)


def test_running_estimate_of_correlated_work_ends_at_the_result(tmp_path):
    result = result_of(crooks_work(400, 400), "bar", inefficiency=3.7)
    assert of_estimates.reverse_inefficiency(result) == pytest.approx(3.7, rel=1e-4)
    table = read_csv(write_estimate_report(result, tmp_path / "run.html"), "running")
    assert table["first samples standard error"][-1] == pytest.approx(result.beta_f_per_atom_std_error)
    assert table["last samples [kT per atom]"][-1] == pytest.approx(result.beta_f_per_atom, abs=1e-8)


def test_overlap_matrix_of_known_states():
    same = Work(np.zeros(30), np.zeros(10))
    np.testing.assert_allclose(of_estimates._overlap_matrix(same, 0.0), [[0.75, 0.25], [0.75, 0.25]])
    apart = Work(np.full(5, 50.0), np.full(5, 50.0))
    np.testing.assert_allclose(of_estimates._overlap_matrix(apart, 0.0), np.eye(2), atol=1e-12)
    work = crooks_work(300, 100, variance=4.0)
    matrix = of_estimates._overlap_matrix(work, float(estimators.bar(work).delta_f))
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    overlap = estimators.overlap(work)
    assert overlap is not None
    assert 1 - np.linalg.det(matrix) == pytest.approx(overlap)


@pytest.mark.parametrize(("contradiction", "fits"), [(0.0, True), (1.0, False)])
def test_overlap_curves_are_the_same_where_crooks_holds(tmp_path, contradiction, fits):
    # chi^2 of about 25 bins; its 1 - 1e-6 quantile is below 80. A contradiction shifts the curves by a deviation.
    work = crooks_work(4000, 2000, seed=1)
    work = Work(work.forward, work.reverse + contradiction)
    table = read_csv(write_estimate_report(result_of(work, "bar"), tmp_path / "run.html"), "overlap")
    sides = ("reference", "crystal")
    value = [table[f"{side} density [1/kT]"] for side in sides]
    error = [table[f"{side} standard error [1/kT]"] for side in sides]
    some = (value[0] > 0.02) & (value[1] > 0.02)
    assert some.sum() > 10
    z = (value[0] - value[1])[some] / np.hypot(*error)[some]
    assert (np.sum(z**2) < 80) == fits
    assert np.sum(value[0] * (table["high [kT]"] - table["low [kT]"])) == pytest.approx(1, abs=0.01)


def test_overlap_csv_is_the_histogram_of_fermi_weights(tmp_path):
    work, g = crooks_work(600, 300), 2.5
    result = result_of(work, "bar", inefficiency=g)
    table = read_csv(write_estimate_report(result, tmp_path / "run.html"), "overlap")
    edges = np.append(table["low [kT]"], table["high [kT]"][-1])
    shift = result.delta_f - math.log(600 / (300 / g))
    for name, x, w, spread in (
        ("reference", work.forward, expit(shift - work.forward), 1.0),
        ("crystal", -work.reverse, expit(-work.reverse - shift), math.sqrt(g)),
    ):
        scale = w.sum() * np.diff(edges)
        sums, squares = (np.histogram(x, edges, weights=w**power)[0] for power in (1, 2))
        np.testing.assert_allclose(table[f"{name} density [1/kT]"], sums / scale, rtol=1e-4)
        np.testing.assert_allclose(table[f"{name} standard error [1/kT]"], spread * np.sqrt(squares) / scale, rtol=1e-4)


@pytest.mark.parametrize(
    ("estimator", "forward", "reverse"),
    [
        ("fep", [], []),
        ("fep", [1.5], []),
        ("bar", [1.5], [-1.0]),
        ("bar", [1.5, 2.0], []),
        ("bar", [1.5, 2.0], [-1.0, -1.0, 0.5]),
        ("fep", [1.0, NAN, 2.0, 3.0], []),
        ("bar", [1.0, 2.0], [NAN, 1.0]),
        ("fep", [1.0, -INF, 2.0], [1.0]),
        ("bar", [1.0, -INF, 2.0], [1.0]),
        ("fep", [INF] * 6, []),
        ("bar", [INF] * 6, [INF] * 7),
        ("fep", [1.0, 2.0, 3.0], [INF] * 7),
        ("bar", [1.0, 2.0, 3.0], [INF] * 7),
        ("bar", [3.0] * 50, [-3.0] * 50),
        ("fep", [1e200, -1e200, 1e200], []),
        ("bar", [1e17, 1e17, 1e17], [-1e17]),
        ("bar", [1.0, 1.1, 1.2], [90.0, 90.1, 90.2]),
    ],
)
def test_poor_results_make_a_page_too(tmp_path, estimator, forward, reverse):
    work = Work(np.array(forward, float), np.array(reverse, float))
    unknown = {"pareto_k": NAN, "largest_weight_share": NAN, "bootstrap_std_error": NAN, "drift_z": NAN}
    result = result_of(work, estimator, status="unreliable", **unknown)
    files = write_estimate_report(result, tmp_path / "run.html")
    page = read_page(files)
    assert (len(files) == 1) == ("There is nothing to draw" in page.text)
    if not np.isfinite(work.forward).any() and not np.isfinite(work.reverse).any():
        assert len(files) == 1


def test_many_samples_make_a_small_page(tmp_path):
    work = crooks_work(100_000, 0)
    files = write_estimate_report(result_of(work), tmp_path / "run.html")
    read_page(files)
    assert sum(file.stat().st_size for file in files) < 500_000


def test_profile_is_drawn(tmp_path):
    edges = np.linspace(0, 5, 41)
    values = np.sin(edges[1:]) ** 2
    result = result_of(crooks_work(50, 0), profile=Profile(edges, Average(values, np.full(40, 0.01))))
    table = read_csv(write_estimate_report(result, tmp_path / "run.html"), "rdf")
    assert table["model"].tolist() == values.tolist()
    assert table["high [angstrom]"].tolist() == edges[1:].tolist()


# --------------------------------------------------------------------------- comparisons


def average(mean, std_error):
    return Average(np.array(mean), np.array(std_error))


def comparison_of(tmp_path, **changes):
    """Made-up samples of a model and frames of a trajectory that agree."""
    rng = np.random.default_rng(3)
    n, n_atoms = 5000, 64
    system = fake_system(name="ice", plan=Plan(estimator="bar"))
    result = result_of(crooks_work(300, 200), "bar", system=system)
    n_off = np.zeros(n, int)
    n_off[[1000, 4000]] = 2
    energies = np.where(n_off > 0, INF, n_atoms * rng.normal(-11.2, 0.01, n))
    file_energies = energies / 23.060547830619
    file_energies[::2] = NAN
    series = FrameSeries(
        path=str(tmp_path / "md.dcd"),
        n_frames=n,
        energies=energies,
        file_energies=file_energies,
        mean_squared_displacements=rng.normal(0.1, 0.01, n),
        n_off=n_off,
        melted=np.zeros(n, bool),
        hopped=n_off > 0,
        resolution=1e-5,
        energy_comparison=EnergyComparison(2498, 1e-7, 1e-4, "eV", True, "energies are reproduced; they are in eV"),
        kept=np.arange(4),
        displacements=np.zeros((4, n_atoms, 3)),
    )
    edges = np.linspace(-11.25, -11.15, 21)
    density = np.exp(-0.5 * ((edges[1:] + 11.2) / 0.01) ** 2)
    distribution = Distribution(
        edges,
        model=Average(density, 0.1 * density),
        md=Average(1.1 * density, np.where(density > 0.1, 0.2, NAN)),
        model_mean=average(-11.2, 0.001),
        md_mean=average(-11.201, 0.002),
    )
    r = np.linspace(0, 5, 31)
    error = np.append(np.full(20, 0.02), np.full(10, NAN))
    profile = Profile(r, Average(np.full(30, 1.06), error), Average(np.full(30, 1.0), error))
    values = {
        "system": system,
        "plan": system.plan,
        "series": series,
        "start": 500,
        "inefficiency": 4.5,
        "result": result,
        "fep_per_atom": average(-25.16, 0.01),
        "energy": distribution,
        "displacement": distribution,
        "profile": profile,
        "checks": (
            Check("mean energy", "-11.2001(3)", "-11.2003(2)", "z = +0.6", 0.55, True),
            Check("mean squared displacement", "0.100(1)", "0.110(1)", "z = -7.1", 1.2e-12, False),
            Check("free energy", "-25.16(1)", "not estimable", "", NAN, None),
        ),
        "verdict": "disagree",
        "reason": "the displacements differ",
        "warnings": ("few frames",),
        "wall_seconds": {"total": 12.5, "reading": 3.0},
    }
    return Comparison(**{**values, **changes})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A comparison and the files of its report."""
    folder = tmp_path_factory.mktemp("comparison")
    comparison = comparison_of(folder)
    return comparison, write_comparison_report(comparison, folder / "both.html")


def test_comparison_page_tells_the_checks(written):
    comparison, files = written
    plots = ["energy", "rdf", "displacement", "series", "work", "running", "overlap", "file_energies"]
    assert [file.name for file in files] == ["both.html", *(f"both.{name}.csv" for name in plots)]
    page = read_page(files)
    for text in (
        "Disagree: the displacements differ",
        "few frames",
        "mean energy agree -11.2001(3) -11.2003(2) z = +0.6 0.55",
        "mean squared displacement disagree 0.100(1) 0.110(1) z = -7.1 1e-12",
        "free energy not told -25.16(1) not estimable",
        comparison.series.path,
        "frames 5000 0 melted, 2 with an atom off its site",
        "used 4498 from frame 500 on",
        "independent 1000 statistical inefficiency 4.5",
        "model samples 300",
        "positions 1e-05 angstrom",
        "wall time 12.5 s reading 3.0",
        "published -25.16306(20) Wirnsberger et al. 2022, MBAR",
        "energies are reproduced; they are in eV",
        "-25.160(10)",
    ):
        assert text in page.text


def test_comparison_csvs_hold_what_is_drawn(written):
    comparison, files = written
    table, energy = read_csv(files, "energy"), comparison.energy
    for name, average in (("model", energy.model), ("MD", energy.md)):
        np.testing.assert_array_equal(table[name], average.mean)
        np.testing.assert_array_equal(table[f"{name} standard error"], average.std_error)
    z = read_csv(files, "rdf")["difference in standard errors"]
    np.testing.assert_allclose(z[:20], 0.06 / math.hypot(0.02, 0.02))
    assert np.isnan(z[20:]).all()


def test_series_csv_keeps_extremes_and_unsound_frames(written):
    comparison, files = written
    series, table = comparison.series, read_csv(files, "series")
    frames = table["frame"].astype(int)
    assert len(frames) <= 2000
    assert frames[table["sound"] == 0].tolist() == [1000, 4000]
    energies = np.where(series.sound, series.energies, NAN) / 64
    np.testing.assert_array_equal(table["energy per atom [kcal/mol]"], energies[frames])
    for values in (energies, np.where(series.sound, series.mean_squared_displacements, NAN)):
        assert {np.nanargmin(values), np.nanargmax(values)} <= set(frames)


def test_file_energies_are_compared_in_the_systems_unit(written):
    comparison, files = written
    table = read_csv(files, "file_energies")
    assert np.abs(table["difference [kcal/mol]"]).max() < 1e-9
    np.testing.assert_allclose(table["in the file [kcal/mol]"], comparison.series.energies[table["frame"].astype(int)])
    assert set(table["frame"] % 2) == {1.0}  # every other frame has no energy in the file


def test_short_poor_trajectory_makes_a_page_too(tmp_path):
    comparison = comparison_of(tmp_path)
    series = comparison.series._replace(
        n_frames=1,
        energies=np.array([INF]),
        file_energies=np.array([NAN]),
        mean_squared_displacements=np.array([NAN]),
        n_off=np.array([3]),
        melted=np.array([True]),
        hopped=np.array([False]),
    )
    nothing = Average(np.full(30, NAN), np.full(30, NAN))
    distribution = comparison.energy._replace(
        md=Average(np.full(20, NAN), np.full(20, NAN)),
        md_mean=average(NAN, NAN),
    )
    poor = comparison_of(
        tmp_path,
        series=series,
        start=0,
        inefficiency=NAN,
        result=result_of(Work(np.full(9, INF), np.zeros(0)), "bar"),
        energy=distribution,
        displacement=distribution,
        profile=comparison.profile._replace(md=nothing),
        fep_per_atom=average(NAN, NAN),
        verdict="inconclusive",
        reason="there is nothing to compare",
        wall_seconds={},
    )
    page = read_page(write_comparison_report(poor, tmp_path / "both.html"))
    assert "Inconclusive: there is nothing to compare" in page.text


# --------------------------------------------------------------------------- the page itself


def test_text_from_the_user_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>&amp;\'"$x$'
    system = fake_system(
        name=evil, published=Published(-25.2, None, evil), units=unit_style("lj"), config={"name": evil, evil: [evil]}
    )
    result = result_of(crooks_work(50, 20), "bar", system=system, warnings=(evil,), provenance={"config": {evil: evil}})
    page = read_page(write_estimate_report(result, tmp_path / "run.html"))
    assert page.text.count(evil) == 3 + 1  # title, head, published, warnings; JSON escapes its quotes
    comparison = comparison_of(
        tmp_path,
        system=system,
        result=result,
        series=comparison_of(tmp_path).series._replace(path=evil),
        reason=evil,
        warnings=(evil,),
        checks=(Check(*(evil,) * 4, 0.1, True),),
        provenance={evil: evil},
    )
    page = read_page(write_comparison_report(comparison, tmp_path / "run.html"))
    assert page.text.count(evil) >= 10


def test_odd_file_names_are_linked(tmp_path):
    files = write_estimate_report(result_of(crooks_work(10, 0)), tmp_path / 'a "b"&#1?.c.html')
    assert [file.name for file in files][1] == 'a "b"&#1?.c.work.csv'
    assert "./a%20%22b%22%26%231%3F.c.work.csv" in Page(files[0].read_text()).links
    assert all(file.is_file() for file in files)


def test_a_page_that_is_no_file_has_no_neighbours(tmp_path):
    (tmp_path / "page").symlink_to("/dev/null")
    files = write_estimate_report(result_of(crooks_work(10, 0)), tmp_path / "page")
    assert files == [tmp_path / "page"]
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_the_users_style_does_not_matter_and_is_left_alone(tmp_path):
    result = result_of(crooks_work(30, 30), "bar")
    plain = write_estimate_report(result, tmp_path / "run.html")[0].read_bytes()
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "font.size": 30}):
        styled = write_estimate_report(result, tmp_path / "run.html")[0].read_bytes()
        assert matplotlib.rcParams["font.size"] == 30
    assert styled == plain


# --------------------------------------------------------------------------- pieces


def test_extremes_draw_the_same_curve():
    values = np.random.default_rng(0).normal(size=100_001)
    values[5000:9000] = NAN
    chosen = drawing.extremes(values, 500)
    assert len(chosen) <= 500
    assert np.all(np.diff(chosen) > 0)
    assert not np.isnan(values[chosen]).any()
    assert {int(np.nanargmin(values)), int(np.nanargmax(values))} <= set(chosen.tolist())
    assert drawing.extremes(np.arange(10.0)).tolist() == list(range(10))
    assert drawing.extremes(np.full(3000, NAN)).tolist() == []


def test_numbers_stand_at_their_points():
    assert markup._at_the_point(["-249.153", "0.157(3)", "12", "7(2)"]) == [
        "-249.153   ",
        "0.157(3)",
        "12       ",
        "7(2)    ",
    ]


def test_tables_put_numbers_right():
    text = markup.html_table([("a", "1.5", "x"), ("b", "-20.25(3)", "3 y")], ("name", "value", "note"))
    assert text.count('class="number"') == 3  # the head and two cells
    assert '<td class="number">1.5    </td>' in text
    assert "<td>3 y</td>" in text
