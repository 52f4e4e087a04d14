"""Knowledge distillation with fedkern.ops in a plain PyTorch training loop.

python examples/distillation.py
"""

import torch
from torch.nn.functional import cross_entropy

from fedkern import ops

torch.manual_seed(0)
images = torch.randn(512, 20)
labels = (images[:, :2].sum(1) > 0).long()
teacher = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
student = torch.nn.Linear(20, 2)


def train(network: torch.nn.Module, loss, steps: int = 100) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(images)).backward()
        optimizer.step()


train(teacher, lambda logits: cross_entropy(logits, labels))
with torch.no_grad():
    answers = teacher(images)
# T² KL(softmax(teacher / T) ‖ softmax(student / T)): the student never sees a label.
train(student, lambda logits: ops.kl_div(logits, answers, temperature=2.0))
accuracy = (student(images).argmax(1) == labels).float().mean()
print(f"The student agrees with the labels on {accuracy:.1%} of the images.")
