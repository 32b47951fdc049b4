import pytest
import torch

from metaheed.data.convert import convert
from metaheed.errors import DataError


def test_conversion_by_hand() -> None:
    grey = torch.tensor([[[[0, 100], [200, 255]]]], dtype=torch.uint8)
    same, how = convert(grey, (1, 2, 2))
    assert how is None
    assert same is grey
    rgb, how = convert(grey, (3, 2, 2))
    assert how == "grey repeated as RGB"
    assert torch.equal(rgb, grey.expand(1, 3, 2, 2))
    back, how = convert(rgb, (1, 2, 2))
    assert how == "luminance"
    assert torch.equal(back, grey)
    red = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    red[:, 0] = 255
    assert convert(red, (1, 2, 2))[0].flatten().tolist() == [76] * 4, "0.299 × 255"
    flat = torch.full((2, 3, 8, 6), 77, dtype=torch.uint8)
    resized, how = convert(flat, (1, 5, 7))
    assert how == "luminance, Lanczos from 8×6 to 5×7"
    assert resized.shape == (2, 1, 5, 7)
    assert (resized == 77).all()
    edge = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    edge[:, :, :4] = 255
    assert convert(edge, (1, 4, 4))[0][0, 0, :, 0].tolist()[::3] == [255, 0], "up stays up"
    with pytest.raises(DataError, match=r"images of 2 channels cannot be made into images of 3"):
        convert(torch.zeros(1, 2, 2, 2, dtype=torch.uint8), (3, 2, 2))
