"""How far is a small student from its teacher? Measured on several processes: the same number on any number of them.

torchrun --nproc-per-node 4 evaluate_digits.py
"""

import os
import platform

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from klmetric import KLDivergence
from klmetric.distributed import real_samples


def train(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    """Stands for your checkpoint: from the same seed, every process makes the same model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    """Train both on the first 1,000 digits, and compare them on the other 797."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the processes share the cores
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")

    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    teacher = train(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), images[:1000], labels[:1000])
    student = train(nn.Linear(64, 10), images[:1000], labels[:1000])
    teacher, student = teacher.to(device), student.to(device)

    data = TensorDataset(images[1000:])
    loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data, shuffle=False))
    metric = KLDivergence(input_format="logits").to(device)
    measured = 0
    with torch.inference_mode():
        for index, (batch,) in enumerate(loader):
            batch = batch.to(device)
            # 797 is a prime number: the sampler repeats some samples, to give every process equally many.
            real = real_samples(loader, index * loader.batch_size, len(batch))
            metric.update(teacher(batch), student(batch), weight=real)
            measured += int(real.sum())

    value = metric.compute()  # of all processes, on all processes
    where = f"rank {dist.get_rank()} of {dist.get_world_size()} on {platform.node()}"
    print(f"{where} measured {measured} digits\n", end="", flush=True)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"KL(teacher ‖ student) = {value:.7f} nats")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
