"""A research kit: how small can a language model get for one domain, and what does it lose.

The public names are listed in ``__init__.pyi``; each is imported when it is first used, so that
``import minigpt_lab`` loads neither torch nor transformers. Yet after it transformers' Auto classes
load pruned models, and peft adapts them by default where it adapts their family: both are told of
them when they are imported themselves, be it before or after.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"


def _register_pruned_types(auto: ModuleType) -> None:
    """Tell ``AutoConfig`` the types of pruned models; their classes are made on first use."""
    from .architectures import FAMILIES, pruned_type

    def stand_in(model_type: str) -> type:
        def from_dict(entries: dict, **options: object) -> object:
            from .models import pruned_classes

            config_class, _ = pruned_classes(model_type)
            return config_class.from_dict(entries, **options)

        return type("PrunedConfig", (), {"from_dict": from_dict, "__module__": __name__})

    for model_type in FAMILIES:
        auto.AutoConfig.register(pruned_type(model_type), stand_in(model_type), exist_ok=True)


def _register_adapter_targets(constants: ModuleType) -> None:
    """Give pruned types their family's entry in each of peft's tables of default modules."""
    from .architectures import FAMILIES, pruned_type

    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_"):
            known = [model_type for model_type in FAMILIES if model_type in table]
            table |= {pruned_type(model_type): table[model_type] for model_type in known}


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls a function on a module once that has been loaded."""

    def __init__(self, name: str, call: Callable[[ModuleType], None]):
        self.name, self.call = name, call

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            self.call(module)

        spec.loader.exec_module = exec_module
        return spec


for _name, _call in {
    "transformers.models.auto.configuration_auto": _register_pruned_types,
    "peft.utils.constants": _register_adapter_targets,
}.items():
    if _name in sys.modules:
        _call(sys.modules[_name])
    else:
        sys.meta_path.insert(0, _WhenImported(_name, _call))
