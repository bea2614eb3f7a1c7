"""The work as a table for alchemlyb and pymbar: both find the free energies that freeflow does."""

import math

import jax
import numpy as np
import pytest
from fake_results import fake_result

from freeflow.errors import FreeflowError, InputError
from freeflow.estimators import bar, fep, record
from freeflow.types import Work

pd = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def result():
    """Gaussian work of variance 2 that obeys Crooks' relation with delta_f = 3."""
    rng = np.random.default_rng(0)
    return fake_result(work=Work(rng.normal(4.0, math.sqrt(2), 800), rng.normal(-2.0, math.sqrt(2), 500)))


def read_csv(path):
    """As the manual says to read it."""
    table = pd.read_csv(path, index_col=[0, 1])
    table.columns = table.columns.astype(float)
    table.attrs |= {"temperature": 200.0, "energy_unit": "kT"}
    return table


@pytest.fixture(scope="module", params=["csv", "parquet"])
def table(request, result, tmp_path_factory):
    path = tmp_path_factory.mktemp("u_nk") / f"work.{request.param}"
    result.write_u_nk(path)
    if request.param == "csv":
        return read_csv(path)
    pytest.importorskip("pyarrow")
    from alchemlyb.parsing import parquet

    return parquet.extract_u_nk(path, T=200.0)


def test_the_table_holds_every_sample_as_it_is(result, table):
    assert list(table.columns) == [0.0, 1.0]
    assert list(table.index.names) == ["time", "fep-lambda"]
    states = table.index.get_level_values("fep-lambda")
    difference = table[1.0] - table[0.0]
    np.testing.assert_array_equal(difference[states == 0.0], result.work.forward)
    np.testing.assert_array_equal(-difference[states == 1.0], result.work.reverse)


@pytest.fixture
def as_pymbar_wants_jax():
    """The tests' own setting forbids what pymbar does, and pymbar switches all of JAX to 64 bits."""
    before = jax.config.jax_enable_x64
    with jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("as_pymbar_wants_jax")
def test_alchemlyb_agrees(result, table):
    estimators = pytest.importorskip("alchemlyb.estimators")
    ours = bar(result.work)
    for theirs in (estimators.BAR().fit(table), estimators.MBAR().fit(table)):
        assert theirs.delta_f_.loc[0.0, 1.0] == pytest.approx(float(ours.delta_f), abs=1e-5)
        assert theirs.d_delta_f_.loc[0.0, 1.0] == pytest.approx(float(ours.std_error), rel=0.02)


@pytest.mark.usefixtures("as_pymbar_wants_jax")
def test_pymbar_agrees(result, table):
    pymbar = pytest.importorskip("pymbar")
    states = table.index.get_level_values("fep-lambda")
    n_k = [int((states == state).sum()) for state in (0.0, 1.0)]
    found = pymbar.MBAR(table.to_numpy().T, n_k).compute_free_energy_differences()
    assert found["Delta_f"][0, 1] == pytest.approx(float(bar(result.work).delta_f), abs=1e-5)


def test_forward_work_alone_is_a_table_too(tmp_path):
    work = record(np.array([1.0, 2.5, math.inf]))
    result = fake_result(work=work)
    result.write_u_nk(tmp_path / "work.csv")
    table = read_csv(tmp_path / "work.csv")
    assert len(table) == 3
    assert float(fep(record(table[1.0].to_numpy())).delta_f) == float(fep(work).delta_f)


def test_parquet_without_its_libraries_says_what_to_install(result, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"install freeflow\[parquet\], or write .csv"):
        result.write_u_nk(tmp_path / "work.parquet")


def test_a_place_that_cannot_be_written(result, tmp_path):
    with pytest.raises(FreeflowError, match="cannot be written"):
        result.write_u_nk(tmp_path / "no" / "work.csv")
