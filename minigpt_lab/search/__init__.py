"""Which layers can spare how much: a layer budget searched by what it does to the predictions.

`budgets` says which budgets have one size, `supernet` sets a model to any of them, `trials` says
how far its predictions then are from the dense ones and what every group's next units would add,
`descent` moves by that, and `rounds` is the search.
"""

from .rounds import Search, search_counts, summary

__all__ = ["Search", "search_counts", "summary"]
