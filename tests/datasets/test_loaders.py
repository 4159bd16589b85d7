import socket
import subprocess
import sys

import numpy as np
import pytest

from stochproc import datasets
from stochproc.datasets import _bunch

TABLES = {
    "digits": (1797, 64),
    "diabetes": (442, 10),
    "star98": (303, 12),
    "breast_cancer": (569, 30),
    "wine": (178, 13),
    "iris": (150, 4),
}
SERIES = {
    "nile": ("statsmodels", (100,), 0),
    "co2": ("statsmodels", (2284,), 59),
    "sunspots": ("statsmodels", (309,), 0),
    "elnino": ("statsmodels", (732,), 0),
    "macrodata": ("statsmodels", (203, 12), 0),
    "sp500": ("arch", (5031, 6), 0),
    "sp500_volatility": ("arch", (5031,), 0),
    "nasdaq": ("arch", (5031, 6), 0),
    "vix": ("arch", (1305,), 46),
    "wti": ("arch", (8611,), 290),
    "crude": ("arch", (393, 2), 0),
    "bond_yields": ("arch", (1200, 2), 0),
    "core_cpi": ("arch", (743,), 0),
    "french_factors": ("arch", (1109, 4), 0),
}
TENSORS = {
    "il2": ((13, 4, 12, 8), 192),
    "covid19_serology": ((438, 6, 11), 0),
    "kinetic": ((64, 12, 10, 60), 1754),
    "indian_pines": ((145, 145, 200), 0),
}
PACKAGES = {name: package for name, (package, _, _) in SERIES.items()} | dict.fromkeys(TENSORS, "tensorly")
PACKAGES["star98"] = "statsmodels"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("a loader went to the network")

    monkeypatch.setattr(socket, "socket", refuse)


def load(name, **options):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return getattr(datasets, f"load_{name}")(**options)


def test_every_loader_is_tested():
    loaders = {name[5:] for name in datasets.__all__ if name.startswith("load_")}
    assert loaders == {*TABLES, *SERIES, *TENSORS, "sample_images"}


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_their_documented_shape(name, no_network):
    bunch = load(name)
    X, y = load(name, return_X_y=True)
    assert bunch.data.shape == X.shape == TABLES[name]
    assert len(bunch.feature_names) == X.shape[1]
    np.testing.assert_array_equal(bunch.target, y)
    assert np.isfinite(X).all()
    assert all(word in bunch.DESCR for word in ("Units:", "Missing values: none", "Licence:"))


def test_the_target_of_star98_is_a_percentage_of_few_decimals():
    bunch = load("star98")
    assert 0 < bunch.target.min() < bunch.target.max() < 100
    # The first district has 452 pupils above the median and 355 below it.
    assert bunch.target[0] == pytest.approx(100 * 452 / 807)
    assert not any("_" in name for name in bunch.feature_names)


def test_options_of_tables_are_passed_on():
    assert set(load("digits", n_class=3).target) == {0, 1, 2}
    assert load("diabetes", scaled=False).data[:, 0].max() == 79.0


def test_images_are_bytes_and_floats_of_the_same_picture(no_network):
    bunch = load("sample_images")
    assert bunch.names == ["china", "flower"]
    np.testing.assert_array_equal(np.rint(bunch.data * 255).astype(np.uint8), bunch.images)
    assert "creative commons" in bunch.DESCR


@pytest.mark.parametrize("name", SERIES)
def test_series_have_their_documented_shape_and_gaps(name, no_network):
    _, shape, n_missing = SERIES[name]
    bunch = load(name)
    assert bunch.target.shape == shape
    assert bunch.times.shape == shape[:1]
    assert (np.diff(bunch.times) > 0).all()
    assert np.isfinite(bunch.times).all()
    assert np.isnan(bunch.target).sum() == n_missing
    assert bunch.target.dtype == bunch.times.dtype == np.float64
    assert len(bunch.feature_names) == (12 if name == "elnino" else shape[1] if len(shape) > 1 else 1)
    assert all(word in bunch.DESCR for word in ("Origin:", "Units:", "Missing values:", "Licence:"))
    assert ("NaN" in bunch.DESCR) == (n_missing > 0)
    if "dates" in bunch:
        assert bunch.dates.dtype == np.dtype("datetime64[D]")
        assert (np.diff(bunch.dates) > np.timedelta64(0)).all()


@pytest.mark.parametrize("name", SERIES)
def test_X_y_of_a_series_leaves_out_the_gaps(name):
    _, shape, n_missing = SERIES[name]
    X, y = load(name, return_X_y=True)
    assert X.shape == (shape[0] - n_missing, 1)
    assert y.shape == (shape[0] - n_missing, *shape[1:])
    assert np.isfinite(y).all()


def test_loaded_arrays_are_not_shared_between_calls():
    first = load("nile")
    first.target[:] = 0.0
    assert load("nile").target.mean() == 919.35


def test_first_and_last_dates_of_series():
    assert str(load("co2").dates[0]) == "1958-03-29"
    assert load("co2").times[0] == 1958 + 87 / 365
    assert [str(d) for d in load("french_factors").dates[[0, -1]]] == ["1926-07-01", "2018-11-01"]
    assert load("macrodata").times[[0, -1]].tolist() == [1959.0, 2009.5]


def test_elnino_row_by_row_is_its_table():
    bunch = load("elnino")
    np.testing.assert_array_equal(bunch.data.ravel(), bunch.target)
    assert bunch.times[13] == pytest.approx(1951 + 1.5 / 12, abs=1e-9)
    assert bunch.feature_names[0] == "Jan"


def test_decimal_years_know_leap_years():
    dates = np.array(["2000-01-01", "2000-07-01", "2001-07-01", "1969-12-31"], dtype="datetime64[D]")
    expected = [2000.0, 2000 + 182 / 366, 2001 + 181 / 365, 1969 + 364 / 365]
    np.testing.assert_allclose(_bunch.decimal_years(dates), expected, rtol=1e-15)


def test_parkinson_volatility_agrees_with_the_returns_and_is_rough():
    bunch, prices = load("sp500_volatility"), load("sp500")
    np.testing.assert_allclose(np.exp(2 * bunch.target), bunch.variance, rtol=1e-12)
    # The range leaves out the night; squared returns from close to close have heavier noise: a factor 2 apart.
    returns = np.diff(np.log(prices.target[:, prices.feature_names.index("close")]))
    assert 0.5 < bunch.variance.mean() / returns.var() < 1.1
    lags = np.array([1, 2, 4, 8, 16, 32])
    variogram = [np.mean((bunch.target[lag:] - bunch.target[:-lag]) ** 2) for lag in lags]
    hurst = np.polyfit(np.log(lags), np.log(variogram), 1)[0] / 2
    assert 0.03 < hurst < 0.15


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_have_coordinates_for_every_mode(name, no_network):
    shape, n_missing = TENSORS[name]
    bunch = load(name)
    assert bunch.tensor.shape == shape
    assert np.isnan(bunch.tensor).sum() == n_missing
    assert len(bunch.mode_names) == len(shape)
    assert tuple(len(c) for c in bunch.coordinates) == shape
    assert [c.dtype.kind for c in bunch.coordinates] == ["f" if c else "U" for c in bunch.continuous]
    assert all(word in bunch.DESCR for word in ("Origin:", "Units:", "Missing values:", "Licence:"))


def test_special_fields_of_tensors():
    il2 = load("il2")
    gaps = np.isnan(il2.tensor).all((2, 3))
    assert np.argwhere(gaps).tolist() == [[3, 3], [4, 3]]
    assert il2.continuous == [False, True, True, False]
    assert set(load("covid19_serology").target) == {"Negative", "Mild", "Moderate", "Severe", "Deceased"}
    assert load("kinetic").outliers.max() < 64
    assert set(np.unique(load("indian_pines").target)) == set(range(17))


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_package_is_named_with_the_remedy(name, monkeypatch):
    package = PACKAGES[name]
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as error:
        getattr(datasets, f"load_{name}")()
    assert str(error.value) == f'load_{name} needs {package}; install it with pip install "stochproc[data]"'


def test_package_that_is_itself_incomplete_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import something_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_absent"):
        _bunch.need("half_installed", "load_nothing")


@pytest.mark.slow
def test_importing_datasets_loads_none_of_the_packages():
    late = ("sklearn", "statsmodels", "arch", "tensorly", "pandas")
    code = f"import sys, stochproc.datasets; print(*[m for m in {late} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.split() == []
