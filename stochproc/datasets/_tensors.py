"""Tensors of measurements that come with tensorly, with the coordinates of their modes."""

from typing import Any

import numpy as np

from stochproc.datasets._bunch import describe, need

__all__ = ["load_covid19_serology", "load_il2", "load_indian_pines", "load_kinetic"]


def load_il2() -> Any:
    """Load the response of 8 cell types to 13 variants of interleukin-2, over 4 times and 12 doses.

    Returns
    -------
    sklearn.utils.Bunch
        ``tensor`` (13, 4, 12, 8) with NaN where nothing was measured (two variants have no fourth time: 192 entries),
        ``mode_names``, ``coordinates`` (one array a mode: names of variants, hours in descending order, doses in
        nanomolar in descending order, names of cells), ``continuous`` (which modes have numbers), ``DESCR``.

    Raises
    ------
    ImportError
        If tensorly is not installed; the message says how to get it.

    References
    ----------
    .. [1] B. Orcutt-Jahns et al., "Multivalency enhances the specificity of Fc-cytokine fusions", bioRxiv 2021.
    """
    raw = _raw("load_IL2data", "load_il2")
    return _bunch(
        raw["tensor"],
        ["ligand", "time", "dose", "cell"],
        raw["ticks"],
        "Signalling response of eight cell types to 13 variants of interleukin-2.",
        origin="Orcutt-Jahns et al. (2021), Meyer laboratory",
        units="scaled to [0, 1]; times in hours, doses in nanomolar",
        missing="NaN in 192 of 4992 entries: the fourth time of two variants",
        licence="MIT (The Regents of the University of California); copy distributed by tensorly",
    )


def load_covid19_serology() -> Any:
    """Load antibody measurements of 438 samples of serum, against 6 antigens by 11 receptors.

    Returns
    -------
    sklearn.utils.Bunch
        ``tensor`` (438, 6, 11) standardised log intensities, ``target`` (438,) the severity of the disease as text,
        ``mode_names``, ``coordinates`` (one array a mode: number of the sample, names of antigens and receptors),
        ``continuous``, ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If tensorly is not installed; the message says how to get it.

    References
    ----------
    .. [1] T. Zohar et al., "Compromised humoral functional evolution tracks with SARS-CoV-2 mortality", Cell 183
       (2020) 1508-1519.
    """
    raw = _raw("load_covid19_serology", "load_covid19_serology")
    severity, antigens, receptors = raw["ticks"]
    names = [f"sample {i}" for i in range(len(severity))]
    return _bunch(
        raw["tensor"],
        ["sample", "antigen", "receptor"],
        [names, antigens, receptors],
        "Antibodies against SARS-CoV-2 in the serum of 438 people.",
        origin="Zohar et al. (2020); arranged by Tan et al., Molecular Systems Biology 17 (2021) e10243",
        units="logarithms of fluorescence, centred",
        licence="MIT (The Regents of the University of California); copy distributed by tensorly",
        target=np.asarray(severity, dtype=str),
    )


def load_kinetic() -> Any:
    """Load fluorescence of catecholamine mixtures: 64 runs, 12 emission and 10 excitation wavelengths, 60 times.

    Returns
    -------
    sklearn.utils.Bunch
        ``tensor`` (64, 12, 10, 60) with NaN in the 1754 entries that the authors mark as missing, ``mode_names``,
        ``coordinates`` (run from 1, emission and excitation in nanometres, minutes), ``continuous``, ``outliers``
        (rows of the first mode that the authors call outliers), ``DESCR``.

    Raises
    ------
    ImportError
        If tensorly is not installed; the message says how to get it.

    References
    ----------
    .. [1] R. P. H. Nikolajsen et al., "Quantifying catecholamines using multi-way kinetic modelling", Analytica
       Chimica Acta 475 (2003) 137-150.
    """
    raw = _raw("load_kinetic", "load_kinetic")
    tensor = np.where(np.asarray(raw["missing_values_position"], dtype=bool), np.nan, np.asarray(raw["tensor"]))
    return _bunch(
        tensor,
        ["run", "emission", "excitation", "time"],
        [[f"run {i}" for i in raw["ticks"][0]], *raw["ticks"][1:]],
        "Fluorescence of reacting catecholamines over emission, excitation and time.",
        origin="Nikolajsen et al. (2003), University of Copenhagen",
        units="fluorescence in arbitrary units; wavelengths in nanometres, times in minutes",
        missing="NaN in 1754 of 460800 entries",
        licence="open to public use, citation asked for (models.life.ku.dk/datasets); copy distributed by tensorly",
        outliers=np.asarray(raw["outlier_measurements_idx"]),
    )


def load_indian_pines() -> Any:
    """Load the hyperspectral image of Indian Pines, 145 x 145 pixels in 200 bands, with 16 kinds of land use.

    Returns
    -------
    sklearn.utils.Bunch
        ``tensor`` (145, 145, 200), ``target`` (145, 145) integers with 0 for unlabelled, ``mode_names``,
        ``coordinates`` (row, column, wavelength in nanometres; the wavelengths step back once, where two
        spectrometers overlap), ``continuous``, ``DESCR``. Nothing is missing.

    Raises
    ------
    ImportError
        If tensorly is not installed; the message says how to get it.

    References
    ----------
    .. [1] M. F. Baumgardner, L. L. Biehl, D. A. Landgrebe, "220 band AVIRIS hyperspectral image data set: June 12,
       1992 Indian Pine test site 3", 2015, doi:10.4231/R7RX991C.
    """
    raw = _raw("load_indian_pines", "load_indian_pines")
    target, wavelengths = raw["ticks"]
    side = np.arange(145.0)
    return _bunch(
        raw["tensor"],
        ["row", "column", "wavelength"],
        [side, side, wavelengths],
        "Hyperspectral image of fields near West Lafayette, Indiana, 1992-06-12 (AVIRIS).",
        origin="Baumgardner, Biehl and Landgrebe (2015), Purdue University",
        units="calibrated radiance in digital counts; wavelengths in nanometres",
        licence="Creative Commons Attribution 3.0; copy distributed by tensorly",
        target=np.asarray(target, dtype=np.int64),
    )


def _raw(name: str, loader: str) -> Any:
    return getattr(need("tensorly.datasets", loader), name)()


def _bunch(
    tensor: Any,
    mode_names: list[str],
    ticks: Any,
    title: str,
    *,
    origin: str,
    units: str,
    licence: str,
    missing: str = "none",
    **fields: Any,
) -> Any:
    """Record of a tensor; coordinates are float64 for numbers and text for names."""
    from sklearn.utils import Bunch

    coordinates = [np.asarray(t) for t in ticks]
    coordinates = [t.astype(np.float64) if t.dtype.kind in "iuf" else t.astype(str) for t in coordinates]
    return Bunch(
        tensor=np.array(tensor, dtype=np.float64),
        mode_names=mode_names,
        coordinates=coordinates,
        continuous=[t.dtype.kind == "f" for t in coordinates],
        DESCR=describe(title, origin=origin, units=units, licence=licence, missing=missing),
        **fields,
    )
