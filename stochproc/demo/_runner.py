"""Run the parts of the demo, whatever they are, and report them together.

A part is one module ``part_<name>.py`` in this folder; nothing else has to be edited. It holds::

    TITLE = "What the part shows, in a few words"

    def run(context: Context) -> list[Row]:
        ...

``run`` trains on some rows of real data, predicts others, and returns one :class:`Row` a model and data set: its own
model first, then others, simple baselines included. Metrics that several families have share their names, so that they
share a column: ``"RMSE"``, ``"log density"`` (mean, in nats, of data in their unit), ``"90 % coverage"`` (share inside)
and ``"seconds"`` (to fit and predict). ``Row.lead`` says how sure a difference to the first model is. The
:class:`Context` takes everything else:

- ``context.quick`` asks for a run of a second or two on a subset, for tests;
- ``context.progress(text)`` says on stderr what is going on;
- ``context.note(text)`` adds a sentence under the table, such as how the rows were split;
- ``context.save_figure(figure, name, caption)`` writes ``<part>_<name>.png`` and shows it on the page;
- ``with context.optional("sunspots"):`` skips that block, and says so, where its data package is missing.

A part whose ``run`` or import needs a package of the extra ``data`` that is missing is reported as skipped. One that
raises anything else is reported as failed; the others still run, and the exit code is 1. Warnings are collected and
shown once each. Figures are drawn in the style of ``_figures``; a part makes its own with ``matplotlib.figure.Figure``.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stochproc.demo._report import Figure, PartReport, print_summary, table_as_text, write_html, write_json

__all__ = ["Context", "discover", "run_demo"]

_PREFIX = "part_"
# The extra "data": a demo must run without them. Any other missing package is a broken installation.
_OPTIONAL = ("arch", "statsmodels", "tensorly")


class Context:
    """What the runner hands to a part.

    Parameters
    ----------
    report : PartReport
        Where notes and figures go.
    output : Path
        Folder of the figures; it exists.
    quick : bool, default=False
        Whether a subset of the data is enough.
    """

    def __init__(self, report: PartReport, output: Path, quick: bool = False) -> None:
        self.quick = quick
        self._report, self._output = report, output

    def progress(self, text: str) -> None:
        """Say on stderr what is going on."""
        print(f"  {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Add a sentence under the table."""
        self._report.notes.append(text)

    def save_figure(self, figure: Any, name: str, caption: str) -> None:
        """Write a ``matplotlib.figure.Figure`` as a PNG file and show it on the page."""
        file = f"{self._report.name}_{name}.png"
        figure.savefig(self._output / file)
        # Letters have one size on the page, whatever the size of the figure.
        self._report.figures.append(Figure(file, caption, round(100 * figure.get_figwidth())))

    @contextlib.contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Skip the block, and say so, if it needs an optional package that is missing."""
        try:
            yield
        except ImportError as error:
            if not _is_missing_data(error):
                raise
            self.progress(f"{what} skipped: {error}")
            self.note(f"{what} skipped: {error}")


def discover(package: str = "stochproc.demo") -> list[str]:
    """Return the names of the parts in a package, in alphabetical order; nothing is imported but the package.

    Parameters
    ----------
    package : str, default="stochproc.demo"

    Returns
    -------
    list of str
        ``["gp"]`` for a package with one module ``part_gp``.
    """
    folder = importlib.import_module(package).__path__
    names = (module.name for module in pkgutil.iter_modules(folder))
    return sorted(name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))


def run_demo(
    output: Path, parts: Sequence[str] | None = None, *, quick: bool = False, package: str = "stochproc.demo"
) -> int:
    """Run parts of the demo, print their table and write figures, ``results.json`` and ``index.html``.

    Parameters
    ----------
    output : Path
        Folder to write to; made if it is not there.
    parts : sequence of str, default=None
        Names from :func:`discover`; None runs all.
    quick : bool, default=False
        Ask the parts for a short run on a subset.
    package : str, default="stochproc.demo"
        Where the parts are.

    Returns
    -------
    int
        0, or 1 if a part failed.

    Raises
    ------
    ValueError
        If a part is unknown.
    OSError
        If ``output`` cannot be written to; before any work is done.
    """
    known = discover(package)
    wanted = list(known if parts is None else dict.fromkeys(parts))
    for name in wanted:
        if name not in known:
            raise ValueError(f"parts must be among {', '.join(known)}; got {name!r}.")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
        pass

    reports = []
    for number, name in enumerate(wanted, start=1):
        print(f"[{number}/{len(wanted)}] {name}", file=sys.stderr, flush=True)
        reports.append(_run_part(f"{package}.{_PREFIX}{name}", name, output, quick))
    print(table_as_text(reports))
    print_summary(reports)
    write_json(reports, output / "results.json", quick=quick)
    write_html(reports, output / "index.html", quick=quick)
    print(f"\nFigures and table: {output / 'index.html'}")
    return 1 if any(report.status == "failed" for report in reports) else 0


def _run_part(module_name: str, name: str, output: Path, quick: bool) -> PartReport:
    """Run one part and keep whatever it gave, also when it stopped half-way."""
    from matplotlib import rc_context

    from stochproc.demo._figures import STYLE

    report = PartReport(name)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught, rc_context(STYLE):
        warnings.simplefilter("always")
        # Between libraries; Python does not show them to users either.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        try:
            module = importlib.import_module(module_name)
            report.title = module.TITLE
            report.rows.extend(module.run(Context(report, output, quick)))
        # Any error at all of one part: it is shown with its traceback, and must not hide the results of the others.
        except Exception as error:
            missing = isinstance(error, ImportError) and _is_missing_data(error)
            report.status = "skipped" if missing else "failed"
            report.reason = str(error) if missing else f"{type(error).__name__}: {error}"
            print(f"  {report.status}: {report.reason}", file=sys.stderr)
            if not missing:
                report.traceback = traceback.format_exc()
                print(report.traceback, file=sys.stderr)
    report.seconds = time.perf_counter() - start
    seen = Counter(f"{w.category.__name__}{_origin(w.filename)}: {str(w.message).strip()}" for w in caught)
    for text, count in seen.items():
        print(f"  {count} x {text}", file=sys.stderr)
        report.warnings.append(f"{count} x {text}")
    return report


def _origin(filename: str) -> str:
    """Name the installed package that a warning points at."""
    _, found, inside = Path(filename).as_posix().rpartition("/site-packages/")
    return f" ({inside.partition('/')[0]})" if found else ""


def _is_missing_data(error: ImportError) -> bool:
    """Return whether an optional package could not be found, here or in what caused the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and (cause.name or "").partition(".")[0] in _OPTIONAL:
            return True
        cause = cause.__cause__
    return False
