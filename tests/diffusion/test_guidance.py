import pytest
import torch

from masked_diffusion import create_diffusion
from masked_diffusion.diffusion.guidance import (
    Guidance,
    NullLabel,
    constant_weight,
    interval_weight,
    power_cosine_weight,
)
from masked_diffusion.models.tokens import Draw, KeptTokens


def weights_of_250_steps():
    return power_cosine_weight(torch.tensor(create_diffusion("250").timestep_map), cfg_scale=3.8)


def test_power_cosine_weight_is_float32_and_as_counted_in_the_published_setting():
    weights = weights_of_250_steps()
    assert weights.dtype == torch.float32
    assert (weights == 1).sum() == 24
    assert ((weights - 1).abs() <= 1e-2).sum() == 110


def test_power_cosine_weight_rises_from_one_to_the_scale():
    weights = weights_of_250_steps()
    assert weights[0] == pytest.approx(3.8) and weights[-1] == 1
    assert (weights.diff() <= 0).all()


def linear_model(x, t, y):
    """Channels: C of eps, C of variance; each tells the label and its place."""
    out = torch.cat([x, 10 + x], dim=1)
    return out + y.view(-1, 1, 1, 1)


@pytest.mark.parametrize("channels, num_guided", [(4, 3), (3, 3), (1, 1), (5, 5), (16, 16)])
def test_guidance_touches_three_of_four_latent_channels_all_of_others_and_never_the_variance(channels, num_guided):
    x = torch.randn(2, channels, 3, 3)
    t, y = torch.tensor([0, 5]), torch.tensor([1, 2])
    denoise = Guidance(NullLabel(0), weight=lambda t: t + 2.0).lead(linear_model)
    out, cond = denoise(x, t, y), linear_model(x, t, y)
    expected_shift = ((t + 2.0 - 1) * y).view(-1, 1, 1, 1).expand(-1, num_guided, 3, 3)
    torch.testing.assert_close(out[:, :num_guided] - cond[:, :num_guided], expected_shift)
    assert torch.equal(out[:, num_guided:], cond[:, num_guided:])


def test_a_constant_weight_is_the_scale_everywhere():
    weights = constant_weight(torch.tensor([0, 500, 999]), cfg_scale=1.5)
    assert weights.dtype == torch.float32 and weights.tolist() == [1.5] * 3


def test_an_interval_guides_inside_its_ends_and_nowhere_else():
    t = torch.tensor([0, 99, 100, 300, 470, 471, 999])
    weights = interval_weight(t, 2.0, 1000, (100, 470))
    assert weights.dtype == torch.float32 and weights.tolist() == [1, 1, 2, 2, 2, 1, 1]


def test_guidance_is_idle_where_its_weight_is_one_within_the_tolerance():
    t = torch.tensor([0, 1, 2, 3])
    weight = torch.tensor([3.0, 1.125, 1.0, 0.875])
    for skip_tol, idle in ((0.0, [False, False, True, False]), (0.125, [False, True, True, True])):
        assert Guidance(NullLabel(0), lambda t: weight[t], skip_tol=skip_tol).is_idle(t).tolist() == idle


def test_both_halves_of_a_guided_batch_keep_the_same_tokens_of_each_sample():
    kept = KeptTokens.from_noise(torch.rand(3, 16), 10)
    seen = []

    def watching(x, t, y, draw):
        seen.append((y.tolist(), draw.kept))
        return torch.cat([x, x], dim=1)

    denoise = Guidance(NullLabel(9), lambda t: t + 2.0).lead(watching)
    denoise(torch.zeros(3, 4, 8, 8), torch.zeros(3), torch.tensor([1, 2, 3]), draw=Draw(kept))
    [(labels, doubled)] = seen
    assert labels == [1, 2, 3, 9, 9, 9]
    for name in ("ids_keep", "ids_restore", "dropped"):
        assert torch.equal(getattr(doubled, name), torch.cat([getattr(kept, name)] * 2))
