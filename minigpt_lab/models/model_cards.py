"""Model cards: the ``README.md`` of a saved model, with metadata as the Hugging Face hub expects.

What is not known (a licence, a base model's name on the hub, a measured loss) is not invented: the
card leaves it out or says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..architectures import ALL_SITES, dense_type
from ..checks import Frame, Model, Text, checked, invalid
from .anatomy import Anatomy
from .plan import PruningPlan
from .precision import dtype_name
from .runtime import is_pruned, label, noted_dense, origin_of
from .sizes import Size, model_size, span

CARD = "README.md"
_MARKER = (
    "<!-- Written by minigpt_lab. Without this line the file counts as yours and is never "
    "overwritten. -->"
)
_NUMBERS = ("perplexity", "bits_per_character", "low", "high")


@checked(
    model=Model(),
    table=Frame(names=["text", "variant"], numbers=_NUMBERS) | None,
    protocol=Text(),
    domain=Text(),
    notes=Text(),
)
def model_card(
    model: PreTrainedModel,
    *,
    table: pd.DataFrame | None = None,
    protocol: str = "",
    domain: str = "",
    notes: str = "",
) -> ModelCard:
    """Describe a model for those who find its folder: what it is, what it lost, how to load it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense or pruned.
    table : pandas.DataFrame, optional
        Measured losses, one row per text and variant: columns ``text, variant, perplexity,
        bits_per_character`` and the perplexity's interval ``low, high``; ``bytes`` is shown too if
        there is such a column. Without it the card says that nothing was measured.
    protocol : str
        How the table was measured; required with it.
    domain : str
        What the model was pruned for; by default as its plans say.
    notes : str
        What was done to it beside pruning, such as how it was trained.

    Returns
    -------
    huggingface_hub.ModelCard
        For ``save_model(…, card=card)``; ``str(card)`` is the text.

    Raises
    ------
    ValueError
        If a column is missing, or the protocol of the table.
    """
    if table is not None and not protocol:
        raise invalid("protocol", protocol, "how the table was measured", "pass it with the table")
    plans = getattr(model, "pruning_plans", [])
    known = [plan.origin["domain"] for plan in plans if plan.origin.get("domain")]
    domain = domain or str((known or [""])[-1])
    origin = origin_of(model)
    pruned = is_pruned(model)
    tags = ["minigpt-lab", *(["pruning", "structured-pruning"] if pruned else [])]
    data = ModelCardData(
        base_model=origin.get("hub"),
        language=origin.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*tags, *([domain] if domain else [])],
        **_licence_metadata(origin.get("licence")),
    )
    size = model_size(model)
    sections = [
        _MARKER,
        f"# {_inline(label(model))}",
        _summary(origin, pruned, domain, size),
        "## Size",
        _size_table(model, size, plans),
        "## How it was made",
        "\n".join(_history(plans, pruned, notes)),
        "## What it lost",
        _losses(table, protocol),
        "## How to load it",
        _loading(model),
        "## What it should not be used for",
        _LIMITS,
        "## Licence",
        _licence(origin),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def is_users(path: Path) -> bool:
    """Whether a file is there that no `model_card` wrote, or one that a user has made his own."""
    try:
        return _MARKER not in path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False


def origin_from(path: Path) -> dict[str, str]:
    """Name, licence and language that a base model's card states; empty if it states none."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(2**20)
        data = ModelCard(text, ignore_metadata_errors=True).data if text[:4] == "---\n" else None
    except Exception:  # a card of any kind is no obstacle to loading a model
        return {}
    facts = {}
    licence = getattr(data, "license", None)
    if licence == "other":
        parts = (getattr(data, "license_name", None), getattr(data, "license_link", None))
        licence = ": ".join(part for part in parts if isinstance(part, str))
    named = {"title": "model_name", "language": "language"}
    stated = {name: getattr(data, entry, None) for name, entry in named.items()}
    for name, value in {**stated, "licence": licence}.items():
        if isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable():
            facts[name] = value
    return facts


def _licence_metadata(licence: str | None) -> dict[str, Any]:
    """The hub's fields of a licence: an identifier, or a name and a link."""
    if not licence:
        return {}
    if re.fullmatch(r"[\w.+-]+", licence):
        return {"license": licence.lower()}
    link = re.search(r"https?://\S+", licence)
    name = re.sub(r"[^a-z0-9.]+", "-", re.split(r"[:(]", licence)[0].lower()).strip("-")
    fields = {"license": "other", "license_name": name}
    return fields | ({"license_link": link.group()} if link else {})


def _inline(text: object) -> str:
    """Text for one line, or one cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _rows(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _summary(origin: dict, pruned: bool, domain: str, size: Size) -> str:
    """What the model is, in a sentence or two."""
    base = f"`{origin['hub']}`" if "hub" in origin else origin.get("title", "")
    base = _inline(base + (f" ({origin['note']})" if "note" in origin else ""))
    if not pruned:
        return f"{base or 'A model'}, saved by minigpt_lab. It is not pruned."
    aim = f" for the domain *{_inline(domain)}*" if domain else ""
    return (
        f"A smaller version of {base or 'its base model'}, made by structured pruning{aim}: whole "
        "FFN channels, attention heads and tokens are removed. It has "
        f"{size.stored / size.dense:.1%} of the dense model's parameters."
    )


def _size_table(model: PreTrainedModel, size: Size, plans: Sequence[PruningPlan]) -> str:
    """Parameters, bytes and units of the dense and this model."""
    rows: list[Sequence[object]] = [
        ("parameters stored", f"{size.dense:,}", f"{size.stored:,}", size.stored / size.dense),
        (
            "of them in decoder layers",
            f"{size.layers_dense:,}",
            f"{size.layers_stored:,}",
            size.layer_ratio,
        ),
        ("non-zero parameters", "", f"{size.nonzero:,}", size.nonzero / size.dense),
    ]
    rows = [(*row, f"{share:.1%}") for *row, share in rows]
    stored = sum(parameter.nbytes for parameter in model.parameters())
    rows.append((f"MB of weights ({_dtype(model)})", "", f"{stored / 1e6:,.1f}", ""))
    anatomy, before, noted = Anatomy(model), {}, noted_dense(model)
    for plan in reversed(plans):  # the first that names a site knew its dense units
        before |= plan.units
    names = {"ffn": "FFN channels", "attention": "key/value groups"}
    names["balanced_heads"] = "query heads per group"
    for site in ALL_SITES:
        now = anatomy.units(site)
        dense = noted.get(site) or span(before.get(site, now))
        rows.append((f"{names[site]} per layer", _inline(dense), span(now), ""))
    vocabulary = getattr(model, "trimmed_vocabulary", None)
    tokens = len(model.get_input_embeddings().weight)
    dense = vocabulary.size if vocabulary else noted.get("tokens", tokens)
    rows.append(("tokens", f"{dense:,}", f"{tokens:,}", ""))
    return _rows(["", "dense model", "this model", "share"], rows)


def _dtype(model: PreTrainedModel) -> str:
    return ", ".join(sorted({dtype_name(p.dtype) for p in model.parameters()}))


def _history(plans: Sequence[PruningPlan], pruned: bool, notes: str) -> Iterator[str]:
    """One item for each pruning, with the scalar settings that its plan noted."""
    for plan in plans:
        settings = [
            f"`{key}={value}`".replace("\n", " ")
            for key, value in plan.origin.items()
            if isinstance(value, str | int | float) and not key.endswith(("method", "hash"))
        ]
        method = _inline(plan.origin.get("method", "a plan of unknown origin"))
        yield f"- pruned by {method}" + (": " + ", ".join(settings) if settings else "")
        if isinstance(fitted := plan.origin.get("reconstruction"), dict):
            epochs = _inline(fitted.get("epochs"))
            yield f"- pruned blocks fitted to the dense model, in {epochs} epochs"
    if pruned and not plans:
        yield "- pruned; the plans are not kept with these files"
    if notes:
        yield f"- {notes}"
    if not pruned and not notes:
        yield "- not changed"
    if plans:
        yield "\nThe plans themselves are in `minigpt_lab.json`."


def _losses(table: pd.DataFrame | None, protocol: str) -> str:
    """The measured losses and their protocol."""
    if table is None:
        return (
            "Not measured, neither in its domain nor elsewhere. Measure it beside the dense model "
            "(`lab.compare`) before relying on it."
        )
    header = ["text", "variant", "perplexity", "95 % interval", "bits per character"]
    rows = []
    for row in table.to_dict("records"):
        ends = [f"{row[end]:.2f}" if pd.notna(row[end]) else "?" for end in ("low", "high")]
        cells = [_inline(row["text"]), _inline(row["variant"]), f"{row['perplexity']:.2f}"]
        cells += ["–".join(ends), f"{row['bits_per_character']:.3f}"]
        rows.append([*cells, *([f"{row['bytes'] / 1e6:,.1f}"] if "bytes" in row else [])])
    return _rows([*header, *(["MB"] if "bytes" in table else [])], rows) + f"\n\n{protocol}"


def _loading(model: PreTrainedModel) -> str:
    """Code that loads the folder, in four runtimes."""
    is_plain = model.config.model_type == dense_type(model.config.model_type)
    needed = (
        "" if is_plain else "import minigpt_lab  # its layers have different widths: needed first\n"
    )
    otherwise = (
        "" if is_plain else " (or, if `modeling_minigpt.py` is here, `trust_remote_code=True`)"
    )
    return f"""With transformers{otherwise}:

```python
{needed}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

With minigpt_lab, which also compares the files with each other and reads the pruning plans:

```python
import minigpt_lab as lab

model, tokenizer = lab.load_model("path/to/this/folder")
```

With llama.cpp, if it has a graph for this architecture and its widths (otherwise the call says so):

```python
lab.export_gguf(model, tokenizer, "model-Q8_0.gguf", kind="Q8_0")
```

```
llama-cli -m model-Q8_0.gguf -p "…"
```

With vLLM, for a Llama, Mistral or Qwen2 with as many query heads in every layer. The folder is
checked against the form that vLLM reads, and was not run there:

```python
lab.export_vllm(model, tokenizer, "path/to/another/folder")
```

```
vllm serve path/to/another/folder --trust-remote-code
```"""


_LIMITS = """- Text outside the domain that it was pruned for: knowledge of other fields is lost
  first, and more of it than the loss in the domain shows.
- Medical, legal or financial advice, decisions about people, or any output that nobody checks.
- Questions that it must answer in its own words, if only its choices among given answers were
  measured: a pruned model can pick the right one and still fail to write it.
- Whatever the base model's card warns of: pruning removes no bias, and what a model was trained to
  refuse may be lost."""


def _licence(origin: dict) -> str:
    """The base model's licence, passed on if it is known."""
    if origin.get("licence"):
        return f"That of the base model: {_inline(origin['licence'])}"
    return (
        "Not known here: the base model came without one. Its licence holds for this model too; "
        "look it up before you pass the model on."
    )
