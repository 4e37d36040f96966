import numpy as np
import pytest
import torch

from topoflow.loss import masked_squared_error

SHAPE = (3, 2, 4, 5)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    prediction, y = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    valid = rng.random(SHAPE) < 0.6
    return prediction, y, valid


def as_tensors(prediction, y, valid):
    return (
        torch.tensor(prediction, dtype=torch.float32, requires_grad=True),
        torch.tensor(y, dtype=torch.float32),
        torch.tensor(valid),
    )


def test_sums_and_counts_equal_numpy_float64():
    prediction, y, valid = make_batch()
    sums, counts = masked_squared_error(*as_tensors(prediction, y, valid))
    expected = [((prediction[:, t] - y[:, t])[valid[:, t]] ** 2).sum() for t in range(SHAPE[1])]
    assert sums.detach().numpy() == pytest.approx(expected, rel=1e-6)
    assert counts.tolist() == valid.sum(axis=(0, 2, 3)).tolist()
    assert (sums.dtype, counts.dtype) == (torch.float32, torch.int64)


def test_with_leads_sums_are_by_target_over_all_leads():
    by_lead = [as_tensors(*make_batch(seed)) for seed in (6, 7)]
    stacked = (torch.stack(tensors, dim=1) for tensors in zip(*by_lead, strict=True))  # [B, L, T, H, W]
    sums, counts = masked_squared_error(*stacked)
    expected = [masked_squared_error(*tensors) for tensors in by_lead]
    torch.testing.assert_close(sums, expected[0][0] + expected[1][0])
    assert torch.equal(counts, expected[0][1] + expected[1][1])


def test_gradient_equals_closed_form_of_the_masked_mean():
    prediction, y, valid = make_batch(1)
    x, y_tensor, valid_tensor = as_tensors(prediction, y, valid)
    sums, counts = masked_squared_error(x, y_tensor, valid_tensor)
    (sums.sum() / counts.sum()).backward()
    expected = np.where(valid, 2 * (prediction - y) / valid.sum(), 0)
    assert x.grad.numpy() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["prediction", "y", "both"])
def test_invalid_values_have_zero_gradient_and_no_weight(bad, where):
    prediction, y, valid = make_batch(2)
    clean, _ = masked_squared_error(*as_tensors(prediction, y, valid))
    if where != "y":
        prediction = np.where(valid, prediction, bad)
    if where != "prediction":
        y = np.where(valid, y, bad)
    x, y_tensor, valid_tensor = as_tensors(prediction, y, valid)
    sums, _ = masked_squared_error(x, y_tensor, valid_tensor)
    sums.sum().backward()
    assert torch.equal(sums, clean)
    assert torch.isfinite(x.grad).all()
    assert (x.grad[~valid_tensor] == 0).all()
    assert (x.grad[valid_tensor] != 0).all()


def test_a_valid_value_that_is_not_finite_is_not_hidden():
    prediction, y, valid = make_batch(3)
    valid[0, 1, 0, 0], prediction[0, 1, 0, 0] = True, np.nan
    sums, _ = masked_squared_error(*as_tensors(prediction, y, valid))
    assert torch.isfinite(sums).tolist() == [True, False]


def test_a_batch_without_values_has_no_weight():
    prediction, _, _ = make_batch(4)
    x, y, valid = as_tensors(prediction, np.full(SHAPE, np.nan), np.zeros(SHAPE, dtype=bool))
    sums, counts = masked_squared_error(x, y, valid)
    sums.sum().backward()
    assert sums.tolist() == [0.0, 0.0]
    assert counts.tolist() == [0, 0]
    assert not x.grad.any()


def test_the_mean_does_not_depend_on_how_the_batch_is_divided():
    prediction, y, valid = make_batch(5)
    batch = as_tensors(prediction, y, valid)
    whole_sums, whole_counts = masked_squared_error(*batch)
    parts = [masked_squared_error(*(tensor[i : i + 1] for tensor in batch)) for i in range(SHAPE[0])]
    assert torch.allclose(sum(sums for sums, _ in parts), whole_sums, rtol=1e-6)
    assert torch.equal(sum(counts for _, counts in parts), whole_counts)


def test_bf16_predictions_are_subtracted_in_float32():
    # 1 + 2**-9 is not a bfloat16, so an error formed in bfloat16 would be 0 or 2**-7
    prediction = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    y = torch.full((1, 1, 1, 1), 1 + 2**-9)
    sums, _ = masked_squared_error(prediction, y, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    assert sums.dtype == torch.float32
    assert sums.item() == 2**-18
    sums.sum().backward()
    assert prediction.grad.dtype == torch.bfloat16


def test_shapes_that_would_broadcast_are_refused():
    x = torch.zeros(SHAPE)
    with pytest.raises(AssertionError):
        masked_squared_error(x, x[:, :1], torch.ones(SHAPE, dtype=torch.bool))
