import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from topoflow.model.wind import WindMean, WindRank, rank_along_wind


def centres(rows, columns, dx_km=100.0, dy_km=80.0, north_first=True):
    """Return patch centres relative to the grid's centre, in raster order."""
    x = (torch.arange(columns, dtype=torch.float64) - (columns - 1) / 2) * dx_km
    y = (torch.arange(rows, dtype=torch.float64) - (rows - 1) / 2) * dy_km
    y = y.flip(0) if north_first else y
    return x.repeat(rows), y.repeat_interleave(columns)


def uniform(u, v, rows=4, columns=6):
    return torch.tensor([u, v]).reshape(1, 2, 1, 1).repeat(1, 1, rows, columns)


def test_ranks_are_scipys():
    torch.manual_seed(0)
    x, y = centres(5, 7)
    x, y = x + torch.randn(35), y + torch.randn(35)
    wind = torch.randn(6, 2, 10, 14) * 5
    ranks = rank_along_wind(wind, x, y)
    for sample, rank in zip(wind.double(), ranks, strict=True):
        u, v = sample.mean(dim=(1, 2))
        expected = (rankdata(x * u + y * v) - 1) / 34
        np.testing.assert_allclose(rank, expected, atol=1e-15)


def test_the_most_upwind_is_zero():
    x, y = centres(3, 4)
    west_wind = rank_along_wind(uniform(3.0, 0.0), x, y).reshape(3, 4)
    south_wind = rank_along_wind(uniform(0.0, 3.0), x, y).reshape(3, 4)
    # columns (rows) share the mean of their ranks: 3 tokens each (4 each) of 12
    assert west_wind[0].tolist() == pytest.approx([1 / 11, 4 / 11, 7 / 11, 10 / 11])
    assert south_wind[:, 0].tolist() == pytest.approx([9.5 / 11, 5.5 / 11, 1.5 / 11])  # north first
    assert (west_wind == west_wind[0]).all()
    assert (south_wind == south_wind[:, :1]).all()


def test_ties_off_the_axes_survive_rounding():
    x, y = centres(7, 9, dx_km=0.1, dy_km=0.1)
    direction = 0.7 / 3
    rank = rank_along_wind(uniform(direction, direction), x * 30, y * 30)[0]
    steps = (torch.arange(9).repeat(7) + torch.arange(7).flip(0).repeat_interleave(9)).numpy()
    np.testing.assert_allclose(rank, (rankdata(steps) - 1) / 62, atol=1e-15)


@pytest.mark.parametrize("wind", [(2.0, 0.0), (0.0, -3.0), (1.0, 1.0), (-0.3, 4.7), (0.0, 0.0)])
def test_reversing_the_wind_reverses_the_rank(wind):
    x, y = centres(6, 8, dx_km=50.0, dy_km=50.0)
    field = uniform(*wind) + torch.tensor([1e-3, -1e-3, 0.5, -0.5]).reshape(1, 1, 4, 1)  # varies, same mean
    forth, back = rank_along_wind(field, x, y), rank_along_wind(-field, x, y)
    torch.testing.assert_close(back, 1 - forth, rtol=0, atol=1e-15)


def test_row_order_does_not_matter():
    torch.manual_seed(0)
    wind = torch.randn(3, 2, 12, 16)
    north_first = rank_along_wind(wind, *centres(6, 8)).reshape(3, 6, 8)
    south_first = rank_along_wind(wind.flip(2), *centres(6, 8, north_first=False)).reshape(3, 6, 8)
    assert torch.equal(north_first, south_first.flip(1))


def test_calm_and_single_patch_give_one_half():
    x, y = centres(2, 3)
    still, barely = uniform(0.0, 0.0), uniform(5e-7, 0.0)
    opposed = torch.stack([uniform(4.0, 1.0)[0, :, :2], uniform(-4.0, -1.0)[0, :, :2]], dim=2).reshape(1, 2, 4, 6)
    ranks = rank_along_wind(torch.cat([still, barely, opposed, uniform(1.0, 0.0)]), x, y)
    assert (ranks[:3] == 0.5).all()
    assert (ranks[3] != 0.5).any()
    assert rank_along_wind(uniform(1.0, 2.0), *centres(1, 1)).tolist() == [[0.5]]


def test_embedding_depends_on_the_rank_alone():
    torch.manual_seed(0)
    module = WindRank(16, *centres(3, 4))
    weak, strong, other = module(torch.cat([uniform(1.0, 2.0), uniform(4.0, 8.0), uniform(-1.0, 2.0)]))
    assert torch.equal(weak, strong)
    assert not torch.allclose(weak, other)
    assert weak.shape == (12, 16)


def test_centres_are_not_part_of_the_state():
    assert set(WindRank(16, *centres(3, 4)).state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


def features_of(module, wind_ms):
    """Return what the module's first layer gets."""
    seen = []
    with module.fc1.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[0])):
        assert module(wind_ms).shape == (len(wind_ms), 1, 16)
    return seen[0]


def test_features_of_the_mean_wind_are_numpys():
    torch.manual_seed(0)
    wind = torch.randn(6, 2, 10, 14) * 5 + 3
    mean = wind.double().numpy().mean(axis=(2, 3))
    speed = np.sqrt((mean**2).sum(axis=1, keepdims=True))  # of the mean, not the mean of the speeds
    expected = np.concatenate([mean / 10, mean / speed, speed / 10], axis=1)
    np.testing.assert_allclose(features_of(WindMean(16), wind), expected, rtol=1e-6)


def test_calm_has_no_direction():
    still, barely = uniform(0.0, 0.0), uniform(0.0, 5e-7)
    opposed = torch.stack([uniform(4.0, 1.0)[0, :, :2], uniform(-4.0, -1.0)[0, :, :2]], dim=2).reshape(1, 2, 4, 6)
    features = features_of(WindMean(16), torch.cat([still, barely, opposed, uniform(0.0, 5e-6)]))
    assert (features[:3, 2:4] == 0).all()
    assert features[3, 2:4].tolist() == [0, 1]
    assert torch.isfinite(features).all()


def test_the_order_of_cells_and_autocast_do_not_change_the_mean_wind():
    torch.manual_seed(0)
    module, wind = WindMean(16), torch.randn(3, 2, 12, 16) * 5
    expected = features_of(module, wind)
    assert torch.equal(features_of(module, wind.flip(2, 3)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        features = features_of(module, wind)
    assert features.dtype == torch.float32
    assert torch.equal(features, expected)
