"""Which kernel, out of all that can be made."""

from typing import NamedTuple


class Key(NamedTuple):
    """Which kernel: the name of its maker and what was fixed at compile time."""

    kernel: str
    bf16: bool = False
    activation: str | None = None
    residual: bool = False
    pool: bool | tuple[int, int, int] = False  # the mean of 2x2, or kernel, stride and padding of windows
    vectors: int = 0  # that hold the output's channels, where a kernel is made for a number of them

    @property
    def slug(self) -> str:
        """A readable part of a file's name."""
        chosen = [self.kernel, "bf16" if self.bf16 else "f32", self.activation or "linear"]
        chosen += ["residual"] * self.residual
        if isinstance(self.pool, tuple):
            chosen.append("max{}s{}p{}".format(*self.pool))
        elif self.pool:
            chosen.append("pool")
        return "-".join([*chosen, f"v{self.vectors}"] if self.vectors else chosen)
