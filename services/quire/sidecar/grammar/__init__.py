"""Constraints to compiled grammars, compiled grammars to sequences' states, states to rows of token masks."""
