"""Results in arrays that exist, and in place. ``python examples/howto/in_place.py``."""

import numpy as np

import bnbp

rng = np.random.default_rng(0)
x, dy = rng.normal(3, 2, size=(2, 32, 64, 14, 14)).astype(np.float32)
delta = dy.astype(np.float64)  # for the comparison at the end, as dy will be overwritten
gamma, beta = np.ones(64, np.float32), np.zeros(64, np.float32)

# `out=` takes an earlier result, or one array for each output. The same arrays come back.
forward = bnbp.batch_norm_training(x, gamma, beta)
again = bnbp.batch_norm_training(x, gamma, beta, out=forward)
print("same array:", again.normalized is forward.normalized)

# None stands for a new array: here the mean and variance are new, and the tensor is not.
y = np.empty_like(x)
normalized, mean, variance = bnbp.batch_norm_training(x, gamma, beta, out=(y, None, None))
print("same array:", normalized is y)

# In place: the result may overwrite the incoming gradient.
given = x, gamma, beta, mean, variance, dy
fresh = bnbp.batch_norm_training_backprop(*given)
dx, dgamma, dbeta = bnbp.batch_norm_training_backprop(*given, out=(dy, None, None))
print("in place:", dx is dy, "- same bits:", dx.tobytes() == fresh.input_delta.tobytes())

# Views work as well: here every second row of a larger array.
rows = np.zeros((64, 64, 14, 14), np.float32)
bnbp.batch_norm_inference(x, gamma, beta, mean, variance, out=rows[::2])
print("other rows untouched:", not rows[1::2].any())

# An output that overlaps the input in part would overwrite elements before they are read. It is refused.
buffer = np.zeros((33, 64, 14, 14), np.float32)
try:
    bnbp.batch_norm_inference(buffer[1:], gamma, beta, mean, variance, out=buffer[:-1])
except ValueError as error:
    print("refused:", str(error).partition(":")[0])

# The same in NumPy.
exact = x.astype(np.float64)
centered = exact - exact.mean((0, 2, 3), keepdims=True)
inv_std = 1 / np.sqrt(exact.var((0, 2, 3), keepdims=True) + 1e-5)
expected = centered * inv_std
delta -= delta.mean((0, 2, 3), keepdims=True) + expected * (delta * expected).mean((0, 2, 3), keepdims=True)
np.testing.assert_allclose(dx, delta * inv_std, rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(rows[::2], expected, rtol=1e-5, atol=1e-5)
