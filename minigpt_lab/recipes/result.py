"""What a recipe returns: the model, and what it lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..figures import caption_for, size_and_loss


@dataclass(frozen=True, repr=False)
class Mini:
    """A mini-GPT, and what it lost.

    Parameters
    ----------
    model, tokenizer
        The pair.
    table : pandas.DataFrame
        One row per variant (``dense``, ``dense, fine-tuned``, ``random``, ``pruned``, ``mini``;
        ``only trimmed`` and ``mini, Q8_0`` where they were asked for) and text: ``stored, bytes,
        perplexity, low, high, bits_per_character, …``.
    folder : pathlib.Path
        Loads with `load_model`.
    protocol : str
        How the table was measured.
    """

    model: PreTrainedModel = field(compare=False)
    tokenizer: PreTrainedTokenizerBase = field(compare=False)
    table: pd.DataFrame = field(compare=False)
    folder: Path
    protocol: str

    @property
    def card(self) -> str:
        """The model card in the folder."""
        return (self.folder / "README.md").read_text(encoding="utf-8")

    def to_frame(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def figure(self) -> Figure:
        """Size on disk against bits per character, a point per variant and text."""
        return size_and_loss(self.table, caption=caption_for(self.model, self.protocol))

    def __repr__(self) -> str:
        own = self.table[self.table["variant"].isin(["dense", "mini"])]
        own = own[own["text"] == own["text"].iloc[0]].set_index("variant")
        bits = own["bits_per_character"]
        return (
            f"mini-GPT of {own['stored']['mini']:,} parameters "
            f"({own['stored']['mini'] / own['stored']['dense']:.1%} of the dense model's), "
            f"{bits['mini']:.3f} bits per character on {own['text'].iloc[0]} "
            f"(dense {bits['dense']:.3f}), in {self.folder}"
        )

    def _repr_html_(self) -> str:
        columns = ["variant", "text", "stored", "bytes", "perplexity", "bits_per_character"]
        return f"<p>{self!r}</p>" + self.table[columns].to_html(index=False)


def training_note(tokens: int, general: float, name: str) -> str:
    """What a card says of how a model was made after its pruning, and of its rows."""
    return (
        f"trained on {tokens:,} tokens, {general:.0%} of them general text ({name}), the "
        "others of the domain's train part: half on labels, half on the dense model's predictions\n"
        "- below, this model is *mini*; before its training it was *pruned*"
    )
