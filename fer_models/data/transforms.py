"""From a uint8 image to a network's input, with or without augmentation."""

import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN_MEAN, PLAIN_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class _Resize(nn.Module):
    """To a square, whatever the sides were: face crops are square but for a few pixels."""

    def __init__(self, size: int):
        super().__init__()
        self.size = [size, size]

    def forward(self, image: Tensor) -> Tensor:
        if list(image.shape[-2:]) == self.size:
            return image
        return F.resize(image, self.size, antialias=True)


def _to_input(imagenet: bool) -> list[nn.Module]:
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else (PLAIN_MEAN, PLAIN_STD)
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std, inplace=True)]


def eval_transform(size: int, *, imagenet: bool = True) -> v2.Compose:
    """uint8 (3, H, W) to float (3, size, size), normalised as for ImageNet, or else to [-1, 1]."""
    return v2.Compose([_Resize(size), *_to_input(imagenet)])


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
) -> v2.Compose:
    """As eval_transform, after a random flip and the augmentations below; 0 switches one off.

    Args:
        turn: degrees either way.
        shift: share of the side, either way.
        zoom: share of the size, either way.
        color: change of brightness, contrast and saturation.
        erase: how often a rectangle of 2 to 20 % is blanked.
        randaugment: that many of RandAugment's operations, with its magnitude of 9.
    """
    steps: list[nn.Module] = [_Resize(size), v2.RandomHorizontalFlip()]
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
    steps += _to_input(imagenet)
    if erase:
        steps.append(v2.RandomErasing(erase, scale=(0.02, 0.2)))
    return v2.Compose(steps)
