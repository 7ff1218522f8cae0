"""A teacher as a module: encoder, head and what is done to their output, never trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from seed_exp.config.schema import ViewsConfig
from seed_exp.models.folding import fold_batch_norm
from seed_exp.models.inputs import IMAGENET, Inputs, InputSpec
from seed_exp.models.maps import feature_maps, map_of_empty_image
from seed_exp.models.reduction import Reduction
from seed_exp.models.teacher_precision import (
    Overflow,
    callers_dtype,
    computing_in,
    teacher_dtype,
)
from seed_exp.models.trial import features_of_empty_image


class Teacher(nn.Module):
    """An encoder and its projection head, frozen and in evaluation mode whatever the caller does.

    Args:
        encoder: Maps images [N, 3, H, W] to features [N, num_features].
        head: Maps features to embeddings [N, embedding_dim].
        embedding_dim: Width D of the embedding.
        expects: Images on which the encoder was trained.
    """

    def __init__(
        self, encoder: nn.Module, head: nn.Module, embedding_dim: int, expects: InputSpec = IMAGENET
    ) -> None:
        super().__init__()
        self.inputs = Inputs(expects)
        self.encoder = encoder
        self.head = head
        self.reduction: Reduction | None = None
        self.embedding_dim = embedding_dim
        self.fingerprint = ""
        """Hash of the teacher's weights; empty if untrained."""
        self.overflow = Overflow()
        """Whether float16 does not hold its embeddings."""
        self._feature_maps: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = feature_maps
        self.format: torch.dtype | None = None
        """Format of its own in which it computes; None = that of the caller's autocast."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002
        """Stays in evaluation mode: training must not change the teacher's batch statistics."""
        return super().train(False)

    def forward(self, views: Tensor) -> Tensor:
        """Embeddings [N, D] of views [N, 3, S, S].

        They have unit length unless a reduction leaves them their own, are constants for autograd,
        and are float32 also under autocast. The network computes in `format`, by default that of
        `teacher_dtype`, or in float32 once an embedding was not finite in float16. On a GPU the
        passes until that is known return such embeddings too.
        """
        (embeddings,) = self._computed(lambda views: (self.embed(views),), views)
        return embeddings

    def with_maps(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings of `forward`, and the encoder's maps [N, C, h, w], float32.

        The maps are those of `feature_maps`: the encoder's output before it is pooled.
        """

        def both(views: Tensor) -> tuple[Tensor, Tensor]:
            features, maps = self._feature_maps(self.encoder, self.inputs(views))
            return self._embedding(features), maps.float()

        embeddings, maps = self._computed(both, views)
        return embeddings, maps

    def _computed(
        self, function: Callable[[Tensor], Sequence[Tensor]], views: Tensor
    ) -> list[Tensor]:
        """Outputs of a function of views, in the format that `forward` says."""
        device = views.device.type
        dtype = self.format or teacher_dtype(callers_dtype(device), device)
        if dtype is torch.float16 and not self.overflow.seen():
            outputs = self._in(dtype, function, views)
            self.overflow.add(outputs, views.shape)
            if not self.overflow.seen():
                return outputs
        return self._in(torch.float32 if dtype is torch.float16 else dtype, function, views)

    def _in(
        self, dtype: torch.dtype, function: Callable[[Tensor], Sequence[Tensor]], views: Tensor
    ) -> list[Tensor]:
        """The outputs, computed in `dtype`."""
        with torch.inference_mode(), computing_in(dtype, views.device.type):
            outputs = function(views)
        # Clones: an inference tensor itself cannot be saved for a backward pass.
        return [output.clone() for output in outputs]

    def embed(self, views: Tensor) -> Tensor:
        """The embeddings of `forward`, in the caller's autograd mode."""
        return self._embedding(self.encoder(self.inputs(views)))

    def _embedding(self, features: Tensor) -> Tensor:
        embeddings = F.normalize(self.head(features).float(), dim=1)
        return embeddings if self.reduction is None else self.reduction(embeddings)

    @property
    def unit_length(self) -> bool:
        """Whether the embeddings have unit length; a reduction may leave them their own."""
        return self.reduction is None or self.reduction.unit_length

    def at_unit_length(self, embeddings: Tensor) -> Tensor:
        """The teacher's embeddings [N, D], at unit length where they are not yet."""
        return embeddings if self.unit_length else F.normalize(embeddings, dim=1)

    def map_shape(self, size: int) -> tuple[int, int, int]:
        """Shape C, h, w of the maps of views of `size` pixels; errors as `map_of_empty_image`."""
        return map_of_empty_image(self.encoder, size, "the teacher", self.inputs)

    def compile_encoder(self, *, with_maps: bool) -> None:
        """Compiles what takes the time: the encoder, and its form that keeps the maps."""
        self.encoder.compile(dynamic=False)
        if with_maps:
            self._feature_maps = torch.compile(feature_maps, dynamic=False)

    def features(self, views: Tensor) -> Tensor:
        """Pooled encoder outputs [N, num_features], float32 and constants for autograd."""
        with torch.inference_mode(), computing_in(torch.float32, views.device.type):
            features: Tensor = self.encoder(self.inputs(views))
        return features.clone()

    def adapt_to(self, views: ViewsConfig, side: int | None = None) -> None:
        """Prepares the teacher for views of a recipe, which is made for the students.

        Args:
            views: The recipe.
            side: Side in pixels to which it resizes global views of the recipe's own size, and
                others in proportion; None = as the network needs.

        Raises:
            ValueError: the network does not take one of the view sizes, or not that side, or it
                returns no features.
        """
        self.inputs.normalised_with(views.mean, views.std)
        if side is not None:
            self._resize_to(side, views.crops["global"].size)
        width: int | None = getattr(self.encoder, "num_features", None)
        for size in views.sizes:
            seen = self.inputs.size(size)
            features_of_empty_image(
                lambda images: self.encoder(self.inputs(images)),
                size,
                "the teacher",
                width,
                "" if seen == size else f" (resized to {seen} x {seen})",
            )

    def _resize_to(self, side: int, of: int) -> None:
        only, multiple = self.inputs.spec.size, self.inputs.spec.multiple_of
        if (only is not None and side != only) or side % multiple:
            takes = f"{only} pixels only" if only is not None else f"multiples of {multiple} pixels"
            raise ValueError(f"teacher.size={side}: this teacher takes {takes}; choose another")
        self.inputs.resized_by(side, of)

    def reduce_by(self, reduction: Reduction) -> None:
        """Passes all further embeddings through `reduction`."""
        self.reduction = reduction
        self.embedding_dim = reduction.out_dim

    def drop_head(self) -> None:
        """Makes the pooled encoder output the embedding."""
        self.head = nn.Identity().eval()
        self.embedding_dim = self.encoder.num_features  # type: ignore[assignment]

    def normalise_by_batch(self) -> None:
        """Makes batch norm take the statistics of the images at hand, for good.

        Dropout stays off. An embedding then depends on the other images of its forward pass.

        Raises:
            ValueError: there is no batch norm.
        """
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        if not norms:
            raise ValueError(
                "objective.teacher_statistics=batch is for teachers with batch norm, and this one "
                "has none; leave it out"
            )
        for norm in norms:
            norm.running_mean = norm.running_var = None  # then torch takes the batch's

    def fold_batch_norm(self) -> None:
        """Folds the encoder's BN layers into its convolutions, in place.

        The embeddings stay the same up to rounding and take less time.
        """
        fold_batch_norm(self.encoder)
