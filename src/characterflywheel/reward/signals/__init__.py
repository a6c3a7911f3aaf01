"""User-signal models: p(continue), p(thumb up) and other reactions to a reply, from the same context (PAPER section 3).

`labels` says what is known of each reply, `inputs` what a model reads, `logistic` fits all signals at once with missing
labels masked, `probabilities` calibrates, `biases` and `reliability` say what a signal is worth, `models` is the whole.
Signals are noisy and biased, so one is used only where it has shown, on users it was not trained on, that it can rank.
"""

from .biases import Bias
from .inputs import MEASURES, Context, Embeds, Reply, context, features, spreads
from .labels import collect
from .logistic import PENALTIES, HeldOut, Weights, choose_penalty, cross_fit, fit, folds
from .models import SignalModels
from .probabilities import Platt, platt, temperature
from .reliability import FEWEST_OF_A_CLASS, Criterion, SignalReport

__all__ = [
    "FEWEST_OF_A_CLASS", "MEASURES", "PENALTIES", "Bias", "Context", "Criterion", "Embeds", "HeldOut", "Platt", "Reply",
    "SignalModels", "SignalReport", "Weights", "choose_penalty", "collect", "context", "cross_fit", "features", "fit",
    "folds", "platt", "spreads", "temperature",
]  # fmt: skip
