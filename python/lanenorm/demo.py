"""A network trained on handwritten digits with no normalization, with BN and with LN: `python -m lanenorm demo`.

A sigmoid network in plain NumPy, in the manner of the MNIST experiment of Ioffe & Szegedy 2015 (section 4.1) but
deeper, whose normalizations are `lanenorm.BatchNorm` and `lanenorm.LayerNorm`. The images are the 1797 digits of 8 x 8
pixels that come with scikit-learn. Two experiments, both in float32:

- depth: one deep network per normalization and step size. Gives accuracy by epoch, gradient norm and slope by layer.
- batch size: one shallower network per normalization and batch size, every network seeing the same number of images.

Everything runs on NumPy arrays, or with `--device cuda` on CuPy's: the same program, not a benchmark, since arrays this
small leave a GPU idle. `xp` is the library of the arrays throughout.

Whatever is being compared starts from the same weights and sees the same images in the same order. The claims known
from the papers are then checked against what was measured, and a claim that did not hold is reported as such
(`_demo_report.py`, which also draws the picture).

Longer than 300 lines because it is one program, to be read from top to bottom. Chapters:
settings -> data -> network -> training -> the two experiments -> command line.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lanenorm import BatchNorm, LayerNorm, cuda_unavailable_reason
from lanenorm._demo_report import plot, report

NORMS: dict[str, Any] = {"none": None, "BN": BatchNorm, "LN": LayerNorm}
Floats = NDArray[np.floating]
Labels = NDArray[np.integer]
EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}  # module -> distribution


@dataclass(frozen=True)
class Settings:
    """What is trained. The defaults take under a minute on two cores, `QUICK` takes a few seconds."""

    # Six layers: deep enough that nothing trains without normalization, and about as deep as LN alone can go here:
    # with eight, LN too was still guessing after 40 epochs at steps of 0.01, 0.03 and 0.1 (seed 0), unlike BN.
    depth: int = 6
    epochs: int = 30
    batch: int = 32
    steps: tuple[float, ...] = (0.03, 0.1, 0.3)
    seeds: int = 3
    # Three layers: here LN starts within the first epochs at every batch size, so that only the batch differs.
    sweep_depth: int = 3
    sweep_epochs: int = 6
    sweep_batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)
    sweep_seeds: int = 5

    def sweep_step(self, batch: int) -> float:
        """0.1 at 32 images, growing with the square root of the batch size: step times gradient noise is constant."""
        return 0.1 * math.sqrt(batch / 32)


QUICK = Settings(epochs=10, steps=(0.1,), seeds=1, sweep_epochs=2, sweep_batches=(2, 8, 64), sweep_seeds=2)


# --- The data ---------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images (count, 64) centred on the training mean, labels (count,)."""

    train_x: Floats
    train_y: Labels
    test_x: Floats
    test_y: Labels


def load_digits(seed: int, xp: Any = np) -> Digits:
    """Split the digits at random: 1280 = 5 * 256 to train on, so every batch size divides an epoch, 517 to test."""
    import sklearn.datasets

    x, y = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    x -= x[:1280].mean(axis=0)
    return Digits(*map(xp.asarray, (x[:1280], y[:1280], x[1280:], y[1280:])))


# --- The network ------------------------------------------------------------------------------------------------------


class Linear:
    """y = x @ weight + bias, weight (inputs, outputs) drawn from N(0, 1/inputs)."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, dtype: Any, xp: Any = np):
        self.weight: Floats = xp.asarray((rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(dtype))
        self.bias: Floats = xp.zeros(outputs, dtype)

    def __call__(self, x: Floats) -> Floats:
        """Return y (batch, outputs) and keep x (batch, inputs) for `backward`."""
        self.x = x
        return x @ self.weight + self.bias

    def backward(self, dy: Floats) -> Floats:
        """Return dx; set dweight and dbias."""
        self.dweight = self.x.T @ dy
        self.dbias = dy.sum(axis=0)
        return dy @ self.weight.T


class Sigmoid:
    """y = 1 / (1 + exp(-x)), written with tanh, which cannot overflow."""

    def __init__(self, xp: Any = np):
        self.xp = xp

    def __call__(self, x: Floats) -> Floats:
        """Return y and keep it for `backward`: the slope is a function of y alone."""
        self.y: Floats = self.xp.tanh(0.5 * x)
        self.y += 1
        self.y *= 0.5
        return self.y

    def slope(self) -> Floats:
        """dy/dx where the last input was: 1/4 in the middle, towards 0 in both tails."""
        return self.y * (1 - self.y)

    def backward(self, dy: Floats) -> Floats:
        """Return dx."""
        return dy * self.slope()


class Network:
    """`depth` times (Linear, normalization or nothing, Sigmoid), then Linear to one score per class."""

    def __init__(
        self,
        norm: Any,
        depth: int,
        seed: int,
        *,
        inputs: int = 64,
        width: int = 64,
        classes: int = 10,
        dtype: Any = np.float32,
        xp: Any = np,
    ):
        rng = np.random.default_rng(seed)  # the normalizations draw nothing, so the weights do not depend on `norm`
        self.layers: list[Any] = []
        for fan_in in [inputs] + [width] * (depth - 1):
            self.layers.append(Linear(fan_in, width, rng, dtype, xp))
            if norm is not None:
                self.layers.append(norm(width, dtype=dtype, xp=xp))
            self.layers.append(Sigmoid(xp))
        self.layers.append(Linear(width, classes, rng, dtype, xp))
        self.linears = [layer for layer in self.layers if isinstance(layer, Linear)]
        self.sigmoids = [layer for layer in self.layers if isinstance(layer, Sigmoid)]
        self.norms: list[Any] = [layer for layer in self.layers if isinstance(layer, BatchNorm | LayerNorm)]

    def __call__(self, x: Floats) -> Floats:
        """Return the scores (batch, classes) of the images x (batch, inputs)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Floats) -> Floats:
        """Return the gradient of the images; every layer keeps those of its parameters."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def parameters(self) -> Iterator[tuple[Floats, Floats]]:
        """Every parameter with its gradient, always in the same order."""
        for layer in [*self.linears, *self.norms]:
            yield layer.weight, layer.dweight
            yield layer.bias, layer.dbias

    def accuracy(self, x: Floats, labels: Labels) -> float:
        """Share of right answers in eval mode: BN normalizes with its running statistics."""
        for norm in self.norms:
            norm.eval()
        right = (self(x).argmax(axis=1) == labels).mean()
        for norm in self.norms:
            norm.train()
        return float(right)


def cross_entropy(scores: Floats, labels: Labels, xp: Any = np) -> tuple[float, Floats]:
    """Mean over the batch of -log softmax(scores)[label], and its gradient with respect to `scores`."""
    rows = xp.arange(len(labels))
    shifted = scores - scores.max(axis=1, keepdims=True)
    probability = xp.exp(shifted)
    total = probability.sum(axis=1, keepdims=True)
    loss = (xp.log(total[:, 0]) - shifted[rows, labels]).mean()
    probability /= total
    probability[rows, labels] -= 1
    probability /= len(labels)
    return float(loss), probability


class Momentum:
    """Gradient descent with momentum 0.9: velocity = 0.9 velocity - step * gradient; parameter += velocity."""

    def __init__(self, step: float):
        self.step = step
        self.velocities: list[Floats] = []

    def update(self, parameters: Iterator[tuple[Floats, Floats]]) -> None:
        """Take one step, in place. The pairs (parameter, gradient) come in the same order every time."""
        for index, (parameter, gradient) in enumerate(parameters):
            if index == len(self.velocities):
                self.velocities.append(0 * parameter)
            velocity = self.velocities[index]
            velocity *= 0.9
            velocity -= self.step * gradient
            parameter += velocity


# --- Training ---------------------------------------------------------------------------------------------------------


class History(NamedTuple):
    """One training. Gradient and slope are those of the first batch of an epoch, so row 0 is the untrained network."""

    loss: Floats  # (epochs,) mean training loss
    accuracy: Floats  # (epochs,) on the test images, after the epoch
    gradient: Floats  # (epochs, depth + 1) Euclidean norm of dloss/dweight of each Linear
    slope: Floats  # (epochs, depth) mean slope of each Sigmoid, 1 = the steepest there is (1/4)


def train(
    norm: Any,
    depth: int,
    step: float,
    batch: int,
    epochs: int,
    seed: int,
    data: Digits,
    tick: Callable[[int], Any],
    xp: Any = np,
) -> History:
    """Train one network on images that are arrays of `xp`; `tick(n)` is told of every n steps done."""
    network, descent = Network(norm, depth, seed, xp=xp), Momentum(step)
    shuffle = np.random.default_rng((seed, 1))
    loss, accuracy, gradient, slope = np.zeros(epochs), np.zeros(epochs), np.zeros((epochs, depth + 1)), []
    for epoch in range(epochs):
        batches = xp.asarray(shuffle.permutation(len(data.train_x)).reshape(-1, batch))
        for index, chosen in enumerate(batches):
            batch_loss, dscores = cross_entropy(network(data.train_x[chosen]), data.train_y[chosen], xp)
            network.backward(dscores)
            loss[epoch] += batch_loss / len(batches)
            if index == 0:
                gradient[epoch] = [float(xp.linalg.norm(linear.dweight)) for linear in network.linears]
                slope.append([4 * float(sigmoid.slope().mean()) for sigmoid in network.sigmoids])
            descent.update(network.parameters())
        accuracy[epoch] = network.accuracy(data.test_x, data.test_y)
        tick(len(batches))
    return History(loss, accuracy, gradient, np.array(slope))


# --- The two experiments ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Everything measured by `run`."""

    settings: Settings
    depth: dict[tuple[str, float], History]  # (norm, step): a History whose arrays have a leading axis of seeds
    sweep: dict[str, Floats]  # "BN", "LN": final test accuracy (batch sizes, seeds)
    seconds: float

    def best_step(self, norm: str) -> float:
        """Choose the step size with the lowest training loss in the last epoch: the test images have no say."""
        return min(self.settings.steps, key=lambda step: self.depth[norm, step].loss[:, -1].mean())

    def best(self, norm: str) -> History:
        """Look up the trainings at the best step size."""
        return self.depth[norm, self.best_step(norm)]

    def final(self, norm: str) -> float:
        """Test accuracy after the last epoch, mean of the seeds."""
        return float(self.best(norm).accuracy[:, -1].mean())

    def passed(self, norm: str, epochs: slice = slice(1)) -> float:
        """Gradient norm of the first layer over that of the last; geometric mean of the seeds and `epochs`."""
        gradient = self.best(norm).gradient[:, epochs]
        return float(np.exp(np.mean(np.log(gradient[..., 0] / gradient[..., -1]))))

    def flattest(self, norm: str, step: float, epoch: int) -> float:
        """Mean slope of the sigmoids in the layer where it is smallest, 1 = the steepest there is (1/4)."""
        return float(self.depth[norm, step].slope[:, epoch].mean(axis=0).min())


def run(*, quick: bool = False, seed: int = 0, show_progress: bool = False, device: str = "cpu") -> Results:
    """Run both experiments.

    Parameters
    ----------
    quick : bool, default False
        A few seconds in place of a minute: fewer epochs, step sizes, seeds and batch sizes.
    seed : int, default 0
        First of the consecutive seeds of the networks; also draws the split into training and test images.
    show_progress : bool, default False
        Show one progress bar over all trainings on the standard error stream.
    device : {"cpu", "cuda"}, default "cpu"
        Train on NumPy arrays, or on CuPy arrays on the current device.

    Returns
    -------
    Results
        Accuracy, loss, gradient norms and slopes of the deep networks; accuracy by batch size of the others.

    Raises
    ------
    ImportError
        scikit-learn, matplotlib or tqdm is missing: `pip install "lanenorm[demo]"`; or for "cuda", what
        `lanenorm.cuda_unavailable_reason` says.
    """
    require_extra()
    xp = array_library(device)
    from threadpoolctl import threadpool_limits  # comes with scikit-learn
    from tqdm import tqdm

    began, data, s = time.perf_counter(), load_digits(seed, xp), QUICK if quick else Settings()
    images = len(data.train_x)
    total = len(NORMS) * len(s.steps) * s.seeds * s.epochs * (images // s.batch)
    total += 2 * s.sweep_seeds * s.sweep_epochs * sum(images // batch for batch in s.sweep_batches)
    depth: dict[tuple[str, float], History] = {}
    sweep: dict[str, Floats] = {}
    # One BLAS thread: at 64 x 64 a second one gains nothing, and on a busy machine the two wait for each other.
    with threadpool_limits(1), tqdm(total=total, unit=" steps", disable=not show_progress) as bar:
        for norm, step in itertools.product(NORMS, s.steps):
            bar.set_description(f"{norm:4}  {s.depth} layers, step size {step:<5g}", refresh=False)
            seeds = range(seed, seed + s.seeds)
            runs = [train(NORMS[norm], s.depth, step, s.batch, s.epochs, k, data, bar.update, xp) for k in seeds]
            depth[norm, step] = History(*map(np.stack, zip(*runs, strict=True)))
        for norm in ("BN", "LN"):
            sweep[norm] = np.zeros((len(s.sweep_batches), s.sweep_seeds))
            for (row, batch), k in itertools.product(enumerate(s.sweep_batches), range(s.sweep_seeds)):
                bar.set_description(f"{norm:4}  {s.sweep_depth} layers, batch size {batch:<4}", refresh=False)
                step = s.sweep_step(batch)
                one = train(NORMS[norm], s.sweep_depth, step, batch, s.sweep_epochs, seed + k, data, bar.update, xp)
                sweep[norm][row, k] = one.accuracy[-1]
    return Results(s, depth, sweep, time.perf_counter() - began)


# --- Command line -----------------------------------------------------------------------------------------------------


def array_library(device: str) -> Any:
    """NumPy, or CuPy where it and CUDA can be used; else ImportError with the reason."""
    if device == "cpu":
        return np
    if reason := cuda_unavailable_reason():
        raise ImportError(f"demo: --device cuda: {reason}")
    return importlib.import_module("cupy")


def require_extra() -> None:
    """Raise ImportError, with the install line, when a package of the extra "demo" is missing."""
    missing = [name for module, name in EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f'demo: {", ".join(missing)} missing: pip install "lanenorm[demo]"')


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the tables and the verdicts, write the picture.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments, those of the command line by default; `--help` lists them.

    Returns
    -------
    int
        0, or 1 where a package of the extra "demo" is missing or the picture cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m lanenorm demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("lanenorm_demo.png"), help="PNG to write (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few seconds of training in place of a minute")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="NumPy or CuPy arrays (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        parser.error(f"--seed: {arguments.seed} is negative")
    if not arguments.output.parent.is_dir():  # said now, not after a minute of training
        parser.error(f"--output: there is no directory {arguments.output.parent}")
    try:
        results = run(quick=arguments.quick, seed=arguments.seed, show_progress=True, device=arguments.device)
        print(report(results))
        plot(results, arguments.output)
    except (ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{results.seconds:.0f} seconds of training. Picture: {arguments.output}")
    return 0
