"""The layers: parameters, running statistics, modes, state, pickling."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import reference
from cases import DTYPES, by_dtype, check_backward, check_y, normal, parameters
from reference import check

import lanenorm

# ---- By hand --------------------------------------------------------------------------------------------------------


def test_layer_norm_layer_by_hand():
    layer = lanenorm.LayerNorm(4, eps=0.0)
    layer.weight[...], layer.bias[...] = [1, 2, 3, 4], [10, 20, 30, 40]
    assert np.array_equal(layer(np.array([[3, 5, 3, 5]], np.float32)), [[9, 22, 27, 44]])
    assert np.array_equal(layer.backward(np.array([[8, 0, 0, 0]], np.float32)), [[4, 0, -4, 0]])
    assert np.array_equal(layer.dweight, [-8, 0, 0, 0])
    assert np.array_equal(layer.dbias, [8, 0, 0, 0])


def test_batch_norm_layer_by_hand():
    layer = lanenorm.BatchNorm(2, eps=0.0, momentum=0.25)
    x = np.array([[1, 10], [3, 30]], np.float32)
    assert np.array_equal(layer(x), [[-1, -1], [1, 1]])
    assert np.array_equal(layer.running_mean, [0.5, 5])
    assert np.array_equal(layer.running_var, [1.25, 50.75])
    assert layer.num_batches_tracked == 1
    layer.running_mean[...], layer.running_var[...] = [1, 10], [4, 100]
    assert np.array_equal(layer.eval()(x), [[0, 0], [1, 2]])
    assert np.array_equal(layer.backward(np.array([[2, 0], [0, 10]], np.float32)), [[1, 0], [0, 1]])
    assert np.array_equal(layer.dweight, [0, 20])
    assert layer.num_batches_tracked == 1


# ---- Values ---------------------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("shape", [7, (7,), [7], (5, 7)], ids=str)
def test_layer_norm_layer(rng, dtype, shape):
    layer = lanenorm.LayerNorm(shape, eps=0.01, dtype=dtype)
    lengths = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    axis = tuple(range(-len(lengths), 0))
    layer.weight[...], layer.bias[...] = parameters(rng, lengths, dtype)
    x, dy = normal(rng, (3, *lengths), dtype), normal(rng, (3, *lengths), dtype)
    y = layer(x)
    check_y(y, reference.layer_norm(x, layer.weight, layer.bias, axis=axis, eps=0.01), layer.weight, layer.bias)
    dx = layer.backward(dy)
    exact = reference.layer_norm_backward(dy, x, layer.weight, axis=axis, eps=0.01)
    check_backward(lanenorm.NormBackward(dx, layer.dweight, layer.dbias), exact, x, layer.weight)


@by_dtype
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_batch_norm_layer_in_training(rng, dtype, channel_axis):
    layer = lanenorm.BatchNorm(4, eps=0.01, momentum=0.3, channel_axis=channel_axis, dtype=dtype)
    layer.weight[...], layer.bias[...] = parameters(rng, 4, dtype)
    x, dy = normal(rng, (6, 4, 5, 4), dtype, 2.0), normal(rng, (6, 4, 5, 4), dtype)
    expected = reference.running_statistics(x, layer.running_mean, layer.running_var, 0.3, channel_axis=channel_axis)
    y = layer(x)
    forward = reference.batch_norm_forward(x, layer.weight, layer.bias, channel_axis=channel_axis, eps=0.01)
    gamma, beta = (reference.spread(p, (channel_axis % 4,), 4) for p in (layer.weight, layer.bias))
    check_y(y, forward, gamma, beta)
    check("running_mean", layer.running_mean, expected[0], np.sqrt(forward.var))
    check("running_var", layer.running_var, expected[1], 2 * forward.var)
    dx = layer.backward(dy)
    exact = reference.batch_norm_backward(dy, x, layer.weight, channel_axis=channel_axis, eps=0.01)
    check_backward(lanenorm.NormBackward(dx, layer.dweight, layer.dbias), exact, x, layer.weight)


@by_dtype
def test_batch_norm_layer_in_eval_mode(rng, dtype):
    """Normalized with the running statistics, which stay; the gradient takes them for constants."""
    layer = lanenorm.BatchNorm(4, eps=0.01, dtype=dtype)
    layer.weight[...], layer.bias[...] = parameters(rng, 4, dtype)
    layer.running_mean[...] = normal(rng, 4, layer.running_mean.dtype)
    layer.running_var[...] = rng.uniform(0.5, 2, 4)
    before = layer.state_dict()
    assert layer.eval() is layer
    x, dy = normal(rng, (6, 4, 5), dtype), normal(rng, (6, 4, 5), dtype)
    y = layer(x)
    gamma, beta = (reference.spread(p, (1,), 3) for p in (layer.weight, layer.bias))
    check_y(
        y,
        reference.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=0.01),
        gamma,
        beta,
    )
    dx = layer.backward(dy)
    rstd = 1 / np.sqrt(layer.running_var.astype(np.float64) + 0.01)
    exact = reference.batch_norm_frozen_backward(dy, x, layer.running_mean, rstd, layer.weight)
    check("dx", dx, exact.dx, exact.dx_scale)
    check("dweight", layer.dweight, exact.dweight, exact.dweight_scale)
    check("dbias", layer.dbias, exact.dbias, exact.dbias_scale)
    assert all(np.array_equal(before[name], array) for name, array in layer.state_dict().items())


def test_batch_norm_layer_one_value_per_channel_in_eval_mode(rng):
    layer = lanenorm.BatchNorm(4).eval()
    x = normal(rng, (1, 4), np.float32)
    check_y(layer(x), reference.batch_norm(x, layer.running_mean, layer.running_var))
    layer.train()
    with pytest.raises(ValueError, match="batch_norm_forward: x"):
        layer(x)
    assert layer.num_batches_tracked == 0
    assert np.all(layer.running_mean == 0)


def test_batch_norm_layer_cumulative_average(rng):
    """momentum=None: after three batches of equal size, the mean of their statistics."""
    layer = lanenorm.BatchNorm(5, momentum=None, dtype=np.float64)
    batches = [normal(rng, (20, 5), np.float64, offset) for offset in (0, 3, -7)]
    for batch in batches:
        layer(batch)
    assert layer.num_batches_tracked == 3
    np.testing.assert_allclose(layer.running_mean, np.mean([b.mean(0) for b in batches], axis=0), rtol=1e-14)
    np.testing.assert_allclose(layer.running_var, np.mean([b.var(0, ddof=1) for b in batches], axis=0), rtol=1e-14)


def test_batch_norm_layer_without_running_statistics(rng):
    """Eval mode too normalizes with the statistics of the batch, as in PyTorch."""
    layer = lanenorm.BatchNorm(5, track_running_stats=False)
    assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
    x, dy = normal(rng, (20, 5), np.float32), normal(rng, (20, 5), np.float32)
    exact = reference.batch_norm_backward(dy, x)
    for mode in (True, False):
        layer.train(mode)
        check_y(layer(x), reference.batch_norm_forward(x))
        check("dx", layer.backward(dy), exact.dx, exact.dx_scale)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_batch_norm_layer_empty_batch_does_not_count():
    layer = lanenorm.BatchNorm(5, momentum=None)
    assert layer(np.empty((0, 5), np.float32)).shape == (0, 5)
    assert layer.num_batches_tracked == 0
    assert np.all(layer.running_var == 1)
    assert layer.backward(np.empty((0, 5), np.float32)).shape == (0, 5)
    assert np.all(layer.dweight == 0)


def test_layers_train_a_network(rng):
    """Gradient steps through both layers take a loss down: signs and shapes fit together."""
    target = normal(rng, (40, 6), np.float64)
    x = normal(rng, (40, 6), np.float64)
    mixing = normal(rng, (6, 6), np.float64)
    batch, layer = lanenorm.BatchNorm(6, dtype=np.float64), lanenorm.LayerNorm(6, dtype=np.float64)
    losses = []
    for _ in range(60):
        y = layer(batch(x) @ mixing)
        losses.append(float(np.square(y - target).mean()))
        batch.backward(layer.backward(2 * (y - target) / y.size) @ mixing.T)
        for each in (batch, layer):
            each.weight -= 0.5 * each.dweight
            each.bias -= 0.5 * each.dbias
    assert losses[-1] < 0.9 * losses[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


# ---- Parameters and arguments ---------------------------------------------------------------------------------------


def test_layers_without_parameters(rng):
    x, dy = normal(rng, (20, 5), np.float32), normal(rng, (20, 5), np.float32)
    for layer, forward, backward in (
        (lanenorm.LayerNorm(5, elementwise_affine=False), reference.layer_norm, reference.layer_norm_backward),
        (lanenorm.BatchNorm(5, affine=False), reference.batch_norm_forward, reference.batch_norm_backward),
    ):
        assert layer.weight is layer.bias is None
        check_y(layer(x), forward(x))
        exact = backward(dy, x)
        check("dx", layer.backward(dy), exact.dx, exact.dx_scale)
        assert layer.dweight is layer.dbias is None


def test_layer_norm_layer_without_bias(rng):
    layer = lanenorm.LayerNorm(5, bias=False)
    assert layer.bias is None
    layer(normal(rng, (2, 5), np.float32))
    layer.backward(normal(rng, (2, 5), np.float32))
    assert layer.dweight.shape == (5,)
    assert layer.dbias is None
    assert set(layer.state_dict()) == {"weight"}


@by_dtype
def test_layer_dtypes_at_the_start(dtype):
    statistics = reference.statistics_dtype(dtype)
    for layer in (lanenorm.LayerNorm(3, dtype=dtype), lanenorm.BatchNorm(3, dtype=dtype)):
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert np.all(layer.weight == 1)
        assert np.all(layer.bias == 0)
        assert layer.dweight is layer.dbias is None
        assert layer.training
    assert layer.running_mean.dtype == layer.running_var.dtype == statistics
    assert np.all(layer.running_mean == 0)
    assert np.all(layer.running_var == 1)
    assert layer.num_batches_tracked.dtype == np.int64


def test_layers_with_float32_parameters_take_16_bit_inputs(rng):
    for dtype in (d for d in DTYPES if d.itemsize == 2):
        x = normal(rng, (8, 5), dtype)
        for layer in (lanenorm.LayerNorm(5), lanenorm.BatchNorm(5)):
            assert layer(x).dtype == dtype
            assert layer.backward(x).dtype == dtype
            assert layer.dweight.dtype == np.float32


def test_gradients_are_overwritten_and_not_accumulated(rng):
    x, dy = normal(rng, (8, 5), np.float32), normal(rng, (8, 5), np.float32)
    for layer in (lanenorm.LayerNorm(5), lanenorm.BatchNorm(5)):
        layer(x)
        layer.backward(dy)
        first = layer.dweight.copy()
        layer.backward(dy)
        assert np.array_equal(layer.dweight, first)


def test_layer_refuses_backward_before_forward():
    for layer in (lanenorm.LayerNorm(5), lanenorm.BatchNorm(5)):
        with pytest.raises(RuntimeError, match=r"\w+Norm\.backward: .*forward"):
            layer.backward(np.ones((2, 5), np.float32))


def test_layer_refuses_input_of_another_shape():
    """Also without parameters, where nothing else would notice."""
    for affine in (True, False):
        with pytest.raises(ValueError, match=r"\(2, 6\), expected .*5"):
            lanenorm.LayerNorm(5, elementwise_affine=affine)(np.ones((2, 6), np.float32))
        with pytest.raises(ValueError, match=r"\(2, 6\), expected .*5"):
            lanenorm.BatchNorm(5, affine=affine)(np.ones((2, 6), np.float32))
        with pytest.raises(ValueError, match="expected"):
            lanenorm.LayerNorm((4, 5), elementwise_affine=affine)(np.ones(5, np.float32))
    with pytest.raises(TypeError, match=r"x has type list, expected numpy\.ndarray"):
        lanenorm.LayerNorm(5)([[1.0, 2, 3, 4, 5]])
    with pytest.raises(np.exceptions.AxisError):
        lanenorm.BatchNorm(5)(np.ones(5, np.float32))


# ---- State ----------------------------------------------------------------------------------------------------------

TORCH_KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def trained(rng):
    """A layer whose every array has left its initial value."""
    layer = lanenorm.BatchNorm(5)
    layer.weight[...], layer.bias[...] = parameters(rng, 5, np.float32)
    layer(normal(rng, (8, 5), np.float32, 3.0))
    return layer


def test_state_dict_has_the_keys_of_pytorch(rng):
    assert list(trained(rng).state_dict()) == TORCH_KEYS
    assert list(lanenorm.LayerNorm(5).state_dict()) == ["weight", "bias"]


def test_state_dict_is_a_copy(rng):
    layer = trained(rng)
    state = layer.state_dict()
    kept = {name: array.copy() for name, array in state.items()}
    layer(normal(rng, (8, 5), np.float32))
    layer.weight += 1
    assert all(np.array_equal(state[name], kept[name]) for name in TORCH_KEYS)


def test_load_state_dict_restores_everything_in_place(rng):
    layer, fresh = trained(rng), lanenorm.BatchNorm(5)
    arrays = {name: getattr(fresh, name) for name in TORCH_KEYS}
    fresh.load_state_dict(layer.state_dict())
    for name in TORCH_KEYS:
        assert getattr(fresh, name) is arrays[name]
        assert np.array_equal(arrays[name], getattr(layer, name))
    x = normal(rng, (8, 5), np.float32)
    assert np.array_equal(fresh.eval()(x), layer.eval()(x))


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        (lambda s: s.pop("bias"), ValueError, "misses bias"),
        (lambda s: s.update(extra=np.ones(5)), ValueError, "unexpected extra"),
        (lambda s: s.update(bias=np.ones(6, np.float32)), ValueError, r"bias has shape \(6,\), expected \(5,\)"),
        (lambda s: s.update(bias=[1.0] * 5), TypeError, "bias has type list, expected numpy.ndarray"),
        (lambda s: s.update(bias=np.ones(5)), TypeError, "bias has dtype float64, expected float32"),
        (lambda s: s.update(running_var=np.ones((5, 1), np.float32)), ValueError, "running_var has shape"),
    ],
)
def test_load_state_dict_refuses_and_changes_nothing(rng, change, exception, message):
    layer = lanenorm.BatchNorm(5)
    before = {name: array.tobytes() for name, array in layer.state_dict().items()}
    state = trained(rng).state_dict()
    change(state)
    with pytest.raises(exception, match=message):
        layer.load_state_dict(state)
    assert {name: array.tobytes() for name, array in layer.state_dict().items()} == before


def test_layers_are_picklable_and_copyable(rng):
    x = normal(rng, (8, 5), np.float32)
    for layer in (trained(rng), lanenorm.LayerNorm((5,), eps=0.5)):
        for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
            assert repr(other) == repr(layer)
            state = other.state_dict()
            assert all(np.array_equal(state[name], array) for name, array in layer.state_dict().items())
            assert np.array_equal(other(x), copy.deepcopy(layer)(x))
            other.weight += 1
            assert not np.array_equal(other.weight, layer.weight)


def test_load_state_dict_forgets_the_last_forward(rng):
    layer = trained(rng)
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError):
        layer.backward(np.ones((8, 5), np.float32))


def test_layers_name_themselves():
    assert "LayerNorm((5,), eps=1e-05" in repr(lanenorm.LayerNorm(5))
    assert "BatchNorm(5, eps=1e-05, momentum=0.1" in repr(lanenorm.BatchNorm(5))
