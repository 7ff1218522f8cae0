"""Training and evaluation of the papers with published numbers, as far as they are known.

Keys are names of our options.
"""

from __future__ import annotations

from typing import Any

FIT: dict[str, Any] = {
    "batch_size": 256,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.03,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 1e-4,
    "optimizer.clip_grad_norm": None,
    "optimizer.schedule": "cosine",
}
PAPERS: dict[str, dict[str, Any]] = {
    "seed": {
        **FIT,
        "objective.queue_size": 65536,
        "objective.tau_student": 0.2,
        "objective.tau_teacher": (0.01, 1e-4),
        "objective.effective_neighbours": None,
        "views.crops.global.num": 1,
    },
    "seed_strong": {
        **FIT,
        "objective.queue_size": 65536,
        "objective.tau_student": 0.2,
        "objective.tau_teacher": 0.01,
        "objective.effective_neighbours": None,
        "views.crops.global.num": 2,
    },
    "moco_v2": {
        **FIT,
        "embedding_dim": 128,
        "moco.queue_size": 65536,
        "moco.temperature": 0.2,
        "moco.momentum": 0.999,
        "views.crops.global.num": 2,
    },
}
"""Objective -> options of the published training, where they are known. Tuples list alternatives.

A run with other values does not repeat the training. SEED has two values of tau_teacher: the first
is that of reproductions that match the paper, the second is the default of the released code. The
warm-up is not listed, because that of the released code does nothing at a batch of 256. The strong
variant is that of the independent reproduction; its head is a column of published.csv.
"""
TEACHER_EPOCHS = {"moco_v2": 200, "swav": 400}
"""Epochs of the training of SEED's teachers."""
FEATURE_WIDTHS = {
    **{"resnet18": 512, "resnet34": 512, "resnet50": 2048},
    **{"mobilenetv3_large": 1280, "efficientnet_b0": 1280, "efficientnet_b1": 1280},
}
"""Student -> hidden width of its head, in SEED and MoCo-V2: the width of its features."""
EVAL_VIEWS: dict[str, Any] = {"views.eval_size": 224, "views.eval_resize": 256}
COLOURS: dict[str, Any] = {
    "views.mixup": False,
    "views.resolution": None,
    "views.jitter": [0.4, 0.4, 0.4, 0.1],
    "views.jitter_prob": 0.8,
    "views.grayscale_prob": 0.2,
    "views.blur_prob": 0.5,
    "views.blur_sigma": [0.1, 2.0],
    "views.flip_prob": 0.5,
}
RECIPES: dict[str, dict[str, Any]] = {
    "mocov2": {
        "views.crops.global.size": 224,
        "views.crops.global.scale": [0.2, 1.0],
        "views.crops.local.num": 0,
        **COLOURS,
        **EVAL_VIEWS,
    },
    "swav_multicrop": {
        "views.crops.global.size": 224,
        "views.crops.global.scale": [0.14, 1.0],
        "views.crops.local.num": 6,
        "views.crops.local.size": 96,
        "views.crops.local.scale": [0.05, 0.14],
        **COLOURS,
        **EVAL_VIEWS,
    },
}
"""Recipe in published.csv -> its options. A run may have a recipe's name and other values."""
LABELLED_VIEWS: dict[str, Any] = {
    "views.name": "linear",
    "views.crops.global.size": 224,
    "views.crops.global.scale": [0.08, 1.0],
    "views.flip_prob": 0.5,
    **EVAL_VIEWS,
}
"""Views on which classifiers are trained and measured."""
LINEAR: dict[str, Any] = {
    "epochs": 100,
    "steps": None,
    "batch_size": 256,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad_norm": None,
    "optimizer.warmup_epochs": 0,
    "optimizer.schedule": "step",
    "optimizer.milestones": [60.0, 80.0],
    "optimizer.gamma": 0.1,
    **LABELLED_VIEWS,
}
"""Linear evaluation of MoCo (arXiv:1911.05722) and SEED, without its learning rate."""
RESNET_LR = 30.0
"""Learning rate of linear evaluation for ResNets; those for other networks are not known."""
