import torch

from obsdiff.diffusion.distill import feature_loss, jacobian_gain, output_loss, unit_directions


def test_feature_terms_are_relative_to_their_size():
    teacher = [torch.randn(4, 5, 6), torch.randn(4, 5, 6)]
    student = [1.1 * f for f in teacher]
    for scale in (1.0, 1e3):
        loss = feature_loss([scale * s for s in student], [scale * t for t in teacher], robust=False)
        torch.testing.assert_close(loss, torch.tensor(0.01), rtol=1e-4, atol=0)


def test_massive_activations_do_not_count_where_robust():
    teacher = torch.randn(10, 100)
    teacher[0, 0] = 1e4
    student = teacher.clone()
    student[0, 0] = 0.0
    assert float(feature_loss([student], [teacher])) == 0.0
    assert float(feature_loss([student], [teacher], robust=False)) > 0.9


def test_gain_is_the_norm_of_the_jacobian_product():
    matrix = torch.randn(3, 5)
    x = torch.randn(2, 5, requires_grad=True)
    output = x @ matrix.T
    direction = unit_directions(output, torch.Generator().manual_seed(0))
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(2))
    gain = jacobian_gain(output, x, direction, create_graph=True)
    torch.testing.assert_close(gain, (direction @ matrix).square().sum(1))


def test_output_loss_is_the_mean_square():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(output_loss(a, b), ((a - b) ** 2).mean())
