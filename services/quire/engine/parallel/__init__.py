"""Tensor parallelism: one model on several GPUs, of one host or of several.

Each GPU has a process, its rank. Rank 0 is the engine's core; the others, its followers, run every step that it runs,
on their part of the weights and of the keys and values (Shoeybi et al., "Megatron-LM", 2019). What a step draws rank 0
draws for all.
"""
