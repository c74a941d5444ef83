"""modules_to_save on torch models: a module, and the copy of it that each adapter brings."""

from typing import Any

from torch import nn

from . import torch_dispatch
from .torch_layers import Rows, Switch
from .torch_stamps import module_dict
from .torch_wrappers import inner, unwrap


class SavedModule(nn.Module):
    """Runs the copy of the active adapter that has one here, else the original.

    Names are those of PEFT's wrapper: `original_module.*` and `modules_to_save.<adapter>.*`. Once peft is imported,
    its `ModulesToSaveWrapper` is a base of this class (`torch_host.join_peft`), so that isinstance holds.
    """

    _peftc: Switch
    _peftc_inner = "original_module"  # see torch_wrappers

    @classmethod
    def around(cls, module: nn.Module, switch: Switch) -> "SavedModule":
        module.__dict__.pop("modules_to_save", None)  # of an adapter that was deleted: torch_generation.py
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        wrapper._modules["original_module"] = module
        wrapper._modules["modules_to_save"] = module_dict()
        wrapper._peftc = switch
        wrapper.training = module.training
        return wrapper

    def copies(self) -> dict[str, nn.Module]:
        """adapter name → its module"""
        return self._modules["modules_to_save"]._modules

    def chosen(self) -> nn.Module:
        """The module that runs now."""
        switch, copies = self._peftc, self.copies()
        if switch.enabled:
            for name in switch.active:
                if name in copies:
                    return copies[name]
        return self._modules["original_module"]

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        rows = self._peftc.rows if adapter_names is None else Rows(adapter_names)
        if rows is None:
            return self.chosen()(*args, **kwargs)
        batch, copies = args[0], self.copies()
        rows.check(batch)
        result: Any = None
        for name, where in rows.groups:
            module = copies.get(name, self._modules["original_module"])
            part = module(batch[where], *args[1:], **kwargs)
            if result is None:
                result = part.new_empty((len(batch), *part.shape[1:]))
            result[where] = part
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "_modules" not in self.__dict__ or name.startswith("__") or name == "_peftc":
                raise
            return getattr(self.chosen(), name)

    @property
    def active_adapter(self) -> Any:
        return next((name for name in self._peftc.active if name in self.copies()), [])

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in self._peftc.active if name in self.copies()]

    @property
    def disable_adapters(self) -> bool:
        return not self._peftc.enabled


def copy_of(module: nn.Module) -> nn.Module:
    """A copy for an adapter to train: without the adapters of others that may sit inside."""
    made: nn.Module = unwrap(torch_dispatch.copy_of(module))
    made.__dict__.pop("modules_to_save", None)
    for parent in list(made.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and inner(child) is not None:
                parent._modules[key] = unwrap(child)
    return made
