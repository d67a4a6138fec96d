"""Train a small convolutional network on images of handwritten digits, with its batch norms computed by bnbp.

Needs PyTorch and scikit-learn, which has the images: ``pip install 'bnbp[train]'``.
"""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnbp.torch


def conv(inputs, outputs):
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def network():
    """Two pairs of convolutions, each followed by pooling: from 8 x 8 pixels to 2 x 2."""
    return nn.Sequential(
        conv(1, 32),
        conv(32, 32),
        nn.MaxPool2d(2),
        conv(32, 64),
        conv(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 10),
    )


def digits():
    """Images of shape (1, 8, 8) and their labels: a part to train with and a part to test with."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def train(model, data, epochs):
    """Minimise the cross entropy with SGD."""
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_function = nn.CrossEntropyLoss()
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}")


def accuracy(model, data):
    """The share of images whose largest output is that of their label."""
    images, labels = data.tensors
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main():
    """Read the options, train, test."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--no-convert", action="store_true", help="leave the batch norms to PyTorch")
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    options = parser.parse_args()

    torch.manual_seed(0)
    train_data, test_data = digits()
    model = network()
    if not options.no_convert:
        model = bnbp.torch.convert(model)
    if options.compile:
        model = torch.compile(model)

    start = time.perf_counter()
    train(model, train_data, options.epochs)
    print(f"{time.perf_counter() - start:.1f} s")
    print(f"accuracy on the test images: {accuracy(model, test_data):.3f}")


if __name__ == "__main__":
    main()
