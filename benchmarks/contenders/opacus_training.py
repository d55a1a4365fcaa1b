"""Private training by opacus as its users write it: three modules, eight runs of each.

It needs PyTorch and opacus, and nothing of ntkdp. Run by ``benchmarks/opacus_runs.py``.
"""

import argparse
import csv
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

N_TRAIN, N_TEST = 300, 100
BATCH_SIZE, STEPS, RECORD_EVERY = 75, 80, 8
#: Learning rate, clipping norm and noise multiplier of each module.
SETTINGS = {"mlp": (0.02, 1.0, 3.3), "cnn": (0.1, 1.0, 3.3), "linear": (0.5, 1.0, 3.3)}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(n, 1, 8, 8)`` of standardised pixels and labels, training before test."""
    data = load_digits()
    chosen = np.random.default_rng(0).permutation(len(data.target))[: N_TRAIN + N_TEST]
    images = torch.tensor(data.images[chosen] / 16.0, dtype=torch.float32)[:, None]
    return (images - images.mean()) / images.std(), torch.tensor(data.target[chosen])


def make_module(name: str) -> nn.Module:
    """A module in PyTorch's own initialisation, the same in every process."""
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 10))
    if name == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def train(name: str, seed: int) -> list[dict[str, float]]:
    """One run, recorded as rows of a log."""
    from opacus import PrivacyEngine

    x, y = digits()
    module = make_module(name)
    learning_rate, clip_norm, sigma = SETTINGS[name]
    torch.manual_seed(1 + seed)
    loader = DataLoader(TensorDataset(x[:N_TRAIN], y[:N_TRAIN]), batch_size=BATCH_SIZE)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=learning_rate),
        data_loader=loader,
        noise_multiplier=sigma,
        max_grad_norm=clip_norm,
        poisson_sampling=True,
    )
    rows = [_measured(module, x, y, 0, seed)]
    step = 0
    while step < STEPS:
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(inputs), labels).backward()
            optimizer.step()
            step += 1
            if step % RECORD_EVERY == 0:
                rows.append(_measured(module, x, y, step, seed))
            if step == STEPS:
                break
    return rows


@torch.no_grad()
def _measured(
    module: nn.Module, x: torch.Tensor, y: torch.Tensor, step: int, seed: int
) -> dict[str, float]:
    outputs = module(x)
    right = (outputs.argmax(1) == y).float()
    part = {"": slice(None, N_TRAIN), "test_": slice(N_TRAIN, None)}
    row: dict[str, float] = {"seed": seed, "step": step}
    for name, samples in part.items():
        row[f"{name}loss"] = float(nn.functional.cross_entropy(outputs[samples], y[samples]))
        row[f"{name}accuracy"] = float(right[samples].mean())
    return row


def main() -> None:
    """Write one CSV file for each module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=8)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in SETTINGS:
        rows = [row for seed in range(arguments.runs) for row in train(name, seed)]
        with (arguments.folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
