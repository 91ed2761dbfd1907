"""Fine-tune with timm's tools, as timm's train script uses them: layer-wise learning rates, mixup, averaged
weights, a schedule by step: `python timm_finetune.py --weights runs/first/best.safetensors`."""

import argparse

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

import fer_models  # noqa: F401  # its models register with timm
from fer_models.data import create_dataset, train_transform
from fer_models.registry import load_weights

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="face2nodes_xs")
parser.add_argument("--weights", help="state dict to start from; its head may have other classes")
parser.add_argument("--data", default="synthetic")
parser.add_argument("--root", help="folder or zip file of the data")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--steps", type=int, default=0, help="stop an epoch after so many steps")
options = parser.parse_args()

model = timm.create_model(options.model, num_classes=7, drop_path_rate=0.1)
if options.weights:
    load_weights(model, options.weights, other_head=True)
size = model.default_cfg["input_size"][-1]
data = create_dataset(
    options.data, options.root, "train", transform=train_transform(size, imagenet=False), classes=7
)
loader = DataLoader(data, 64, shuffle=True, drop_last=True, num_workers=1)
# The earlier the layer, the smaller its rate: by the model's group_matcher
optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.8)
steps = options.steps or len(loader)
scheduler, _ = create_scheduler_v2(
    optimizer, "cosine", num_epochs=options.epochs, step_on_epochs=False, updates_per_epoch=steps
)
mixup, criterion = Mixup(mixup_alpha=0.2, num_classes=7), SoftTargetCrossEntropy()
averaged, update = ModelEmaV3(model, decay=0.999, use_warmup=True), 0

for epoch in range(options.epochs):
    model.train()
    for batch in loader:
        images, targets = mixup(batch["image"], batch["label"])
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update += 1
        scheduler.step_update(update)
        averaged.update(model, step=update)
        if update % steps == 0:
            break
    print(f"epoch {epoch + 1}: last step's loss {loss.item():.3f}", flush=True)
torch.save(averaged.module.state_dict(), "finetuned.pth")
print("averaged weights in finetuned.pth")
