"""Slow, obvious formulas written from the papers, in float64 and one row at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    exponentials = [math.exp(logit - largest) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


def log_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    log_sum = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
    return [logit - log_sum for logit in logits]


def seed_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, tau_student: float, tau_teacher: float
) -> float:
    """SEED, arXiv:2101.04731, Section 3.2, a loop over instances and entries of D+."""
    student, teacher, queue = student.double(), teacher.double(), queue.double()
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        entries = [*queue, t]
        target = softmax([float(t @ d) / tau_teacher for d in entries])
        prediction = log_softmax([float(s @ d) / tau_student for d in entries])
        total -= sum(p * q for p, q in zip(target, prediction, strict=True))
    return total / len(student)


def seed_loss_matrix(
    student: Tensor, teacher: Tensor, queue: Tensor, tau_student: float, tau_teacher: float
) -> Tensor:
    """SEED's formula with the N x (K+1) matrices written out, in float64 and differentiable."""
    student, teacher, queue = student.double(), teacher.double(), queue.double()
    target_logits = (
        torch.cat([(teacher * teacher).sum(1, keepdim=True), teacher @ queue.T], 1) / tau_teacher
    )
    logits = (
        torch.cat([(student * teacher).sum(1, keepdim=True), student @ queue.T], 1) / tau_student
    )
    return -(target_logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> float:
    """MoCo, arXiv:1911.05722, Eq. 1."""
    query, key, queue = query.double(), key.double(), queue.double()
    total = 0.0
    for q, k in zip(query, key, strict=True):
        total -= log_softmax(
            [float(q @ k) / temperature, *(float(q @ d) / temperature for d in queue)]
        )[0]
    return total / len(query)


# The other objectives: one row, one entry at a time, float64, differentiable with respect to the
# student.


def log_share(logits: list[Tensor], index: int) -> Tensor:
    """log softmax of one entry."""
    return logits[index] - torch.stack(logits).logsumexp(0)


def compress_loss(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """CompRess with one queue, arXiv:2010.14713: KL divergence plus entropy of the teacher."""
    student, teacher, queue = student.double(), teacher.double(), queue.double()
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        p = softmax([float(t @ d) / temperature for d in queue])
        logits = [s @ d / temperature for d in queue]
        divergence = sum(p[j] * (math.log(p[j]) - log_share(logits, j)) for j in range(len(queue)))
        total = total + divergence - sum(share * math.log(share) for share in p)
    return total / len(student)


def bingo_loss(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    temperature: float,
    bag_size: int,
    weight: float,
) -> Tensor:
    """BINGO, arXiv:2107.01691, adapted to one softmax.

    Its positives are the own embedding and the most similar ones of the queue.
    """
    student, teacher, queue = student.double(), teacher.double(), queue.double()
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        logits = [s @ d / temperature for d in [t, *queue]]
        bag = sorted(range(len(queue)), key=lambda j: -float(t @ queue[j]))[:bag_size]
        total = total - (1 - weight) * log_share(logits, 0)
        for j in bag:
            total = total - weight / len(bag) * log_share(logits, 1 + j)
    return total / len(student)


def bag_loss(
    student: Tensor,
    own: Tensor,
    other: Tensor,
    queue: Tensor,
    own_shares: list[float],
    temperature: float,
) -> Tensor:
    """BINGO, arXiv:2107.01691: two softmaxes, each over one positive and the queue."""
    student, own, other, queue = (one.double() for one in (student, own, other, queue))
    total = torch.zeros((), dtype=torch.float64)
    for s, one, two, share in zip(student, own, other, own_shares, strict=True):
        for positive, weight in ((one, share), (two, 1 - share)):
            logits = [s @ d / temperature for d in [positive, *queue]]
            total = total - weight * log_share(logits, 0)
    return total / len(student)


def binary_contrastive_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, temperature: float
) -> Tensor:
    """CRD, arXiv:1910.10699, with h(s, d) = P / (P + K / M), P = exp(s . d / T) / Z and Z = M."""
    student, teacher, queue = student.double(), teacher.double(), queue.double()
    num_images = 1_281_167  # any number

    def is_pair(s: Tensor, d: Tensor) -> Tensor:
        p = torch.exp(s @ d / temperature) / num_images
        return p / (p + len(queue) / num_images)

    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        total = total - torch.log(is_pair(s, t)) - sum(torch.log(1 - is_pair(s, d)) for d in queue)
    return total / len(student)


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """SimReg, arXiv:2201.05131: the squares of the differences, added up over dimensions."""
    rows = [
        sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        for s, t in zip(student.double(), teacher.double(), strict=True)
    ]
    return torch.stack(rows).mean()


def regression_loss(student: Tensor, target: Tensor, smooth_share: float) -> Tensor:
    """UNIC, arXiv:2408.05088: 1 - cosine, and the smooth-L1 distance, mean over dimensions."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student.double(), target.double(), strict=True):
        cosine = s @ t / torch.sqrt((s @ s) * (t @ t))
        smooth = [
            (a - b) ** 2 / 2 if abs(float(a - b)) < 1 else abs(a - b) - 0.5
            for a, b in zip(s, t, strict=True)
        ]
        total = total + (1 - smooth_share) * (1 - cosine) + smooth_share * sum(smooth) / len(s)
    return total / len(student)


def bilinear(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps [N, C, h, w] at the centres of a grid over the same square; borders are repeated."""

    def sources(length: int, of: int) -> list[tuple[int, int, float]]:
        found = []
        for i in range(length):
            place = min(max((i + 0.5) * of / length - 0.5, 0), of - 1)
            low = min(int(place), of - 1)
            found.append((low, min(low + 1, of - 1), place - low))
        return found

    rows = [
        [
            (1 - v) * ((1 - u) * maps[:, :, top, left] + u * maps[:, :, top, right])
            + v * ((1 - u) * maps[:, :, bottom, left] + u * maps[:, :, bottom, right])
            for left, right, u in sources(width, maps.shape[3])
        ]
        for top, bottom, v in sources(height, maps.shape[2])
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def dense_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """EUPE, arXiv:2603.22387: 0.9 cosine and 0.1 smooth-L1, mean over positions and views."""
    grid = [max(student.shape[axis], teacher.shape[axis]) for axis in (2, 3)]
    one, two = (bilinear(maps.double(), *grid) for maps in (student, teacher))
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(one)):
        for y in range(grid[0]):
            for x in range(grid[1]):
                total = total + regression_loss(one[n, :, y, x][None], two[n, :, y, x][None], 0.1)
    return total / (len(one) * grid[0] * grid[1])


def coss_loss(student: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """CoSS, arXiv:2409.13939: cosines of the rows, and of the columns."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return a @ b / torch.sqrt((a @ a) * (b @ b))

    student, teacher = student.double(), teacher.double()
    rows = torch.stack([cosine(s, t) for s, t in zip(student, teacher, strict=True)]).mean()
    columns = torch.stack(
        [cosine(student[:, d], teacher[:, d]) for d in range(student.shape[1])]
    ).mean()
    return -rows - weight * columns


def cluster_loss(
    student: Tensor, codes: list[list[float]], prototypes: Tensor, temperature: float
) -> Tensor:
    """Cross-entropy between given codes and softmax(s . c / T): SwAV, arXiv:2006.09882, Eq. 2."""
    student, prototypes = student.double(), prototypes.double()
    total = torch.zeros((), dtype=torch.float64)
    for s, code in zip(student, codes, strict=True):
        logits = [s @ c / temperature for c in prototypes]
        total = total - sum(q * log_share(logits, j) for j, q in enumerate(code))
    return total / len(student)


def k_means(points: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm on the sphere; the i-th empty cluster gets the i-th least similar point."""
    points, centroids = points.double(), centroids.double()
    for _ in range(iterations):
        members: list[list[int]] = [[] for _ in centroids]
        closeness = []
        for i, x in enumerate(points):
            similarities = [float(x @ c) for c in centroids]
            members[similarities.index(max(similarities))].append(i)
            closeness.append(max(similarities))
        strangers = sorted(range(len(points)), key=closeness.__getitem__)
        moved = []
        for rows in members:
            total = sum(points[i] for i in rows) if rows else points[strangers.pop(0)]
            moved.append(total / total.norm())
        centroids = torch.stack(moved)
    return centroids


def sinkhorn(points: Tensor, prototypes: Tensor, epsilon: float, iterations: int) -> Tensor:
    """SwAV's assignment of points to prototypes [K, C].

    The whole matrix is scaled in turn: columns to equal sums, then rows to 1.
    """
    matrix = torch.exp(points.double() @ prototypes.double().T / epsilon)
    for _ in range(iterations):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    return matrix


def retrieval(
    gallery: list[list[float]],
    gallery_labels: list[int],
    queries: list[list[float]],
    query_labels: list[int],
    ks: list[int],
    own: list[int] | None = None,
) -> dict[str, float]:
    """Mean average precision and recall@k, percent, from the whole ranking of each query.

    Average precision: the mean, over the relevant images, of the precision at their rank (Manning
    et al., Introduction to Information Retrieval, Section 8.4). Recall@k: whether one of the k
    first is relevant (arXiv:1511.06452, Section 6). Equal similarities: other classes first.
    """

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (
            math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        )

    precisions: list[float] = []
    hits: dict[int, list[bool]] = {k: [] for k in ks}
    for number, (query, label) in enumerate(zip(queries, query_labels, strict=True)):
        others = [
            (-round(cosine(query, image), 6), other == label)
            for index, (image, other) in enumerate(zip(gallery, gallery_labels, strict=True))
            if own is None or index != own[number]
        ]
        relevant = [is_relevant for _, is_relevant in sorted(others)]
        if not any(relevant):
            continue
        at_relevant = [
            sum(relevant[: rank + 1]) / (rank + 1) for rank, hit in enumerate(relevant) if hit
        ]
        precisions.append(sum(at_relevant) / len(at_relevant))
        for k in ks:
            hits[k].append(any(relevant[:k]))
    return {
        "map": 100 * sum(precisions) / len(precisions),
        **{f"recall{k}": 100 * sum(found) / len(found) for k, found in hits.items()},
    }


def segmentation(
    predicted: list[list[list[int]]], masks: list[list[list[int]]], num_classes: int
) -> dict[str, float]:
    """Mean intersection over union and accuracy of pixels, percent, pixel by pixel.

    VOC's measure (Everingham et al., IJCV 2015, Section 4.3): over all images, true positives /
    (true positives + false positives + false negatives), averaged over the classes. 255 in a mask
    does not count, nor a class that nothing shows.
    """
    pairs = [
        (guess, truth)
        for guesses, mask in zip(predicted, masks, strict=True)
        for guess_row, row in zip(guesses, mask, strict=True)
        for guess, truth in zip(guess_row, row, strict=True)
        if truth != 255
    ]
    shares = []
    for number in range(num_classes):
        both = sum(guess == number and truth == number for guess, truth in pairs)
        either = sum(number in pair for pair in pairs)
        if either:
            shares.append(both / either)
    right = sum(guess == truth for guess, truth in pairs)
    return {
        "miou": 100 * sum(shares) / len(shares),
        "pixel_accuracy": 100 * right / len(pairs),
    }
