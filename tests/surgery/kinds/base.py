"""The layers that most kinds are made of."""

from torch import nn

from .harness import x

IMAGE = x(4, 3, 6, 6)
OTHER = x(4, 3, 6, 6, at=1)
SMALL = x(2, 3, 4, 4, at=2)
ROWS = x(6, 5)


class Base(nn.Module):
    """A convolution, two batch norms and an activation, for images of three channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()


class Block(nn.Module):
    """Convolution, batch norm and activation."""

    def __init__(self, c_in=3, c_out=3):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 1)
        self.bn = nn.BatchNorm2d(c_out)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))
