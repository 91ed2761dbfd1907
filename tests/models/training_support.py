"""What the systems' tests share: a few images that do not change, and a few steps of training on them."""

import torch

from fer_models.losses import Criterion, Targets


def faces(count=64, side=32, classes=8, seed=0):
    """Images of smooth noise, labels in turn, and valence and arousal that the image decides."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    valence_arousal = coarse.flatten(2).mean(2)[:, :2]
    return images, Targets(torch.arange(count) % classes, None, torch.tanh(4 * valence_arousal))


def train(model, images, targets, steps, lr=1e-3, until=None, **overrides):
    """The loss parts of every step; ends early where `until(model)` holds at a tenth step."""
    criterion = Criterion.for_model(model, **overrides)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    history = []
    for step in range(1, steps + 1):
        model.train()
        total, parts = criterion(model(images, full=True), targets)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        history.append({name: part.item() for name, part in parts.items()})
        if until is not None and step % 10 == 0 and until(model):
            break
    return history


@torch.no_grad()
def accuracy(model, images, targets):
    model.eval()
    return (model(images).argmax(1) == targets.label).float().mean().item()


def assert_overfits(model, side=32, classes=8, lr=1e-3):
    images, targets = faces(side=side, classes=classes)
    train(model, images, targets, 200, lr, until=lambda m: accuracy(m, images, targets) == 1.0)
    assert accuracy(model, images, targets) == 1.0
