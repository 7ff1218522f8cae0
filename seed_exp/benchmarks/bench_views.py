"""Times the way from image files to normalised views."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from PIL import Image

from seed_exp.benchmarks.measure import BenchReport, Contender, interleave, machine
from seed_exp.benchmarks.references import PlainTsv, PlainViews, dali_views, kornia_views
from seed_exp.config.schema import BenchConfig
from seed_exp.data.decode import decode
from seed_exp.data.sources import load_source
from seed_exp.data.transfer import moved
from seed_exp.data.tsv import TsvSource
from seed_exp.engine.distributed import local_device
from seed_exp.engine.fleet import device_half
from seed_exp.views.recipe import HostBatch, TrainViews


def bench(config: BenchConfig) -> BenchReport:
    """Measures images per second of the plain pipeline and of ours.

    The whole plain pipeline and our host half use one core each; our device half runs on the
    model's device. A repetition makes new views of the first `config.batch_size` images. If the
    data is not a TSV file, the source reads and decodes the images for both pipelines, so that only
    the views differ.

    Raises:
        ValueError: no data is given, or it has fewer than `config.batch_size` images.
    """
    device, num = local_device(config.device), config.batch_size
    source = load_source(config.data, "train")
    if num > len(source):
        raise ValueError(
            f"batch_size={num} exceeds the {len(source)} images; take batch_size={len(source)} or "
            "less"
        )
    views, plain_views = TrainViews(config.views, seed=0), PlainViews(config.views)
    epochs, indices = itertools.count(), np.arange(num)
    buffers = views.empty(num)
    tsv = PlainTsv(source.path, num) if isinstance(source, TsvSource) else None

    def host() -> HostBatch:
        images = [source.image(index) for index in range(num)]
        views.host(images, np.full(num, -1), next(epochs), indices, buffers)
        return buffers

    def plain_image(index: int) -> Image.Image:
        return (
            tsv.image(index)
            if tsv
            else Image.fromarray(source.image(index).permute(1, 2, 0).numpy())
        )

    ready = moved(host(), device)
    ours = device_half(views, config, device)
    ways = [
        Contender("plain", lambda: plain_views([plain_image(index) for index in range(num)]), num),
        Contender("ours, host half", host, num),
        Contender(f"ours, device half ({device.type})", lambda: ours(ready), num),
        Contender("ours, both halves", lambda: ours(moved(host(), device)), num),
    ]
    if kornia := kornia_views(config.views):
        pixels = [view.flatten(0, 1) for view in ready.views.values()]
        ways.append(
            Contender(
                f"kornia, device half ({device.type})",
                lambda: [kornia(view) for view in pixels],
                num,
            )
        )
    bounds = [
        Contender("read and decode", lambda: [source.image(index) for index in range(num)], num)
    ]
    if tsv:
        files = [tsv.data(index) for index in range(num)]
        if dali := dali_views(config.views, num):
            ways.append(
                Contender("DALI, CPU", lambda: dali([tsv.data(index) for index in range(num)]), num)
            )
        bounds += [
            Contender("decode", lambda: [decode(file, "") for file in files], num),
            Contender(
                "read and base64, plain", lambda: [tsv.data(index) for index in range(num)], num
            ),
        ]
    with torch.no_grad():
        rows = interleave([*ways, *bounds], seconds=config.seconds, device=device)
    facts = {
        "views": f"{config.views.name}: "
        + " + ".join(f"{c.num} x {c.size}" for c in config.views.crops.values() if c.num > 0),
        "images": f"{num} of {source.fingerprint()}",
    }
    title = "from image files to views"
    return BenchReport(
        title, "img/s", rows[: len(ways)], "plain", rows[len(ways) :], facts | machine(device)
    )
