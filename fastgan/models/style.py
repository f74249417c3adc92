"""What neural style needs (Gatys, Ecker, Bethge, CVPR 2016): a picture whose pixels are trained, and its
distances from the content of one image and the style of another in the features of VGG."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan import losses
from fastgan.models.vgg import VGGFeatures

# activated, as Caffe's layers of these names are: it computes the activation in place
CONTENT = "relu4_2"
STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
SMALLEST = 16  # pixels of a side: four halvings lie before the last layer


class Picture(nn.Module):
    """One image as the parameter `image` (C, H, W), in the layout that it is given in."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.image = nn.Parameter(start.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The picture (1, C, H, W), whatever x is."""
        return self.image[None]


class StyleDistance(nn.Module):
    """Distances of a picture from the content of one image and the style of another.

    The features of each layer are divided by their mean over the two images: the paper scales the filters of
    its network to a mean activation of one over ImageNet, which is not at hand.

    Args:
        vgg: with the layers (CONTENT, *STYLE).
        content, style: (1, C, H, W), sizes may differ.
        sums: the content as half the sum of squares, as in the paper; False: as the mean, and each layer of
            the style over its squared number of channels, as in the first author's code.
    """

    content: Tensor
    scales: Tensor

    @torch.no_grad()
    def __init__(self, vgg: VGGFeatures, content: Tensor, style: Tensor, *, sums: bool = False) -> None:
        super().__init__()
        self.vgg, self.sums = vgg, sums
        found = list(zip(vgg(content), vgg(style)))
        means = [(a.mean() + b.mean()) / 2 for a, b in found]
        self.register_buffer("scales", 1 / torch.stack(means).clamp_min(1e-6))
        self.register_buffer("content", found[0][0] * self.scales[0])
        for k, (_, of_style) in enumerate(found[1:], 1):
            self.register_buffer(f"gram{k}", losses.gram(of_style * self.scales[k]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, C, H, W) to the distance from the content, of features, and from the style, of Gram matrices, a
        fifth for each layer of the paper's."""
        of_content, *of_style = (features * scale for features, scale in zip(self.vgg(x), self.scales))
        style = x.new_zeros(())
        for k, features in enumerate(of_style, 1):
            wanted: Tensor = getattr(self, f"gram{k}")
            # the paper's 1 / (4 N^2 M^2), of Gram matrices that are sums over M positions
            share = 4 * len(STYLE) if self.sums else len(wanted[0]) ** 2
            style = style + losses.mse(losses.gram(features), wanted) / share
        content = losses.mse(of_content, self.content)
        return content * (of_content.numel() / 2 if self.sums else 1), style
