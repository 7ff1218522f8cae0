"""A teacher as a module: encoder, head and what is done to their output, never trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from seed_exp.config.schema import ViewsConfig
from seed_exp.models.folding import fold_batch_norm
from seed_exp.models.inputs import IMAGENET, Inputs, InputSpec
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
        self.format: torch.dtype | None = None
        """Format of its own in which it computes; None = that of the caller's autocast."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002
        """Stays in evaluation mode: training must not change the teacher's batch statistics."""
        return super().train(False)

    def forward(self, views: Tensor) -> Tensor:
        """Embeddings [N, D] of views [N, 3, S, S].

        They have unit length, are constants for autograd, and are float32 also under autocast. The
        network computes in `format`, by default that of `teacher_dtype`, or in float32 once an
        embedding was not finite in float16. On a GPU the passes until that is known return such
        embeddings too.
        """
        device = views.device.type
        dtype = self.format or teacher_dtype(callers_dtype(device), device)
        if dtype is torch.float16 and not self.overflow.seen():
            embeddings = self._in(dtype, views)
            self.overflow.add(embeddings, views.shape)
            if not self.overflow.seen():
                return embeddings
        return self._in(torch.float32 if dtype is torch.float16 else dtype, views)

    def _in(self, dtype: torch.dtype, views: Tensor) -> Tensor:
        """The embeddings, computed in `dtype`."""
        with torch.inference_mode(), computing_in(dtype, views.device.type):
            embeddings = self.embed(views)
        return embeddings.clone()  # an inference tensor itself cannot be saved for a backward pass

    def embed(self, views: Tensor) -> Tensor:
        """The embeddings of `forward`, in the caller's autograd mode."""
        embeddings = F.normalize(self.head(self.encoder(self.inputs(views))).float(), dim=1)
        return embeddings if self.reduction is None else self.reduction(embeddings)

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
        self.embedding_dim = reduction.components.shape[1]

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
