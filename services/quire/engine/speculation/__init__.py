"""Speculative decoding: who drafts tokens, how they are verified, how many are worth it."""
