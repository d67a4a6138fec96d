"""Running averages, gathered in training and used afterwards. ``python examples/howto/running_averages.py``."""

import numpy as np

import bnbp

rng = np.random.default_rng(0)
batches = rng.normal([2.0, -1.0, 0.0], [1.0, 3.0, 0.5], size=(200, 16, 3)).astype(np.float32)
gamma, beta = np.ones(3, np.float32), np.zeros(3, np.float32)

# Each step of training moves the averages a little way towards the batch.
momentum = 0.1  # the weight of the new batch, as in PyTorch; in Keras this is 0.9
running_mean, running_variance = np.zeros(3, np.float32), np.ones(3, np.float32)
for x in batches:
    normalized, batch_mean, batch_variance = bnbp.batch_norm_training(x, gamma, beta)
    m = x.size // x.shape[1]  # elements of a channel
    running_mean += momentum * (batch_mean - running_mean)
    unbiased = batch_variance * m / (m - 1)
    running_variance += momentum * (unbiased - running_variance)
print("running averages   ", running_mean.round(2), running_variance.round(2))

# Or take the statistics of all batches together. They depend on no momentum.
whole = bnbp.merge_statistics(bnbp.batch_norm_training_statistics(x) for x in batches)
mean, variance = whole.mean.astype(np.float32), whole.variance.astype(np.float32)
print("all batches at once", mean.round(2), variance.round(2))

# Afterwards a sample gives the same result alone as in a batch.
together = bnbp.batch_norm_inference(batches[0], gamma, beta, mean, variance)
alone = bnbp.batch_norm_inference(batches[0][:1], gamma, beta, mean, variance)
print("alone as in a batch", np.array_equal(alone, together[:1]))

# The same in NumPy: step k of n has the weight momentum * (1 - momentum) ** (n - k).
exact = batches.astype(np.float64)
weights = momentum * (1 - momentum) ** np.arange(len(exact) - 1, -1, -1)
np.testing.assert_allclose(running_mean, weights @ exact.mean(1), rtol=1e-4, atol=1e-6)
left = (1 - momentum) ** len(exact)  # the weight that is left to the ones at the start
np.testing.assert_allclose(running_variance, weights @ exact.var(1, ddof=1) + left, rtol=1e-4)
np.testing.assert_allclose(whole.variance, exact.reshape(-1, 3).var(0), rtol=1e-12)
print("agrees with NumPy")
