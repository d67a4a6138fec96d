"""A model with synchronised batch norms on CPUs: ``torchrun --nproc-per-node 4 examples/sync_batch_norm.py``.

It prints the loss of some steps. PyTorch's own ``SyncBatchNorm`` refuses tensors on a CPU.
"""

import torch
from torch.nn.parallel import DistributedDataParallel

import bnbp.torch

torch.distributed.init_process_group("gloo")
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
torch.manual_seed(0)
model = torch.nn.Sequential(
    *(torch.nn.Conv2d(3, 16, 3, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU()),
    *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 4)),
)
model = bnbp.torch.SyncBatchNorm.convert_sync_batchnorm(model)  # before the model is wrapped
model = DistributedDataParallel(bnbp.torch.convert(model))  # which fuses the ReLU into the batch norm

x, y = torch.randn(24, 3, 16, 16), torch.arange(24) % 4
own = slice(len(x) * rank // size, len(x) * (rank + 1) // size)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    optimizer.zero_grad()
    # DistributedDataParallel averages the gradients of the ranks; this makes it those of the mean over all samples.
    loss = torch.nn.functional.cross_entropy(model(x[own]), y[own], reduction="sum") * size / len(x)
    loss.backward()
    optimizer.step()

total = loss.detach() / size
torch.distributed.all_reduce(total)
if rank == 0:
    print(f"loss {total:.5f}")
torch.distributed.destroy_process_group()
