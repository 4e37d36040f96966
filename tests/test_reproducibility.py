import pytest
import torch

from topoflow.reproducibility import set_tf32


@pytest.mark.parametrize(("enabled", "precision"), [(True, "high"), (False, "highest")])
def test_tf32_is_what_torch_multiplies_with_if_configured(enabled, precision):
    before = torch.get_float32_matmul_precision()
    try:
        set_tf32(enabled)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
