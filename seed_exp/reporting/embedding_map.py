"""How an encoder arranges the images, in two dimensions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from seed_exp.base.files import atomic_write
from seed_exp.reporting.colours import CLASS_COLOURS, INK, MUTED

MAX_POINTS = 5000


def embedding_map(features: Tensor, labels: Tensor, title: str, path: Path) -> None:
    """Writes a PNG of 800 x 800 pixels: the features' directions on two principal components.

    The map is linear, unlike t-SNE: points that are far apart in it are far apart. The axes say
    how much of the variance they show.

    Args:
        features: Features of N images [N, D], N >= 2; the first 5000 are drawn.
        labels: Classes of the images [N], int64, which give the colours.
        title: Line above the map.
        path: Path of the PNG; replaced atomically.
    """
    # These imports take a second, for which a training should not wait at its start.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    pca = PCA(2, random_state=0)
    # If all features are equal, the shares of the variance are no numbers.
    with np.errstate(invalid="ignore"):
        points = pca.fit_transform(F.normalize(features[:MAX_POINTS].float().cpu(), dim=1).numpy())
    figure = Figure(figsize=(8, 8), dpi=100, facecolor="white")
    axes = figure.add_subplot()
    classes = labels[:MAX_POINTS].cpu().numpy()
    for label in np.unique(classes):
        mine = points[classes == label]
        axes.scatter(
            mine[:, 0],
            mine[:, 1],
            color=CLASS_COLOURS[label % len(CLASS_COLOURS)],
            s=14,
            linewidths=0,
            label=str(label),
        )
    if len(np.unique(classes)) <= len(CLASS_COLOURS):  # with more classes, hues repeat
        axes.legend(title="class", frameon=False, labelcolor=INK)
    axes.set_title(title, loc="left", fontsize=13, color=INK)
    shares = 100 * pca.explained_variance_ratio_
    axes.set_xlabel(f"first principal component, {shares[0]:.0f} % of the variance", color=MUTED)
    axes.set_ylabel(f"second principal component, {shares[1]:.0f} %", color=MUTED)
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=10)
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
