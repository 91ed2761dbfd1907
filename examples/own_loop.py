"""Train a network of fer_models in a loop of one's own: `python own_loop.py [--data ferplus --root DATA]`."""

import argparse

import torch
from torch.utils.data import DataLoader

import fer_models
from fer_models.data import create_dataset, eval_transform, train_transform
from fer_models.losses import Criterion, Targets

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="jadfer_xs", help="one of `fer info --models`")
parser.add_argument("--data", default="synthetic")
parser.add_argument("--root", help="folder or zip file of the data")
parser.add_argument("--size", type=int, default=64, help="pixels a side")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--steps", type=int, default=0, help="stop an epoch after so many steps")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
train = create_dataset(
    options.data, options.root, "train", transform=train_transform(options.size, imagenet=False)
)
valid = create_dataset(
    options.data, options.root, "valid", transform=eval_transform(options.size, imagenet=False)
)
model = fer_models.create_model(options.model, num_classes=train.num_classes, img_size=options.size).to(
    device
)
criterion = Criterion.for_model(model)  # the system's whole loss: for JADFER cross-entropy and variety
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)

for epoch in range(options.epochs):
    model.train()
    for step, batch in enumerate(DataLoader(train, 64, shuffle=True, drop_last=True, num_workers=1), 1):
        output = model(batch["image"].to(device), full=True)
        loss, parts = criterion(output, Targets(batch["label"].to(device)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == options.steps:
            break
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(batch["image"].to(device)).argmax(1).cpu() == batch["label"]).sum())
            for batch in DataLoader(valid, 64)
        )
    named = ", ".join(f"{name} {float(value):.3f}" for name, value in parts.items())
    print(f"epoch {epoch + 1}: last step's {named}; accuracy {right / len(valid):.3f}", flush=True)
