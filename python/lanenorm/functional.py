"""The six operations on arrays.

Every function calls the C++ module for NumPy arrays with positional arguments (keywords would double the cost of a
call). Where that returns NotImplemented, because an array is none of NumPy's, the module for its library serves the
call, or it is refused. A call on a small array takes about a microsecond in all: testing the types here, and naming
the results, took a quarter of it. (Most of these lines are the docstrings.)

γ is `weight`, β is `bias`, x̂ the normalized value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lanenorm import _cpu
from lanenorm._arrays import backend

Array = Any  # numpy.ndarray or cupy.ndarray


class NormForward(NamedTuple):
    """Result of a forward that a backward will follow.

    Parameters
    ----------
    y : ndarray
        Normalized array, with the shape, dtype and memory layout of `x`.
    mean : ndarray
        Mean of every slice; float32, or float64 for float64 `x`.
    rstd : ndarray
        1/sqrt(var + eps) of every slice, shape and dtype of `mean`.
    """

    y: Array
    mean: Array
    rstd: Array


class NormBackward(NamedTuple):
    """Gradients of a loss.

    Parameters
    ----------
    dx : ndarray
        Gradient with respect to `x`, of its shape, dtype and memory layout.
    dweight, dbias : ndarray or None
        Gradients with respect to `weight` and `bias`, None with ``param_grads=False``.
    """

    dx: Array
    dweight: Array | None
    dbias: Array | None


# --- Layer normalization ----------------------------------------------------------------------------------------------


def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    r"""Layer normalization, without the statistics that a backward needs.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64
        Input, any shape and strides.
    weight : ndarray, optional
        γ, the shape of the normalized axes of `x` in ascending order. Its dtype is that of `x`, or float32 with a
        16-bit `x`. None stands for ones.
    bias : ndarray, optional
        β, shape and dtype as `weight`. None stands for zeros.
    axis : int or tuple of int, default -1
        The axes normalized over; any, not only trailing ones.
    eps : float, default 1e-5
        Added to the variance, inside the square root; finite and not negative.
    out : ndarray, optional
        Receives the result; shape, dtype and memory layout of ``numpy.empty_like(x)``. May be `x` itself, else it
        must not share memory with an input.

    Returns
    -------
    ndarray
        y, with the shape, dtype and memory layout of ``numpy.empty_like(x)``; `out` where it is given.

    Raises
    ------
    TypeError
        An argument is not a plain array, its dtype is not one of the four or does not go with that of `x`; NumPy and
        CuPy arrays are mixed, or CuPy arrays lie on two devices.
    ValueError
        A shape does not fit `x`; `axis` is empty or names an axis twice; `eps` is negative or not finite; `out` is
        read-only, of another layout, or shares memory with an input.
    numpy.exceptions.AxisError
        `axis` is out of bounds.
    KeyboardInterrupt
        Ctrl-C was pressed; the contents of the result are undefined.
    ImportError, RuntimeError
        With CuPy arrays: this lanenorm has no CUDA part, or CUDA refuses (no driver, no device, no memory).

    See Also
    --------
    layer_norm_forward : The same, with what `layer_norm_backward` needs.

    Notes
    -----
    For each slice over `axis`, with n elements, mean μ and variance σ² (biased: divided by n),

    .. math:: y = \hat x γ + β, \qquad \hat x = \frac{x - μ}{\sqrt{σ^2 + eps}}.

    float16 and bfloat16 are calculated in float32 and rounded once. The result does not depend on the number of
    threads, the instruction set, the strides of `x` other than which axis lies innermost in memory, or the other rows
    of the batch. A constant slice gives exactly `bias` where eps > 0; NaN or Inf spoils its own slice only.

    CuPy arrays give CuPy arrays. The work is queued on the current stream of the device they lie on, and not waited
    for; while that stream is being captured it becomes part of the graph. NumPy and CuPy results may differ in the
    last bits.

    Conventions elsewhere: PyTorch and ONNX use the same eps, Flax 1e-6, Keras 1e-3. PyTorch normalizes over
    trailing axes only.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016, equations 3 and 4. arXiv:1607.06450

    Examples
    --------
    >>> import numpy as np
    >>> import lanenorm
    >>> x = np.array([[1, -1, 1, -1], [5, 5, 5, 5]], dtype=np.float32)
    >>> lanenorm.layer_norm(x, eps=0.0)[0]
    array([ 1., -1.,  1., -1.], dtype=float32)
    >>> bias = np.array([1, 2, 3, 4], dtype=np.float32)
    >>> lanenorm.layer_norm(x, None, bias)[1]
    array([1., 2., 3., 4.], dtype=float32)
    """
    result = _cpu.layer_norm(x, weight, bias, axis, eps, out)
    if result is NotImplemented:
        module = backend("layer_norm", {"x": x}, {"weight": weight, "bias": bias, "out": out})
        result = module.layer_norm(x, weight, bias, axis, eps, out)
    return result


def layer_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> NormForward:
    """Layer normalization, with the statistics that its backward needs.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64
        Input, any shape and strides.
    weight : ndarray, optional
        γ, the shape of the normalized axes of `x` in ascending order. Its dtype is that of `x`, or float32 with a
        16-bit `x`. None stands for ones.
    bias : ndarray, optional
        β, shape and dtype as `weight`. None stands for zeros.
    axis : int or tuple of int, default -1
        The axes normalized over; any, not only trailing ones.
    eps : float, default 1e-5
        Added to the variance, inside the square root; finite and not negative.
    out : ndarray, optional
        Receives y, as in `layer_norm`. With ``out=x`` the input is gone and a backward cannot follow.

    Returns
    -------
    NormForward
        y, shape and dtype of `x`; mean and rstd, the shape of `x` with length 1 along `axis` (so they broadcast
        against it), float32, or float64 for float64 `x`. rstd is 1/sqrt(var + eps) with the biased variance.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError, KeyboardInterrupt, ImportError, RuntimeError
        As in `layer_norm`.

    See Also
    --------
    layer_norm : Formula, accuracy and determinism.
    layer_norm_backward : The gradients.

    Notes
    -----
    y is that of `layer_norm`, bit by bit. The statistics of a slice of zero length are 0 and 1/sqrt(eps).

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016, equations 3 and 4. arXiv:1607.06450

    Examples
    --------
    >>> import numpy as np
    >>> import lanenorm
    >>> x = np.array([[1, 3, 1, 3], [0, 0, 4, 4]], dtype=np.float32)
    >>> y, mean, rstd = lanenorm.layer_norm_forward(x, eps=0.0)
    >>> y[1]
    array([-1., -1.,  1.,  1.], dtype=float32)
    >>> mean
    array([[2.],
           [2.]], dtype=float32)
    >>> rstd
    array([[1. ],
           [0.5]], dtype=float32)
    """
    result = _cpu.layer_norm_forward(x, weight, bias, axis, eps, out, NormForward)
    if result is NotImplemented:
        module = backend("layer_norm_forward", {"x": x}, {"weight": weight, "bias": bias, "out": out})
        result = module.layer_norm_forward(x, weight, bias, axis, eps, out, NormForward)
    return result


def layer_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    param_grads: bool = True,
    out: Array | None = None,
) -> NormBackward:
    r"""Gradients of layer normalization.

    Parameters
    ----------
    dy : ndarray
        Gradient of the loss with respect to y; shape and dtype of `x`.
    x : ndarray of float16, bfloat16, float32 or float64
        Input of the forward.
    mean, rstd : ndarray
        As `layer_norm_forward` returned them for this `x`, `axis` and eps.
    weight : ndarray, optional
        γ of the forward.
    axis : int or tuple of int, default -1
        The axes normalized over.
    param_grads : bool, default True
        False leaves out `dweight` and `dbias`.
    out : ndarray, optional
        Receives dx; shape, dtype and memory layout of ``numpy.empty_like(x)``. May be `dy` itself, else it must not
        share memory with an input.

    Returns
    -------
    NormBackward
        dx, shape and dtype of `x`; dweight and dbias, the shape of the normalized axes, in the dtype of `weight`
        (without one: float32, or float64 for float64 `x`), or None.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError, KeyboardInterrupt, ImportError, RuntimeError
        As in `layer_norm`.

    See Also
    --------
    layer_norm_forward : Gives `mean` and `rstd`.

    Notes
    -----
    With g = dy·γ, and ⟨·⟩ the mean over a slice,

    .. math:: dx = rstd\,(g - ⟨g⟩ - \hat x ⟨g \hat x⟩), \qquad dγ = \sum dy\,\hat x, \qquad dβ = \sum dy,

    the sums running over the axes not normalized. They are taken in an order that depends on shape and dtype only.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016. arXiv:1607.06450

    Examples
    --------
    >>> import numpy as np
    >>> import lanenorm
    >>> x = np.array([[1, -1, 1, -1]], dtype=np.float32)
    >>> dy = np.array([[1, 0, 0, 0]], dtype=np.float32)
    >>> _, mean, rstd = lanenorm.layer_norm_forward(x, eps=0.0)
    >>> dx, dweight, dbias = lanenorm.layer_norm_backward(dy, x, mean, rstd)
    >>> dx
    array([[ 0.5,  0. , -0.5,  0. ]], dtype=float32)
    >>> dbias
    array([1., 0., 0., 0.], dtype=float32)
    """
    result = _cpu.layer_norm_backward(dy, x, mean, rstd, weight, axis, param_grads, out, NormBackward)
    if result is NotImplemented:
        module = backend(
            "layer_norm_backward", {"dy": dy, "x": x, "mean": mean, "rstd": rstd}, {"weight": weight, "out": out}
        )
        result = module.layer_norm_backward(dy, x, mean, rstd, weight, axis, param_grads, out, NormBackward)
    return result


# --- Batch normalization ----------------------------------------------------------------------------------------------


def batch_norm(
    x: Array,
    running_mean: Array,
    running_var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    r"""Batch normalization with given statistics (inference).

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64
        Input, any shape and strides, C channels along `channel_axis`.
    running_mean, running_var : ndarray, shape (C,)
        Mean and variance to normalize with; float32, or float64 for float64 `x`.
    weight, bias : ndarray, shape (C,), optional
        γ and β, in the dtype of `x`, or float32 with a 16-bit `x`. None stands for ones and zeros.
    channel_axis : int, default 1
        The axis that is kept: 1 for channels-first (N, C, H, W), -1 for channels-last.
    eps : float, default 1e-5
        Added to the variance, inside the square root; finite and not negative.
    out : ndarray, optional
        Receives the result; shape, dtype and memory layout of ``numpy.empty_like(x)``. May be `x` itself, else it
        must not share memory with an input.

    Returns
    -------
    ndarray
        y, with the shape, dtype and memory layout of ``numpy.empty_like(x)``; `out` where it is given.

    Raises
    ------
    TypeError
        An argument is not a plain array, its dtype is not one of the four or does not go with that of `x`.
    ValueError
        A shape does not fit `x`; `eps` is negative or not finite; `out` is read-only, of another layout, or shares
        memory with an input.
    numpy.exceptions.AxisError
        `channel_axis` is out of bounds.
    KeyboardInterrupt
        Ctrl-C was pressed; the contents of the result are undefined.
    ImportError, RuntimeError
        With CuPy arrays: this lanenorm has no CUDA part, or CUDA refuses (no driver, no device, no memory).

    See Also
    --------
    batch_norm_forward : Normalization with the statistics of the batch itself.

    Notes
    -----
    For each channel

    .. math:: y = \frac{x - running\_mean}{\sqrt{running\_var + eps}} γ + β.

    The affine step acts on the normalized value; it is not folded into a·x + b, which loses the digits where the mean
    is large against the deviation.

    References
    ----------
    .. [1] S. Ioffe, C. Szegedy, "Batch Normalization", 2015, algorithm 2. arXiv:1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import lanenorm
    >>> x = np.array([[3, 10], [5, 30]], dtype=np.float32)
    >>> mean, var = np.array([1, 20], dtype=np.float32), np.array([4, 100], dtype=np.float32)
    >>> lanenorm.batch_norm(x, mean, var, eps=0.0)
    array([[ 1., -1.],
           [ 2.,  1.]], dtype=float32)
    """
    result = _cpu.batch_norm(x, running_mean, running_var, weight, bias, channel_axis, eps, out)
    if result is NotImplemented:
        module = backend(
            "batch_norm",
            {"x": x, "running_mean": running_mean, "running_var": running_var},
            {"weight": weight, "bias": bias, "out": out},
        )
        result = module.batch_norm(x, running_mean, running_var, weight, bias, channel_axis, eps, out)
    return result


def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: float = 0.1,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> NormForward:
    r"""Batch normalization with the statistics of the batch (training).

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64
        Input, any shape and strides, C channels along `channel_axis`, at least two values of each.
    weight, bias : ndarray, shape (C,), optional
        γ and β, in the dtype of `x`, or float32 with a 16-bit `x`. None stands for ones and zeros.
    running_mean, running_var : ndarray, shape (C,), optional
        Running statistics, updated in place; both or neither. float32, or float64 for float64 `x`.
    momentum : float, default 0.1
        Share of the new batch in the running statistics, in [0, 1].
    channel_axis : int, default 1
        The axis that is kept: 1 for channels-first (N, C, H, W), -1 for channels-last.
    eps : float, default 1e-5
        Added to the variance, inside the square root; finite and not negative.
    out : ndarray, optional
        Receives y, as in `batch_norm`. With ``out=x`` the input is gone and a backward cannot follow.

    Returns
    -------
    NormForward
        y, shape and dtype of `x`; mean and rstd of the batch, shape (C,), float32, or float64 for float64 `x`.
        rstd is 1/sqrt(var + eps) with the biased variance.

    Raises
    ------
    TypeError
        An argument is not a plain array, its dtype is not one of the four or does not go with that of `x`;
        `momentum` is None (the cumulative average belongs to the layer `BatchNorm`, which counts batches).
    ValueError
        A shape does not fit `x`; there is only one value per channel; `eps` is negative or not finite; `momentum` is
        outside [0, 1]; one running statistic comes without the other, or is read-only or not contiguous; `out` is
        read-only, of another layout, or shares memory with an input. Nothing has been changed then.
    numpy.exceptions.AxisError
        `channel_axis` is out of bounds.
    KeyboardInterrupt
        Ctrl-C was pressed; the contents of the result are undefined, the running statistics unchanged.
    ImportError, RuntimeError
        With CuPy arrays: this lanenorm has no CUDA part, or CUDA refuses (no driver, no device, no memory).

    See Also
    --------
    batch_norm : Normalization with given statistics.
    batch_norm_backward : The gradients.

    Notes
    -----
    For each channel, with n values, mean μ and variance σ² (biased: divided by n) of the batch,

    .. math:: y = \hat x γ + β, \qquad \hat x = \frac{x - μ}{\sqrt{σ^2 + eps}},

    and, as in PyTorch, with the unbiased variance in the running one,

    .. math:: running\_mean ← (1 - momentum)\,running\_mean + momentum\,μ

    .. math:: running\_var ← (1 - momentum)\,running\_var + momentum\,\frac{n}{n-1}σ^2.

    Conventions elsewhere: in Keras, Flax and ONNX `momentum` is the share of the *old* value (their 0.9 is 0.1 here)
    and the running variance is biased.

    The result does not depend on the number of threads or the instruction set. An empty batch leaves the running
    statistics alone and has mean 0 and rstd 1/sqrt(eps).

    References
    ----------
    .. [1] S. Ioffe, C. Szegedy, "Batch Normalization", 2015, algorithm 1. arXiv:1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import lanenorm
    >>> x = np.array([[1, 10], [3, 30]], dtype=np.float32)
    >>> running_mean, running_var = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> y, mean, rstd = lanenorm.batch_norm_forward(
    ...     x, running_mean=running_mean, running_var=running_var, momentum=0.5, eps=0.0
    ... )
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> mean, rstd
    (array([ 2., 20.], dtype=float32), array([1. , 0.1], dtype=float32))
    >>> running_mean, running_var
    (array([ 1., 10.], dtype=float32), array([  1.5, 100.5], dtype=float32))
    """
    result = _cpu.batch_norm_forward(
        x, weight, bias, running_mean, running_var, momentum, channel_axis, eps, out, NormForward
    )
    if result is NotImplemented:
        module = backend(
            "batch_norm_forward",
            {"x": x},
            {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var, "out": out},
        )
        result = module.batch_norm_forward(
            x, weight, bias, running_mean, running_var, momentum, channel_axis, eps, out, NormForward
        )
    return result


def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None = None,
    *,
    channel_axis: int = 1,
    training: bool = True,
    param_grads: bool = True,
    out: Array | None = None,
) -> NormBackward:
    r"""Gradients of batch normalization.

    Parameters
    ----------
    dy : ndarray
        Gradient of the loss with respect to y; shape and dtype of `x`.
    x : ndarray of float16, bfloat16, float32 or float64
        Input of the forward.
    mean, rstd : ndarray, shape (C,)
        With ``training=True`` as `batch_norm_forward` returned them for this `x`. With ``training=False`` the
        statistics that were normalized with: the running mean and 1/sqrt(running_var + eps).
    weight : ndarray, shape (C,), optional
        γ of the forward.
    channel_axis : int, default 1
        The axis that is kept.
    training : bool, default True
        True: the statistics are functions of `x`. False: they are constants (inference, fine-tuning).
    param_grads : bool, default True
        False leaves out `dweight` and `dbias`.
    out : ndarray, optional
        Receives dx; shape, dtype and memory layout of ``numpy.empty_like(x)``. May be `dy` itself, else it must not
        share memory with an input.

    Returns
    -------
    NormBackward
        dx, shape and dtype of `x`; dweight and dbias, shape (C,), in the dtype of `weight` (without one: float32, or
        float64 for float64 `x`), or None.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError, KeyboardInterrupt, ImportError, RuntimeError
        As in `batch_norm`.

    See Also
    --------
    batch_norm_forward : Gives `mean` and `rstd`.

    Notes
    -----
    With g = dy·γ, and ⟨·⟩ the mean over the values of a channel,

    .. math:: dx = rstd\,(g - ⟨g⟩ - \hat x ⟨g \hat x⟩), \qquad dγ = \sum dy\,\hat x, \qquad dβ = \sum dy.

    With ``training=False``, dx = rstd·g. The sums are taken in an order that depends on shape, dtype and memory layout
    only.

    References
    ----------
    .. [1] S. Ioffe, C. Szegedy, "Batch Normalization", 2015, section 3. arXiv:1502.03167

    Examples
    --------
    >>> import numpy as np
    >>> import lanenorm
    >>> x = np.array([[1], [-1], [1], [-1]], dtype=np.float32)
    >>> dy = np.array([[1], [0], [0], [0]], dtype=np.float32)
    >>> _, mean, rstd = lanenorm.batch_norm_forward(x, eps=0.0)
    >>> lanenorm.batch_norm_backward(dy, x, mean, rstd).dx.ravel()
    array([ 0.5,  0. , -0.5,  0. ], dtype=float32)
    >>> lanenorm.batch_norm_backward(dy, x, mean, rstd, training=False).dx.ravel()
    array([1., 0., 0., 0.], dtype=float32)
    """
    result = _cpu.batch_norm_backward(dy, x, mean, rstd, weight, channel_axis, training, param_grads, out, NormBackward)
    if result is NotImplemented:
        module = backend(
            "batch_norm_backward", {"dy": dy, "x": x, "mean": mean, "rstd": rstd}, {"weight": weight, "out": out}
        )
        result = module.batch_norm_backward(
            dy, x, mean, rstd, weight, channel_axis, training, param_grads, out, NormBackward
        )
    return result
