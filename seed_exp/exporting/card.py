"""The model card: an exported network's origin, its measured accuracy, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from seed_exp import __version__
from seed_exp.base.average_names import SUFFIX
from seed_exp.base.redaction import redact
from seed_exp.base.table import markdown_table
from seed_exp.config.schema import EVALUATIONS
from seed_exp.evaluation.results import results_about
from seed_exp.exporting.formats import Format, Subject
from seed_exp.exporting.kept_accuracy import Kept, kept_table
from seed_exp.exporting.loaders import CHANGES
from seed_exp.models.folding import has_branches
from seed_exp.models.teachers import TEACHERS, TeacherSpec

HUB_LICENCES = frozenset(
    {"mit", "apache-2.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "bsd-3-clause"}
)
"""Licences that the Hugging Face hub has a name for; the card calls any other `other`."""

_UNKNOWN = "unknown"

_SEED = """@article{fang2020seed,
  author  = {Fang, Zhiyuan and Wang, Jianfeng and Wang, Lijuan and Zhang, Lei and Yang, Yezhou and
             Liu, Zicheng},
  title   = {SEED: Self-supervised Distillation For Visual Representation},
  journal = {International Conference on Learning Representations},
  year    = {2021},
}"""
_MOCO_V2 = """@article{chen2020mocov2,
  author  = {Chen, Xinlei and Fan, Haoqi and Girshick, Ross and He, Kaiming},
  title   = {Improved Baselines with Momentum Contrastive Learning},
  journal = {arXiv:2003.04297},
  year    = {2020},
}"""

_MADE = {
    "Objective": "objective.name",
    "tau_student": "objective.tau_student",
    "tau_teacher": "objective.tau_teacher",
    "Effective neighbours that chose it": "objective.effective_neighbours",
    "Share of smooth-L1": "objective.smooth_share",
    "Queue": "objective.queue_size",
    "Views": "views.name",
    "Epochs asked for": "epochs",
    "Steps asked for": "steps",
    "Batch size": "batch_size",
    "Optimiser": "optimizer.name",
    "Learning rate at batch 256": "optimizer.lr",
    "Weight decay": "optimizer.weight_decay",
    "Seed": "seed",
}
"""Options of the training that the card shows if the network's file has them, by their label."""


@dataclass(frozen=True)
class WeightsOrigin:
    """The file that an exported network comes from, and the results about it."""

    header: Mapping[str, Any]
    """Header of the file of weights."""
    sha256: str
    """Checksum of the file of weights."""
    results: Path
    """Folder of the results files."""


def model_card(
    subject: Subject,
    origin: WeightsOrigin,
    formats: Mapping[str, Format],
    errors: Mapping[str, float],
    tried_on: str,
    kept: Mapping[str, Kept],
    kept_on: str,
) -> str:
    """Returns the text of README.md in the Hugging Face hub's form, without secrets.

    A fact that is not known is called unknown.

    Args:
        subject: The network that was exported.
        origin: The file that it comes from.
        formats: Formats it was exported to, by name.
        errors: Relative error of each format, by name.
        tried_on: Fingerprint of the images on which the errors were measured.
        kept: Size, features and k-NN accuracy of formats of fewer bits, beside the network's.
        kept_on: Sentences about the images on which these were measured.
    """
    header, command = origin.header, origin.header["command"]
    options: dict[str, Any] = header.get("options", {})
    spec = TEACHERS.get(str(options.get("teacher.network")), TeacherSpec())
    licence, why = licence_of(header)
    sections = [
        _front_matter(subject, formats, licence, command),
        f"# {_name(subject.name)}: {_WHAT.get(command, 'a small vision encoder')}",
        _summary(subject, command, options),
        "## Load",
        _loading(subject, formats),
        "## Training",
        _list([("Command", command), *_training(subject, origin, options)]),
    ]
    if command == "distill":
        sections += ["## Teacher", _list(_teacher(header, options, spec))]
    sections += [
        "## Evaluation",
        *_evaluations(subject.name, origin),
        "## Files",
        "Each file was read back without the code that wrote it, and tried on "
        f"{len(subject.images)} images of {_code(tried_on)}. The error is the largest difference "
        "from the trained network's output, relative to the largest difference between that "
        "output and its mean over the images.",
        markdown_table(
            ["format", "file", "error"],
            [[name, each.file, f"{errors[name]:.1e}"] for name, each in formats.items()],
        ),
        *_branches(subject, formats),
        *_fewer_bits(kept, kept_on),
        "## Licence",
        why,
        "## Citation",
        f"```bibtex\n{_MOCO_V2 if command == 'pretrain' else _SEED}\n```",
        f"Made with seed_exp {__version__}.",
    ]
    return redact("\n\n".join(sections) + "\n")


def _branches(subject: Subject, formats: Mapping[str, Format]) -> list[str]:
    """Sentences on layers that have parallel branches in training only."""
    if not has_branches(subject.student.encoder):
        return []
    programs = [each.file for each in formats.values() if each.is_program]
    weights = [each.file for each in formats.values() if not each.is_program]
    sentences = ["The network was trained with parallel branches that one layer can replace."]
    if programs:
        sentences.append(f"They are replaced in {' and '.join(programs)} (reparameterised).")
    if weights:
        sentences.append(
            f"{weights[0]} has them, for further training; "
            "`timm.utils.reparameterize_model(model.eval())` replaces them."
        )
    return [" ".join(sentences)]


_WHAT = {
    "distill": "a small vision encoder, distilled without labels",
    "pretrain": "a small vision encoder, pre-trained without labels",
    "released by SEED": "a small vision encoder that the authors of SEED released",
}


def licence_of(header: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the hub's name for the licence of a network, and a sentence on where it comes from.

    Args:
        header: Header of the network's file.
    """
    if header["student"].get("init") is not None:
        return (
            _UNKNOWN,
            "Unknown: the network started from other weights. Find out their licence before you "
            "publish it.",
        )
    if header["student"].get("pretrained"):
        return _of_two(header)
    return _of_training(header)


def _of_two(header: Mapping[str, Any]) -> tuple[str, str]:
    """As `licence_of`, for a network that started from timm's weights."""
    start, known = _pretrained(header["student"])
    begin = f"The network started from timm's weights {_code(start)}, whose licence is"
    if known is None:
        return _UNKNOWN, f"{begin} unknown. Find it out before you publish this network."
    identifier = known if known in HUB_LICENCES else "other"
    if header["command"] != "distill":
        return identifier, f"{begin} {known}."
    inherited, why = _of_training(header)
    if inherited == _UNKNOWN:
        return _UNKNOWN, f"{begin} {known}. {why}"
    return identifier if identifier == inherited else "other", f"{begin} {known}. {why}"


def _pretrained(student: Mapping[str, Any]) -> tuple[str, str | None]:
    """Name of the weights of timm that a student started from, and their licence if known."""
    name = str(student["name"])
    config = None if ":" in name else timm.models.get_pretrained_cfg(name)
    if config is None:
        return name, None
    tag = "" if "." in name or not config.tag else f".{config.tag}"
    return f"{name}{tag}", config.license


def _of_training(header: Mapping[str, Any]) -> tuple[str, str]:
    """As `licence_of`, for a network that started from random weights."""
    options: Mapping[str, Any] = header.get("options", {})
    if header["command"] != "distill":
        return (
            _UNKNOWN,
            "Unknown: the weights have no known teacher from which they could inherit a licence. "
            "Whoever publishes them decides.",
        )
    network = str(options.get("teacher.network"))
    known = TEACHERS.get(network, TeacherSpec()).licence
    if network == "timm":
        config = timm.models.get_pretrained_cfg(str(options.get("teacher.name")))
        known = config.license if config is not None else None
    if known is None or options.get("teacher.checkpoint") is not None:
        stated = f" (its official file has {known})" if known else ""
        return (
            _UNKNOWN,
            f"Unknown: the teacher's weights came without a licence{stated}. Find it out before "
            "you publish this network.",
        )
    identifier = known.lower() if known.lower() in HUB_LICENCES else "other"
    return identifier, f"{known}, inherited from the teacher {_code(network)}."


def _front_matter(
    subject: Subject, formats: Mapping[str, Format], licence: str, command: str
) -> str:
    facts: dict[str, Any] = {"license": licence}
    # With this name the hub's page shows lines that load the network as timm's own.
    if "timm" in formats and subject.config.network not in CHANGES:
        facts["library_name"] = "timm"
    facts["pipeline_tag"] = "image-feature-extraction"
    facts["tags"] = [
        "image-feature-extraction",
        "self-supervised-learning",
        *(["timm"] if "timm" in formats else []),
    ]
    if command == "distill":
        facts["tags"] += ["knowledge-distillation", "seed"]
    return "\n".join(
        ["---", *(f"{key}: {json.dumps(value)}" for key, value in facts.items()), "---"]
    )


def _summary(subject: Subject, command: str, options: Mapping[str, Any]) -> str:
    encoder = subject.student.encoder
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
    name = subject.architecture
    network = _code(subject.config.network) if name is None else f"timm's {_code(name)}"
    if subject.config.args:
        network += f" with {_code(json.dumps(subject.config.args))}"
    if subject.config.network in CHANGES:
        network += f" with {CHANGES[subject.config.network][0]}"
    teacher = _code(options.get("teacher.network", _UNKNOWN))
    how = {
        "distill": f"It was distilled, without labels, from the teacher {teacher}.",
        "pretrain": "It was trained as MoCo-V2 "
        "([arXiv:2003.04297](https://arxiv.org/abs/2003.04297)), without a teacher.",
    }
    if command == "distill" and options.get("objective.name") == "seed":
        how["distill"] = (
            f"It learned, without labels, to see the similarities between images that its teacher "
            f"{teacher} sees (SEED, [arXiv:2101.04731](https://arxiv.org/abs/2101.04731))."
        )
    facts = f"{num_parameters:,} parameters, features of width {subject.student.num_features}"
    return f"The network is {network}: {facts}. {how.get(command, '')}".rstrip()


def _loading(subject: Subject, formats: Mapping[str, Format]) -> str:
    views = subject.eval_views
    size, resize = views["eval_size"], views["eval_resize"]
    parts = [
        f"Images: shorter side resized to {resize} px (bilinear, antialiased), centre of {size} x "
        f"{size} px, values from 0 to 1, normalised with mean {views['mean']} and std "
        f"{views['std']}. In this folder, with `images` [N, 3, {size}, {size}]:"
    ]
    if subject.config.network in CHANGES and "timm" in formats:
        plain = _code(subject.architecture)
        parts.append(
            f"**timm's own {plain} takes these weights without an error and gives other features: "
            "load.py is needed.**"
        )
    parts += [f"{name}:\n\n```python\n{each.lines(subject)}\n```" for name, each in formats.items()]
    if "timm" in formats and subject.config.network not in CHANGES:
        parts.append(
            "timm loads the folder by itself too: "
            '`timm.create_model("local-dir:PATH", pretrained=True)`.'
        )
    return "\n\n".join(parts)


def _training(
    subject: Subject, origin: WeightsOrigin, options: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    header = origin.header
    decay = header.get("ema_decay")
    student = subject.name if decay is None else subject.name.removesuffix(SUFFIX)
    epochs = options.get(f"students.{student}.epochs")
    rows: list[tuple[str, Any]] = [
        ("Steps trained", header.get("step")),
        ("Images", header.get("inputs", {}).get("data")),
    ]
    # The header has the numbers that batch_size=auto and effective_neighbours came to.
    found = {**options, "batch_size": header.get("batch_size", options.get("batch_size"))}
    if "tau_teacher" in header:
        found["objective.tau_teacher"] = header["tau_teacher"]
    rows += [(name, found[key]) for name, key in _MADE.items() if found.get(key) is not None]
    if options.get("views.mixup"):
        rows.append(("Mixup", "each view with one of another image"))
    if weight := options.get("objective.dense_weight"):
        rows.append(("Weight of the comparison of maps", weight))
    if phases := options.get("views.resolution"):
        unit = "step" if options.get("steps") else "epoch"
        shown = ", ".join(
            f"from {unit} {first} on {' and '.join(map(str, sizes))}" for first, *sizes in phases
        )
        rows.append(("Sides of global views in pixels", shown))
    if decay is not None:
        rows.append(("Weights", f"moving average over the steps, of which each keeps {decay}"))
    if epochs is not None:
        rows.append(("Epochs of this network", epochs))
    if header["student"].get("init"):
        rows.append(("Started from", Path(header["student"]["init"]).name))
    if header["student"].get("pretrained"):
        start, licence = _pretrained(header["student"])
        rows.append(("Started from", f"timm's weights {start}, {licence or _UNKNOWN}"))
    hidden = header["student"].get("hidden_dim")
    return [
        *rows,
        (
            "Hidden width of the projection head",
            "as the feature" if hidden is None else hidden or "none: one linear layer",
        ),
    ]


def _teacher(
    header: Mapping[str, Any], options: Mapping[str, Any], spec: TeacherSpec
) -> list[tuple[str, Any]]:
    official = options.get("teacher.checkpoint") is None
    return [
        ("Name", options.get("teacher.name") or options.get("teacher.network")),
        ("Network", spec.network),
        ("Self-supervised method", options.get("teacher_ssl.name") if spec.network else None),
        ("Epochs of its training", spec.epochs),
        ("Published linear top-1 on ImageNet-1k, %", spec.top1),
        (
            "Weights",
            (spec.url or "of the library")
            if official
            else "a file that the user gave; the published numbers may be those of other weights",
        ),
        ("Fingerprint of its weights", header.get("inputs", {}).get("teacher")),
    ]


def _evaluations(name: str, origin: WeightsOrigin) -> list[str]:
    """Returns a table and its protocol for each results file about exactly these weights."""
    parts = []
    for content, numbers in results_about(origin.results, name, origin.sha256):
        protocol = {key: value for key, value in content["protocol"].items() if key != "students"}
        stamp = json.dumps(
            {"protocol": protocol, "versions": content.get("versions", {})}, indent=2
        )
        evaluation = content["evaluation"]
        kind = EVALUATIONS.get(evaluation)
        parts += [
            f"### {_name(evaluation)}" if kind is None else f"### {evaluation}: {kind.title}",
            markdown_table(
                ["measure", "%"], [[_name(key), f"{value:.2f}"] for key, value in numbers.items()]
            ),
            f"<details><summary>Protocol</summary>\n\n```json\n{stamp}\n```\n\n</details>",
        ]
    return parts or ["None is known for these weights."]


def _fewer_bits(kept: Mapping[str, Kept], kept_on: str) -> list[str]:
    """Returns a section on formats of fewer bits; nothing if there are none."""
    if not kept:
        return []
    return [
        "## Fewer bits",
        f"{kept_on} The cosine is the mean over images of that between a file's features and the "
        "network's, both less the mean of the network's. `onnx` is the network itself, in float32.",
        kept_table(kept),
    ]


def _list(rows: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(
        f"- {name}: {_UNKNOWN if value is None else _code(value)}" for name, value in rows
    )


def _name(text: str) -> str:
    """Returns a name as it is if no character of it is Markdown or HTML, otherwise as code."""
    return text if re.fullmatch(r"[\w.+ -]*", text) else _code(text)


def _code(value: object) -> str:
    """Returns `value` as Markdown code on one line, in which nothing is Markdown or HTML."""
    text = " ".join(str(value).replace("`", "'").split())
    return f"`{text}`"
