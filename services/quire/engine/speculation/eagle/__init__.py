"""EAGLE: a head of one layer that drafts tokens from the hidden states of the model that it was trained for.

EAGLE-1 (Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", 2024) reads the target's last
hidden state; EAGLE-2 (2024) differs in how drafts are searched, not in the head; EAGLE-3 (Li et al., "EAGLE-3: Scaling
up Inference Acceleration of Large Language Models via Training-Time Test", 2025) fuses hidden states of several layers
and predicts over a reduced vocabulary. The engine's runners use `head.EagleHead`; `quire.speculate` trains one.
"""
