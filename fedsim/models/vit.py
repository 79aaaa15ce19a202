"""A small vision transformer (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from torch import nn

from fedsim.data.images import ImageShape


def vit_tiny(classes: int, image: ImageShape) -> nn.Module:
    """torchvision's VisionTransformer in the size ViT-Ti (Touvron et al. 2021) on patches of 4x4 pixels, no dropout.

    (B, 3, S, S) images, S a multiple of 4 -> (B, classes) logits; 5.4 million parameters.
    """
    from torchvision.models import VisionTransformer  # takes a second

    _, height, _ = image
    model: nn.Module = VisionTransformer(
        image_size=height,
        patch_size=4,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=classes,
    )
    return model
