"""`Tensor`: an array in a forward pass that gradients can go back through.

In train mode the layers and functions of `peftc.nn` give Tensors where something is to be trained. A Tensor is an
ndarray; operators, the methods below and the NumPy functions in the tables at the end are recorded. Everything else
works, too, but gives an array that no layer accepts, so that a gradient cannot get lost unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _core

__all__ = ["Gradient", "Tensor"]


class Tensor(np.ndarray):
    """An array with a place on the tape. Its memory is read-only: other operations may have saved it.

    `detach()` gives the plain array, through which no gradient goes.
    """

    _node: Any  # _core.Node, or None
    _lost: bool  # made from a recorded array by something that is not recorded

    def __array_finalize__(self, source: Any) -> None:
        self._node = None
        self._lost = isinstance(source, Tensor) and (source._node is not None or source._lost)

    def detach(self) -> np.ndarray:
        """The values as a plain array of their own: what is computed from it has no gradient."""
        return np.array(self, subok=False)

    def numpy(self) -> np.ndarray:
        """The same as `detach()`."""
        return self.detach()

    # ------------------------------------------------------------ NumPy's protocols

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        plain = tuple(_plain(value) for value in inputs)
        if out is not None:
            kwargs["out"] = tuple(None if target is None else _writable(target, ufunc) for target in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        slope = _UFUNCS.get(ufunc) if method == "__call__" and not kwargs.keys() - {"out"} else None
        if slope is not None:
            return _core.record(inputs, _copied(result, out), slope(*plain, result))
        return _unrecorded(result, inputs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        recorded = _FUNCTIONS.get(func)
        if recorded is not None:
            return recorded(*args, **kwargs)
        sources: list[Any] = []
        result = func(*_plain_tree(args, sources), **_plain_tree(kwargs, sources))
        return _unrecorded(result, sources)

    # In place would change what others have saved: the name is bound to a new array instead.
    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]  # numpy's have overloads
        return np.add(self, other)

    def __isub__(self, other: Any) -> Any:  # type: ignore[misc]  # numpy's have overloads
        return np.subtract(self, other)

    def __imul__(self, other: Any) -> Any:  # type: ignore[misc]  # numpy's have overloads
        return np.multiply(self, other)

    def __itruediv__(self, other: Any) -> Any:  # type: ignore[misc]  # numpy's have overloads
        return np.divide(self, other)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._node is not None:
            raise ValueError(
                "an array of a forward pass in train mode cannot be changed in place, since its values may be needed for "
                "gradients; compute a new one, or change a copy: x.detach()"
            )
        super().__setitem__(key, value)

    # --------------------------------------------------------------------- methods

    def __getitem__(self, key: Any) -> Any:
        values = _plain(self)
        result = values[key]
        if self._node is None:
            return result
        if not isinstance(result, np.ndarray):
            result = np.asarray(result)

        def back(dy: np.ndarray) -> tuple[np.ndarray]:
            dx = np.zeros(values.shape, dy.dtype)
            if _is_basic(key):
                dx[key] = dy
            else:
                np.add.at(dx, key, dy)
            return (dx,)

        return _core.record((self,), result.copy() if result.base is not None else result, back)

    def reshape(self, *shape: Any, order: Any = "C", copy: Any = None) -> Any:
        if order != "C":
            return _unrecorded(_plain(self).reshape(*shape, order=order), (self,))
        return _reshape(self, shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    def ravel(self, order: Any = "C") -> Any:
        return self.reshape(-1, order=order)

    def flatten(self, order: Any = "C") -> Any:
        return self.reshape(-1, order=order)

    def squeeze(self, axis: Any = None) -> Any:
        return _reshape(self, _plain(self).squeeze(axis).shape)

    def transpose(self, *axes: Any) -> Any:
        order: Any = axes or None
        if len(axes) == 1 and not isinstance(axes[0], int):
            order = axes[0]
        return _transpose(self, order)

    @property
    def T(self) -> Any:
        return _transpose(self)

    @property
    def mT(self) -> Any:
        return _swapaxes(self, -1, -2)

    def swapaxes(self, axis1: Any, axis2: Any) -> Any:
        return _swapaxes(self, axis1, axis2)

    def sum(  # type: ignore[override]  # numpy's have overloads
        self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, **rest: Any
    ) -> Any:
        return _sum(self, axis, dtype, out, keepdims, **rest)

    def mean(  # type: ignore[override]  # numpy's have overloads
        self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, **rest: Any
    ) -> Any:
        return _mean(self, axis, dtype, out, keepdims, **rest)

    def copy(self, order: Any = "C") -> Any:
        return _core.record((self,), np.array(_plain(self), order=order), lambda dy: (dy,))

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        result = _plain(self).astype(dtype, *args, **kwargs)
        return _core.record((self,), result, lambda dy: (dy,))

    def __deepcopy__(self, memo: Any) -> np.ndarray:  # type: ignore[override]  # a copy is cut off
        return self.detach()

    def __reduce__(self) -> Any:
        return self.detach().__reduce__()


class Gradient(np.ndarray):
    """The gradient of a loss, which knows the result that it belongs to. Scaling and adding keep that."""

    _node: Any

    def __array_finalize__(self, source: Any) -> None:
        self._node = getattr(source, "_node", None) if isinstance(source, Gradient) else None


def gradient_of(output: Any, values: np.ndarray) -> np.ndarray:
    """`values` as the gradient with respect to `output`, for `Module.backward`."""
    node = getattr(output, "_node", None)
    if node is None:
        return values
    gradient = values.view(Gradient)
    gradient._node = node
    return gradient


_core.set_tensor_type(Tensor)

# ------------------------------------------------------------------------ helpers


def _plain(value: Any) -> Any:
    """The array of a Tensor or a parameter; anything else as it is."""
    if isinstance(value, Tensor):
        return value.view(np.ndarray)
    return value.data if isinstance(value, _core.Parameter) else value


def _plain_tree(value: Any, sources: list[Any]) -> Any:
    if isinstance(value, Tensor):
        sources.append(value)
        return _plain(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_plain_tree(item, sources) for item in value)
    if isinstance(value, dict):
        return {name: _plain_tree(item, sources) for name, item in value.items()}
    return value


def _writable(target: Any, ufunc: Any) -> Any:
    if isinstance(target, Tensor) and target._node is not None:
        raise ValueError(
            f"{ufunc.__name__}(out=…): an array of a forward pass in train mode cannot be changed in place"
        )
    return _plain(target)


def _copied(result: Any, out: Any) -> np.ndarray:
    """Memory that nobody else writes to."""
    return np.array(result) if out is not None else np.asarray(result)


def _unrecorded(result: Any, sources: Any) -> Any:
    """A result that carries no gradient: arrays of floats are marked, so that no layer takes them by mistake."""
    if not isinstance(result, np.ndarray) or result.dtype.kind != "f" or result.ndim == 0:
        return result
    if not any(isinstance(source, Tensor) and (source._node is not None or source._lost) for source in sources):
        return result
    marked = result.view(Tensor)
    marked._lost = True
    return marked


def _is_basic(key: Any) -> bool:
    parts = key if isinstance(key, tuple) else (key,)
    return all(part is None or part is Ellipsis or isinstance(part, (int, np.integer, slice)) for part in parts)


def _shape(value: Any) -> tuple[int, ...]:
    return np.shape(value)


def _fit(dy: Any, value: Any) -> Any:
    """Sum a gradient over the axes that broadcasting added or stretched."""
    shape = _shape(value)
    dy = np.asarray(dy)
    if dy.shape == shape:
        return dy
    extra = dy.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        extra + i for i, size in enumerate(shape) if size == 1 and dy.shape[extra + i] != 1
    )
    return dy.sum(axis=axes, keepdims=True).reshape(shape)


def _matmul_back(a: Any, b: Any, _: Any) -> Callable[[Any], Any]:
    if np.ndim(a) < 2 or np.ndim(b) < 2:
        raise TypeError("matmul with a vector is not recorded in train mode; use arrays of at least 2 axes")
    return lambda dy: (_fit(dy @ np.swapaxes(b, -1, -2), a), _fit(np.swapaxes(a, -1, -2) @ dy, b))


def _power_back(a: Any, b: Any, _: Any) -> Callable[[Any], Any]:
    if np.ndim(b):
        raise TypeError("power is recorded in train mode for a number as exponent only")
    return lambda dy: (_fit(dy * b * np.power(a, b - 1), a), None)


#: ufunc → (inputs…, result) → dy → gradients of the inputs
_UFUNCS: dict[Any, Callable[..., Callable[[Any], Any]]] = {
    np.add: lambda a, b, y: lambda dy: (_fit(dy, a), _fit(dy, b)),
    np.subtract: lambda a, b, y: lambda dy: (_fit(dy, a), _fit(-dy, b)),
    np.multiply: lambda a, b, y: lambda dy: (_fit(dy * b, a), _fit(dy * a, b)),
    np.divide: lambda a, b, y: lambda dy: (_fit(dy / b, a), _fit(-dy * a / (b * b), b)),
    np.negative: lambda a, y: lambda dy: (-dy,),
    np.positive: lambda a, y: lambda dy: (dy,),
    np.power: _power_back,
    np.square: lambda a, y: lambda dy: (2 * dy * a,),
    np.sqrt: lambda a, y: lambda dy: (dy / (2 * y),),
    np.exp: lambda a, y: lambda dy: (dy * y,),
    np.log: lambda a, y: lambda dy: (dy / a,),
    np.tanh: lambda a, y: lambda dy: (dy * (1 - y * y),),
    np.absolute: lambda a, y: lambda dy: (dy * np.sign(a),),
    np.maximum: lambda a, b, y: lambda dy: (_fit(dy * (a >= b), a), _fit(dy * (a < b), b)),
    np.minimum: lambda a, b, y: lambda dy: (_fit(dy * (a <= b), a), _fit(dy * (a > b), b)),
    np.matmul: _matmul_back,
}


# ---------------------------------------------------------------------- functions


def _reshape(a: Any, shape: Any = None, *args: Any, newshape: Any = None, **kwargs: Any) -> Any:
    values = _plain(a)
    result = np.reshape(values, shape if shape is not None else newshape, *args, **kwargs)
    return _core.record((a,), result.view(), lambda dy: (dy.reshape(values.shape),))


def _transpose(a: Any, axes: Any = None) -> Any:
    values = _plain(a)
    result = np.transpose(values, axes)
    back = None if axes is None else np.argsort([axis % values.ndim for axis in axes])
    return _core.record((a,), result, lambda dy: (np.transpose(dy, back),))


def _swapaxes(a: Any, axis1: int, axis2: int) -> Any:
    return _core.record((a,), np.swapaxes(_plain(a), axis1, axis2), lambda dy: (np.swapaxes(dy, axis1, axis2),))


def _moveaxis(a: Any, source: Any, destination: Any) -> Any:
    return _core.record(
        (a,), np.moveaxis(_plain(a), source, destination), lambda dy: (np.moveaxis(dy, destination, source),)
    )


def _spread(dy: np.ndarray, values: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    """The gradient of a sum, for every element that was added up."""
    if axis is not None and not keepdims:
        dy = np.expand_dims(dy, axis)
    return np.broadcast_to(dy, values.shape)


def _sum(a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, **rest: Any) -> Any:
    values = _plain(a)
    if dtype is not None or out is not None or rest:
        return _unrecorded(np.sum(values, axis, dtype, out, keepdims, **rest), (a,))
    result = np.asarray(np.sum(values, axis, keepdims=keepdims))
    return _core.record((a,), result, lambda dy: (_spread(dy, values, axis, keepdims),))


def _mean(a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False, **rest: Any) -> Any:
    values = _plain(a)
    if dtype is not None or out is not None or rest:
        return _unrecorded(np.mean(values, axis, dtype, out, keepdims, **rest), (a,))
    result = np.asarray(np.mean(values, axis, keepdims=keepdims))
    share = result.size / max(values.size, 1)
    return _core.record((a,), result, lambda dy: (_spread(dy * share, values, axis, keepdims),))


def _concatenate(arrays: Any, axis: int = 0, **rest: Any) -> Any:
    arrays = tuple(arrays)
    plain = [_plain(array) for array in arrays]
    if axis is None or rest:
        return _unrecorded(np.concatenate(plain, axis, **rest), arrays)
    cuts = np.cumsum([array.shape[axis] for array in plain])[:-1]
    return _core.record(arrays, np.concatenate(plain, axis), lambda dy: tuple(np.split(dy, cuts, axis)))


def _stack(arrays: Any, axis: int = 0, **rest: Any) -> Any:
    arrays = tuple(arrays)
    plain = [_plain(array) for array in arrays]
    result = np.stack(plain, axis, **rest)
    if rest:
        return _unrecorded(result, arrays)
    return _core.record(arrays, result, lambda dy: tuple(np.moveaxis(dy, axis, 0)))


def _expand_dims(a: Any, axis: Any) -> Any:
    return _reshape(a, np.expand_dims(_plain(a), axis).shape)


def _squeeze(a: Any, axis: Any = None) -> Any:
    return _reshape(a, np.squeeze(_plain(a), axis).shape)


def _where(condition: Any, *choices: Any) -> Any:
    plain = [_plain(choice) for choice in choices]
    result = np.where(_plain(condition), *plain)
    if len(choices) != 2:
        return result
    chosen = np.asarray(_plain(condition)) != 0

    def back(dy: np.ndarray) -> tuple[Any, Any]:
        return _fit(np.where(chosen, dy, 0), plain[0]), _fit(np.where(chosen, 0, dy), plain[1])

    return _core.record(choices, result, back)


def _broadcast_to(a: Any, shape: Any, **rest: Any) -> Any:
    values = _plain(a)
    return _core.record((a,), np.array(np.broadcast_to(values, shape)), lambda dy: (_fit(dy, values),))


#: NumPy function → the recorded version
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.broadcast_to: _broadcast_to,
    np.concatenate: _concatenate,
    np.expand_dims: _expand_dims,
    np.mean: _mean,
    np.moveaxis: _moveaxis,
    np.ravel: lambda a, order="C": _reshape(a, -1, order=order),
    np.reshape: _reshape,
    np.squeeze: _squeeze,
    np.stack: _stack,
    np.sum: _sum,
    np.swapaxes: _swapaxes,
    np.transpose: _transpose,
    np.where: _where,
}
