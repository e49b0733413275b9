"""A research kit: how small can a language model get for one domain, and what does it lose.

The public names are listed in ``__init__.pyi``; each is imported when it is first used, so that
``import minigpt_lab`` loads neither torch nor transformers. Yet after it transformers' Auto classes
load pruned models: they are told of them when they are imported themselves, be it before or after.
"""

import importlib.abc
import importlib.util
import sys
from types import ModuleType

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"

_AUTO = "transformers.models.auto.configuration_auto"


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


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls `_register_pruned_types` once transformers has loaded its ``AutoConfig``."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _register_pruned_types(module)

        spec.loader.exec_module = exec_module
        return spec


if _AUTO in sys.modules:
    _register_pruned_types(sys.modules[_AUTO])
else:
    sys.meta_path.insert(0, _WhenImported())
