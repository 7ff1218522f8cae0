"""One picture of a comparison: losses, maps of the features, nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from seed_exp.base.files import atomic_write
from seed_exp.reporting.colours import CLASS_COLOURS, INK, MUTED, OTHER, SAME

MAX_POINTS = 2000
"""Most images that a map shows."""


def overview_figure(
    path: Path,
    *,
    losses: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    maps: Mapping[str, Tensor],
    labels: Tensor,
    neighbours: Mapping[str, Tensor],
    query_images: Tensor,
    query_labels: Tensor,
    bank_images: Tensor,
    bank_labels: Tensor,
    class_names: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Writes a PNG of 1600 x 900 pixels: losses, then a map and a gallery for each encoder.

    Each run has axes of its own, because losses of different methods are different quantities. The
    maps are t-SNE of the features' directions, started from PCA with a fixed seed. In a gallery
    each query stands left of its neighbours. A neighbour is framed green if it has the query's
    label, and red if it has another.

    Args:
        path: Path of the PNG; replaced atomically.
        losses: Run name -> (steps, loss values), in order; at least one.
        maps: Encoder name -> features of the same images [N, D] (D may differ); the first 2000 are
            drawn.
        labels: Classes of the images of the maps [N], int64 >= 0.
        neighbours: Encoder name, as in `maps` -> indices into the bank [Q, k], nearest first.
        query_images: Images of the queries, uint8 [Q, 3, H, W], the same for all encoders.
        query_labels: Classes of the queries [Q].
        bank_images: Images of the bank, uint8 [M, 3, H, W].
        bank_labels: Classes of the bank [M].
        class_names: Name per class for the legend; None = the numbers of the classes.
        title: Line above everything.

    Raises:
        ValueError: the encoders of `maps` and `neighbours` differ, there are no losses or no
            encoders, or fewer than 4 images for the maps.
    """
    if not losses or not maps:
        raise ValueError(
            "the figure needs at least one run and one encoder, "
            f"got {list(losses)} and {list(maps)}"
        )
    if list(maps) != list(neighbours):
        raise ValueError(
            "maps and neighbours must name the same encoders in order, "
            f"got {list(maps)} and {list(neighbours)}"
        )
    if len(labels) < 4:
        raise ValueError(f"a map needs at least 4 images, got {len(labels)}")
    figure = Figure(figsize=(16, 9), dpi=100, facecolor="white")
    figure.text(0.03, 0.962, title, fontsize=19, fontweight="bold", color=INK, va="center")
    top = figure.add_gridspec(
        1, len(losses), left=0.045, right=0.925, bottom=0.745, top=0.885, wspace=0.16
    )
    bottom = figure.add_gridspec(
        1, len(maps), left=0.03, right=0.925, bottom=0.035, top=0.635, wspace=0.1
    )
    for column, (name, (steps, values)) in enumerate(losses.items()):
        _draw_loss(figure.add_subplot(top[column]), name, steps, values)
    classes = labels[:MAX_POINTS].cpu().numpy()
    for column, (name, features) in enumerate(maps.items()):
        cell = bottom[column].subgridspec(2, 1, height_ratios=(1.6, 1), hspace=0.14)
        _draw_map(figure.add_subplot(cell[0]), name, _project(features[:MAX_POINTS]), classes)
        found = neighbours[name].cpu()
        picture = _gallery(
            query_images, bank_images[found], query_labels[:, None] == bank_labels[found]
        )
        _draw_gallery(figure.add_subplot(cell[1]), picture, found.shape[1])
    _draw_legend(figure, np.unique(classes), class_names)
    FigureCanvasAgg(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _draw_loss(axes: Any, name: str, steps: Sequence[float], values: Sequence[float]) -> None:
    axes.plot(steps, values, color="#4e79a7", linewidth=1.8)
    axes.set_title(f"Loss, {name}", loc="left", fontsize=13, color=INK)
    axes.set_xlabel("step", fontsize=10, color=MUTED, loc="right", labelpad=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cccccc")
    axes.tick_params(colors=MUTED, labelsize=10, length=3, color="#cccccc")
    axes.locator_params(nbins=4, axis="y")
    axes.margins(x=0.01)


def _draw_map(
    axes: Any, name: str, points: NDArray[np.float64], classes: NDArray[np.int64]
) -> None:
    colours = [CLASS_COLOURS[label % len(CLASS_COLOURS)] for label in classes]
    axes.scatter(points[:, 0], points[:, 1], c=colours, s=9, alpha=0.85, linewidths=0)
    axes.set_title(name, loc="left", fontsize=13, color=INK)
    axes.margins(0.03)
    axes.set_axis_off()


def _draw_gallery(axes: Any, picture: NDArray[np.float32], num_neighbours: int) -> None:
    axes.imshow(picture, interpolation="antialiased")
    axes.set_anchor("W")
    axes.set_axis_off()
    cell = picture.shape[1] / (num_neighbours + 1.5)
    axes.text(cell / 2, -0.12 * cell, "query", fontsize=10, color=MUTED, ha="center", va="bottom")
    axes.text(
        1.5 * cell, -0.12 * cell, "nearest neighbours →", fontsize=10, color=MUTED, va="bottom"
    )


def _draw_legend(
    figure: Figure, classes: NDArray[np.int64], class_names: Sequence[str] | None
) -> None:
    for height, colour, name in ((0.17, SAME, "same class"), (0.14, OTHER, "other class")):
        figure.text(0.931, height, "■", fontsize=12, color=colour, va="center")
        figure.text(0.943, height, name, fontsize=10, color=INK, va="center")
    if len(classes) > len(CLASS_COLOURS):
        return  # hues repeat: a legend of the classes would mislead
    for row, label in enumerate(classes):
        name = str(label) if class_names is None else class_names[label]
        height = 0.62 - 0.03 * row
        figure.text(
            0.935,
            height,
            "●",
            fontsize=14,
            color=CLASS_COLOURS[label % len(CLASS_COLOURS)],
            va="center",
        )
        figure.text(0.949, height, name, fontsize=11, color=INK, va="center")


def _project(features: Tensor) -> NDArray[np.float64]:
    """t-SNE of unit-length features [N, D] -> [N, 2]; the same numbers give the same picture."""
    unit = F.normalize(features.detach().float().cpu(), dim=1).numpy()
    # A perplexity of N or more is refused, and one near N shows nothing.
    perplexity = min(30.0, (len(unit) - 1) / 3)
    # t-SNE's threads meet after each of many short iterations: on a busy machine, several threads
    # take ten times as long as one.
    with threadpool_limits(1):
        return np.asarray(
            TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(unit),
            dtype=np.float64,
        )


def _gallery(queries: Tensor, neighbours: Tensor, same: Tensor) -> NDArray[np.float32]:
    """A picture with each query beside its neighbours.

    Args:
        queries: Images of the queries, uint8 [Q, 3, H, W].
        neighbours: Images of their neighbours, uint8 [Q, k, 3, H, W].
        same: Whether query and neighbour have the same label [Q, k]; gives the frames' colours.
    """
    num_queries, num_neighbours, _, height, width = neighbours.shape
    # Frames are a share of a cell, so tiny images need more pixels.
    enlarge = max(1, -(-64 // height))
    height, width = height * enlarge, width * enlarge
    frame, gap = max(2, height // 14), max(2, height // 14)
    cell_height, cell_width = height + 2 * frame + gap, width + 2 * frame + gap
    picture = np.ones(
        (num_queries * cell_height - gap, (2 * num_neighbours + 3) * cell_width // 2, 3),
        dtype=np.float32,
    )
    for row in range(num_queries):
        tiles = [(0, queries[row], "#ffffff")]
        for rank in range(num_neighbours):
            left = (2 * rank + 3) * cell_width // 2  # half a cell right of the query
            tiles.append((left, neighbours[row, rank], SAME if same[row, rank] else OTHER))
        for left, image, colour in tiles:
            pixels = (
                image.permute(1, 2, 0)
                .cpu()
                .repeat_interleave(enlarge, 0)
                .repeat_interleave(enlarge, 1)
            )
            y = row * cell_height
            picture[y : y + height + 2 * frame, left : left + width + 2 * frame] = to_rgb(colour)
            picture[y + frame : y + frame + height, left + frame : left + frame + width] = (
                pixels.to(torch.float32) / 255
            )
    return picture
