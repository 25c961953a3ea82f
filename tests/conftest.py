"""Settings for all tests."""

import torch

# The tensors are small: a second thread gains nothing, and on busy cores it costs a lot.
torch.set_num_threads(1)
