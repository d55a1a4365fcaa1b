"""opacus: per-sample gradients, ghost clipping, and torch.func mapped over the samples."""

from collections.abc import Callable
from functools import partial
from typing import Any

import problems
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)


def network(case: str) -> nn.Module:
    """The network of the case, images NCHW."""
    if case == problems.STEP_MLP:
        return nn.Sequential(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def data(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels as tensors."""
    flat = case == problems.STEP_MLP
    x = torch.from_numpy(problems.images(problems.BATCH, flat=flat))
    x = x if flat else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.from_numpy(problems.labels(problems.BATCH)).long()


def engine_step(case: str, mode: str) -> Callable[[], None]:
    """A step of opacus' engine."""
    model, (x, labels) = network(case), data(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=problems.LEARNING_RATE)
    loader = DataLoader(TensorDataset(x, labels), batch_size=problems.BATCH)
    criterion = nn.CrossEntropyLoss()
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        criterion=criterion,
        noise_multiplier=problems.NOISE_MULTIPLIER,
        max_grad_norm=problems.CLIP_NORM,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    if mode == "ghost":
        model, optimizer, criterion, _ = made
    else:
        model, optimizer, _ = made

    def call() -> None:
        optimizer.zero_grad()
        criterion(model(x), labels).backward()
        optimizer.step()

    return call


def functional_step(case: str) -> Callable[[], None]:
    """The same by ``vmap`` of ``grad``, clipped and noised by hand."""
    model, (x, labels) = network(case), data(case)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params: Any, x_i: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(model, params, (x_i[None],))
        return nn.functional.cross_entropy(outputs, label[None])

    gradient = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def call() -> None:
        with torch.no_grad():
            gradients = gradient(params, x, labels)
            squares = sum(g.flatten(1).square().sum(1) for g in gradients.values())
            factors = (problems.CLIP_NORM / squares.sqrt()).clamp(max=1.0)
            for name, g in gradients.items():
                total = torch.tensordot(factors, g, 1)
                total += problems.NOISE_MULTIPLIER * problems.CLIP_NORM * torch.randn_like(total)
                params[name] = params[name] - problems.LEARNING_RATE / problems.BATCH * total

    return call


CASES: dict[str, Callable[[], Callable[[], None]]] = {}
for _case in (problems.STEP_MLP, problems.STEP_CNN):
    CASES[f"{_case}, ghost clipping"] = partial(engine_step, _case, "ghost")
    CASES[f"{_case}, per-sample gradients"] = partial(engine_step, _case, "hooks")
    CASES[f"{_case}, torch.func"] = partial(functional_step, _case)
