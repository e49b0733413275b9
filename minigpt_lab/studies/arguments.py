"""Checks of arguments that several studies take."""

from ..calibration import Statistics
from ..checks import (
    Array,
    Batches,
    Instance,
    Integer,
    ListOf,
    Location,
    Model,
    Number,
    Texts,
    Tokenizer,
)
from ..domains import Part

BATCHES = Batches()
COUNTS = Array() | None
FOLDER = Location() | None
MODEL = Model()
PART = Texts()
SHARES = ListOf(Number(0, 1), 1)
STATISTICS = Instance(Statistics, "lab.collect_statistics gives it")
TEXTS = ListOf(Instance(Part, "domain.test is one"), 1)
PAIR = {"model": MODEL, "tokenizer": Tokenizer()}
PROTOCOL = {"max_tokens": Integer(2), "seq_len": Integer(2)}
