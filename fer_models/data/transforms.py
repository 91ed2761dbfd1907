"""From a uint8 image to a network's input, with or without augmentation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN_MEAN, PLAIN_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """A uint8 image (3, H, W) to (3, height, width), antialiased."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


class _Square(nn.Module):
    """Whatever the sides were: face crops are square but for a few pixels."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        return resize(image, self.size, self.size)


class _ToInput(nn.Module):
    """uint8 to float, normalised."""

    def __init__(self, imagenet: bool):
        super().__init__()
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (PLAIN_MEAN, PLAIN_STD)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (mean, std))

    def forward(self, image: Tensor) -> Tensor:
        return image.float().sub_(self.mean).div_(self.std)


def eval_transform(size: int, *, imagenet: bool = True) -> nn.Module:
    """uint8 (3, H, W) to float (3, size, size), normalised as for ImageNet, or else to [-1, 1]."""
    return nn.Sequential(_Square(size), _ToInput(imagenet))


def train_transform(
    size: int,
    *,
    imagenet: bool = True,
    turn: float = 10.0,
    shift: float = 0.06,
    zoom: float = 0.1,
    color: float = 0.25,
    erase: float = 0.25,
    randaugment: int = 0,
) -> Any:
    """As eval_transform, after a random flip and the augmentations below; 0 switches one off.

    Args:
        turn: degrees either way.
        shift: share of the side, either way.
        zoom: share of the size, either way.
        color: change of brightness, contrast and saturation.
        erase: how often a rectangle of 2 to 20 % is blanked.
        randaugment: that many of RandAugment's operations, with its magnitude of 9.
    """
    from torchvision.transforms import v2  # here: it takes long to import, and prediction does without

    steps: list[nn.Module] = [_Square(size), v2.RandomHorizontalFlip()]
    if turn or shift or zoom:
        steps.append(
            v2.RandomAffine(
                turn, (shift, shift), (1 - zoom, 1 + zoom), interpolation=v2.InterpolationMode.BILINEAR
            )
        )
    if color:
        steps.append(v2.ColorJitter(color, color, color))
    if randaugment:
        steps.append(v2.RandAugment(randaugment, 9, interpolation=v2.InterpolationMode.BILINEAR))
    steps.append(_ToInput(imagenet))
    if erase:
        steps.append(v2.RandomErasing(erase, scale=(0.02, 0.2)))
    return v2.Compose(steps)
