"""The differentiable resample: Pillow's levels, and the gradient of its weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from davsp.lvlm.resample import resample
from tiny import picture


@pytest.mark.parametrize("kernel", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
@pytest.mark.parametrize(("size", "side"), [(128, 56), (56, 128), (336, 276), (1024, 384), (100, 99)])
def test_resample_is_pillows(kernel, size, side):
    image = picture(3, (size, size))
    canvas = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    expected = torch.from_numpy(np.array(image.resize((side, side), kernel))).permute(2, 0, 1)[None]
    assert torch.equal((resample(canvas, side, kernel) * 255).round().byte(), expected)


def test_the_gradient_of_a_resample_is_that_of_its_weights():
    leaf = torch.rand(1, 3, 20, 20, requires_grad=True)
    (gradient,) = torch.autograd.grad(resample(leaf, 10, Image.Resampling.BILINEAR).sum(), leaf)
    torch.testing.assert_close(gradient.sum(), torch.tensor(300.0))  # every output's weights sum to 1
    with pytest.raises(ValueError, match="no matrix for BOX"):
        resample(leaf, 10, Image.Resampling.BOX)
