"""Batch normalisation of a frozen network, folded into the convolutions in front of it."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

from timm.utils.model import reparameterize_model
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval


def fold_batch_norm(network: nn.Module) -> None:
    """Folds each BatchNorm2d that directly follows a Conv2d into that convolution, in place.

    The network must be in evaluation mode. Its outputs stay the same up to float32 rounding. Layers
    that cannot be folded safely stay as they are: a layer that is called twice, a convolution whose
    output has another user, and every layer of a network that torch.fx cannot trace.
    """
    # A forward() that branches on shapes or values makes tracing fail with errors of nearly every
    # kind.
    try:
        nodes = fx.Tracer().trace(network).nodes
    except Exception:
        return
    modules = dict(network.named_modules())
    uses = Counter(_layer(node) for node in nodes)
    folded: dict[nn.Module, nn.Module] = {}
    for node in nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if (
            not isinstance(source, fx.Node)
            or len(source.users) > 1
            or uses[_layer(source)] > 1
            or uses[_layer(node)] > 1
        ):
            continue
        conv, norm = modules.get(_layer(source)), modules.get(_layer(node))
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
            # In float64, so that only the product is rounded.
            folded[conv] = fuse_conv_bn_eval(deepcopy(conv).double(), deepcopy(norm).double()).to(
                conv.weight.dtype
            )
            folded[norm] = nn.Identity().eval()
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if module in folded:
            network.set_submodule(name, folded[module])


def has_branches(network: nn.Module) -> bool:
    """Whether some layers of timm have parallel branches that one layer can replace (FastViT)."""
    steps = ("fuse", "reparameterize", "switch_to_deploy")
    return any(hasattr(module, step) for module in network.modules() for step in steps)


def reparameterised(network: nn.Module) -> nn.Module:
    """A copy whose parallel branches are one layer each; the network itself if it has none.

    The network must be in evaluation mode. The outputs stay the same up to float32 rounding.
    """
    if not has_branches(network):
        return network
    fused: nn.Module = reparameterize_model(network)
    return fused


def _layer(node: fx.Node) -> str:
    """Name of the layer that a node calls or whose tensor it reads; empty for a function."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""
