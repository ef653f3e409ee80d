"""The trained head: scale, shape, dtype and gradients for every map of u."""

import pytest
import torch

from ptp_lightning.models.slots.auxiliary_embedding import AuxiliaryEmbedding
from ptp_lightning.models.slots.auxiliary_features import AuxiliaryFeatures
from ptp_lightning.models.slots.continuous_features import RawFloatFeatures
from ptp_lightning.models.slots.stepped_features import BinaryFeatures
from tests.unit.models.test_auxiliary_features import ALL, uniform

HIDDEN_SIZE = 512
HEADS = ["linear", "mlp"]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("features", ALL, ids=repr)
class TestEveryMap:
    def test_output_has_the_requested_scale(self, features: AuxiliaryFeatures, head: str) -> None:
        embedding = AuxiliaryEmbedding(features, head, HIDDEN_SIZE, scale=0.02)
        with torch.no_grad():
            assert 0.6 < embedding(uniform(2000)).square().mean().sqrt() / 0.02 < 1.3

    def test_shape(self, features: AuxiliaryFeatures, head: str) -> None:
        u = uniform(2, 3)
        embedding = AuxiliaryEmbedding(features, head, 8, scale=1.0)
        found = embedding(u)
        assert found.shape == (2, 3, 8)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[1, 2], embedding(u[1, 2]))

    def test_gradient_reaches_every_weight_matrix(self, features: AuxiliaryFeatures, head: str) -> None:
        embedding = AuxiliaryEmbedding(features, head, 8, scale=1.0)
        embedding(uniform(4, 500)).square().sum().backward()
        for name, weight in embedding.named_parameters():
            assert weight.grad is not None
            assert weight.grad.isfinite().all()
            assert weight.grad.any(), name

    def test_follows_the_dtype_of_its_weights(self, features: AuxiliaryFeatures, head: str) -> None:
        embedding = AuxiliaryEmbedding(features, head, 8, scale=1.0).to(torch.bfloat16)
        assert embedding(uniform(3)).dtype == torch.bfloat16


def test_linear_head_is_the_matrix_of_features() -> None:
    embedding = AuxiliaryEmbedding(BinaryFeatures(2), "linear", 3, scale=1.0)
    (weight,) = embedding.parameters()
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]))
    u = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert embedding(u)[:, 0].tolist() == [-11, 9, -9, 11]
    assert embedding(u)[3].tolist() == [11, 22, 33]


def test_mlp_head_is_not_linear_in_its_features() -> None:
    u = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = AuxiliaryEmbedding(RawFloatFeatures(), "mlp", 8, scale=1.0)(u)
    assert not torch.allclose((low + high) / 2, middle, atol=1e-3)
