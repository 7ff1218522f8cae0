"""Any network of timm is a teacher, with its own sizes and normalisation.

Its weights are timm's or those of its authors' files.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.base.files import file_hash
from seed_exp.config.schema import (
    CropConfig,
    Reduce,
    TeacherConfig,
    TeacherEmbedding,
    ViewsConfig,
)
from seed_exp.models import encoders
from seed_exp.models.encoders import input_spec, timm_encoder
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.teachers import build_teacher, untrained_teacher
from seed_exp.models.tokens import TokenPooling

BEFORE_SWIN_TOOK_SIZES = pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < (1, 0, 31),
    reason="this timm takes Swin's images at 224 px only",
)
NAME = "test_vit"  # timm's smallest: patches of 16 px, width 64, images of 160 px


def views(*sizes: int, mean: float = 0.45, std: float = 0.22) -> ViewsConfig:
    crops = {name: CropConfig(size) for name, size in zip(("global", "local"), sizes, strict=False)}
    return ViewsConfig("x", crops, mean=[mean] * 3, std=[std] * 3)


def network(name: str = NAME) -> nn.Module:
    """A network as timm gives it, with a classifier; every tensor differs from a fresh one's."""
    torch.manual_seed(5)
    model = timm.create_model(
        name, num_classes=3, **({"dynamic_img_size": True} if "vit" in name else {})
    )
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        features: Tensor = F.normalize(
            model.forward_head(model.forward_features(images), pre_logits=True), dim=1
        )
    return features


@pytest.fixture
def file(tmp_path: Path) -> str:
    save_file(network().state_dict(), tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


def built(file: str, name: str = NAME) -> Teacher:
    return build_teacher(TeacherConfig("timm", name, checkpoint=file), "moco_v2")


def test_the_embedding_is_the_pooled_feature(file: str) -> None:
    teacher = built(file)
    assert teacher.embedding_dim == 64
    assert teacher.fingerprint == file_hash(Path(file))
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(teacher(images), pooled(network(), images))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_images_are_what_the_network_was_trained_on_whatever_the_views_are(file: str) -> None:
    teacher = built(file)
    teacher.adapt_to(views(64, 40))
    pixels = torch.rand(2, 3, 40, 40)
    expected = F.interpolate((pixels - 0.5) / 0.5, size=(48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        teacher((pixels - 0.45) / 0.22), pooled(network(), expected), atol=1e-5, rtol=0
    )


def test_a_teacher_sees_global_views_at_its_own_size_and_others_in_proportion(file: str) -> None:
    teacher, as_it_needs = built(file), built(file)
    teacher.adapt_to(views(64, 40), 160)
    as_it_needs.adapt_to(views(64, 40))
    assert [teacher.inputs.size(size) for size in (64, 40)] == [160, 112]
    seen = torch.randn(2, 3, 64, 64)
    large = F.interpolate(seen, size=(160, 160), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(seen), as_it_needs(large), atol=1e-5, rtol=0)
    for size, only, takes in ((150, None, "multiples of 16"), (160, 224, "224 pixels only")):
        refusing = built(file)
        refusing.inputs.spec = dataclasses.replace(refusing.inputs.spec, size=only)
        with pytest.raises(ValueError, match=rf"teacher\.size={size}: this teacher takes {takes}"):
            refusing.adapt_to(views(64, 40), size)


@pytest.mark.parametrize(
    ("name", "size", "multiple_of"),
    [
        ("vit_small_patch14_dinov2.lvd142m", None, 14),
        ("vit_tiny_patch16_224", None, 16),
        pytest.param("swin_tiny_patch4_window7_224", None, 4, marks=BEFORE_SWIN_TOOK_SIZES),
        ("beit_base_patch16_224", 224, 1),
        ("mixer_s16_224", 224, 1),
        ("convnext_atto", None, 1),
        ("resnet26", None, 1),
    ],
)
def test_sizes_are_those_that_the_network_takes(
    name: str, size: int | None, multiple_of: int
) -> None:
    with torch.device("meta"):  # random weights of these networks take seconds
        encoder = timm_encoder(name)
    spec = input_spec(encoder)
    assert (spec.size, spec.multiple_of) == (size, multiple_of)
    config = timm.get_pretrained_cfg(name)
    assert (spec.mean, spec.std) == (list(config.mean), list(config.std))
    teacher = Teacher(encoder, nn.Identity(), encoder.num_features, spec)
    with torch.device("meta"):
        teacher.to("meta")
        for side in (224, 96):
            assert teacher.embed(torch.zeros(1, 3, side, side)).shape == (1, encoder.num_features)


def test_a_vit_14_sees_224_as_it_is_and_96_as_98() -> None:
    spec = input_spec(timm_encoder("vit_small_patch14_dinov2.lvd142m"))
    inputs = Teacher(nn.Identity(), nn.Identity(), 3, spec).inputs
    assert [inputs.size(size) for size in (224, 98, 96, 84)] == [224, 98, 98, 84]
    assert (spec.mean, spec.interpolation) == ([0.485, 0.456, 0.406], "bicubic")


@pytest.mark.parametrize(
    ("name", "options", "num_prefix"),
    [
        ("test_vit", {}, 1),
        ("test_vit", {"reg_tokens": 2}, 3),
        ("test_vit", {"global_pool": "avg"}, 1),  # the norm is behind the pooling
        ("vit_tiny_patch16_dinov3_qkvb", {"depth": 2}, 5),
    ],
)
@pytest.mark.parametrize("part", ["cls", "mean_patch", "cls+mean_patch"])
def test_an_embedding_of_tokens_is_what_timm_pools(
    name: str, options: dict[str, Any], num_prefix: int, part: str
) -> None:
    torch.manual_seed(0)
    vit = timm_encoder(name, **options).eval()
    for parameter in vit.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = vit.forward_features(images)
        assert tokens.shape[1] == num_prefix + 16
        mean = sum(tokens[:, num_prefix + number] for number in range(16)) / 16
        parts = {"cls": tokens[:, 0], "mean_patch": mean}
        expected = torch.cat([vit.fc_norm(parts[one]) for one in part.split("+")], 1)
        features = TokenPooling(vit, TeacherEmbedding[part])(images)
        torch.testing.assert_close(features, expected)
        if {"token": "cls", "avg": "mean_patch"}[vit.global_pool] == part:
            torch.testing.assert_close(features, vit(images))


def test_an_embedding_of_tokens_has_its_own_width_and_key(file: str) -> None:
    images = torch.randn(2, 3, 160, 160)
    found = {}
    for part in TeacherEmbedding:
        config = TeacherConfig("timm", NAME, checkpoint=file, embedding=part)
        teacher = build_teacher(config, "")
        teacher.adapt_to(views(64, 40))
        assert teacher.embedding_dim == untrained_teacher(config, "").embedding_dim
        assert teacher(images).shape == (2, teacher.embedding_dim)
        assert not any(module.training for module in teacher.modules())
        found[part.value] = teacher(images)
    assert found["cls+mean_patch"].shape == (2, 128)
    assert torch.equal(found["head"], found["features"])
    assert not torch.allclose(found["cls"], found["mean_patch"], atol=1e-2)


def test_a_network_without_such_tokens_is_refused_with_what_it_has() -> None:
    config = TeacherConfig("timm", "test_resnet", embedding=TeacherEmbedding["mean_patch"])
    with pytest.raises(ValueError, match=r"ResNet has no tokens of patches: .*embedding=features"):
        untrained_teacher(config, "")
    without_class = timm_encoder("test_vit2")  # its only prefix is a register
    with pytest.raises(ValueError, match=r"needs a class token.*embedding=mean_patch or features"):
        TokenPooling(without_class, TeacherEmbedding["cls+mean_patch"])
    assert TokenPooling(without_class, TeacherEmbedding["mean_patch"]).num_features == 64


@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_pytorch_files_with_a_container_are_read(tmp_path: Path, container: str | None) -> None:
    tensors = network().state_dict()
    torch.save(
        tensors if container is None else {"epoch": 1, container: tensors}, tmp_path / "x.pth"
    )
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(built(str(tmp_path / "x.pth"))(images), pooled(network(), images))


def test_a_file_in_the_names_of_the_authors_is_converted(tmp_path: Path) -> None:
    # DINOv2's file: other names for the register tokens, a mask token that only its training needs,
    # positions of the class token.
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    reference = timm_encoder(name).eval()
    tensors = {
        key.replace("reg_token", "register_tokens"): tensor
        for key, tensor in reference.state_dict().items()
    }
    class_position = torch.zeros(1, 1, tensors["pos_embed"].shape[2])
    original = {
        **tensors,
        "pos_embed": torch.cat([class_position, tensors["pos_embed"]], 1),
        "mask_token": torch.zeros(1, 384),
    }
    torch.save(original, tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    teacher = built(str(tmp_path / "dinov2_vits14_reg4_pretrain.pth"), name)
    for key, tensor in reference.state_dict().items():
        torch.testing.assert_close(teacher.encoder.state_dict()[key], tensor, msg=key)


def test_a_file_without_counters_of_batches_is_whole(tmp_path: Path) -> None:
    name = "test_resnet"
    tensors = {
        key: value
        for key, value in network(name).state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    save_file(tensors, tmp_path / "resnet.safetensors")
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(
        built(str(tmp_path / "resnet.safetensors"), name)(images), pooled(network(name), images)
    )


def test_weights_that_do_not_fit_are_refused_and_never_loaded_in_part(
    tmp_path: Path, file: str
) -> None:
    with pytest.raises(
        ValueError,
        match=r"vit\.safetensors does not fit the encoder vit_tiny_patch16_224 \(timm's names\)",
    ):
        built(file, "vit_tiny_patch16_224")
    tensors = network().state_dict()
    del tensors["blocks.3.attn.qkv.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"missing blocks\.3\.attn\.qkv\.weight"):
        built(str(tmp_path / "less.safetensors"))
    save_file(
        {f"module.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "other.safetensors"
    )
    with pytest.raises(ValueError, match=r"missing cls_token.*unexpected module\.") as raised:
        built(str(tmp_path / "other.safetensors"))
    assert "\n" not in str(raised.value)


def test_unknown_names_and_missing_ones_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"timm has no network 'vit_tiny_patch17'; did you mean 'vit_"
    ):
        build_teacher(TeacherConfig("timm", "vit_tiny_patch17"), "")
    with pytest.raises(
        ValueError,
        match=r"needs the network's name in timm.*teacher\.name=vit_small_patch14_dinov2",
    ):
        build_teacher(TeacherConfig("timm"), "")
    with pytest.raises(
        ValueError, match=r"teacher\.name=x is only for teacher=timm; this teacher is swav_r50"
    ):
        TeacherConfig("swav_r50", "x")


@pytest.mark.parametrize("name", [NAME, "hf-hub:org/model"])
def test_a_download_that_fails_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    create = timm.create_model

    def offline(model: str, *, pretrained: bool, **options: object) -> nn.Module:
        if pretrained or ":" in model:
            raise OSError("Name or service not known\nand much more")
        return create(model, pretrained=False, **options)

    monkeypatch.setattr(encoders.timm, "create_model", offline)
    expected = (
        rf"timm cannot load {re.escape(name)} \(Name or service not known\); "
        r".*teacher\.checkpoint=PATH$"
    )
    with pytest.raises(ValueError, match=expected):
        build_teacher(TeacherConfig("timm", name), "")


def test_downloaded_weights_are_fingerprinted_by_their_content(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create = timm.create_model

    def online(model: str, *, pretrained: bool, **options: object) -> nn.Module:
        torch.manual_seed(seed)
        return create(model, pretrained=False, **options)

    monkeypatch.setattr(encoders.timm, "create_model", online)
    fingerprints = []
    for seed in (1, 1, 2):  # noqa: B007  (`online` reads it)
        fingerprints.append(build_teacher(TeacherConfig("timm", NAME), "").fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_without_weights_it_has_the_same_shapes_and_needs_no_file(name: str) -> None:
    teacher = untrained_teacher(TeacherConfig("timm", name, checkpoint="nowhere"), "")
    assert teacher(torch.randn(1, 3, 32, 32)).shape == (1, teacher.embedding_dim)
    teacher.fold_batch_norm()
    reduced = untrained_teacher(TeacherConfig("timm", name, reduce=Reduce.pca, embedding_dim=5), "")
    assert reduced.embedding_dim == 5
    assert reduced(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_views_that_the_network_does_not_take_are_refused_in_one_line() -> None:
    encoder = nn.Conv2d(3, 4, 9)
    with pytest.raises(
        ValueError,
        match=r"the teacher does not take views of 8 x 8 pixels: Calculated padded input size",
    ) as raised:
        Teacher(encoder, nn.Identity(), 4).adapt_to(views(32, 8))
    assert "\n" not in str(raised.value)
