"""Healthy models of rows and sequences: tables, categories, series, sets of points."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gammabeta as gb

from .cases import CLASSES, Given, Shuffled, alone, classified, classifier, cross_entropy, own, train


def encoder(width: int = 8) -> nn.Sequential:
    """Two normalised layers, (N, 8) to (N, 16)."""
    return nn.Sequential(
        nn.Linear(width, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
    )


def perceptron() -> nn.Sequential:
    """The encoder with a head."""
    return encoder().append(nn.Linear(16, CLASSES))


class Vae(nn.Module):
    """Draws in evaluation, too, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.code, self.first = encoder(), nn.Linear(16, 8), nn.Linear(4, 16)
        self.norm, self.last = nn.BatchNorm1d(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, means and logarithms of variances."""
        mean, log = self.code(self.encoder(x)).chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (log / 2).exp()
        return self.last(F.relu(self.norm(self.first(drawn)))), mean, log


def elbo(output: Any, x: Tensor) -> Tensor:
    """The negative evidence lower bound per sample."""
    made, mean, log = output
    divergence: Tensor = (mean.square() + log.exp() - 1 - log).sum(1).mean() / 2
    return F.mse_loss(made, x) * x.shape[1] / 2 + divergence


@own("variational autoencoder")
def _() -> Given:
    loader = Shuffled(classified(8)[0], form=alone)
    return Given(train(Vae(), loader, lambda m, x: elbo(m(x), x)), loader, {"loss": elbo})


@own("variational autoencoder, no loss")
def _() -> Given:
    loader = Shuffled(classified(8)[0], form=alone)
    return Given(train(Vae(), loader, lambda m, x: elbo(m(x), x)), loader)


class McDropout(nn.Module):
    """Dropout that stays on, before and behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm, self.head = encoder(), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, others at each call."""
        x = self.norm(F.dropout(self.encoder(x), 0.3, training=True))
        out: Tensor = self.head(F.dropout(x, 0.5, training=True))
        return out


@own("Monte Carlo dropout")
def _() -> Given:
    return classifier(McDropout(), Shuffled(*classified(8)))


@own("Monte Carlo dropout, no loss")
def _() -> Given:
    loader = Shuffled(*classified(8))
    return Given(train(McDropout(), loader), loader)


class Ghost(nn.Module):
    """As TabNet's: each part of a batch is normalised by itself."""

    def __init__(self, channels: int, part: int = 32) -> None:
        super().__init__()
        self.part, self.norm = part, nn.BatchNorm1d(channels, momentum=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        return torch.cat([self.norm(piece) for piece in x.split(self.part)])


class TabNetLike(nn.Module):
    """Shared layers with norms of their own at each step, and a mask over the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.BatchNorm1d(8), nn.Linear(8, 32, bias=False)
        self.ghosts = nn.ModuleList(Ghost(32) for _ in range(3))
        self.masks = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), Ghost(8)) for _ in range(3))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.first(x)
        total, masked = torch.zeros(()), x
        for ghost, mask in zip(self.ghosts, self.masks, strict=True):
            step = F.glu(ghost(self.shared(masked)), 1)
            masked = x * mask(step).softmax(1) * 8
            total = total + step.relu()
        out: Tensor = self.head(total)
        return out


@own("TabNet-like, ghost batches")
def _() -> Given:
    return classifier(TabNetLike(), Shuffled(*classified(8, samples=1024), size=128))


@own("our GhostBatchNorm")
def _() -> Given:
    model = gb.convert(perceptron(), to="ghost")
    return classifier(model, Shuffled(*classified(8), size=64))


class Categories(nn.Module):
    """Embedded categories beside normalised numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.numbers = nn.Embedding(50, 6), nn.BatchNorm1d(4)
        self.body, self.head = encoder(10), nn.Linear(16, CLASSES)

    def forward(self, category: Tensor, numbers: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.head(self.body(torch.cat([self.embed(category), self.numbers(numbers)], 1)))
        return out


@own("embeddings and numbers, by keyword")
def _() -> Given:
    x, y = classified(4)
    category = (y * 10 + torch.randint(0, 10, y.shape)) % 50

    def form(category: Tensor, numbers: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"category": category, "numbers": numbers * 100 + 7, "target": target}

    loader = Shuffled(category, x, y, form=form)

    def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output, batch["target"])

    model = train(Categories(), loader, lambda m, b: loss(m(b["category"], b["numbers"]), b))
    return Given(model, loader, {"loss": loss})


@own("one-hot columns, some of them never set")
def _() -> Given:
    _, y = classified(1, samples=1024)
    drawn = (torch.rand(len(y)).square() * 60).long()
    columns = torch.cat([F.one_hot(drawn, 80), F.one_hot((y + drawn) % 8, 8)], 1).float()
    model = nn.Sequential(nn.BatchNorm1d(88), *encoder(88), nn.Linear(16, CLASSES))
    return classifier(model, Shuffled(columns, y, size=64))


@own("pixels with an empty border")
def _() -> Given:
    x, y = classified(1, 10, 10)
    x = F.pad(x, (3, 3, 3, 3)).flatten(1)
    model = nn.Sequential(nn.BatchNorm1d(256), *encoder(256), nn.Linear(16, CLASSES))
    return classifier(model, Shuffled(x, y))


class TwoInputs(nn.Module):
    """An image and a row."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.row, self.head = encoder(), nn.Linear(24, CLASSES)

    def forward(self, image: Tensor, row: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.head(torch.cat([self.image(image).mean((2, 3)), self.row(row)], 1))
        return out


@own("two inputs, forward_fn")
def _() -> Given:
    (image, y), row = classified(1, 8, 8), classified(8)[0]
    loader = Shuffled(image, y, row)

    def forward(model: Any, batch: Any) -> Any:
        return model(batch[0], batch[2])

    model = train(TwoInputs(), loader, lambda m, b: F.cross_entropy(forward(m, b), b[1]))
    return Given(model, loader, {"loss": F.cross_entropy, "forward_fn": forward})


class Siamese(nn.Module):
    """One encoder for both of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.project = encoder(), nn.Linear(16, 8)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """(N,) how alike the two are."""
        one, other = (self.project(self.encoder(x)) for x in pair)
        return F.cosine_similarity(one, other) * 3


@own("siamese pairs")
def _() -> Given:
    x, y = classified(8)
    other = torch.randperm(len(x))
    same = (y == y[other]).float()
    loader = Shuffled(x, x[other], same, form=lambda a, b, t: ((a, b), t))
    loss = F.binary_cross_entropy_with_logits
    model = train(Siamese(), loader, lambda m, b: loss(m(b[0]), b[1]))
    return Given(model, loader, {"loss": loss})


class MomentumPair(nn.Module):
    """A student, and a teacher that follows it in the forward pass, as in BYOL."""

    def __init__(self) -> None:
        super().__init__()
        self.student = encoder().append(nn.Linear(16, 8))
        self.teacher = encoder().append(nn.Linear(16, 8)).requires_grad_(False)
        self.predict = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and goal."""
        if self.training:
            with torch.no_grad():
                for mine, its in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    mine.lerp_(its, 0.05)
        noisy = x + 0.1 * torch.randn_like(x)
        return self.predict(self.student(noisy)), self.teacher(x).detach()


def agreement(output: Any, _: Any) -> Tensor:
    """One less the cosine, doubled."""
    return 2 - 2 * F.cosine_similarity(*output).mean()


@own("student and momentum teacher")
def _() -> Given:
    loader = Shuffled(classified(8)[0], size=64, form=alone)
    model = train(MomentumPair(), loader, lambda m, x: agreement(m(x), x), passes=60)
    return Given(model, loader, {"loss": agreement})


@own("averaged weights, statistics renewed")
def _() -> Given:
    loader = Shuffled(*classified(8))
    model = perceptron()
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        train(model, loader, passes=3)
        average.update_parameters(model)
    torch.optim.swa_utils.update_bn(loader, average)
    return Given(average.eval(), loader, {"loss": F.cross_entropy})


@own("weight norm")
def _() -> Given:
    model = perceptron()
    model[3] = parametrizations.weight_norm(nn.Linear(16, 16))
    return classifier(model, Shuffled(*classified(8)))


@own("no affine parameters, momentum None")
def _() -> Given:
    model = nn.Sequential(
        nn.BatchNorm1d(8, affine=False),
        nn.Linear(8, 16),
        nn.ReLU(),
        nn.BatchNorm1d(16, affine=False),
        nn.Linear(16, CLASSES),
    )
    loader = Shuffled(*classified(8))
    train(model, loader)
    torch.optim.swa_utils.update_bn(loader, model)
    return Given(model.eval(), loader, {"loss": F.cross_entropy})


@own("Keras's eps and momentum")
def _() -> Given:
    model = perceptron()
    for layer in (model[1], model[4]):
        layer.eps, layer.momentum = 1e-3, 0.01
    given = classifier(model, Shuffled(*classified(8)))
    given.options["source"] = "keras"
    return Given(train(model, given.loader, passes=60), given.loader, given.options)


class Recurrent(nn.Module):
    """A norm with statistics of its own for each step of a cell (Cooijmans, 2017), and one behind an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 16)
        self.steps = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(5))
        self.lstm, self.norm = nn.LSTM(16, 16, batch_first=True), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, of (N, T, C)."""
        state, states = x.new_zeros(len(x), 16), []
        for t in range(x.shape[1]):
            state = self.steps[t](self.cell(x[:, t], state))
            states.append(state)
        out = self.norm(self.lstm(torch.stack(states, 1))[0].transpose(1, 2))
        logits: Tensor = self.head(out.mean(2))
        return logits


@own("recurrent")
def _() -> Given:
    return classifier(Recurrent(), Shuffled(*classified(5, 8)))


@own("padded sequences, masked mean")
def _() -> Given:
    x, y = classified(12, 8)
    lengths = torch.randint(4, 13, (len(x),))
    x = x * (torch.arange(12)[None] < lengths[:, None])[..., None]

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16)
            self.head = nn.Linear(16, CLASSES)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            mask = (torch.arange(x.shape[1])[None] < lengths[:, None])[:, None]
            out = F.relu(self.norm(self.conv(x.transpose(1, 2)))) * mask
            logits: Tensor = self.head(out.sum(2) / lengths[:, None])
            return logits

    loader = Shuffled(x, lengths, y, form=lambda a, n, t: ((a, n), t))

    def forward(model: Any, batch: Any) -> Any:
        return model(*batch[0])

    model = train(Padded(), loader, lambda m, b: F.cross_entropy(forward(m, b), b[1]))
    return Given(model, loader, {"loss": F.cross_entropy, "forward_fn": forward})


class PointNet(nn.Module):
    """Points one by one, their maximum, and a transform that begins as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.AdaptiveMaxPool1d(1))
        self.matrix = nn.Linear(16, 9)
        nn.init.zeros_(self.matrix.weight)
        self.points = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, of (N, 3, P)."""
        matrix = self.matrix(self.turn(x).flatten(1)).view(-1, 3, 3) + torch.eye(3)
        out: Tensor = self.head(F.relu(self.norm(self.points(matrix @ x).amax(2))))
        return out


@own("sets of points")
def _() -> Given:
    return classifier(PointNet(), Shuffled(*classified(3, 24)))


class Conformer(nn.Module):
    """Attention and a normalised depthwise convolution over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.attend = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.enter, self.wide = nn.Linear(8, 16), nn.Conv1d(16, 32, 1)
        self.deep, self.norm = nn.Conv1d(16, 16, 5, padding=2, groups=16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, of (N, T, C)."""
        x = self.enter(x)
        y = self.before(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        y = F.silu(self.norm(self.deep(F.glu(self.wide(x.transpose(1, 2)), 1))))
        out: Tensor = self.head((x + y.transpose(1, 2)).mean(1))
        return out


@own("conformer")
def _() -> Given:
    return classifier(Conformer(), Shuffled(*classified(12, 8)))


@own("dropout behind the last norm, weight decay")
def _() -> Given:
    model = encoder().append(nn.Dropout(0.5)).append(nn.Linear(16, CLASSES))
    given = classifier(model, Shuffled(*classified(8)))
    given.options["optimizer"] = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    return given


class LayerDrop(nn.Module):
    """Blocks that training skips at random."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = encoder()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(3))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(x)
        for block in self.blocks:
            if not self.training or float(torch.rand(())) < 0.7:
                x = x + block(x) * (1 if self.training else 0.7)
        out: Tensor = self.head(x)
        return out


@own("stochastic depth, whole blocks")
def _() -> Given:
    loader = Shuffled(*classified(8))
    model = train(LayerDrop(), loader, passes=20)
    gb.recalibrate(model, loader)
    return Given(model, loader, {"loss": F.cross_entropy})


@own("layers that are not used")
def _() -> Given:
    model = perceptron()
    model.add_module("spare", nn.Identity())
    model.spare.norm = nn.BatchNorm2d(5)  # registered, never called
    return classifier(model, Shuffled(*classified(8)))


class TwoHeads(nn.Module):
    """Of which the data asks for one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = encoder()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)) for _ in range(2)
        )

    def forward(self, x: Tensor, head: int = 0) -> Tensor:
        """Logits of one head."""
        out: Tensor = self.heads[head](self.body(x))
        return out


@own("two heads, data for one")
def _() -> Given:
    return classifier(TwoHeads(), Shuffled(*classified(8)))


@own("ragged batches")
def _() -> Given:
    return classifier(perceptron(), Shuffled(*classified(8, samples=500), size=48))


@own("a DataLoader that shuffles")
def _() -> Given:
    data = torch.utils.data.TensorDataset(*classified(8))
    return classifier(perceptron(), torch.utils.data.DataLoader(data, batch_size=48, shuffle=True))


@own("contrastive views, batch of both")
def _() -> Given:
    loader = Shuffled(classified(8)[0], size=64, form=alone)

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = encoder().append(nn.Linear(16, 8)).append(nn.BatchNorm1d(8, affine=False))

        def forward(self, x: Tensor) -> Tensor:
            views = [x + 0.2 * torch.randn_like(x) for _ in range(2)]
            out: Tensor = self.body(torch.cat(views))
            return out

    def loss(output: Tensor, _: Any) -> Tensor:
        z = F.normalize(output, dim=1)
        alike = z @ z.T * 5 - 1e4 * torch.eye(len(z))
        return F.cross_entropy(alike, torch.arange(len(z)).roll(len(z) // 2))

    return Given(train(Views(), loader, lambda m, x: loss(m(x), x)), loader, {"loss": loss})


class OwnNorm(nn.Module):
    """Batch normalization that is neither torch's nor ours, with well-kept statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        mean, spread = self.average, self.spread
        if self.training:
            mean, spread = x.mean(0), x.std(0) + 1e-5
            with torch.no_grad():
                self.average.lerp_(mean, 0.1)
                self.spread.lerp_(spread, 0.1)
        return (x - mean) / spread


@own("a norm of the owner's own")
def _() -> Given:
    model = nn.Sequential(nn.Linear(8, 16), OwnNorm(16), nn.ReLU(), nn.Linear(16, CLASSES))
    return classifier(model, Shuffled(*classified(8)))


class Renorm(nn.Module):
    """Batch renormalization (Ioffe, 2017): training corrects towards the running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        if not self.training:
            out: Tensor = self.inner(x)
            return out
        old_mean, old_var = self.inner.running_mean.clone(), self.inner.running_var.clone()
        normal = self.inner(x)
        with torch.no_grad():
            spread = (x.var(0, correction=0) + 1e-5).sqrt()
            old = (old_var + 1e-5).sqrt()
            r = (spread / old).clamp(1 / 3, 3)
            d = ((x.mean(0) - old_mean) / old).clamp(-5, 5)
        return normal * r + d


@own("batch renormalization")
def _() -> Given:
    model = nn.Sequential(nn.Linear(8, 16), Renorm(16), nn.ReLU(), nn.Linear(16, CLASSES))
    return classifier(model, Shuffled(*classified(8)))


@own("mixed precision, autocast in the loop")
def _() -> Given:
    loader = Shuffled(*classified(8))

    def forward(model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch[0])

    def objective(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(forward(model, batch).float(), batch[1])

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), labels)

    return Given(train(perceptron(), loader, objective), loader, {"loss": loss, "forward_fn": forward})


@own("double precision")
def _() -> Given:
    x, y = classified(8)
    return classifier(perceptron().double(), Shuffled(x.double(), y))


@own("regression, no classes")
def _() -> Given:
    x, _ = classified(8)
    loader = Shuffled(x, x[:, :2].sin())
    model = encoder().append(nn.Linear(16, 2))
    return Given(
        train(model, loader, lambda m, b: F.mse_loss(m(b[0]), b[1]), passes=30), loader, {"loss": F.mse_loss}
    )


@own("left in training mode")
def _() -> Given:
    given = classifier(perceptron(), Shuffled(*classified(8)))
    given.model.train()
    return given


__all__ = ["cross_entropy", "encoder", "perceptron"]
