"""Writes the models that test_pickles.py reads; run with the version of gammabeta that they are to be of.

PYTHONPATH=CHECKOUT/src:. python tests/previous/make.py FOLDER
"""

import sys
from pathlib import Path

import torch
from torch import nn

import gammabeta as gb
from tests.previous.networks import PreActivation, Residual

FOLDER = Path(sys.argv[1])


def drawn(model: nn.Module) -> nn.Module:
    """Give each batch norm statistics and parameters that are not those of a new one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                for tensor, least in ((layer.running_mean, 0.0), (layer.running_var, 0.5)):
                    tensor.copy_(torch.rand(layer.num_features, generator=generator) + least)
                for tensor, least in ((layer.weight, 0.5), (layer.bias, -0.5)):
                    tensor.copy_(torch.rand(layer.num_features, generator=generator) + least)
    return model


def save(name: str, model: nn.Module, x: torch.Tensor) -> None:
    """Write a model with an input and what it gives in evaluation mode."""
    with torch.no_grad():
        output = model.eval()(x)
    path = FOLDER / f"{gb.__version__}-{name}.pt"
    torch.save({"model": model, "input": x, "output": output}, path)


def main() -> None:
    """Write one file for each kind of model that a version rewrites."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    network, stacked = drawn(Residual()), drawn(PreActivation())
    save("converted", gb.convert(network, example=x), x)
    save("frozen", gb.convert(network, to="frozen"), x)
    save("folded", gb.fold(gb.convert(network), x, pack=False), x)
    save("packed", gb.fold(drawn(Residual(228)), x, pack=True), x)
    save("multiply-add", gb.fold(stacked, x, pack=False), x)
    save("fused-left", gb.fold(gb.convert(stacked), x, pack=True), x)


if __name__ == "__main__":
    main()
