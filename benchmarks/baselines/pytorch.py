"""PyTorch, tuned for CPUs as in its tuning guide: channels_last, fused optimizer, images gathered from one tensor."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.runner import Workload
from cifar_flax.runtime.environment import usable_cores

VERSIONS = {"torch": torch.__version__}


class Runner:
    def __init__(self, workload: Workload):
        config = workload.config
        torch.manual_seed(config.seed)
        torch.set_num_threads(usable_cores())
        self._config, self._batch_size = config, config.train.batch_size
        build = cnn if config.model.name == "cnn" else airbench
        self._model = build(config.model).to(memory_format=torch.channels_last)
        self._forward = torch.compile(self._model) if os.environ.get("COMPILE") else self._model
        self._optimizer = optimizer(config, self._model)
        self._learning_rates = workload.learning_rates.tolist()
        self._train = torch.from_numpy(workload.train_images), torch.from_numpy(workload.train_labels).long()
        self._test = torch.from_numpy(workload.test_images), torch.from_numpy(workload.test_labels).long()
        self._mean, self._std = torch.tensor(workload.mean), torch.tensor(workload.std)
        self._order, self._done = torch.empty(0, dtype=torch.long), 0

    def train(self, steps: int) -> None:
        self._model.train()
        for _ in range(steps):
            image, label = self._next_batch()
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rates[self._done]
            self._optimizer.zero_grad(set_to_none=True)
            logits = self._forward(self._normalize(self._augment(image)))
            F.cross_entropy(logits, label, label_smoothing=self._config.train.label_smoothing).backward()
            self._optimizer.step()
            self._done += 1

    @torch.inference_mode()
    def evaluate(self, batch_size: int) -> float:
        self._model.eval()
        pairs = zip(*(tensor.split(batch_size) for tensor in self._test), strict=True)
        hits = sum((self._forward(self._normalize(image)).argmax(1) == label).sum() for image, label in pairs)
        return float(hits) / len(self._test[1])

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        images, labels = self._train
        if len(self._order) < self._batch_size:
            self._order = torch.cat([self._order, torch.randperm(len(labels))])
        index, self._order = self._order[: self._batch_size], self._order[self._batch_size :]
        return images[index], labels[index]

    def _normalize(self, image: Tensor) -> Tensor:
        """Convert uint8 [B, H, W, C] to float32 [B, C, H, W], in channels-last memory format."""
        return ((image.float() - self._mean) / self._std).permute(0, 3, 1, 2)

    def _augment(self, image: Tensor) -> Tensor:
        """Flip and crop (reflect padding) by gathering the source rows and columns of each image at once."""
        settings, (batch, height, width, _) = self._config.augment, image.shape
        if settings.flip == "none" and not settings.crop_padding:
            return image
        rows, columns = (
            (torch.arange(size) + torch.randint(-settings.crop_padding, settings.crop_padding + 1, (batch, 1)))
            for size in (height, width)
        )
        rows, columns = (
            size - 1 - (size - 1 - source.abs()).abs() for size, source in ((height, rows), (width, columns))
        )
        if settings.flip == "random":
            columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
        return image[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def cnn(config: Any, image_size: int = 32) -> nn.Module:
    """Return the reference network for images [3, image_size, image_size] and 10 classes; it returns logits."""
    pooled = (image_size - 2) // 2
    model = nn.Sequential(
        nn.Conv2d(3, config.width, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(config.width, eps=1e-3, momentum=0.01),
        nn.Dropout(config.conv_dropout),
        nn.Flatten(),
        nn.Linear(pooled * pooled * config.width, config.hidden),
        nn.ReLU(),
        nn.Dropout(config.hidden_dropout),
        nn.Linear(config.hidden, 10),
    )
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


class Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def airbench(config: Any) -> nn.Module:
    """Return airbench's network, initialized as with `init="muon"`, but with a random whitening kernel."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 2), nn.GELU()]
    layers[0].weight.requires_grad = False
    c_in = 24
    for width in config.widths:
        for number in range(config.depth):
            conv = nn.Conv2d(c_in if number == 0 else width, width, 3, padding=1, bias=False)
            nn.init.dirac_(conv.weight.data[: conv.in_channels])
            norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
            norm.weight.requires_grad = False
            layers += [conv, nn.MaxPool2d(2), norm, nn.GELU()] if number == 0 else [conv, norm, nn.GELU()]
        c_in = width
    head = nn.Linear(c_in, 10, bias=False)
    head.weight.data /= head.weight.data.std()
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), head, Scale(1 / c_in))


def optimizer(config: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer with learning rate 1; one-dimensional tensors (biases, BatchNorm) have no weight decay."""
    settings = config.optim
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    if settings.name == "sgd":
        momentum = settings.momentum or 0.0
        return torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=momentum > 0, fused=True)
    return torch.optim.AdamW(groups, lr=1.0, eps=settings.eps or 1e-8, fused=True)
