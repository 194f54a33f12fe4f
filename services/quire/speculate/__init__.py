"""Heads for speculative decoding, made for a model: data that it writes itself, training, evaluation.

Called by `quire speculate`; needs what `from quire.llm import LLM` needs. `data` has the target write dialogues,
`train` makes an EAGLE-3 head from them, `evaluate` says how many tokens a step it is good for.
"""
