"""Diagrams of what is measured and compared."""

from __future__ import annotations

import math

from .drawing import Drawing, diagram


@diagram(335)
def mean_activations(d: Drawing) -> None:
    """Each column of the values |a| of tokens by neurons is averaged; means at or below ε are
    unused, and the unused neurons of two domains overlap only in part.
    """
    means = {
        "one domain": [0.9, 0.12, 0.6, 0.15, 0.8, 0.3, 0.1, 0.7, 0.5, 0.14],
        "another domain": [0.8, 0.6, 0.1, 0.14, 0.7, 0.4, 0.12, 0.16, 0.9, 0.5],
    }
    tokens = [1.3, 0.5, 0.9, 1.5, 0.8]
    for x, (domain, levels) in zip((60, 350), means.items(), strict=True):
        d.head(x + 94, domain, "|a| of 5 tokens × 10 neurons")
        for row, strength in enumerate(tokens):
            for column, level in enumerate(levels):
                left, top = x + 19 * column, 72 + 19 * row
                d.box(left, top, 17, 17, "soft")
                side = 17 * min(math.sqrt(level * strength), 1)
                d.box(left + (17 - side) / 2, top + (17 - side) / 2, side, side)
        for column, level in enumerate(levels):
            look = "keep" if level > 0.2 else "gone"
            d.box(x + 19 * column, 290 - 100 * level, 17, 100 * level, look)
        d.line([(x - 8, 270), (x + 198, 270)], "ink", dashed=True)
        d.text(x - 14, 275, "ε", anchor="end")
        d.text(x + 94, 315, "mean over tokens, m_{j}", "muted", size=14)
    d.head(745, "unused in")
    one, two = ({i for i, level in enumerate(levels) if level <= 0.2} for levels in means.values())
    for y, words, chosen in ((84, "both", one & two), (146, "either", one | two)):
        d.text(745, y, words, "muted", size=14)
        for neuron in range(10):
            d.box(652 + 19 * neuron, y + 12, 17, 17, "gone" if neuron in chosen else "soft")
    d.text(745, 236, f"Jaccard overlap {len(one & two)} / {len(one | two)}")
    d.text(745, 262, "1: the same neurons\n0: none in common", "muted", size=14)


@diagram(330)
def threshold(d: Drawing) -> None:
    """One ε for all layers removes most of a layer of small activations and nothing of one of
    large ones; the lowest share of each layer removes as much of every layer.
    """
    layers = [("early layer", 0.24), ("middle layer", 0.44), ("late layer", 0.68)]

    def bump(x: float, y: float, centre: float, end: float, look: str) -> None:
        """Fill a layer's distribution up to a place of the axis."""
        steps = [centre - 0.18 + 0.36 * i / 60 for i in range(61)]
        inside = [s for s in steps if s <= end]
        top = [(x + 380 * s, y - 48 * math.exp(-(((s - centre) / 0.07) ** 2) / 2)) for s in inside]
        if top:
            d.area([(top[0][0], y), *top, (top[-1][0], y)], look)

    for x, heading, below in (
        (40, "one ε for all layers", "removes nearly all of one layer, nothing of another"),
        (480, "the lowest share of each layer", "removes as many channels of every layer"),
    ):
        d.head(x + 190, heading, below)
        for y, (name, centre) in zip((130, 200, 270), layers, strict=True):
            end = 0.34 if x == 40 else centre - 0.037
            bump(x, y, centre, 9, "keep")
            bump(x, y, centre, end, "page")
            bump(x, y, centre, end, "gone")
            d.line([(x, y), (x + 380, y)], "muted", 1)
            side, anchor = (x + 376, "end") if centre < 0.5 else (x + 4, "start")
            d.text(side, y - 10, name, "muted", anchor, 14)
            if x != 40:
                d.line([(x + 380 * end, y - 58), (x + 380 * end, y + 4)], "ink", dashed=True)
        d.text(x + 190, 312, "mean |a| of a channel, small to large →", "muted", size=14)
    d.line([(40 + 380 * 0.34, 76), (40 + 380 * 0.34, 284)], "ink", dashed=True)
    d.text(46 + 380 * 0.34, 88, "ε", anchor="start")


@diagram(330)
def questions(d: Drawing) -> None:
    """The choice whose tokens have the lowest perplexity is the answer; of two models that answer
    the same questions, those that only one of them gets right tell them apart.
    """
    d.head(225, "How a model answers", "“The wound was closed with …”")
    choices = [("sutures", 0.34), ("judges", 0.82), ("kettles", 0.95), ("rivers", 0.7)]
    for row, (word, length) in enumerate(choices):
        y = 92 + 46 * row
        d.text(130, y + 19, word, "ink", "end")
        d.box(142, y, 250 * length, 26, "new" if row == 0 else "soft")
    d.text(240, 110, "lowest: the answer", "new", "start", 14)
    d.text(225, 300, "perplexity of the choice's tokens →", "muted", size=14)
    d.line([(450, 30), (450, 300)], "edge")
    d.head(675, "Two models, the same questions", "paired: McNemar's test")
    d.text(690, 100, "pruned model", "muted", size=14)
    for place, word in enumerate(("right", "wrong")):
        d.text(630 + 120 * place, 124, word, size=14)
        d.text(560, 170 + 66 * place, word, "ink", "end", 14)
    d.text(500, 203, "dense", "muted", size=14)
    for row in range(2):
        for column in range(2):
            left, top = 572 + 120 * column, 134 + 66 * row
            d.box(left, top, 114, 60, "soft" if row == column else "frame")
            words = "n_{10}" if column > row else "n_{01}" if row > column else "says nothing"
            look, size = ("muted", 13) if row == column else ("new", 20)
            d.text(left + 57, top + 36, words, look, size=size)
    d.text(690, 300, "if equally good, n_{10} and n_{01} differ by luck alone", "muted", size=14)


@diagram(370)
def domain_matrix(d: Drawing) -> None:
    """Every domain's text makes a plan, every plan a model of one size, and every model reads
    every domain's held-out text; if pruning is contextual, each column is lowest on the
    diagonal.
    """
    domains = ["law", "medical", "games"]
    d.head(110, "calibration text")
    d.head(330, "models of one size")
    d.head(680, "perplexity on held-out text of")
    rows = [*domains, "all (mix)", "none (random)"]
    for row, name in enumerate(rows):
        y = 92 + 48 * row
        control = row >= 3
        d.box(40, y, 140, 34, "soft")
        d.text(110, y + 22, name, "muted" if control else "ink")
        d.arrow(190, y + 17, 258, y + 17, "plan" if row == 0 else "")
        d.box(272, y, 116, 34, "frame")
        for place in range(8):
            gone = (place * 5 + row * 3) % 8 < 3
            d.box(280 + 13 * place, y + 9, 10, 17, "gone" if gone else "keep")
        d.arrow(400, y + 17, 470, y + 17, "reads" if row == 0 else "")
        for column in range(3):
            own = row == column
            d.box(490 + 130 * column, y, 118, 34, "new" if own else "soft")
            d.text(549 + 130 * column, y + 22, "own: lowest?" if own else "higher?",
                   "page" if own else "muted", size=13, bold=own)  # fmt: skip
    for column, name in enumerate(domains):
        d.text(549 + 130 * column, 78, name)
    d.text(450, 350, "controls know no domain, or all of them: is the diagonal lower still?",
           "muted", size=14)  # fmt: skip


@diagram(350)
def pareto_front(d: Drawing) -> None:
    """Models by size and perplexity: those that no other beats in both are the Pareto front; every
    other one is dominated by a model that is no larger and no worse.
    """
    d.head(450, "Which models are worth having?")
    d.line([(150, 60), (150, 300), (620, 300)], "ink")
    d.text(385, 328, "size →", "muted", size=14)
    d.text(138, 72, "perplexity", "muted", "end", 14)
    front = [(200, 90), (260, 170), (360, 220), (480, 245), (580, 255)]
    steps = [front[0]]
    for (_, y), (x, lower) in zip(front, front[1:], strict=False):
        steps += [(x, y), (x, lower)]
    d.line(steps, "new", 2)
    d.area([(440, 130), (440, 300), (150, 300), (150, 130)], "soft")
    d.line([(150, 130), (440, 130), (440, 300)], "muted", dashed=True)
    d.line([(150, 60), (150, 300), (620, 300)], "ink")
    d.line(steps, "new", 2)
    for x, y in front:
        d.dot(x, y, 7, "new")
    for x, y in ((440, 130), (330, 110), (540, 180)):
        d.line([(x - 6, y - 6), (x + 6, y + 6)], "gone", 2.5)
        d.line([(x - 6, y + 6), (x + 6, y - 6)], "gone", 2.5)
    d.text(454, 124, "dominated", "gone", "start", 14)
    d.text(592, 250, "dense", "muted", "start", 14)
    d.dot(660, 110, 7, "new")
    d.text(676, 115, "on the front: smaller\nalways costs perplexity", "ink", "start", 14)
    d.text(654, 187, "×", "gone", "start", 22)
    d.text(676, 185, "dominated: a model in\nits grey corner is no\nlarger and no worse", "ink",
           "start", 14)  # fmt: skip


@diagram(340)
def spsa(d: Drawing) -> None:
    """The losses on both sides of the weights give the slope c along a random direction z; c times
    z holds a small part of the gradient, the mean over directions more of it.
    """
    d.head(225, "The slope, from two forward passes", "one random direction z of all weights")

    def loss(x: float) -> float:
        return 240 - 0.0016 * (x - 60) ** 2

    d.line([(x, loss(x)) for x in range(60, 380, 10)], "keep", 2.5)
    d.line([(50, 270), (410, 270)], "muted", 1)
    for x, words in ((140, "w − εz"), (200, "w"), (260, "w + εz")):
        d.line([(x, loss(x)), (x, 270)], "muted", 1, dashed=True)
        d.dot(x, loss(x), 6, "keep" if x == 200 else "new")
        d.text(x, 290, words, size=14)
    d.line([(80, loss(140) + 27), (320, loss(260) - 27)], "new", 1.5, dashed=True)
    d.text(132, loss(140) - 14, "L_{−}", "new", "end")
    d.text(252, loss(260) - 14, "L_{+}", "new", "end")
    d.text(396, 80, "loss", "keep", "end", 14)
    d.text(225, 322, "c = (L_{+} − L_{−}) / 2ε", bold=True)
    d.line([(450, 30), (450, 310)], "edge")
    d.head(
        675, "How much of the gradient g it holds", "with many weights, z is almost orthogonal to g"
    )
    d.arrow(560, 280, 720, 110, look="keep")
    d.text(732, 112, "g", "keep", "start", 17, True)
    for x, y, part in ((700, 250, 0.62), (540, 140, 0.42), (620, 120, 0.8)):
        d.line([(560, 280), (x, y)], "muted", 1, dashed=True)
        d.arrow(560, 280, 560 + part * (x - 560), 280 + part * (y - 280), look="new")
    d.text(708, 256, "z_{1}", "muted", "start")
    d.text(524, 138, "z_{2}", "muted", "start")
    d.text(606, 112, "z_{3}", "muted", "start")
    d.text(675, 322, "ĝ = mean of c z;  cosine to g ≈ √(directions / weights)", size=14)


@diagram(370)
def criteria(d: Drawing) -> None:
    """What each way to choose looks at: nothing, the weights, the inputs, the loss gradient, or
    how the inputs vary together; the lowest scores are removed.
    """
    columns = ["weights\nw", "inputs\nx", "gradient\ng", "moments\nX Xᵀ"]
    rows = [
        ("random", ""), ("magnitude", "w"), ("contextual", "x"), ("wanda, fluctuation", "wx"),
        ("taylor", "wg"), ("sensitivity", "wxg"), ("sparsegpt, slimgpt", "wh"),
    ]  # fmt: skip
    d.head(190, "A unit's weights")
    d.text(56, 168, "x", size=17, bold=True)
    d.arrow(70, 162, 120, 162)
    d.cells(136, 84, 9, 1, lambda r, c: "gone" if r == 4 else "keep")
    d.arrow(168, 162, 216, 162, "a")
    d.cells(232, 110, 6, 9, lambda r, c: "gone" if c == 4 else "keep", 10)
    d.arrow(352, 162, 386, 162)
    d.line([(386, 254), (60, 254)], "other", arrow=True)
    d.text(384, 274, "loss gradient, backwards", "other", "end", 13)
    d.text(60, 300, "w: its row and its column", "ink", "start", 14)
    d.text(60, 322, "x: what they multiply", "ink", "start", 14)
    d.text(60, 344, "g: how the loss changes with w", "ink", "start", 14)
    d.line([(410, 30), (410, 340)], "edge")
    d.head(655, "What each criterion looks at")
    for place, column in enumerate(columns):
        d.text(598 + 82 * place, 70, column, "muted", size=13)
    for row, (name, read) in enumerate(rows):
        y = 116 + 34 * row
        d.line([(428, y + 12), (880, y + 12)], "edge", 1)
        d.text(560, y, name, "ink", "end", 14)
        for place, letter in enumerate("wxgh"):
            if letter in read:
                d.dot(598 + 82 * place, y - 5, 7, "keep")


@diagram(340)
def generality(d: Drawing) -> None:
    """A share μ of general text's second moments is mixed into the domain's; every μ is a model on
    the front between specialist and generalist, and smaller models lie further from the dense one.
    """
    d.head(225, "One dial", "what the remaining weights are fitted to")
    moments = (
        ["951..", "59.1.", "1.9..", ".1.93", "...39"],
        ["9..3.", ".91.1", ".19.5", "3..91", ".1519"],
    )
    for x, name, rows in ((40, "domain", moments[0]), (270, "general", moments[1])):
        d.text(x + 69, 92, f"H_{{{name}}}", bold=True)
        for row, line in enumerate(rows):
            for column, letter in enumerate(line):
                left, top = x + 28 * column, 106 + 28 * row
                side = 2 if letter == "." else 5 + 2 * int(letter)
                d.box(left, top, 25, 25, "soft")
                look = "keep" if name == "domain" else "other"
                d.box(left + (25 - side) / 2, top + (25 - side) / 2, side, side, look)
    d.text(224, 180, "+", size=24)
    d.text(109, 268, "(1 − μ) ×", size=16)
    d.text(339, 268, "μ ×", size=16)
    d.line([(70, 294), (380, 294)], "muted", 3)
    d.dot(170, 294, 9, "new")
    d.text(60, 299, "0", "muted", "end")
    d.text(390, 299, "1", "muted", "start")
    d.text(170, 324, "μ", "new", bold=True)
    d.line([(450, 30), (450, 310)], "edge")
    d.head(680, "One front for each size", "no μ is right for everyone")
    d.line([(510, 80), (510, 290), (850, 290)], "ink")
    d.text(680, 318, "loss in the domain →", "muted", size=14)
    d.text(522, 92, "loss on general text", "muted", "start", 14)
    d.dot(530, 270, 7, "ink")
    d.text(544, 275, "dense", "muted", "start", 14)
    for shift, size in ((0, "80 % kept"), (60, "70 %"), (130, "50 %")):
        points = [(560 + 0.9 * shift + 90 * t**1.6, 250 - 0.55 * shift - 75 * (1 - t) ** 1.6)
                  for t in (0, 0.25, 0.5, 0.75, 1)]  # fmt: skip
        d.line(points, "new", 2)
        for place, point in enumerate(points):
            d.dot(*point, 5, ("keep", "new", "new", "new", "other")[place])
        d.text(points[-1][0] + 12, points[-1][1] + 5, size, "muted", "start", 14)
    d.text(790, 112, "specialist, μ = 0", "keep", "middle", 14)
    d.text(790, 134, "generalist, μ = 1", "other", "middle", 14)
