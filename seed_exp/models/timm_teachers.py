"""Facts about well-known encoders with weights in timm, which are teachers by a short name."""

from __future__ import annotations

from typing import NamedTuple


class TimmTeacher(NamedTuple):
    """Facts about a network of timm with published weights; None = unknown."""

    name: str
    """Its name in timm."""
    family: str
    """Key of FAMILIES."""
    parameters: int
    """Parameters of the encoder, without a classifier."""
    top1: float | None = None
    """Top-1 accuracy in linear evaluation on ImageNet-1k, percent, of DINOv2's README."""


class Family(NamedTuple):
    """Facts about networks that were published together."""

    method: str
    """Method of their training without labels."""
    paper: str
    """Paper that describes it."""
    licence: str
    """Licence of the weights, as timm states it."""
    gate: str | None
    """Who has to agree before a download."""


FAMILIES = {
    "dinov2": Family(
        "DINOv2",
        "arXiv:2304.07193",
        "Apache-2.0",
        "none",
    ),
    "dinov2_reg": Family(
        "DINOv2 with registers",
        "arXiv:2309.16588",
        "Apache-2.0",
        "none",
    ),
    "dinov3": Family(
        "DINOv3",
        "arXiv:2508.10104",
        "DINOv3-License",
        "Meta gives its own files on request only; of timm's copies, used here, no gate is known",
    ),
    "eupe": Family(
        "EUPE",
        "arXiv:2603.22387",
        "FAIR-Noncommercial-Research-License",
        None,
    ),
    "mobileclip2": Family(
        "MobileCLIP2, images with texts",
        "arXiv:2508.20691",
        "Apple-AMLR",
        None,
    ),
    "siglip2": Family(
        "SigLIP 2, images with texts",
        "arXiv:2502.14786",
        "Apache-2.0",
        None,
    ),
}

TIMM_TEACHERS: dict[str, TimmTeacher] = {
    "dinov2_s": TimmTeacher("vit_small_patch14_dinov2.lvd142m", "dinov2", 22_056_192, 81.1),
    "dinov2_b": TimmTeacher("vit_base_patch14_dinov2.lvd142m", "dinov2", 86_579_712),
    "dinov2_l": TimmTeacher("vit_large_patch14_dinov2.lvd142m", "dinov2", 304_367_616),
    "dinov2_g": TimmTeacher("vit_giant_patch14_dinov2.lvd142m", "dinov2", 1_136_479_232),
    "dinov2_s_reg": TimmTeacher("vit_small_patch14_reg4_dinov2.lvd142m", "dinov2_reg", 22_057_344),
    "dinov2_b_reg": TimmTeacher("vit_base_patch14_reg4_dinov2.lvd142m", "dinov2_reg", 86_582_016),
    "dinov2_l_reg": TimmTeacher("vit_large_patch14_reg4_dinov2.lvd142m", "dinov2_reg", 304_370_688),
    "dinov2_g_reg": TimmTeacher(
        "vit_giant_patch14_reg4_dinov2.lvd142m", "dinov2_reg", 1_136_483_840
    ),
    "dinov3_s": TimmTeacher("vit_small_patch16_dinov3.lvd1689m", "dinov3", 21_586_944),
    "dinov3_s_plus": TimmTeacher("vit_small_plus_patch16_dinov3.lvd1689m", "dinov3", 28_683_264),
    "dinov3_b": TimmTeacher("vit_base_patch16_dinov3.lvd1689m", "dinov3", 85_641_216),
    "dinov3_l": TimmTeacher("vit_large_patch16_dinov3.lvd1689m", "dinov3", 303_079_424),
    "dinov3_h_plus": TimmTeacher("vit_huge_plus_patch16_dinov3.lvd1689m", "dinov3", 840_509_440),
    "dinov3_convnext_t": TimmTeacher("convnext_tiny.dinov3_lvd1689m", "dinov3", 27_820_128),
    "dinov3_convnext_s": TimmTeacher("convnext_small.dinov3_lvd1689m", "dinov3", 49_454_688),
    "dinov3_convnext_b": TimmTeacher("convnext_base.dinov3_lvd1689m", "dinov3", 87_566_464),
    "dinov3_convnext_l": TimmTeacher("convnext_large.dinov3_lvd1689m", "dinov3", 196_230_336),
    "eupe_t": TimmTeacher("vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", "eupe", 5_489_664),
    "eupe_s": TimmTeacher("vit_small_patch16_dinov3_qkvb.eupe_lvd1689m", "eupe", 21_596_160),
    "eupe_b": TimmTeacher("vit_base_patch16_dinov3_qkvb.eupe_lvd1689m", "eupe", 85_659_648),
    "eupe_convnext_t": TimmTeacher("convnext_tiny.eupe_lvd1689m", "eupe", 27_820_128),
    "eupe_convnext_s": TimmTeacher("convnext_small.eupe_lvd1689m", "eupe", 49_454_688),
    "eupe_convnext_b": TimmTeacher("convnext_base.eupe_lvd1689m", "eupe", 87_566_464),
    "mobileclip2_s0": TimmTeacher("fastvit_mci0.apple_mclip2_dfndr2b", "mobileclip2", 10_882_176),
    "mobileclip2_s2": TimmTeacher("fastvit_mci2.apple_mclip2_dfndr2b", "mobileclip2", 35_159_360),
    "mobileclip2_b": TimmTeacher(
        "vit_base_mci_224.apple_mclip2_dfndr2b", "mobileclip2", 85_955_328
    ),
    "mobileclip2_s3": TimmTeacher("fastvit_mci3.apple_mclip2_dfndr2b", "mobileclip2", 122_875_584),
    "mobileclip2_s4": TimmTeacher("fastvit_mci4.apple_mclip2_dfndr2b", "mobileclip2", 318_638_336),
    "siglip2_b": TimmTeacher("vit_base_patch16_siglip_224.v2_webli", "siglip2", 92_884_224),
    "siglip2_l": TimmTeacher("vit_large_patch16_siglip_256.v2_webli", "siglip2", 315_956_224),
    "siglip2_so400m": TimmTeacher("vit_so400m_patch14_siglip_224.v2_webli", "siglip2", 427_680_704),
    "siglip2_g": TimmTeacher("vit_giantopt_patch16_siglip_256.v2_webli", "siglip2", 1_163_168_256),
}
"""Teachers by the name of their option; their weights are those of ORG timm on the hub."""


def hub_repository(teacher: TimmTeacher) -> str:
    """Repository of the weights on the Hugging Face hub."""
    return f"timm/{teacher.name}"
