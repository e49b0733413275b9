"""Buttons for work that needs a model: in the background, with progress and a cancel button."""

from __future__ import annotations

import html
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial

import ipywidgets
from IPython.display import HTML
from transformers import PreTrainedTokenizerBase

from ..checks import (
    Function,
    Instance,
    Integer,
    Text,
    Texts,
    Tokenizer,
    checked,
    hooked,
    on_wait,
    waits_for_this_thread,
)
from ..domains import excerpt
from ..evaluation import perplexity
from ..models import shrink
from .base import alarm, escaped, size_words
from .pruning import RatioExplorer
from .threshold_explorer import ThresholdExplorer


class ModelJob:
    """A button that runs work in the background, with progress and a cancel button.

    If the work fails or is cancelled, the last result is kept and the reason shown below it. The
    job waits for a model that a cell is using, and says so below the bar.

    Parameters
    ----------
    description : str
        On the button.
    work : callable
        Takes ``tick(done)`` with the share that is done, to be called often (it raises
        `concurrent.futures.CancelledError` to stop the work); returns the result as text.
    """

    @checked(description=Text(), work=Function())
    def __init__(self, description: str, work: Callable[[Callable[[float], None]], str]):
        self.work = work
        self.button = ipywidgets.Button(description=description, layout={"width": "auto"})
        self.cancel = ipywidgets.Button(description="cancel", disabled=True)
        self.progress = ipywidgets.FloatProgress(min=0, max=1)
        self.result, self.state = ipywidgets.HTML(), ipywidgets.HTML()
        self.result.add_class("lab-result")
        self.view = ipywidgets.VBox(
            [ipywidgets.HBox([self.button, self.cancel, self.progress]), self.result, self.state]
        )
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.button.on_click(lambda _button: self.start())
        self.cancel.on_click(lambda _button: self._stop.set())

    def show(self, interactive: bool) -> ipywidgets.Widget | HTML:
        """What a notebook cell displays: the button, or a word on it where nothing can press it."""
        if interactive:
            return self.view
        return HTML(
            f"<i>In a live notebook: a button, <b>{escaped(self.button.description)}</b>.</i>"
        )

    def start(self) -> None:
        """Begin, unless it is running already."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._stop.clear()
        self.button.disabled, self.cancel.disabled = True, False
        self.progress.value, self.state.value = 0.0, "running …"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the work has ended.

        Raises
        ------
        RuntimeError
            If it waits for a model that this thread holds: inside `masked`, say.
        """
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.1)
            if waits_for_this_thread(self._thread):
                self._stop.set()
                raise RuntimeError(
                    f"the job {self.button.description!r} waits for a model that this cell holds; "
                    "leave the with block (masked, say) first"
                )

    def _tick(self, done: float) -> None:
        if self._stop.is_set():
            raise CancelledError
        self.progress.value, self.state.value = min(done, 1.0), "running …"

    def _waits(self, name: str, _seconds: float) -> None:
        if self._stop.is_set():
            raise CancelledError
        self.state.value = f"waiting: the {html.escape(name)} is in use …"

    def _run(self) -> None:
        on_wait(self._waits)
        try:
            self.result.value = html.escape(self.work(self._tick))
            self.state.value, self.progress.value = "", 1.0
        except CancelledError:
            self.state.value = "cancelled; the last result is kept"
        except Exception as error:  # noqa: BLE001 - a thread's error would be lost
            self.state.value = alarm(error)
        finally:
            self.button.disabled, self.cancel.disabled = False, True


@checked(
    explorer=Instance(ThresholdExplorer) | Instance(RatioExplorer),
    tokenizer=Tokenizer(),
    texts=Texts(),
    max_tokens=Integer(2),
    seq_len=Integer(2),
)
def perplexity_job(
    explorer: ThresholdExplorer | RatioExplorer,
    tokenizer: PreTrainedTokenizerBase,
    texts,
    *,
    max_tokens: int = 2048,
    seq_len: int = 256,
) -> ModelJob:
    """A button that measures held-out perplexity of the explorer's choice.

    It runs a shrunk copy: the notebook's own model does not change, whatever cells run meanwhile.

    Parameters
    ----------
    explorer
        Whose `plan` to measure.
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the explorer's model.
    texts : Part
        E.g. ``domain.validation``.
    max_tokens, seq_len : int
        Protocol, see `perplexity`.
    """
    held_out = excerpt(texts, tokenizer, max_tokens=max_tokens)

    def work(tick: Callable[[float], None]) -> str:
        plan, calls = explorer.plan, itertools.count()
        mini = shrink(explorer.model, plan)
        batches = max_tokens / seq_len / 4 + 1

        def count(*_call) -> None:
            tick(next(calls) / batches)

        with hooked(partial(mini.register_forward_pre_hook, count)):
            result = perplexity(
                mini, tokenizer, held_out, seq_len=seq_len, max_characters=None, progress=False
            )
        return f"{size_words(plan.predicted_size(explorer.model))}: {result}"

    return ModelJob("measure perplexity", work)
