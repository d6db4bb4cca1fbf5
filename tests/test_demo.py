"""The demo: its network's gradients, and one quick run from the training to the picture."""

import struct

import numpy as np
import pytest

import lanenorm
from lanenorm import demo


def need_extra():
    """Skip, naming the package, where the extra "demo" is not installed."""
    for module in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(module, reason=f'the extra "demo" is not installed: no {module}')


@pytest.fixture(scope="module")
def quick():
    need_extra()
    return demo.run(quick=True)


def test_cross_entropy_by_hand():
    """Two classes with equal scores: the loss is log 2, the gradient half a unit per image, over two images."""
    loss, dscores = demo.cross_entropy(np.zeros((2, 2)), np.array([0, 1]))
    assert loss == pytest.approx(np.log(2), rel=1e-15)
    np.testing.assert_array_equal(dscores, [[-0.25, 0.25], [0.25, -0.25]])


@pytest.mark.parametrize("norm", demo.NORMS)
def test_network_gradient_matches_finite_differences(norm):
    """Every parameter and every input of a float64 network, against central differences.

    With h = 1e-5 the differences err by h^2 = 1e-10 times a third derivative of order 1 and by 2^-53 / h = 1e-11.
    """
    rng = np.random.default_rng(1)
    network = demo.Network(demo.NORMS[norm], 2, 0, inputs=5, width=4, classes=3, dtype=np.float64)
    for layer in network.norms:  # away from weight = 1, bias = 0, where a forgotten factor would not show
        layer.weight += rng.uniform(-0.3, 0.3, 4)
        layer.bias += rng.uniform(-0.3, 0.3, 4)
    x, labels = rng.standard_normal((6, 5)), rng.integers(3, size=6)
    _, dscores = demo.cross_entropy(network(x), labels)
    dx = network.backward(dscores)
    checked = [(x, dx), *((value, gradient.copy()) for value, gradient in network.parameters())]
    assert len(checked) == 1 + 2 * len(network.linears) + 2 * len(network.norms)
    for value, gradient in checked:
        numeric = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            kept, loss = value[index], []
            for h in (1e-5, -1e-5):
                value[index] = kept + h
                loss.append(demo.cross_entropy(network(x), labels)[0])
            value[index] = kept
            numeric[index] = (loss[0] - loss[1]) / 2e-5
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=1e-8)


def train_a_little(xp, norm):
    """The History of one epoch."""
    rng = np.random.default_rng(3)
    images, labels = rng.standard_normal((64, 64)).astype(np.float32), rng.integers(10, size=64)
    data = demo.Digits(*map(xp.asarray, (images, labels, images, labels)))
    return demo.train(demo.NORMS[norm], 2, 0.1, 16, 1, 0, data, lambda steps: None, xp)


class Library:
    """NumPy as another library: only what the demo may ask of one, and nothing of it made by NumPy's own functions."""

    linalg = np.linalg

    def __init__(self):
        self.asked = set()

    def __getattr__(self, name):
        assert name in ("asarray", "zeros", "ones", "arange", "exp", "log", "tanh"), name
        self.asked.add(name)
        return getattr(np, name)


@pytest.mark.parametrize("norm", demo.NORMS)
def test_training_uses_the_library_of_the_arrays(norm):
    library = Library()
    histories = train_a_little(np, norm), train_a_little(library, norm)
    for ours, theirs in zip(*histories, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert library.asked >= {"asarray", "zeros", "arange", "exp", "log", "tanh"}


@pytest.mark.gpu
@pytest.mark.parametrize("norm", demo.NORMS)
def test_training_on_a_gpu_is_the_same(norm):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    reason = lanenorm.cuda_unavailable_reason()
    if reason is not None:
        pytest.skip(f"no CUDA: {reason}")
    for ours, theirs in zip(train_a_little(cupy, norm), train_a_little(np, norm), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_device_cuda_says_what_is_missing(monkeypatch, tmp_path, capsys):
    need_extra()
    monkeypatch.setattr(demo, "cuda_unavailable_reason", lambda: "a reason")
    assert demo.main(["--quick", "--device", "cuda", "--output", str(tmp_path / "demo.png")]) == 1
    assert capsys.readouterr().err == "demo: --device cuda: a reason\n"


def test_networks_start_from_the_same_weights():
    networks = [demo.Network(norm, 3, 7) for norm in demo.NORMS.values()]
    for other in networks[1:]:
        for ours, theirs in zip(networks[0].linears, other.linears, strict=True):
            np.testing.assert_array_equal(ours.weight, theirs.weight)


def test_accuracy_uses_running_statistics_and_leaves_training_mode():
    """One image at a time gives the same answers as all at once, which batch statistics would not."""
    rng = np.random.default_rng(2)
    network = demo.Network(demo.NORMS["BN"], 2, 0)
    x = rng.standard_normal((20, 64)).astype(np.float32)
    network(x)
    labels = rng.integers(10, size=20)
    alone = np.mean([network.accuracy(x[k : k + 1], labels[k : k + 1]) for k in range(20)])
    assert network.accuracy(x, labels) == pytest.approx(alone)
    before = network.norms[0].running_mean.copy()
    network(x)
    assert np.any(network.norms[0].running_mean != before)


def test_run_measures_finite_numbers(quick):
    s = quick.settings
    assert set(quick.depth) == {(norm, step) for norm in demo.NORMS for step in s.steps}
    for history in quick.depth.values():
        assert history.accuracy.shape == history.loss.shape == (s.seeds, s.epochs)
        assert history.gradient.shape == (s.seeds, s.epochs, s.depth + 1)
        assert history.slope.shape == (s.seeds, s.epochs, s.depth)
        assert all(np.all(np.isfinite(measured)) for measured in history)
        assert np.all(history.gradient > 0)
        assert np.all((history.slope >= 0) & (history.slope <= 1))
    for accuracy in quick.sweep.values():
        assert accuracy.shape == (len(s.sweep_batches), s.sweep_seeds)
        assert np.all((accuracy >= 0) & (accuracy <= 1))


def test_run_trains(quick):
    """Guessing gets a tenth right. BN is far beyond it even in the quick run; LN is with the shallower network."""
    assert quick.final("BN") > 0.8
    assert quick.sweep["LN"].max() > 0.8


def test_report_states_what_was_measured(quick):
    text = demo.report(quick)
    assert f"{quick.final('BN'):.1%}" in text
    assert text.count("claim: ") == text.count(" holds (") + text.count("DOES NOT HOLD HERE (") > 0


def test_main_writes_a_picture(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda **_: quick)
    path = tmp_path / "demo.png"
    assert demo.main(["--quick", "--output", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    png = path.read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width > 1500
    assert height > 500
    import matplotlib.image

    image = matplotlib.image.imread(path)
    for colour in ((0x5F, 0x5F, 0x5F), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # a line in each of the three colours
        drawn = np.all(np.abs(image[..., :3] * 255 - colour) < 1, axis=-1)
        assert drawn.sum() > 1000


def test_main_names_missing_packages(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "sklearn" else object())
    path = tmp_path / "demo.png"
    assert demo.main(["--quick", "--output", str(path)]) == 1
    error = capsys.readouterr().err
    assert "scikit-learn missing" in error
    assert 'pip install "lanenorm[demo]"' in error
    assert not path.exists()


def test_main_refuses_missing_directory_before_training(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--output", str(tmp_path / "nowhere" / "demo.png")])
    assert "nowhere" in capsys.readouterr().err
