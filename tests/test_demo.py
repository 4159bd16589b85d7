import html.parser
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.stats import norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from stochproc import __main__ as command_line
from stochproc.demo import discover, run_demo
from stochproc.demo._report import Lead, PartReport, Row, table_as_text
from stochproc.demo._scores import LEVELS, Forecast, GaussianForecaster, compare, forecast
from stochproc.demo.part_functional import MaskedDecomposition
from stochproc.demo.part_gp import RootTarget

GOOD = """
from matplotlib.figure import Figure
from stochproc.demo._report import Lead, Row
TITLE = "A part that <works>"
def run(context):
    context.note("split at random")
    figure = Figure()
    figure.subplots().plot([0, 1])
    context.save_figure(figure, "line", "a line")
    with context.optional("the rest"):
        import statsmodels
    return [
        Row("toy, 3 rows", "ours", "m", {"RMSE": 1.5, "seconds": 0.25, "own": 7.0}),
        Row("toy, 3 rows", "mean", "m", {"RMSE": 2.0, "seconds": float("nan")}, Lead(0.5, 0.1)),
    ]
"""
FAILING = """
import warnings
TITLE = "A part that fails"
def run(context):
    context.note("half of it was done")
    warnings.warn("twice", UserWarning)
    warnings.warn("twice", UserWarning)
    raise ZeroDivisionError("no good")
"""
NEEDS_DATA = """
TITLE = "A part that needs data"
def run(context):
    from stochproc.datasets import load_sunspots
    load_sunspots()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a package of parts out of their texts; its name is new each time, so that nothing is cached."""
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    for name in [n for n in sys.modules if n.startswith("statsmodels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)

    def make(**texts):
        name = f"parts_{tmp_path.name.replace('-', '_')}"
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        for part, text in texts.items():
            (folder / f"part_{part}.py").write_text(text)
        return name

    return make


def results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


class Links(html.parser.HTMLParser):
    """What a page would load or lead to."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "data", "action", "srcset")]


def check_page(folder):
    text = (folder / "index.html").read_text("utf-8")
    links = Links(text).found
    assert all((folder / link).is_file() for link in links)
    assert not any(sign in text for sign in ("http:", "https:", "url(", "@import", "<script", "<link"))
    return text, links


def test_the_family_of_gaussian_processes_is_found():
    assert "gp" in discover()


def test_a_failing_and_a_skipped_part_do_not_hide_the_others(package, tmp_path, capsys):
    code = run_demo(
        tmp_path / "out",
        package=package(broken=FAILING, good=GOOD, hungry=NEEDS_DATA),
        parts=["broken", "hungry", "good"],
    )
    assert code == 1
    by_name = {part["name"]: part for part in results(tmp_path / "out")["parts"]}
    assert {name: part["status"] for name, part in by_name.items()} == {
        "broken": "failed",
        "hungry": "skipped",
        "good": "ok",
    }
    assert by_name["broken"]["reason"] == "ZeroDivisionError: no good"
    assert by_name["broken"]["notes"] == ["half of it was done"]
    assert by_name["broken"]["warnings"] == ["2 x UserWarning: twice"]
    assert "ZeroDivisionError" in by_name["broken"]["traceback"]
    assert (
        by_name["hungry"]["reason"] == 'load_sunspots needs statsmodels; install it with pip install "stochproc[data]"'
    )

    out, err = capsys.readouterr()
    assert "[3/3] good" in err
    lines = out.splitlines()
    assert lines[0].split() == ["part", "data", "model", "unit", "RMSE", "own", "lead", "±", "s.e.", "seconds"]
    assert lines[2].split() == ["good", "toy,", "3", "rows", "ours", "m", "1.500", "7.000", "0.25"]
    assert lines[3].split() == ["mean", "m", "2.000", "+0.500", "±", "0.100", "ahead", "nan"]
    assert "- broken failed: ZeroDivisionError: no good" in lines
    assert any(line.startswith("- hungry skipped: load_sunspots needs statsmodels") for line in lines)
    assert any(line.startswith("- the rest skipped: ") for line in lines)


def test_the_page_shows_everything_and_loads_nothing_from_elsewhere(package, tmp_path):
    run_demo(tmp_path / "out", package=package(broken=FAILING, good=GOOD))
    text, links = check_page(tmp_path / "out")
    assert links == ["good_line.png"]
    for shown in ("A part that &lt;works&gt;", "split at random", "a line", "7.000", "Failed: ZeroDivisionError"):
        assert shown in text


def test_a_skipped_part_alone_is_no_failure(package, tmp_path):
    assert run_demo(tmp_path / "out", package=package(hungry=NEEDS_DATA)) == 0


def test_a_missing_package_that_is_not_optional_is_a_failure(package, tmp_path):
    name = package(broken="import no_such_package_anywhere")
    assert run_demo(tmp_path / "out", package=name) == 1
    assert "no_such_package_anywhere" in results(tmp_path / "out")["parts"][0]["reason"]


def test_numbers_that_are_not_finite_are_null_in_json(package, tmp_path):
    run_demo(tmp_path / "out", package=package(good=GOOD))
    first, second = results(tmp_path / "out")["parts"][0]["rows"]
    assert first["metrics"] == {"RMSE": 1.5, "seconds": 0.25, "own": 7.0}
    assert second["metrics"]["seconds"] is None
    assert second["lead"] == {"mean": 0.5, "error": 0.1}


def test_an_unknown_part_is_named_with_those_there_are(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"parts must be among .*gp.*; got 'nonsense'"):
        run_demo(tmp_path / "out", ["nonsense"])
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["demo", "--parts", "nonsense"])
    assert stopped.value.code == 2
    assert "no part 'nonsense'; there are: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert command_line.main(["demo", "--output", str(output)]) == 2
        out, err = capsys.readouterr()
        assert f"demo: cannot write to {output}: " in err
        assert "[1/" not in err
        assert not out


def test_rows_of_one_data_set_stand_together_in_the_table():
    rows = [Row(data, model, "m", {"RMSE": 1.0}) for data in ("a", "b") for model in ("x", "y")]
    lines = table_as_text([PartReport("one", rows=rows)]).splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("-")] == ["part", "one", "y", "one", "y"]


def test_a_lead_within_two_standard_errors_is_level():
    assert [Lead(m, 1.0).verdict for m in (-2.1, -2.0, 0.0, 2.0, 2.1)] == ["behind", "level", "level", "level", "ahead"]
    assert str(Lead(-0.0001, 0.01)) == "+0.000 ± 0.010 level"


def test_a_lead_is_the_mean_difference_with_its_standard_error():
    lead = compare(np.array([1.0, 2.0, 6.0]), np.array([0.0, 0.0, 0.0]))
    # Differences 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7.
    assert (lead.mean, lead.error) == pytest.approx((3.0, math.sqrt(7 / 3)))


def test_the_baseline_counts_its_white_noise_once():
    # Far from the data the law of a new observation is the prior: constant plus white noise, times the variance of y.
    X = np.linspace(0, 1, 12)[:, None]
    y = np.sin(9 * X[:, 0]) + 3
    kernel = ConstantKernel(2.0) * RBF(0.1) + WhiteKernel(0.5)
    model = GaussianForecaster(GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True)).fit(X, y)
    expected = math.sqrt(2.5) * y.std()
    far = np.array([[1e3]])
    assert model.log_predictive_density(far, np.array([4.0]))[0] == pytest.approx(norm.logpdf(4.0, y.mean(), expected))
    assert model.predict_quantiles(far, [0.5, 0.95])[0] == pytest.approx(
        [y.mean(), y.mean() + norm.ppf(0.95) * expected]
    )


class Known:
    """Knows that y is standard normal."""

    def fit(self, X, y):
        return self

    def predict(self, X, return_std=False):
        return np.zeros(len(X)), np.ones(len(X))

    def predict_quantiles(self, X, q):
        return np.tile(norm.ppf(q), (len(X), 1))

    def log_predictive_density(self, X, y):
        return norm.logpdf(y)


def test_the_true_law_is_calibrated():
    # At the midpoints of n equal probabilities, an interval of coverage c holds n c of them, give or take one an end.
    n = 400
    y = norm.ppf((np.arange(n) + 0.5) / n)
    X = np.zeros((n, 1))
    found = forecast(Known(), X, y, X, y)
    assert np.abs(found.shares - LEVELS).max() <= 2 / n
    assert found.metrics()["90 % coverage"] == pytest.approx(0.9, abs=2 / n)
    assert found.metrics()["RMSE"] == pytest.approx(math.sqrt((y**2).mean()))
    twice = Forecast.pooled([found, found])
    assert {**twice.metrics(), "seconds": 0} == pytest.approx({**found.metrics(), "seconds": 0})


def test_counts_on_the_root_scale_keep_their_law():
    X = np.zeros((1, 2))

    class Shifted(Known):
        # z normal with mean 20 and unit variance: far from the lowest count, z = 0.
        def predict(self, X, return_std=False):
            return np.full(len(X), 20.0), np.ones(len(X))

        def predict_quantiles(self, X, q):
            return 20 + np.tile(norm.ppf(q), (len(X), 1))

        def log_predictive_density(self, X, y):
            return norm.logpdf(y, 20)

    model = RootTarget(Shifted())
    y = np.linspace(40, 300, 20_001)
    density = np.exp(model.log_predictive_density(np.zeros((len(y), 2)), y))
    # Trapezoid rule on a smooth density that has died out at both ends (z from 10.8 to 32.7): exact to rounding.
    assert trapezoid(density, y) == pytest.approx(1, abs=1e-10)
    assert model.predict(X)[0] == pytest.approx(trapezoid(density * y, y), rel=1e-10)
    below = y <= model.predict_quantiles(X, 0.25)[0, 0]
    # The last cell is cut at a grid point: up to one step of 0.013 times the density, at most 0.04.
    assert trapezoid(density[below], y[below]) == pytest.approx(0.25, abs=0.013 * 0.04)


@pytest.mark.slow
def test_the_part_on_gaussian_processes_is_complete(tmp_path):
    pytest.importorskip("statsmodels")
    assert command_line.main(["demo", "--parts", "gp", "--quick", "--output", str(tmp_path)]) == 0
    (part,) = results(tmp_path)["parts"]
    assert part["status"] == "ok"
    assert len(part["rows"]) == 12
    for row in part["rows"]:
        metrics = row["metrics"]
        assert set(metrics) == {"RMSE", "log density", "90 % coverage", "seconds"}
        assert all(value is not None and math.isfinite(value) for value in metrics.values())
        assert 0 <= metrics["90 % coverage"] <= 1
        assert (row["lead"] is None) == (row["model"] == "Student-t process")
    _, links = check_page(tmp_path)
    assert sorted(links) == ["gp_calibration.png", "gp_diabetes.png", "gp_sunspots.png"]


@pytest.mark.slow
def test_the_part_on_gaussian_processes_does_without_statsmodels(package, tmp_path):
    assert run_demo(tmp_path / "out", ["gp"], quick=True) == 0
    (part,) = results(tmp_path / "out")["parts"]
    assert part["status"] == "ok"
    assert {row["data"].partition(",")[0] for row in part["rows"]} == {"diabetes"}
    assert "Sunspots skipped: load_sunspots needs statsmodels" in " ".join(part["notes"])


@pytest.mark.slow
def test_the_part_on_networks_is_complete(tmp_path):
    pytest.importorskip("statsmodels")
    assert command_line.main(["demo", "--parts", "networks", "--quick", "--output", str(tmp_path)]) == 0
    (part,) = results(tmp_path)["parts"]
    assert part["status"] == "ok"
    assert len(part["rows"]) == 14
    for row in part["rows"]:
        assert all(value is not None and math.isfinite(value) for value in row["metrics"].values())
        if row["data"].startswith("digits"):
            assert 0 <= row["metrics"]["accuracy"] <= 1
            assert 0 <= row["metrics"]["calibration error"] <= 1
    _, links = check_page(tmp_path)
    assert links == ["networks_digits.png"]


@pytest.mark.slow
def test_the_part_on_functional_tensors_is_complete(tmp_path):
    pytest.importorskip("tensorly")
    assert command_line.main(["demo", "--parts", "functional", "--quick", "--output", str(tmp_path)]) == 0
    (part,) = results(tmp_path)["parts"]
    assert part["status"] == "ok"
    assert not part["warnings"]
    assert len(part["rows"]) == 16
    for row in part["rows"]:
        metrics = row["metrics"]
        assert set(metrics) == {"RMSE", "log density", "90 % coverage", "seconds"}
        assert all(value is not None and math.isfinite(value) for value in metrics.values())
        assert (row["lead"] is None) == (row["model"] == "functional Tucker")
    rmse = {(row["data"], row["model"]): row["metrics"]["RMSE"] for row in part["rows"]}
    for data in {row["data"] for row in part["rows"]}:
        # The entries have a standard deviation of some 450 units.
        assert rmse[data, "functional Tucker"] < 100
    _, links = check_page(tmp_path)
    assert links == ["functional_kinetic.png"]


def test_the_part_on_functional_tensors_is_skipped_without_tensorly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorly", None)
    monkeypatch.setitem(sys.modules, "tensorly.datasets", None)
    assert run_demo(tmp_path / "out", ["functional"], quick=True) == 0
    (part,) = results(tmp_path / "out")["parts"]
    assert part["status"] == "skipped"
    assert part["reason"].startswith("load_kinetic needs tensorly")


def truncated(tensor, mask, n_iter):
    """The first singular vectors, of a matrix that is known but for one row."""
    u, s, v = np.linalg.svd(tensor[mask.any(axis=1)])
    left = np.zeros((len(tensor), 1))
    left[mask.any(axis=1)] = u[:, :1]
    return np.diag(s[:1]), [left, v[:1].T]


def test_the_baseline_fills_slices_that_were_never_measured_by_splines():
    # Rank one, and a cubic along the first axis, which a spline through the other rows reproduces to rounding.
    axes = [np.arange(7.0), np.array([10.0, 20.0, 40.0])]
    table = np.outer(axes[0] ** 3 + 1, [1.0, 2.0, -1.0])
    X = np.array([[i, j] for i in axes[0] for j in axes[1]])
    known = X[:, 0] != 3
    model = MaskedDecomposition(truncated, axes, 1).fit(X[known], table.ravel()[known])
    np.testing.assert_allclose(model.predict(X), table.ravel(), atol=1e-10)


@pytest.mark.slow
def test_the_part_on_transport_is_complete(tmp_path):
    assert command_line.main(["demo", "--parts", "ot", "--quick", "--output", str(tmp_path)]) == 0
    (part,) = results(tmp_path)["parts"]
    assert part["status"] == "ok"
    assert not part["warnings"]
    assert len(part["rows"]) == 20
    for row in part["rows"]:
        assert all(value is not None and math.isfinite(value) for value in row["metrics"].values())
    exact = {row["model"]: row["metrics"]["RMSE"] for row in part["rows"] if row["data"].startswith("digits, W2")}
    # Two exact solvers agree to rounding, and roots of values near 1 lose none of it.
    assert exact["exact, HiGHS alone"] < 1e-9
    assert exact["entropic transport"] < exact["rows and columns apart"] < exact["distance of centroids"]
    _, links = check_page(tmp_path)
    assert links == ["ot_colours.png"]


def run_command(*arguments):
    return subprocess.run([sys.executable, "-m", "stochproc", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("demo", "--help")])
def test_help_is_given_without_loading_torch(arguments):
    code = (
        "import sys; sys.argv = ['stochproc', *sys.argv[1:]]\n"
        "from stochproc.__main__ import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert "usage: python -m stochproc" in run.stdout
    assert run.stdout.splitlines()[-1] == "False False"


def test_the_module_prints_its_help():
    run = run_command("--help")
    assert run.returncode == 0
    assert "demo" in run.stdout
    assert "info" in run.stdout


@pytest.mark.slow
def test_info_names_the_stack_and_compiles_nothing():
    run = run_command("info")
    assert (run.returncode, run.stderr) == (0, "")
    named = {line.split("  ")[0] for line in run.stdout.splitlines()}
    assert {"stochproc", "Python", "torch", "scikit-learn", "threads", "devices", "KeOps", "KeOps cache"} <= named


def test_info_says_why_keops_cannot_be_used(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert command_line._keops(probe=False) == "not usable: no C++ compiler was found (no-such-compiler)"
