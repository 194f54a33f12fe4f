"""The models: one readable file per family, chosen by `registry.load_model`, run by a runner.

A model is a function of a flat batch of tokens. Prefill chunks, decodes and (later) drafts to verify are the same to
it: each sequence contributes `query_start[i+1] - query_start[i]` consecutive tokens, whose keys and values are written
into its pages before attention reads them.
"""
