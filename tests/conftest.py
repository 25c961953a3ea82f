"""Settings for all tests."""

import torch
from hypothesis import settings

# The tensors are small: a second thread gains nothing, and on busy cores it costs a lot.
torch.set_num_threads(1)

# The same examples every time, however long one takes: a test that fails should fail again.
settings.register_profile("p2pfl", deadline=None, derandomize=True)
settings.load_profile("p2pfl")
