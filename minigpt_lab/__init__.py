"""A research kit: how small can a language model get for one domain, and what does it lose.

The public names are listed in ``__init__.pyi``; each is imported when it is first used, so that
``import minigpt_lab`` loads neither torch nor transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
