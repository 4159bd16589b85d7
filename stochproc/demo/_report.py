"""What the demo reports: rows of one table, as text, JSON and a page that needs no network."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

import stochproc

__all__ = ["Figure", "Lead", "PartReport", "Row", "print_summary", "table_as_text", "write_html", "write_json"]

# Shared metrics come first, in this order; a part may add its own.
_FIRST = ("RMSE", "log density", "90 % coverage")
_LAST = ("seconds",)
LEGEND = (
    "Lead: by how many nats a row the log density of the first model of a data set is higher than that "
    "of the model in the row, with the standard error of this difference; level means within two of them."
)
_FORMATS = {"log density": "{:.3f}", "90 % coverage": "{:.3f}", "seconds": "{:.2f}"}
_LEAD = "lead ± s.e."
_STACK = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib")


@dataclasses.dataclass(frozen=True)
class Lead:
    """A difference of two mean log densities in nats, positive if the first model is better, and its error.

    Parameters
    ----------
    mean : float
    error : float
        Standard error of ``mean``, from independent pairs.
    """

    mean: float
    error: float

    @property
    def verdict(self) -> str:
        """Either "ahead", "behind", or "level" within two standard errors."""
        if abs(self.mean) <= 2 * self.error:
            return "level"
        return "ahead" if self.mean > 0 else "behind"

    def __str__(self) -> str:
        # Adding zero turns a rounded -0.0 into 0.0.
        return f"{round(self.mean, 3) + 0.0:+.3f} ± {self.error:.3f} {self.verdict}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: how a model did on held-out data.

    Parameters
    ----------
    data : str
        The data set, with how much of it was learned from.
    model : str
    unit : str
        Unit of the data, and so of errors.
    metrics : dict of str to float
        By name; names and units are in the docstring of ``_runner``.
    lead : Lead, default=None
        How far the first model of this data set, the family's own, is ahead of this one.
    """

    data: str
    model: str
    unit: str
    metrics: dict[str, float]
    lead: Lead | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A file in the output folder, what it shows, and how wide the page shows it at most, in pixels."""

    file: str
    caption: str
    width: int


@dataclasses.dataclass
class PartReport:
    """Everything one part gave."""

    name: str
    title: str = ""
    status: str = "ok"
    reason: str = ""
    traceback: str = ""
    seconds: float = 0.0
    rows: list[Row] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    figures: list[Figure] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def _columns(reports: Sequence[PartReport]) -> list[str]:
    """Return the numbers of all rows: shared metrics first, the time last."""
    names = dict.fromkeys(name for report in reports for row in report.rows for name in row.metrics)
    middle = [name for name in names if name not in _FIRST + _LAST]
    lead = [_LEAD] if any(row.lead for report in reports for row in report.rows) else []
    return [*(n for n in (*_FIRST, *middle) if n in names), *lead, *(n for n in _LAST if n in names)]


def table_as_text(reports: Sequence[PartReport]) -> str:
    """Return one table of all rows for a terminal; a rule separates data sets.

    Parameters
    ----------
    reports : sequence of PartReport

    Returns
    -------
    str
    """
    metrics = _columns(reports)
    head = ["part", "data", "model", "unit", *metrics]
    groups: list[list[list[str]]] = []
    last: tuple[str, str] | None = None
    for report in reports:
        for row in report.rows:
            key = (report.name, row.data)
            new = key != last
            if new:
                groups.append([])
            last = key
            first = [report.name, row.data] if new else ["", ""]
            groups[-1].append([*first, row.model, row.unit, *(_cell(row, name) for name in metrics)])
    widths = [max(map(len, column)) for column in zip(head, *(line for g in groups for line in g), strict=True)]

    def joined(cells: list[str]) -> str:
        padded = [c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [joined(head)]
    for group in groups:
        lines += [rule, *map(joined, group)]
    return "\n".join([*lines, rule])


def print_summary(reports: Sequence[PartReport]) -> None:
    """Print what does not fit into the table: notes, and parts that did not finish."""
    if any(row.lead for report in reports for row in report.rows):
        print(f"- {LEGEND}")
    for report in reports:
        for note in report.notes:
            print(f"- {note}")
        if report.status != "ok":
            print(f"- {report.name} {report.status}: {report.reason}")


def write_json(reports: Sequence[PartReport], path: Path, *, quick: bool) -> None:
    """Write all results; numbers that are not finite become null.

    Parameters
    ----------
    reports : sequence of PartReport
    path : Path
    quick : bool
        Whether this was a short run on a subset.
    """
    content = {**_circumstances(quick), "parts": [dataclasses.asdict(report) for report in reports]}
    path.write_text(json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def write_html(reports: Sequence[PartReport], path: Path, *, quick: bool) -> None:
    """Write a page with the table and the figures, which lie beside it.

    Parameters
    ----------
    reports : sequence of PartReport
    path : Path
    quick : bool
        Whether this was a short run on a subset.
    """
    about = _circumstances(quick)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    footer = f"{about['created']}; {about['machine']}; Python {about['python']}; {versions}"
    page = Template(Path(__file__).with_name("page.html").read_text("utf-8"))
    text = page.substitute(
        version=html.escape(stochproc.__version__),
        legend=html.escape(LEGEND),
        quick='<p class="skipped">A quick run on a subset of the data: not to be quoted.</p>' if quick else "",
        table=_table_as_html(reports),
        parts="\n".join(map(_part_as_html, reports)),
        footer=html.escape(footer),
    )
    path.write_text(text, "utf-8")


def _table_as_html(reports: Sequence[PartReport]) -> str:
    metrics = _columns(reports)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("part", "data", "model", "unit", *metrics))
    lines, last = [], None
    for report in reports:
        for row in report.rows:
            new = (report.name, row.data) != last
            last = (report.name, row.data)
            texts = [report.name if new else "", row.data if new else "", row.model, row.unit]
            cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
            for name in metrics:
                verdict = f" {row.lead.verdict}" if name == _LEAD and row.lead else ""
                cells += f'<td class="number{verdict}">{_cell(row, name)}</td>'
            lines.append(f'<tr class="first">{cells}</tr>' if new else f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table>"


def _part_as_html(report: PartReport) -> str:
    blocks = [f'<section id="{html.escape(report.name)}"><h2>{html.escape(report.title or report.name)}</h2>']
    if report.status != "ok":
        blocks.append(f'<p class="{report.status}">{report.status.capitalize()}: {html.escape(report.reason)}</p>')
    if report.traceback:
        blocks.append(f"<pre>{html.escape(report.traceback)}</pre>")
    for title, items in (("", report.notes), ("Warnings", report.warnings)):
        if items:
            heading = f"<h3>{title}</h3>" if title else ""
            blocks.append(heading + "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>")
    for figure in report.figures:
        caption = html.escape(figure.caption)
        image = f'<img src="{html.escape(figure.file)}" alt="{caption}" width="{figure.width}">'
        blocks.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return "\n".join([*blocks, "</section>"])


def _cell(row: Row, name: str) -> str:
    if name == _LEAD:
        return str(row.lead or "")
    if name not in row.metrics:
        return ""
    return _FORMATS.get(name, "{:#.4g}").format(row.metrics[name])


def _finite(value: Any) -> Any:
    """Return the same nested value with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _circumstances(quick: bool) -> dict[str, Any]:
    """When, on what and with which versions the numbers came about."""
    return {
        "stochproc": stochproc.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _STACK},
    }
