"""What the ready models promise: examples apart, no look ahead, the same weights from the same seed."""

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchlab.workloads.models import ByteTransformer, ConvNet, mlp

MODELS = {
    "conv": (lambda: ConvNet(1, 8, 10), lambda n: torch.randn(n, 1, 8, 8, dtype=torch.float64), (10,)),
    "conv 32": (lambda: ConvNet(3, 32, 4), lambda n: torch.randn(n, 3, 32, 32, dtype=torch.float64), (4,)),
    "mlp": (lambda: mlp(5, 2), lambda n: torch.randn(n, 5, dtype=torch.float64), (2,)),
    "bytes": (lambda: ByteTransformer(16), lambda n: torch.randint(256, (n, 16)), (16, 256)),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, inputs, shape = MODELS[request.param]
    return make().double(), inputs(6), shape


def test_shapes_and_that_examples_do_not_mix(case):
    model, inputs, shape = case
    together = model(inputs)
    assert together.shape == (6, *shape)
    torch.testing.assert_close(together, torch.cat([model(x[None]) for x in inputs]), rtol=1e-10, atol=1e-10)


def test_the_mean_of_per_example_gradients_is_the_gradient_of_the_mean(case):
    model, inputs, _ = case
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x):
        return -functional_call(model, weights, (x[None],)).log_softmax(-1)[..., 0].mean()

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule
        each = vmap(grad(loss), in_dims=(None, 0))(weights, inputs)
    (-model(inputs).log_softmax(-1)[..., 0].mean()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(each[name].mean(0), p.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_from_the_global_generator_alone(name):
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in MODELS[name][0]().parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_random_or_kept_in_training_mode(name):
    make, inputs, _ = MODELS[name]
    model, x = make().double().train(), inputs(3)
    assert torch.equal(model(x), model(x))
    assert not list(model.buffers())


def test_a_byte_does_not_see_what_follows():
    model, tokens = ByteTransformer(16).double(), torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % 256
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:9], after[:9], rtol=1e-12, atol=1e-12)
    assert ((before[9:] - after[9:]).abs().amax(1) > 1e-6).all()


def test_pixels_of_8_bits_are_brought_to_one():
    model = ConvNet(3, 8, 2)
    pixels = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    torch.testing.assert_close(model(pixels), model(pixels.float() / 127.5 - 1))


@pytest.mark.parametrize("size", [1, 3, 4, 5, 9, 33])
def test_any_picture_size_fits(size):
    assert ConvNet(3, size, 7)(torch.zeros(2, 3, size, size)).shape == (2, 7)
