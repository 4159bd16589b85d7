"""Classification of MNIST digits, clean, damaged, and against characters of another alphabet (KMNIST).

Run ``python benchmarks/bench_gp_digits.py [--train 6000] [--epochs N] [--seeds 2] [--only TABLE ...] [--update]``. The
images are read from ``../shared/data``; without that folder nothing is run. A seed draws the training rows from the
8000 there are; the 2000 test images are always the same. Log loss in nats, calibration error over ten bins of
confidence.
"AUROC, KMNIST" is how well the entropy of the probabilities tells the 2000 test digits from 2000 characters that are
none.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import functools
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, rotate
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from timing import run_tables

from stochproc.gp import ScaleMixtureGPClassifier

DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
DAMAGES = ("noise", "blur", "rotation")
LEVELS = (1, 2, 3)


def models(args: argparse.Namespace, seed: int, exact: bool) -> dict[str, Any]:
    """Ours with both priors of the scale, and others with what they are usually given; exact regression if asked."""
    ours = functools.partial(
        ScaleMixtureGPClassifier, normalize_X="global", max_epochs=args.epochs, dtype="float32", random_state=seed
    )
    found = {
        "random scale, mlp-relu-2": ours("mlp-relu-2"),
        "known scale, mlp-relu-2": ours("mlp-relu-2", scale_prior="delta"),
        "random scale, RBF": ours("rbf"),
        "logistic regression": LogisticRegression(C=0.05, max_iter=300),
        "SVC, RBF, Platt": SVC(C=10, gamma=0.02, probability=True, random_state=seed),
        "3 neighbours": KNeighborsClassifier(3),
    }
    return found | ({"regression on one-hot labels, mlp-relu-2": ours("mlp-relu-2", link="gaussian")} if exact else {})


def damaged(X: np.ndarray, damage: str, level: int) -> np.ndarray:
    """Noise of 0.2 a level, a blur of 0.8 pixels a level, or a rotation by 20 degrees a level."""
    images = X.reshape(-1, 28, 28)
    if damage == "noise":
        images = images + 0.2 * level * np.random.default_rng(level).standard_normal(images.shape)
    elif damage == "blur":
        images = gaussian_filter(images, (0, 0.8 * level, 0.8 * level))
    else:
        images = rotate(images, 20.0 * level, axes=(2, 1), reshape=False, order=1)
    return np.clip(images, 0, 1).reshape(len(X), -1)


def judged(probabilities: np.ndarray, y: np.ndarray) -> dict[str, float]:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == y
    bins = np.minimum((10 * confidence).astype(int), 9)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * np.mean(bins == b) for b in np.unique(bins)]
    clipped = np.clip(probabilities, 1e-6, 1)
    loss = log_loss(y, clipped / clipped.sum(1, keepdims=True), labels=np.arange(10))
    return {"accuracy": float(right.mean()), "log loss": float(loss), "calibration error": float(np.sum(gaps))}


def entropy(probabilities: np.ndarray) -> np.ndarray:
    return -(probabilities * np.log(np.clip(probabilities, 1e-12, 1))).sum(1)


def many(args: argparse.Namespace) -> list[dict[str, Any]]:
    """As many training images as asked for."""
    return digits(args, args.train, exact=False)


def few(args: argparse.Namespace) -> list[dict[str, Any]]:
    """2000 training images, few enough for exact regression."""
    return digits(args, 2000, exact=True)


def digits(args: argparse.Namespace, n: int, exact: bool) -> list[dict[str, Any]]:
    """A line for each model; means over the seeds."""
    with np.load(DATA / "mnist" / "mnist10k.npz") as z, np.load(DATA / "kmnist" / "kmnist2k.npz") as k:
        X, y = z["X_train"].reshape(-1, 784) / 255.0, z["y_train"].astype(int)
        X_test, y_test, other = z["X_test"].reshape(-1, 784) / 255.0, z["y_test"].astype(int), k["X"]
    other = other.reshape(-1, 784) / 255.0
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        rows = np.random.default_rng(seed).choice(len(y), n, replace=False)
        for name, model in models(args, seed, exact).items():
            row = one(model, X[rows], y[rows], X_test, y_test, other)
            found.setdefault(name, []).append(row)
            print(seed, name, row, flush=True)
    return [
        {"model": name, "train": n, "seeds": len(runs)} | averaged(runs, statistics.mean)
        for name, runs in found.items()
    ]


def one(model: Any, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray, other: np.ndarray) -> dict:
    before = time.process_time()
    model.fit(X, y)
    seconds = time.process_time() - before
    clean = model.predict_proba(X_test)
    row = judged(clean, y_test)
    worse = [judged(model.predict_proba(damaged(X_test, d, level)), y_test) for d in DAMAGES for level in LEVELS]
    row |= {f"{key}, damaged": value for key, value in averaged(worse, statistics.mean).items()}
    strange = model.predict_proba(other)
    truth = np.r_[np.zeros(len(clean)), np.ones(len(strange))]
    row["AUROC, KMNIST"] = float(roc_auc_score(truth, np.r_[entropy(clean), entropy(strange)]))
    row["confidence, KMNIST"] = float(strange.max(1).mean())
    return row | {"seconds to fit": seconds}


def averaged(rows: list[dict[str, float]], mean: Callable[[list[float]], float]) -> dict[str, float]:
    return {key: mean([row[key] for row in rows]) for key in rows[0]}


TABLES = {"many": many, "few": few}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=6000, help="training images, 8000 at most")
    parser.add_argument("--epochs", type=int, default=None, help="of the variational fits; their default otherwise")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=None, choices=list(TABLES), help="nothing is written then")
    parser.add_argument("--update", action="store_true", help="write the tables of --only into the present file")
    args = parser.parse_args()
    args.device = "cpu"
    if not (DATA / "mnist").exists():
        raise SystemExit("the folder ../shared/data/mnist is not there: nothing was run and nothing written.")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run_tables("gp_digits", TABLES, args)
