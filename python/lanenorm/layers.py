"""Layers for training: parameters, running statistics, and what the backward needs from the last forward.

Argument names, defaults and the keys of `state_dict` are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from lanenorm._arrays import type_name
from lanenorm.functional import (
    Array,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
)


class _Layer:
    """What both layers share: parameters, mode, state."""

    # arrays, or None where the layer has none
    weight: Array
    bias: Array
    dweight: Array
    dbias: Array
    training: bool
    _state: tuple[str, ...]  # names of the arrays of state_dict, in PyTorch's order
    _last: Any  # of the last forward, what the backward needs; None before one

    def _create_parameters(self, shape: tuple[int, ...], affine: bool, bias: bool, dtype: DTypeLike, xp: Any) -> None:
        self.weight = xp.ones(shape, dtype) if affine else None
        self.bias = xp.zeros(shape, dtype) if affine and bias else None
        self.dweight = self.dbias = None
        self.training = True
        self._last = None

    def train(self, mode: bool = True) -> Self:
        """Go into training mode (or into eval mode with ``mode=False``).

        Parameters
        ----------
        mode : bool, default True
            Whether to train.

        Returns
        -------
        layer
            The layer itself.
        """
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Go into eval mode.

        Returns
        -------
        layer
            The layer itself.
        """
        return self.train(False)

    def state_dict(self) -> dict[str, Any]:
        """Copies of parameters and running statistics under PyTorch's names.

        Returns
        -------
        dict of str to ndarray
            Only what this layer has: no `weight` without one. `num_batches_tracked` is an int64 array of no axes.
        """
        return {name: getattr(self, name).copy() for name in self._state if getattr(self, name) is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy parameters and running statistics into the arrays of this layer.

        The arrays stay the same objects. A forward before it no longer counts for `backward`.

        Parameters
        ----------
        state : mapping of str to ndarray
            As `state_dict` gives it; values of a PyTorch state dict after ``.numpy()`` fit too.

        Raises
        ------
        ValueError
            A key is missing or unexpected, or a shape differs. Nothing has been changed then.
        TypeError
            A value is no array of the library of this layer, or its dtype does not fit into the layer's without loss.
        """
        own = {name: getattr(self, name) for name in self._state if getattr(self, name) is not None}
        self._check_state(own, state)
        for name, array in own.items():
            array[...] = state[name]
        self._last = None

    def _check_state(self, own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        start = f"{type(self).__name__}.load_state_dict: "
        for text, names in (("misses", own.keys() - state.keys()), ("has unexpected", state.keys() - own.keys())):
            if names:
                raise ValueError(f"{start}state {text} {', '.join(sorted(names))}, expected {', '.join(own)}")
        for name, array in own.items():
            value = state[name]
            if type(value) is not type(array):
                raise TypeError(f"{start}{name} has type {type_name(value)}, expected {type_name(array)}")
            if value.shape != array.shape:
                raise ValueError(f"{start}{name} has shape {value.shape}, expected {array.shape}")
            if not np.can_cast(value.dtype, array.dtype, "safe"):
                raise TypeError(
                    f"{start}{name} has dtype {value.dtype}, expected {array.dtype}; use {name}.astype({array.dtype})"
                )

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle and copy: all but the last forward, which holds on to a whole batch."""
        return {**self.__dict__, "_last": None}

    def _saved(self) -> Any:
        if self._last is None:
            raise RuntimeError(f"{type(self).__name__}.backward: there was no forward, expected layer(x) before it")
        return self._last

    def _keep_gradients(self, dweight: Array, dbias: Array) -> None:
        self.dweight = dweight if self.weight is not None else None
        self.dbias = dbias if self.bias is not None else None


class LayerNorm(_Layer):
    """Layer normalization over the trailing axes, with parameters.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        Lengths of the trailing axes that are normalized over.
    eps : float, default 1e-5
        Added to the variance, inside the square root.
    elementwise_affine : bool, default True
        Whether there are `weight` and `bias`.
    bias : bool, default True
        Whether there is a `bias` where there is a `weight`.
    dtype : dtype, default float32
        Of `weight` and `bias`: that of the inputs to come, or float32 for 16-bit inputs.
    xp : module, default numpy
        Library of the arrays: `numpy` or `cupy`. CuPy's are made on the current device.

    Attributes
    ----------
    weight, bias : ndarray of shape `normalized_shape`, or None
        γ (ones at the start) and β (zeros).
    dweight, dbias : ndarray or None
        Gradients, overwritten by every `backward`.
    training : bool
        Without effect here; there for symmetry with `BatchNorm`.

    See Also
    --------
    lanenorm.layer_norm : Formula, accuracy and determinism; any axes.

    Notes
    -----
    The layer keeps a reference to the last input until the next forward; change it in place and the gradients are
    wrong.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016. arXiv:1607.06450

    Examples
    --------
    >>> import numpy as np
    >>> import lanenorm
    >>> layer = lanenorm.LayerNorm(4, eps=0.0)
    >>> layer(np.array([[3, 5, 3, 5]], dtype=np.float32))
    array([[-1.,  1., -1.,  1.]], dtype=float32)
    >>> layer.backward(np.array([[1, 0, 0, 0]], dtype=np.float32))
    array([[ 0.5,  0. , -0.5,  0. ]], dtype=float32)
    >>> layer.dweight
    array([-1.,  0.,  0.,  0.], dtype=float32)
    """

    _state = ("weight", "bias")

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...] | list[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
        xp: Any = np,
    ):
        shape = tuple(normalized_shape) if isinstance(normalized_shape, tuple | list) else (normalized_shape,)
        if not shape:
            raise ValueError("LayerNorm: normalized_shape is empty, expected at least one length")
        self.normalized_shape = shape
        self.eps = eps
        self._axis = tuple(range(-len(shape), 0))
        self._create_parameters(shape, elementwise_affine, bias, dtype, xp)

    def __call__(self, x: Array) -> Array:
        """Normalize.

        Parameters
        ----------
        x : ndarray of shape (..., *normalized_shape)
            Input.

        Returns
        -------
        ndarray
            y, shape and dtype of `x`.

        Raises
        ------
        ValueError
            The trailing axes of `x` are not `normalized_shape`.
        TypeError
            As in `lanenorm.layer_norm`.
        """
        # With parameters the kernel's checks would do, but not without.
        shape = getattr(x, "shape", None)
        if shape is not None and shape[-len(self.normalized_shape) :] != self.normalized_shape:
            trailing = ", ".join(map(str, self.normalized_shape))
            raise ValueError(f"LayerNorm: x has shape {shape}, expected (..., {trailing})")
        y, mean, rstd = layer_norm_forward(x, self.weight, self.bias, axis=self._axis, eps=self.eps)
        self._last = x, mean, rstd
        return y

    def backward(self, dy: Array) -> Array:
        """Gradient of the last forward; overwrites `dweight` and `dbias`.

        Parameters
        ----------
        dy : ndarray
            Gradient with respect to the last output, of its shape and dtype.

        Returns
        -------
        ndarray
            dx, shape and dtype of the last input.

        Raises
        ------
        RuntimeError
            There was no forward yet.
        TypeError, ValueError
            As in `lanenorm.layer_norm_backward`.
        """
        x, mean, rstd = self._saved()
        dx, dweight, dbias = layer_norm_backward(
            dy, x, mean, rstd, self.weight, axis=self._axis, param_grads=self.weight is not None
        )
        self._keep_gradients(dweight, dbias)
        return dx

    def __repr__(self) -> str:
        affine = f"elementwise_affine={self.weight is not None}, bias={self.bias is not None}"
        return f"LayerNorm({self.normalized_shape}, eps={self.eps}, {affine})"


class BatchNorm(_Layer):
    """Batch normalization with parameters and running statistics, for inputs of any number of axes.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float, default 1e-5
        Added to the variance, inside the square root.
    momentum : float or None, default 0.1
        Share of the new batch in the running statistics. None: the average over all batches so far.
    affine : bool, default True
        Whether there are `weight` and `bias`.
    track_running_stats : bool, default True
        Whether there are running statistics. Without them, eval mode normalizes with those of the batch too.
    channel_axis : int, default 1
        The axis of the channels: 1 for channels-first, -1 for channels-last.
    dtype : dtype, default float32
        Of `weight` and `bias`: that of the inputs to come, or float32 for 16-bit inputs. The running statistics are
        float32, or float64 with float64.
    xp : module, default numpy
        Library of the arrays: `numpy` or `cupy`. CuPy's are made on the current device.

    Attributes
    ----------
    weight, bias : ndarray of shape (C,), or None
        γ (ones at the start) and β (zeros).
    running_mean, running_var : ndarray of shape (C,), or None
        Zeros and ones at the start, updated by every forward in training mode; the variance is unbiased.
    num_batches_tracked : numpy.ndarray of int64 without axes, or None
        How many batches are in them; empty ones do not count. NumPy's also with CuPy: to read it never waits for a GPU.
    dweight, dbias : ndarray or None
        Gradients, overwritten by every `backward`.
    training : bool
        Whether batch statistics are used and running ones updated; `train` and `eval` change it.

    See Also
    --------
    lanenorm.batch_norm_forward : Formula, conventions elsewhere, accuracy and determinism.

    Notes
    -----
    After a forward in eval mode, `backward` gives the gradient with the running statistics held fixed.

    The layer keeps a reference to the last input until the next forward; change it in place and the gradients are
    wrong.

    References
    ----------
    .. [1] S. Ioffe, C. Szegedy, "Batch Normalization", 2015. arXiv:1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import lanenorm
    >>> layer = lanenorm.BatchNorm(2, eps=0.0, momentum=0.5)
    >>> x = np.array([[1, 10], [3, 30]], dtype=np.float32)
    >>> layer(x)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> layer.running_mean
    array([ 1., 10.], dtype=float32)
    >>> layer.eval()(x).dtype
    dtype('float32')
    """

    _state = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    running_mean: Array
    running_var: Array
    num_batches_tracked: Array

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        channel_axis: int = 1,
        dtype: DTypeLike = np.float32,
        xp: Any = np,
    ):
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.channel_axis = channel_axis
        self._create_parameters((num_features,), affine, True, dtype, xp)
        self.running_mean = self.running_var = self.num_batches_tracked = None
        if track_running_stats:
            statistics = np.float64 if np.dtype(dtype) == np.float64 else np.float32
            self.running_mean = xp.zeros(num_features, statistics)
            self.running_var = xp.ones(num_features, statistics)
            self.num_batches_tracked = np.zeros((), np.int64)

    def __call__(self, x: Array) -> Array:
        """Normalize; in training mode, update the running statistics.

        Parameters
        ----------
        x : ndarray
            Input with `num_features` channels along `channel_axis`.

        Returns
        -------
        ndarray
            y, shape and dtype of `x`.

        Raises
        ------
        ValueError
            The number of channels differs, or in training mode there is one value per channel.
        TypeError, numpy.exceptions.AxisError
            As in `lanenorm.batch_norm_forward`.
        """
        # With parameters the kernel's checks would do, but not without. An axis out of bounds is left to them.
        shape = getattr(x, "shape", ())
        if -len(shape) <= self.channel_axis < len(shape) and shape[self.channel_axis] != self.num_features:
            raise ValueError(
                f"BatchNorm: x has shape {shape}, expected {self.num_features} channels along axis {self.channel_axis}"
            )
        if not self.training and self.running_mean is not None:
            y = batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                channel_axis=self.channel_axis,
                eps=self.eps,
            )
            self._last = x, None, None
            return y
        track = self.training and self.running_mean is not None
        y, mean, rstd = batch_norm_forward(
            x,
            self.weight,
            self.bias,
            running_mean=self.running_mean if track else None,
            running_var=self.running_var if track else None,
            momentum=self._share_of_next_batch(),
            channel_axis=self.channel_axis,
            eps=self.eps,
        )
        if track and x.size > 0:
            self.num_batches_tracked += 1
        self._last = x, mean, rstd
        return y

    def _share_of_next_batch(self) -> float:
        if self.momentum is not None:
            return self.momentum
        return 1.0 if self.num_batches_tracked is None else 1.0 / (int(self.num_batches_tracked) + 1)

    def backward(self, dy: Array) -> Array:
        """Gradient of the last forward; overwrites `dweight` and `dbias`.

        Parameters
        ----------
        dy : ndarray
            Gradient with respect to the last output, of its shape and dtype.

        Returns
        -------
        ndarray
            dx, shape and dtype of the last input.

        Raises
        ------
        RuntimeError
            There was no forward yet.
        TypeError, ValueError
            As in `lanenorm.batch_norm_backward`.
        """
        x, mean, rstd = self._saved()
        frozen = mean is None
        if frozen:
            mean = self.running_mean
            # In double and rounded once, as the kernel of the forward does; NaN and Inf as silently.
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                rstd = (1.0 / np.sqrt(self.running_var.astype(np.float64) + self.eps)).astype(mean.dtype)
        dx, dweight, dbias = batch_norm_backward(
            dy,
            x,
            mean,
            rstd,
            self.weight,
            channel_axis=self.channel_axis,
            training=not frozen,
            param_grads=self.weight is not None,
        )
        self._keep_gradients(dweight, dbias)
        return dx

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}, track_running_stats={self.running_mean is not None}, "
            f"channel_axis={self.channel_axis})"
        )
