"""What the names of objectives stand for. No torch."""

#: Fitted in one pass over the store, or not at all; they take no loss and no steps.
CLOSED_FORM = ("linear", "skip", "replaceme", "linearpatch")

#: Learned by ordinary layers that know no time.
TIMELESS = ("regression", "looped", "distil")

#: `distil` puts two layers in the place of so many, or more.
TWO_FOR = 5

#: The `--loss` of an objective whose name is no term.
LOSSES = {
    "looped": "regression",
    "distil": "regression@0.7/regression,logits",
}
