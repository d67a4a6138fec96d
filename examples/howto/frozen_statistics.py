"""Fine-tuning with frozen statistics. ``python examples/howto/frozen_statistics.py``."""

import numpy as np

import bnbp

rng = np.random.default_rng(0)
x = rng.normal(size=(32, 4, 6, 6))
target = 1.5 * x + 0.5
gamma, beta = np.ones(4), np.zeros(4)
mean = np.array([0.3, -0.2, 0.0, 0.1])  # from an earlier training, not from this batch
variance = np.array([1.8, 0.9, 1.2, 0.7])


def loss_of(x, gamma, beta):
    """Half the mean squared distance to the target."""
    y = bnbp.batch_norm_inference(x, gamma, beta, mean, variance)
    return 0.5 * np.mean((y - target) ** 2)


# The gradient, with constant mean and variance.
y = bnbp.batch_norm_inference(x, gamma, beta, mean, variance)
dy = (y - target) / y.size
dx, dgamma, dbeta = bnbp.batch_norm_inference_backprop(x, gamma, beta, mean, variance, dy)

# Small steps measure the same slope. The gradient for training gives another one.
wrong = bnbp.batch_norm_training_backprop(x, gamma, beta, mean, variance, dy).input_delta
direction = rng.normal(size=x.shape)
step = 1e-5 * direction
slope = (loss_of(x + step, gamma, beta) - loss_of(x - step, gamma, beta)) / 2e-5
np.testing.assert_allclose(np.vdot(dx, direction), slope, rtol=1e-6)
for k in range(4):  # the gradients of gamma and beta, channel by channel
    step = 1e-5 * np.eye(4)[k]
    slope_of_gamma = (loss_of(x, gamma + step, beta) - loss_of(x, gamma - step, beta)) / 2e-5
    slope_of_beta = (loss_of(x, gamma, beta + step) - loss_of(x, gamma, beta - step)) / 2e-5
    np.testing.assert_allclose([dgamma[k], dbeta[k]], [slope_of_gamma, slope_of_beta], rtol=1e-6)
print(f"measured {slope:.6f}")
print(f"frozen statistics {np.vdot(dx, direction):.6f}, training {np.vdot(wrong, direction):.6f}")

# If only gamma and beta are trained, leave input_delta out.
# The tensors are then read once, and nothing is written.
print(f"loss {loss_of(x, gamma, beta):.4f}")
for _ in range(300):
    y = bnbp.batch_norm_inference(x, gamma, beta, mean, variance)
    dy = (y - target) / y.size
    _, dgamma, dbeta = bnbp.batch_norm_inference_backprop(
        x, gamma, beta, mean, variance, dy, output_mask=(False, True, True)
    )
    gamma -= dgamma
    beta -= dbeta
print(f"loss {loss_of(x, gamma, beta):.4f} after 300 steps")

# The solution is known: y is the target if gamma / sqrt(variance + epsilon) is 1.5.
scale = np.sqrt(variance + 1e-5)
np.testing.assert_allclose(gamma, 1.5 * scale, rtol=1e-3)
np.testing.assert_allclose(beta, 1.5 * mean + 0.5, rtol=1e-3)
print("gamma", gamma.round(3), "beta", beta.round(3))
