"""Features of VGG16 and VGG19 (Simonyan, Zisserman 2015), trained by others: the ground of perceptual and
style losses.

Weights are torchvision's (`vgg19-dcbb9e9d.pth`, `vgg16-397923af.pth`), keys `features.N.weight`; layers are
named as in the papers, relu5_4 being the fourth convolution of the fifth group, activated, and conv5_4 the
same before its activation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastgan.layers import Conv2d

# convolutions in each group; a pooling ends a group
GROUPS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
WIDTHS = (1, 2, 4, 8, 8)
# of the images that the weights were trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def layer_names(kind: str) -> list[str]:
    """The layers of "vgg16" or "vgg19" in the order of torchvision's `features`: conv1_1, relu1_1, ...
    pool5."""
    names = []
    for group, count in enumerate(GROUPS[kind], 1):
        for k in range(1, count + 1):
            names += [f"conv{group}_{k}", f"relu{group}_{k}"]
        names.append(f"pool{group}")
    return names


class VGGFeatures(nn.Module):
    """Images to the outputs of some layers of VGG; its weights are not trained.

    Args:
        taps: names of layers, see `layer_names`.
        kind: "vgg16" or "vgg19".
        pooling: "max" as trained, or "average" (Gatys et al. 2016, section 2).
        output: range of the images, "tanh" for [-1, 1] or "sigmoid" for [0, 1].
        width: of the first group; 64 is VGG's, others have no trained weights.

    Raises:
        ValueError: an unknown layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        taps: Sequence[str],
        *,
        kind: str = "vgg19",
        pooling: str = "max",
        output: str = "tanh",
        width: int = 64,
    ) -> None:
        super().__init__()
        names = layer_names(kind)
        if unknown := [name for name in taps if name not in names]:
            raise ValueError(f"VGGFeatures: {unknown[0]} is not a layer of {kind}")
        self.kind, self.names, self.taps = kind, names[: max(map(names.index, taps)) + 1], tuple(taps)
        layers: list[nn.Module] = []
        into = 3
        for name in self.names:
            if name.startswith("conv"):
                out = width * WIDTHS[int(name[4]) - 1]
                layers.append(Conv2d(into, out, 3, padding=1))
                into = out
            elif name.startswith("relu"):
                # not in place: what stands before it may be wanted
                layers.append(nn.ReLU())
            else:
                layers.append(nn.AvgPool2d(2) if pooling == "average" else nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        # of images in the range of `output`
        centre, half = (0.5, 0.5) if output == "tanh" else (0.0, 1.0)
        shape = 1, 3, 1, 1
        self.register_buffer("mean", ((torch.tensor(MEAN) - centre) / half).view(shape), persistent=False)
        self.register_buffer("std", (torch.tensor(STD) / half).view(shape), persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(
        cls,
        state: Mapping[str, Tensor],
        taps: Sequence[str],
        *,
        kind: str = "vgg19",
        pooling: str = "max",
        output: str = "tanh",
    ) -> VGGFeatures:
        """The network with the weights of a state dict of torchvision's.

        Raises:
            ValueError: the state dict of another network; says in a few words why.
        """
        if found := recognise(state):
            if found != kind:
                raise ValueError(f"it holds {found.upper()}, not {kind.upper()}")
        else:
            keys = ", ".join(list(state)[:3])
            raise ValueError(f"it is not torchvision's {kind.upper()}; its keys are {keys}, ...")
        net = cls(taps, kind=kind, pooling=pooling, output=output)
        net.load_state_dict({key: state[key] for key in net.state_dict()})
        return net

    def draw(self, seed: int) -> VGGFeatures:
        """Random weights of a seed, whose features keep the size of the image's values."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                spread = (2 / (9 * layer.in_channels)) ** 0.5
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * spread)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Outputs (N, c, h, w) of the layers, in the order of `taps`, of images (N, 3, H, W), or grey ones.

        Raises:
            ValueError: another number of channels.
        """
        if x.shape[1] not in (1, 3):
            raise ValueError(f"VGGFeatures: images must have 1 or 3 channels, got {x.shape[1]}")
        x = (x - self.mean) / self.std
        found: dict[str, Tensor] = {}
        for name, layer in zip(self.names, self.features):
            x = layer(x)
            if name in self.taps:
                found[name] = x
        return [found[name] for name in self.taps]


def recognise(state: Mapping[str, Tensor]) -> str:
    """Which of torchvision's networks a state dict is of: "vgg16", "vgg19", or an empty string."""
    shapes = {key: tuple(value.shape) for key, value in state.items() if key.startswith("features.")}
    for kind in GROUPS:
        convs: dict[str, tuple[int, ...]] = {}
        into = 3
        for number, name in enumerate(layer_names(kind)):
            if name.startswith("conv"):
                out = 64 * WIDTHS[int(name[4]) - 1]
                convs |= {f"features.{number}.weight": (out, into, 3, 3), f"features.{number}.bias": (out,)}
                into = out
        if shapes == convs:
            return kind
    return ""
