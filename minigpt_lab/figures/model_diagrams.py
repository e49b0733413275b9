"""Diagrams of what a model is made of, and what is done to it."""

from __future__ import annotations

from collections.abc import Callable

from .drawing import Drawing, diagram


@diagram(330)
def ffn_channel(d: Drawing) -> None:
    """An FFN channel is a row of the gate and up matrices and a column of the down matrix; they
    are removed together, and input and output keep their width.
    """
    j = 3

    def row(r: int, c: int) -> str:
        return "gone" if r == j else "keep"

    def column(r: int, c: int) -> str:
        return "gone" if c == j else "keep"

    d.head(450, "One FFN channel, and all that is removed with it")
    d.cells(48, 119, 6, 1, lambda r, c: "soft")
    d.text(56, 108, "x", bold=True)
    d.arrow(78, 168, 118, 168)
    for x, name in ((130, "W_{gate}"), (300, "W_{up}")):
        d.cells(x, 93, 9, 6, row)
        d.text(x + 50, 82, name, bold=True)
    d.text(266, 175, "⊙", size=26)
    d.text(180, 268, "σ(W_{gate} x)", "muted", size=14)
    d.text(350, 268, "W_{up} x", "muted", size=14)
    d.arrow(412, 168, 458, 168)
    d.cells(470, 93, 9, 1, row)
    d.text(478, 82, "a", bold=True)
    d.text(478, 268, "channels", "muted", size=14)
    d.arrow(498, 168, 544, 168)
    d.cells(556, 119, 6, 9, column)
    d.text(632, 108, "W_{down}", bold=True)
    d.text(632, 240, "W_{down} a", "muted", size=14)
    d.arrow(718, 168, 764, 168)
    d.cells(778, 119, 6, 1, lambda r, c: "soft")
    d.text(786, 108, "y", bold=True)
    d.text(806, 173, "as wide as x", "muted", "start", 13)
    d.text(450, 305, "channel j: row j of W_{gate}, row j of W_{up}, column j of W_{down}", "gone")


@diagram(330)
def plan_mask_shrink(d: Drawing) -> None:
    """A plan lists what is kept; a mask applies it with zeros and takes them back; shrinking
    applies it with smaller matrices. Masked and shrunk models give the same logits.
    """
    kept = [True, False, True, True, False, True, True]

    def rows(look: str) -> Callable[[int, int], str]:
        return lambda r, c: "keep" if kept[r] else look

    d.head(125, "Plan", "a list, no weight touched")
    for row, keep in enumerate(kept):
        y = 92 + 24 * row
        d.box(70, y, 17, 17, "keep" if keep else "gone")
        d.text(100, y + 14, f"channel {row}", "ink" if keep else "gone", "start", 14)
    d.head(425, "Mask", "zeros, and every bit comes back")
    d.arrow(205, 165, 280, 165, "for a while")
    d.cells(305, 106, 7, 5, rows("zero"), 17)
    d.cells(420, 125, 5, 7, lambda r, c: "keep" if kept[c] else "zero", 17)
    d.text(351, 262, "W_{1}", bold=True)
    d.text(485, 262, "W_{2}", bold=True)
    d.head(760, "Shrink", "smaller for good")
    d.arrow(574, 165, 634, 165, "for good")
    d.cells(660, 125, 5, 5, size=17)
    d.cells(770, 125, 5, 5, size=17)
    d.text(707, 262, "W_{1}", bold=True)
    d.text(816, 262, "W_{2}", bold=True)
    d.line([(425, 280), (425, 292), (760, 292), (760, 280)], "new", 2)
    d.text(592, 314, "the same logits", "new")


@diagram(350)
def heads_and_groups(d: Drawing) -> None:
    """Query heads that share keys and values form a group; a group is removed whole, with its rows
    of the query, key and value matrices and its columns of the output matrix.
    """
    d.head(450, "Attention heads, and the groups that share keys and values")
    for group in range(3):
        gone = group == 1
        x, tint = 70 + 270 * group, "gone" if gone else "ink"
        d.line([(x - 14, 66), (x + 224, 66), (x + 224, 236), (x - 14, 236), (x - 14, 66)],
               "gone" if gone else "edge", 1.5, dashed=gone)  # fmt: skip
        d.text(x + 105, 90, f"group {group}", tint, size=14, bold=True)
        for head in range(3):
            d.box(x + 76 * head, 104, 60, 34, "gone" if gone else "keep")
            d.line([(x + 30 + 76 * head, 140), (x + 105, 176)], "gone" if gone else "muted", 1)
            if not gone:
                d.text(x + 30 + 76 * head, 126, f"q{3 * group + head}", "page", size=14, bold=True)
        for place, name in enumerate("kv"):
            d.box(x + 37 + 76 * place, 178, 60, 34, "gone" if gone else "new")
            if not gone:
                d.text(x + 67 + 76 * place, 200, name, "page", size=14, bold=True)
        d.arrow(x + 105, 240, x + 105, 268, look="gone" if gone else "ink")
        d.box(x - 14, 272, 238, 20, "gone" if gone else "keep")
    d.text(450, 326, "removed with it: its rows of Q, K and V, its columns of the output matrix",
           "gone", size=14)  # fmt: skip


@diagram(370)
def compensation(d: Drawing) -> None:
    """Removing an input leaves an error; the weights of the inputs that vary together with it take
    over what they can, weighted by the inverse of the second moments.
    """
    weights = [1, 2, -0.3, 1]
    stages = [
        ("Before", "x_{4} ≈ x_{1} + x_{2}", weights, [0, 0, 0, 0]),
        ("Removed", "an error of w_{4} x_{4}", [1, 2, -0.3, 0], [0, 0, 0, 0]),
        ("Compensated", "x_{1} and x_{2} stand in for x_{4}", [1, 2, -0.3, 0], [1, 1, 0, 0]),
    ]
    for x, (heading, below, bars, more) in zip((40, 250, 650), stages, strict=True):
        d.head(x + 92, heading, below)
        d.line([(x, 240), (x + 190, 240)], "muted", 1)
        for place, (bar, extra) in enumerate(zip(bars, more, strict=True)):
            left = x + 8 + 46 * place
            d.box(left, 240 - 48 * max(bar, 0), 34, 48 * abs(bar))
            if extra:
                d.box(left, 240 - 48 * (bar + extra), 34, 48 * extra - 2, "new")
            if heading != "Before" and place == 3:
                d.box(left, 192, 34, 48, "gone")
            d.text(left + 17, 282, f"w_{{{place + 1}}}", size=14)
    d.head(550, "Which ones?", "H = X Xᵀ / N")
    H = ["9..6", ".9.6", "..9.", "66.9"]
    for row, line in enumerate(H):
        for column, letter in enumerate(line):
            x, y = 490 + 32 * column, 90 + 32 * row
            d.box(x, y, 29, 29, "soft")
            side = {"9": 25, "6": 18, ".": 3}[letter]
            d.box(x + (29 - side) / 2, y + (29 - side) / 2, side, side)
    d.text(552, 245, "row 4: with x_{1} and x_{2}", "muted", size=13)
    d.line([(486, 183), (618, 183), (618, 219), (486, 219), (486, 183)], "new", 2)
    d.arrow(448, 160, 478, 160)
    d.arrow(624, 160, 650, 160)
    d.text(450, 320, "W ← W − W_{:,j} [H⁻¹]_{j,:} / [H⁻¹]_{jj}", bold=True, size=16)
    d.text(
        450,
        348,
        "column j becomes zero; the error that remains is Σ W_{ij}² / [H⁻¹]_{jj}",
        "muted",
        size=14,
    )


@diagram(340)
def recovery(d: Drawing) -> None:
    """Training on labels knows one right token per place, distillation the dense model's whole
    distribution; LoRA trains two thin matrices beside a frozen one and merges them.
    """
    d.head(215, "What is learnt", "the next token after “The court”")
    words = ["held", "found", "ruled", "said", "fish"]
    teacher, student = [0.34, 0.27, 0.2, 0.15, 0.02], [0.2, 0.14, 0.1, 0.3, 0.2]
    rows = (
        (128, "label", [1.0, 0, 0, 0, 0], "other"),
        (196, "dense model p", teacher, "keep"),
        (264, "pruned model q", student, "new"),
    )
    for y, name, shares, look in rows:
        d.text(150, y - 12, name, look, "end", 14, True)
        for place, share in enumerate(shares):
            d.box(172 + 58 * place, y - 50 * share, 34, 50 * share, look)
        d.line([(165, y), (450, y)], "muted", 1)
    for place, word in enumerate(words):
        d.text(189 + 58 * place, 284, word, "muted", size=13)
    d.text(215, 318, "labels: −log q(held)   ·   distillation: KL(p ‖ q)", size=14)
    d.line([(475, 30), (475, 310)], "edge")
    d.head(690, "LoRA", "two thin matrices of rank r beside W")
    d.cells(510, 110, 7, 7, lambda r, c: "keep", 14)
    d.text(565, 245, "W", bold=True)
    d.text(565, 266, "frozen", "muted", size=14)
    d.text(660, 172, "+ α/r ·", size=16)
    d.cells(698, 110, 7, 2, lambda r, c: "new", 14)
    d.text(714, 245, "B", bold=True)
    d.cells(744, 149, 2, 7, lambda r, c: "new", 14)
    d.text(799, 245, "A", bold=True)
    d.text(758, 266, "trained", "muted", size=14)
    d.text(690, 318, "merged at the end:  W ← W + α/r · B A", size=14)


@diagram(312)
def make_mini(d: Drawing) -> None:
    """The way of make_mini: trim the vocabulary, prune with SlimGPT, recover on labels and the
    dense model's predictions, measure beside controls, save; each step leaves a smaller or
    better model.
    """
    steps = [
        ("dense", "model +\na domain", 1.0, "soft"),
        ("1 trim", "tokens the\ndomain lacks", 0.8, "keep"),
        ("2 prune", "heads and\nchannels", 0.5, "keep"),
        ("3 recover", "labels and\nKL to dense", 0.5, "new"),
        ("4 measure", "test parts,\nbeside controls", 0.5, "new"),
        ("5 save", "folder, card,\nGGUF file", 0.5, "new"),
    ]
    for place, (name, words, share, look) in enumerate(steps):
        x, side = 28 + 144 * place, 90 * share**0.5
        d.box(x, 28, 118, 106, "frame")
        d.text(x + 59, 58, name, bold=True, size=17)
        d.text(x + 59, 86, words, "muted", size=14)
        if place:
            d.arrow(x - 24, 80, x - 4, 80)
        d.box(x + 59 - side / 2, 260 - side, side, side, look)
        if name[0] in "12":
            side = 90 * steps[place - 1][2] ** 0.5
            left, right, top = x + 59 - side / 2, x + 59 + side / 2, 260 - side
            d.line([(left, 260), (left, top), (right, top), (right, 260)], "gone", 1.5, dashed=True)
    d.line([(20, 261), (880, 261)], "muted", 1)
    d.text(450, 290, "stored parameters: fewer after two steps, better after the third", "muted",
           size=14)  # fmt: skip


@diagram(350)
def prune_or_quantise(d: Drawing) -> None:
    """A file's bytes are the number of weights times the bits of each; pruning stores fewer
    weights, quantising stores all of them in fewer bits with a scale per block. Equal areas are
    equal bytes.
    """
    d.head(160, "dense, F16", "32 weights × 16 bits")
    d.head(450, "pruned", "9 weights × 16 bits")
    d.head(735, "quantised, Q4_0", "32 weights × 4 bits + a scale")
    for place in range(32):
        d.box(32 + 8 * place, 86, 7, 128, "soft")
        d.box(608 + 8 * place, 182, 7, 32, "new")
    for place in range(9):
        d.box(418 + 8 * place, 86, 7, 128, "keep")
    d.box(608, 175, 255, 5, "other")
    d.text(870, 170, "scale, 16 bits", "other", "end", 13)
    d.line([(22, 86), (22, 214)], "muted", 1)
    d.text(16, 80, "bits", "muted", "start", 13)
    d.line([(20, 215), (880, 215)], "muted", 1)
    d.text(160, 240, "weights →", "muted", size=14)
    d.line([(418, 226), (418, 240), (863, 240), (863, 226)], "ink", 1.5)
    d.text(640, 264, "equal areas: equal bytes")
    d.text(450, 308, "28 % of the weights as they were, or all of them at 4.5 bits:", size=16)
    d.text(450, 332, "which costs less, in the domain and outside of it?", size=16)


@diagram(330)
def bisection(d: Drawing) -> None:
    """Bisection: the middle of what is left is pruned and measured; within the limits the smaller
    half is left, beyond them the larger one. Four sizes settle a share of 80 % to 5 %.
    """
    tries = [(0.4, True), (0.6, False), (0.5, False), (0.45, True)]
    low, high = 0.0, 0.8

    def place(share: float) -> float:
        return 160 + 700 * share

    d.text(160, 40, "0 % pruned", "muted", size=14)
    d.text(720, 40, "80 %", "muted", size=14)
    for row, (middle, within) in enumerate(tries):
        y = 70 + 50 * row
        d.text(90, y + 22, f"size {row + 1}", size=16)
        d.box(place(low), y, place(high) - place(low), 30, "soft")
        d.box(place(middle) - 5, y - 5, 10, 40, "new" if within else "gone")
        words = "within" if within else "beyond"
        d.text(place(high) + 14, y + 21, f"{100 * middle:.0f} %: {words}", "muted", "start", 14)
        low, high = (middle, high) if within else (low, middle)
    d.text(450, 300, "the largest share that was measured within the limits: 45 %", size=16)
