"""The mixin's signatures are those of Transformers 4.56.2's documentation, to the letter."""

import inspect

import pytest

from peftc import PeftAdapterMixin

# Method → its parameters as the page main_classes/peft prints them.
DOCUMENTED = {
    "load_adapter": [
        "peft_model_id: typing.Optional[str] = None",
        "adapter_name: typing.Optional[str] = None",
        "revision: typing.Optional[str] = None",
        "token: typing.Optional[str] = None",
        "device_map: typing.Optional[str] = 'auto'",
        "max_memory: typing.Optional[str] = None",
        "offload_folder: typing.Optional[str] = None",
        "offload_index: typing.Optional[int] = None",
        "peft_config: typing.Optional[dict[str, typing.Any]] = None",
        "adapter_state_dict: typing.Optional[dict[str, 'torch.Tensor']] = None",
        "low_cpu_mem_usage: bool = False",
        "is_trainable: bool = False",
        "adapter_kwargs: typing.Optional[dict[str, typing.Any]] = None",
    ],
    "add_adapter": ["adapter_config", "adapter_name: typing.Optional[str] = None"],
    "set_adapter": ["adapter_name: typing.Union[list[str], str]"],
    "disable_adapters": [],
    "enable_adapters": [],
    "active_adapters": [],
    "get_adapter_state_dict": [
        "adapter_name: typing.Optional[str] = None",
        "state_dict: typing.Optional[dict] = None",
    ],
}


def parameter_text(parameter):
    text = parameter.name
    if parameter.annotation is not parameter.empty:
        annotation = parameter.annotation
        text += ": " + (
            annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("NoneType", "None")
        )
        text = text.replace("ForwardRef('torch.Tensor')", "'torch.Tensor'")
    if parameter.default is not parameter.empty:
        text += f" = {parameter.default!r}"
    return text


@pytest.mark.parametrize("method", DOCUMENTED)
def test_signature(method):
    parameters = list(inspect.signature(getattr(PeftAdapterMixin, method)).parameters.values())
    assert parameters[0].name == "self"
    assert [parameter_text(p) for p in parameters[1:]] == DOCUMENTED[method]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def test_same_as_transformers():
    """Where Transformers is installed: parameter for parameter the same, return annotation too."""
    integration = pytest.importorskip("transformers.integrations.peft")
    for method in [*DOCUMENTED, "delete_adapter", "active_adapter"]:
        ours = inspect.signature(getattr(PeftAdapterMixin, method))
        assert str(ours) == str(inspect.signature(getattr(integration.PeftAdapterMixin, method))), method


def test_everything_is_documented():
    public = [name for name in vars(PeftAdapterMixin) if not name.startswith("_") and name != "peft_config"]
    assert set(DOCUMENTED) <= set(public)
    for name in public:
        assert (inspect.getdoc(getattr(PeftAdapterMixin, name)) or "").strip(), f"{name} has no docstring"
