"""One thread per test process: tensors here are small, and threads that wait for a busy core wait long."""

import torch

torch.set_num_threads(1)
