"""Train a small network with checkpoints. Stopped and started again, it ends with exactly the same numbers.

python docs/examples/train_with_checkpoints.py --steps 25
python docs/examples/train_with_checkpoints.py --steps 40
"""

import argparse

import torch
from torch import nn

from rlinf_lite import numerics
from rlinf_lite.checkpoint import CheckpointManager, Retention

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--save-dir", default="checkpoints")
options = parser.parse_args()

numerics.fix("cpu")  # before anything is computed; "cuda" for a model on a GPU

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

manager = CheckpointManager(options.save_dir, keep=Retention(keep_last=3))
progress = manager.load(model, optimizer) or {"step": 0}  # None if nothing was saved
print(f"starts after step {progress['step']}")

for step in range(progress["step"] + 1, options.steps + 1):
    inputs = torch.randn(64, 8)
    loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    progress = {"step": step, "loss": loss.item()}
    if step % 10 == 0 or step == options.steps:
        manager.save(model, optimizer, progress)

print(f"ends after step {progress['step']}, loss {progress.get('loss')}")
