"""The adapters of one torch model: made by the core, spliced in as layers, switched by one assignment.

Offers what the mixin asks of `_core.AdapterRegistry`.  The core plans, allocates, initialises and reads an adapter; its
arena becomes the storage of the parameters.  Everything is made on the side first, but for an adapter's tensors in layers
that others have already, which are taken out again: a refused adapter leaves no trace.
"""

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .. import _core
from .._core import AdapterRegistry
from . import torch_adalora, torch_dispatch, torch_files, torch_ia3, torch_lora, torch_peft
from .torch_adapter import Adapter, Tensors, tensor_of
from .torch_collector import grown_up
from .torch_layers import AdaptedLayer, Switch
from .torch_plan import plan_biases, plan_embeddings, plan_layers, plan_saved
from .torch_saved import SavedModule
from .torch_tree import describe, kind_of, walk
from .torch_wrappers import place_of, take_out

_PREFIX = "base_model.model."


class TorchRegistry:
    """See the module. `model` is set before each use; it is not kept alive."""

    def __init__(self) -> None:
        self.switch = Switch()
        self._adapters: dict[str, Adapter] = {}
        self._bound: list[tuple[str, Any]] = []
        self._output_embedding: str | None = None
        self._biases_of: str | None = None  # the adapter whose biases are in effect
        self._flagged: set[str] = set()  # adapters whose tensors may require gradients
        #: parameters of embeddings and the base's own values, where an adapter's stand in for them
        self._stood_for: list[tuple[nn.Parameter, torch.Tensor]] = []
        #: base layers, the names of weight and bias there, and what merging replaced; the name of an adapter that PEFT has
        #: merged. In the order of merging
        self._originals: list[tuple[Any, tuple[str, str], torch.Tensor, Any] | str] = []
        #: while something is merged: base layer → its weight with nothing in it
        self._plain: dict[nn.Module, torch.Tensor] = {}
        self._model: Any = None

    @property
    def model(self) -> Any:
        return self._model() if self._model is not None else None

    @model.setter
    def model(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_bound": []}

    def __len__(self) -> int:
        return len(self._adapters)

    def names(self) -> list[str]:
        return list(self._adapters)

    def peft_type(self, name: str) -> str:
        return self._adapters[name].method

    def saved_modules(self, name: str) -> list[str]:
        return [path for path, _ in self._adapters[name].saved]

    def adapted_modules(self, name: str) -> list[str]:
        adapter = self._adapters[name]
        return list(adapter.paths) if adapter.part is None else adapter.part.modules()

    def adapted_kinds(self, name: str) -> set[str]:
        """What the modules do that the adapter adapts."""
        adapter = self._adapters[name]
        if adapter.part is None:
            return adapter.kinds
        modules = dict(self._bound)
        return {kind_of(modules[path]) for path in adapter.part.modules()}

    def part(self, name: str) -> torch_peft.Part | None:
        """What PEFT holds of an adapter; None if peftc made it."""
        return self._adapters[name].part

    def adapted_layers(self, name: str) -> list[tuple[str, AdaptedLayer]]:
        """(module's name, layer) of each layer that the adapter adapts, in the model's order."""
        return self._adapters[name].named_layers()

    def layers_of(self, name: str) -> list[tuple[str, Any]]:
        """(module's name, layer) of each layer that the adapter adapts, peftc's or PEFT's, in the model's order."""
        adapter = self._adapters[name]
        return adapter.named_layers() if adapter.part is None else adapter.part.layers()

    # ------------------------------------------------------------------ making

    def bind(
        self,
        modules: list[tuple[str, Any]],
        output_embedding: str | None = None,
        input_embedding: str | None = None,  # base weights are the model's own parameters here
    ) -> None:
        self._bound = modules
        self._output_embedding = output_embedding

    def add(self, name: str, config: str, *, label: str = "config", seed: int = 0, trainable: bool = True) -> None:
        """Make a fresh adapter; it is listed but not active."""
        with grown_up():
            self._make(name, config, None, label, seed, trainable)

    def load(
        self, name: str, config: str, source: Any, *, label: str = "config", seed: int = 0, trainable: bool = False
    ) -> tuple[list[str], list[str]]:
        """Make an adapter from a file or a dict of arrays; returns (missing, unexpected) names."""
        with grown_up():
            keys = self._make(name, config, source, label, seed, trainable)
            if trainable:
                for layer in self._adapters[name].layers:
                    layer.train_adapter(name)
            return keys

    def _make(
        self, name: str, text: str, source: Any, label: str, seed: int, trainable: bool
    ) -> tuple[list[str], list[str]]:
        values = json.loads(text)
        bias = values.get("bias") or "none"
        if bias in ("all", "lora_only"):
            text = json.dumps({**values, "bias": "none"})  # torch's biases are parameters of the base: seen to here
        init = values.get("init_lora_weights", True)
        with_values = isinstance(init, str) or bool(values.get("use_dora"))
        builder = AdapterRegistry()
        described = describe(self._bound, with_values)
        builder.bind(described.rows, self._output_embedding)
        described.rows.clear()
        missing: list[str] = []
        unexpected: list[str] = []
        # What is computed from the base weights is for all threads together; the rest is drawn, or read, while layers are made.
        if source is None:
            builder.add(name, text, label=label, seed=seed, wait=with_values)
        else:
            missing, unexpected = builder.load(name, text, source, label=label, seed=seed, wait=with_values)
        arena, *listed, groups, slots = builder.layout(name)
        adapter = Adapter(name, builder.peft_type(name))
        adapter.subtracts = str(init).startswith(("pissa", "olora"))
        modules = dict(self._bound)
        config = SimpleNamespace(**{"lora_dropout": 0.0, **values})
        tensors = Tensors.over(arena, groups, listed[2], slots)
        paths = [slot[0] for slot in slots]
        splices = plan_layers(adapter, paths, modules, self.switch)
        if described.elsewhere:
            tensors.send_home([modules[path] for path in paths], described.elsewhere, builder.finish)
        put = adapter.plan_put(tensors, slots, config)
        if values.get("use_dora"):
            for path in paths:
                torch_dispatch.check_in_memory(path, modules[path], "DoRA takes their norm")
        saved = plan_saved(self._bound, values.get("modules_to_save") or [])
        if bias != "none":
            adapted = {slot[0] for slot in slots if slot[1]}
            adapter.biases = plan_biases(self._bound, bias, adapted, [path for path, _ in saved])
        adapter.embeddings = plan_embeddings(self.model, values.get("target_modules"), paths, modules)
        if source is not None:
            unexpected = self._fill_extras(source, adapter, saved, unexpected, label)
        join_peft()
        try:
            for do in put:
                do()
            adapter.enlist(*listed)
            if trainable:
                _core.set_requires_grad(adapter.parameters(), True)
            del put, tensors, groups, slots  # thousands of objects, and there is time for it
            builder.finish()  # as late as can be: the values are still on their way
            _core.set_requires_grad(described.parameters, False)
        except BaseException:
            self._take_out(adapter)
            raise

        # Nothing below fails.
        for parent, key, layer in splices:
            parent._modules[key] = layer
        self._enter(adapter, saved)
        adapter.trainable = trainable
        self._flag_beside(name, trainable)
        return missing, unexpected

    def _enter(self, adapter: Adapter, saved: list[tuple[str, nn.Module]]) -> None:
        """List an adapter whose layers are in, and let no other be trainable. Nothing here fails."""
        name = adapter.name
        for path, module in saved:
            parent, key = place_of(self.model, path)
            wrapper = parent._modules[key]
            if not isinstance(wrapper, SavedModule):
                wrapper = SavedModule.around(wrapper, self.switch)
                parent._modules[key] = wrapper
            wrapper.copies()[name] = module
            module.requires_grad_(False)
            adapter.saved.append((path, wrapper))
        self._adapters[name] = adapter
        for other in list(self._flagged):
            self._flag(other, False)

    def make_with_peft(
        self,
        name: str,
        config: Any,
        instead: dict[str, Any],
        source: Any,
        *,
        label: str = "config",
        trainable: bool = False,
    ) -> tuple[Any, dict[str, Any], list[str], list[str]]:
        """`add` (source None) or `load` for an adapter that peftc has no code for, from a config object.

        See torch_peft.make.
        """
        made = torch_peft.make(self, name, config, instead, source, label, trainable)
        join_peft()
        return made

    def take(
        self, part: torch_peft.Part, config: Any, source: Any, label: str, trainable: bool
    ) -> tuple[list[str], list[str]]:
        """List an adapter whose layers PEFT has put into the model; returns (missing, unexpected) names.

        All or nothing, but for PEFT's layers.
        """
        adapter = Adapter(part.name, part.method)
        adapter.part = part
        modules = dict(self._bound)
        saved = plan_saved(self._bound, getattr(config, "modules_to_save", None) or [])
        bias = getattr(config, "bias", "none")
        if bias != "none":
            bias = bias if bias == "all" else "lora_only"
            adapter.biases = plan_biases(self._bound, bias, set(part.modules()), [path for path, _ in saved])
        if getattr(config, "trainable_token_indices", None) is None and part.method != "TRAINABLE_TOKENS":
            targets = getattr(config, "target_modules", None)
            adapter.embeddings = plan_embeddings(self.model, targets, part.modules(), modules)
        missing: list[str] = []
        unexpected: list[str] = []
        if source is not None:
            missing, unexpected = torch_peft.fill(part, source)
            unexpected = self._fill_extras(source, adapter, saved, unexpected, label)
        _core.set_requires_grad(_core.own_parameters([module for _, module in self._bound]), False)
        self._enter(adapter, saved)
        self.set_trainable(part.name, trainable)
        if source is not None and trainable:
            part.train(True)
        return missing, unexpected

    def _fill_extras(
        self, source: Any, adapter: Adapter, saved: list[tuple[str, nn.Module]], unexpected: list[str], label: str
    ) -> list[str]:
        """Read modules_to_save and biases from what the core did not take; returns what is left over."""
        targets: dict[str, torch.Tensor] = {}
        needed: set[str] = set()
        for path, module in saved:
            for key, tensor in module.state_dict().items():
                targets[f"{path}.{key}"] = tensor
                needed.add(f"{path}.{key}")
        for key, _, _, values in adapter.biases:
            targets[key] = values
            targets[key.replace(".base_layer.", ".")] = values
        named = {name.removeprefix(_PREFIX): name for name in unexpected}
        origin = source if isinstance(source, str) else "state_dict"
        for key in needed:
            if key not in named:
                raise KeyError(f"{key}: {origin} has no such tensor, and modules_to_save names its module")
        found = {key: name for key, name in named.items() if key in targets}
        for name, tensor in torch_files.read(source, found.values(), mapped=True).items():
            target = targets[name.removeprefix(_PREFIX)]
            if target.shape != tensor.shape:
                raise ValueError(
                    f"size mismatch for {name}: {origin} has shape {list(tensor.shape)}, the model needs "
                    f"{list(target.shape)}"
                )
            with torch.no_grad():
                target.copy_(tensor)
        for key, module, field in adapter.embeddings:
            if key in named:
                self._adopt(adapter, module, field, torch_files.read(source, [named[key]])[named[key]], named[key])
                found[key] = named[key]
        return [name for name in unexpected if name.removeprefix(_PREFIX) not in found]

    def _adopt(self, adapter: Adapter, module: nn.Module, field: str, values: torch.Tensor, name: str) -> None:
        """Base weights that came with an adapter: they stand in for the base's while it is active."""
        own = self._own_values(module, field)
        torch_dispatch.check_in_memory(name, module, "the adapter's file has its own in their place")
        if values.shape != own.shape:
            raise ValueError(
                f"size mismatch for {name}: the file has shape {list(values.shape)}, the model needs {list(own.shape)}; "
                "resize the model's embeddings before loading"
            )
        values = values.to(own)
        if not adapter.subtracts and not torch.equal(values, own):
            adapter.stand_ins[module, field] = values

    def _own_values(self, module: nn.Module, field: str) -> torch.Tensor:
        """The base's own values of a parameter, whatever stands in for them."""
        parameter: Any = module._parameters[field]
        found: torch.Tensor = next((own for one, own in self._stood_for if one is parameter), parameter.detach())
        return found

    def _embedding(self, adapter: Adapter, module: nn.Module, field: str) -> torch.Tensor:
        """What an adapter's state has for a base weight."""
        values = adapter.stand_ins.get((module, field))
        return self._own_values(module, field) if values is None else values

    # --------------------------------------------------------------- switching

    def _update(self, **changes: Any) -> None:
        """Assign fields of the switch; PEFT's layers, which have no part in it, are told."""
        self.switch.update(**changes)
        self.follow()

    def follow(self) -> None:
        parts = [adapter.part for adapter in self._adapters.values() if adapter.part is not None]
        if parts:
            torch_peft.follow(parts, self.switch.live)

    def active(self) -> list[str]:
        return list(self.switch.active)

    def activate(self, names: Sequence[str]) -> None:
        """Make exactly these adapters active, in this order. All or nothing.

        Raises:
            ValueError: an unknown name; two adapters that replace the same module.
        """
        order = list(dict.fromkeys(names))
        owner: dict[str, str] = {}
        for name in order:
            if name not in self._adapters:
                raise ValueError(
                    f"Adapter with name {name} not found. Please pass the correct adapter name among {self.names()}"
                )
            for path in self.saved_modules(name):
                if owner.setdefault(path, name) != name:
                    rivals = [other for other in order if path in self.saved_modules(other)]
                    raise ValueError(f"Attempted to set multiple ({rivals}) adapters at once for modules_to_save.")
        self.unmerge()
        for name in self._flagged - set(order):
            self._flag(name, False)
        self._update(active=tuple(order))
        self._settle_biases()

    @property
    def enabled(self) -> bool:
        return self.switch.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not value:
            self.unmerge()
        for name in self._flagged - set(self.switch.active if value else ()):
            self._flag(name, False)
        self._update(enabled=bool(value))
        self._settle_biases()

    def saved_of(self, name: str) -> list[tuple[str, SavedModule]]:
        """(module's name, wrapper) of each module that the adapter replaces."""
        return list(self._adapters[name].saved)

    def trainable(self, name: str) -> bool:
        return self._adapters[name].trainable

    def flags(self) -> Callable[[], None]:
        """A function that makes trainable again what is trainable now, and nothing else of what there is now."""
        base = [(p, p.requires_grad) for p in _core.own_parameters([module for _, module in walk(self.model)])]
        flagged = list(self._flagged)
        frozen = [p for name in flagged for p in self._tensors_of(name) if not p.requires_grad]  # by somebody else

        def restore() -> None:
            for parameter, flag in base:
                parameter.requires_grad_(flag)
            for name in flagged:
                self._flag(name, True)
            for parameter in frozen:
                parameter.requires_grad_(False)

        return restore

    def _tensors_of(self, name: str) -> Iterator[Any]:
        """What an adapter trains, but for the base's biases."""
        adapter = self._adapters[name]
        yield from adapter.parameters()
        for _, wrapper in adapter.saved:
            yield from wrapper.copies()[name].parameters()

    def set_trainable(self, name: str, trainable: bool) -> None:
        self._adapters[name].trainable = trainable
        self._flag(name, trainable)

    def _flag(self, name: str, value: bool) -> None:
        _core.set_requires_grad(self._adapters[name].parameters(), value)
        self._flag_beside(name, value)

    def _flag_beside(self, name: str, value: bool) -> None:
        """The flags of what an adapter trains that is not in its layers."""
        adapter = self._adapters[name]
        for _, wrapper in adapter.saved:
            wrapper.copies()[name].requires_grad_(value)
        for _, module, field, _ in adapter.biases:
            module._parameters[field].requires_grad_(value)
        (self._flagged.add if value else self._flagged.discard)(name)

    def _settle_biases(self) -> None:
        """Put the active adapter's biases in the base layers, or the base's own back."""
        wanted = None
        if self.switch.enabled:
            wanted = next((name for name in self.switch.active if self._adapters[name].biases), None)
        self._settle_stand_ins()
        if wanted == self._biases_of:
            return
        for name in (self._biases_of, wanted):
            if name is not None:
                with torch.no_grad():
                    for _, module, field, other in self._adapters[name].biases:
                        parameter = module._parameters[field]
                        kept = parameter.detach().clone()
                        parameter.copy_(other)
                        other.data = kept
        self._biases_of = wanted

    def _settle_stand_ins(self) -> None:
        """Let the base weights of the active adapters stand in for the base's (the last one's, as on NumPy models)."""
        for one, own in self._stood_for:
            one.data = own.to(one)
        self._stood_for.clear()
        for name in reversed(self.switch.active) if self.switch.enabled else ():
            for (module, field), values in self._adapters[name].stand_ins.items():
                parameter: Any = module._parameters[field]
                if not any(one is parameter for one, _ in self._stood_for):
                    self._stood_for.append((parameter, parameter.data))
                    parameter.data = values.to(parameter)

    def remove(self, name: str) -> None:
        """Delete an adapter; layers that have no other become the base layers that they were."""
        if name not in self._adapters:
            raise ValueError(f"The following adapter(s) are not present and cannot be deleted: {{'{name}'}}")
        adapter = self._adapters[name]
        if name in self.switch.merged:
            self.unmerge()
        self._update(active=tuple(n for n in self.switch.active if n != name))
        self._settle_biases()
        self.take_out(name)
        for _, module, field, _ in adapter.biases:
            module._parameters[field].requires_grad_(False)
        self._flagged.discard(name)
        del self._adapters[name]

    def take_out(self, name: str) -> None:
        """Take an adapter's tensors out of the model, and layers and wrappers that hold no other."""
        self._take_out(self._adapters[name])

    def _take_out(self, adapter: Adapter) -> None:
        for path, layer in adapter.drop():
            take_out(self.model, path, layer)
        if adapter.part is not None:
            adapter.part.drop(self.model)
        for path, wrapper in adapter.saved:
            wrapper.copies().pop(adapter.name, None)
            if not wrapper.copies():
                take_out(self.model, path, wrapper)

    # ------------------------------------------------------------------- state

    def state_dict(self, name: str) -> dict[str, torch.Tensor]:
        """state-dict key → tensor that shares memory with the parameter."""
        adapter = self._adapters[name]
        state = {key: tensor.detach() for key, tensor in adapter.state().items()}
        if adapter.part is not None:
            state = {key: tensor.detach() for key, _, tensor in adapter.part.rows()}
        for key, module, field, other in adapter.biases:
            mine = self._biases_of == name
            state[key] = module._parameters[field].detach() if mine else other
        for path, wrapper in adapter.saved:
            for key, tensor in wrapper.copies()[name].state_dict().items():
                state[f"{path}.{key}"] = tensor
        for key, module, field in adapter.embeddings:
            state[key] = self._embedding(adapter, module, field)
        return state

    def tensors(self, name: str) -> list[tuple[str, str, Any, bool, bool, str]]:
        """(state-dict key, name in the model, tensor, in the state dict?, trainable?, module) of each tensor.

        The name is "" for biases that are not in effect now: the model has the base's then.
        """
        adapter = self._adapters[name]
        where = self._where()
        rows: list[tuple[str, str, Any, bool, bool, str]] = []
        for key, layer, parameter in adapter.rows():
            tensor = tensor_of(layer, parameter, name)
            rows.append((key, _name_below(where[id(layer)], layer, parameter, name), tensor, True, True, key))
        rows += self._shared_rows(adapter, where)
        for path, wrapper in adapter.saved:
            for key, tensor in wrapper.copies()[name].state_dict().items():
                full = f"{where[id(wrapper)]}.modules_to_save.{name}.{key}"
                rows.append((f"{path}.{key}", full, tensor, True, True, path))
        return rows

    def state_from(self, name: str, state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """An adapter's tensors out of a state dict of the model, whose names begin with prefix; what it lacks is left out.

        The model's own tensors may be parts of those (FSDP), and are not looked at.
        """
        adapter = self._adapters[name]
        where = self._where()
        found: dict[str, Any] = {}
        for key, layer, parameter in adapter.rows():
            full = prefix + _name_below(where[id(layer)], layer, parameter, name)
            if full in state:
                found[key] = layer.own_part(name, parameter.partition(".")[0], state[full])
        for key, full, tensor, *_ in self._shared_rows(adapter, where):
            if not full or prefix + full in state:
                found[key] = state[prefix + full] if full else tensor
        for path, wrapper in adapter.saved:
            below = f"{prefix}{where[id(wrapper)]}.modules_to_save.{name}."
            found |= {f"{path}.{full[len(below) :]}": state[full] for full in state if full.startswith(below)}
        return found

    def _where(self) -> dict[int, str]:
        """id of a module → its name in the model's state dict, in which what wraps modules to shard them is left out."""
        return {
            id(module): path.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
            for path, module in self.model.named_modules()
        }

    def _shared_rows(self, adapter: Adapter, where: dict[int, str]) -> list[tuple[str, str, Any, bool, bool, str]]:
        """The rows of `tensors` that are neither in peftc's layers nor in modules_to_save."""
        name = adapter.name
        rows: list[tuple[str, str, Any, bool, bool, str]] = []
        if adapter.part is not None:
            rows += adapter.part.full_rows(where)
        for key, module, field, other in adapter.biases:
            if self._biases_of == name:
                rows.append((key, f"{where[id(module)]}.{field}", module._parameters[field], True, True, key))
            else:  # not in effect, so not in the model
                rows.append((key, "", other, True, True, key))
        for key, module, field in adapter.embeddings:
            values, parameter = self._embedding(adapter, module, field), module._parameters[field]
            shown = (
                parameter is not None and parameter.data_ptr() == values.data_ptr()
            )  # else it is not in the model now
            full = f"{where[id(module)]}.{field}" if shown else ""
            rows.append((key, full, parameter if shown else values, True, False, key))
        return rows

    def save(self, name: str, path: str, prefix: str = _PREFIX) -> None:
        """Write an adapter's state dict as safetensors, atomically; the bytes are those that PEFT writes."""
        from .torch_save import save_file

        save_file({prefix + key: tensor for key, tensor in self.state_dict(name).items()}, path)

    # ----------------------------------------------------------------- merging

    def merged(self) -> list[str]:
        return list(self.switch.merged)

    def merge(self, names: Sequence[str] | None = None, safe_merge: bool = False, progressbar: bool = False) -> None:
        """Put base weights with these adapters folded in in the base weights' place; `unmerge` gives them back exactly.

        progressbar shows one on stderr, layer by layer.

        Raises:
            ValueError: safe_merge, and a result with NaN or infinity.
        """
        wanted = [n for n in (self.active() if names is None else names) if n not in self.switch.merged]
        layers: dict[str, list[tuple[AdaptedLayer, str]]] = {}
        parts = [part for part in map(self.part, wanted) if part is not None]
        before = list(self._originals)
        if not self.switch.merged:
            self._plain = self._weights_under_dora()
        try:
            for part in parts:  # PEFT's layers are the inner ones
                self._originals.append(part.name)
                part.merge(safe_merge)
            self._merge_ours(wanted, layers, safe_merge, progressbar)
        except BaseException:
            for part in reversed(parts):
                part.unmerge()
            self._originals = before
            raise
        self._update(merged=(*self.switch.merged, *wanted))

    def _weights_under_dora(self) -> dict[nn.Module, torch.Tensor]:
        return {
            base: getattr(base, layer.weight_name).detach()
            for adapter in self._adapters.values()
            for layer in adapter.layers
            if any(getattr(layer, "use_dora", {}).values()) and (base := layer.get_base_layer()) is not None
        }

    def _merge_ours(
        self, wanted: list[str], layers: dict[str, list[tuple[AdaptedLayer, str]]], safe_merge: bool, progressbar: bool
    ) -> None:
        for name in wanted:
            for path, layer in self._adapters[name].named_layers():
                layers.setdefault(path, []).append((layer, name))
        made = []
        with torch.no_grad():
            for path, uses in _watched(layers.items(), progressbar):
                base: Any = uses[0][0].get_base_layer()
                names = uses[0][0].weight_name, uses[0][0].bias_name
                old, bias = getattr(base, names[0]), getattr(base, names[1], None)
                torch_dispatch.check_in_memory(path, base, "merging changes them")
                weight = old.detach()
                bias = None if bias is None else bias.detach()
                for layer, name in uses:
                    weight, bias = layer.merge_into(name, weight, bias, self._plain.get(base, weight).to(weight))
                    if safe_merge and not torch.isfinite(weight).all():
                        raise ValueError(
                            f"NaNs detected in the merged weights. The adapter {name} seems to be broken (module {path})"
                        )
                made.append((base, names, weight.to(old.dtype).contiguous(), bias))
        for base, names, weight, bias in made:
            old = getattr(base, names[0])
            self._originals.append((base, names, old.data, getattr(base, names[1], None)))
            old.data = weight
            if bias is not None:
                setattr(base, names[1], nn.Parameter(bias.to(weight.dtype), requires_grad=False))

    def unmerge(self) -> None:
        for original in reversed(self._originals):
            if isinstance(original, str):
                part = self.part(original)
                assert part is not None
                part.unmerge()
                continue
            base, (weight_name, bias_name), weight, bias = original
            parameter = getattr(base, weight_name)
            parameter.data = weight.to(parameter)  # the model may have another dtype or device by now
            if bias is not None:
                bias.data = bias.data.to(parameter)
            if bias is not None or getattr(base, bias_name, None) is not None:
                setattr(base, bias_name, bias)
        self._forget_merged()
        if self.switch.merged:
            self._update(merged=())

    def forget_originals(self) -> None:
        """What is merged stays in the base weights for good."""
        self._forget_merged()
        for adapter in self._adapters.values():
            if adapter.part is not None:
                adapter.part.originals.clear()

    def _forget_merged(self) -> None:
        self._originals.clear()
        self._plain.clear()

    def clear(self) -> None:
        """Forget all adapters; their layers are out of the model already, and biases stay as they are."""
        self._adapters.clear()
        self._flagged.clear()
        self._forget_merged()
        self._biases_of = None
        self.switch = Switch()


def _name_below(path: str, layer: AdaptedLayer, parameter: str, name: str) -> str:
    """An adapter's tensor in the model, by its layer's name and the name that the core has for it."""
    field, _, part = parameter.partition(".")
    last = f".{part or 'weight'}" if layer._modules[field]._modules.get(name) is not None else ""
    return f"{path}.{field}.{name}{last}"


def _watched(items: Any, progressbar: bool) -> Any:
    if not progressbar:
        return items
    from tqdm import tqdm

    return tqdm(items, desc="Unloading and merging model")


def join_peft() -> None:
    """Make our layers instances of PEFT's abstract classes, if peft is imported."""
    import sys

    peft = sys.modules.get("peft")
    if peft is None or getattr(join_peft, "done", False):
        return
    from peft.tuners.adalora import AdaLoraLayer
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    BaseTunerLayer.register(AdaptedLayer)
    LoraLayer.register(torch_lora.LoraLayer)
    AdaLoraLayer.register(torch_adalora.AdaLoraLayer)
    IA3Layer.register(torch_ia3.IA3Layer)
    SavedModule.__bases__ = (ModulesToSaveWrapper,)
    join_peft.done = True


__all__ = ["TorchRegistry", "join_peft", "walk"]
