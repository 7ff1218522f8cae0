"""Running statistics are the means of the batches' statistics over the training images."""

from __future__ import annotations

import numpy as np
import tiny
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.evaluation.features import Extractor
from seed_exp.evaluation.recalibration import recalibrate_batch_norm
from seed_exp.views.recipe import EvalViews

BATCH = 8


def encoder(seed: int = 0) -> nn.Module:
    """Two convolutions with batch norm, the second of which sees the first's output; dropout."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2),
        nn.BatchNorm2d(5, momentum=0.02),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(5, 4, 3),
        nn.BatchNorm2d(4, momentum=0.02),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for layer in (network[1], network[5]):
        nn.init.uniform_(layer.weight, 0.5, 2.0)
        nn.init.uniform_(layer.running_mean, -1.0, 1.0)
        nn.init.uniform_(layer.running_var, 1.0, 2.0)
    return network.eval().requires_grad_(False)


def extractor(batch_size: int = BATCH) -> Extractor:
    return Extractor(EvalViews(tiny.views_config()), torch.device("cpu"), 0, batch_size)


def images(indices: list[int]) -> Tensor:
    views, source = EvalViews(tiny.views_config()), tiny.Images()
    batch = views.empty(len(indices))
    chosen = np.array(indices)
    views.host([source.image(i) for i in indices], source.labels[chosen], 0, chosen, batch)
    return views.device(batch)["global"][0]


def expected(network: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Mean over batches of mean and unbiased variance before each batch norm, pixel by pixel."""
    found: list[list[Tensor]] = [[], [], [], []]
    for batch in batches:
        x = batch.double()
        for number, (conv, norm) in enumerate(((network[0], network[1]), (network[4], network[5]))):  # type: ignore[index]
            x = F.conv2d(x, conv.weight.double(), conv.bias.double(), stride=conv.stride)
            values = x.transpose(0, 1).flatten(1)
            mean, var = values.mean(1), values.var(1, unbiased=False)
            found[2 * number].append(mean)
            found[2 * number + 1].append(values.var(1, unbiased=True))
            centred = (x - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
            x = centred * norm.weight[:, None, None] + norm.bias[:, None, None]
            x = x.clamp(min=0)
    return [torch.stack(values).mean(0) for values in found]


def statistics(network: nn.Module) -> list[Tensor]:
    return [
        value.double()
        for layer in network.modules()
        if isinstance(layer, nn.BatchNorm2d)
        for value in (layer.running_mean, layer.running_var)
        if value is not None
    ]


def order(num: int = 40) -> list[int]:
    found: list[int] = np.random.default_rng(0).permutation(num).tolist()
    return found


def test_statistics_are_the_means_over_whole_batches_of_all_images() -> None:
    networks = {"a": encoder(0), "b": encoder(1)}
    said = recalibrate_batch_norm(networks, extractor(batch_size=9), tiny.Images())
    batches = [images(order()[start : start + 9]) for start in range(0, 36, 9)]
    for network in networks.values():
        for value, wanted in zip(statistics(network), expected(network, batches), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert "36 of the images random[40], in batches of 9 over 1 processes" in said


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    network = encoder()
    recalibrate_batch_norm({"a": network}, extractor(batch_size=64), tiny.Images())
    for value, wanted in zip(
        statistics(network), expected(network, [images(order())]), strict=True
    ):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_nothing_but_the_statistics_changes() -> None:
    network, before = encoder(), encoder()
    recalibrate_batch_norm({"a": network}, extractor(), tiny.Images())
    assert not any(module.training for module in network.modules())
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.02}
    for one, two in zip(network.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_second_time_changes_nothing() -> None:
    network = encoder()
    recalibrate_batch_norm({"a": network}, extractor(), tiny.Images())
    once = statistics(network)
    recalibrate_batch_norm({"a": network}, extractor(), tiny.Images())
    assert all(torch.equal(a, b) for a, b in zip(once, statistics(network), strict=True))


def test_a_network_without_batch_norm_stays_as_it_is() -> None:
    network = tiny.Encoder(4, bn=False).eval()
    before = network(torch.ones(1, 3, 10, 10))
    recalibrate_batch_norm({"a": network}, extractor(), tiny.Images())
    assert torch.equal(network(torch.ones(1, 3, 10, 10)), before)


def _recalibrated() -> list[Tensor]:
    network = encoder()
    recalibrate_batch_norm({"a": network}, extractor(batch_size=BATCH // 2), tiny.Images())
    return statistics(network)


def test_two_processes_share_the_batches(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(_recalibrated)
    shuffled = order()
    batches = [images(shuffled[start : start + 4]) for start in range(0, 40, 4)]
    for one, two, wanted in zip(first, second, expected(encoder(), batches), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-6)
