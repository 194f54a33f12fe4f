"""Drafts for free: what followed the same tokens before, in a request or in its tenant's others, may follow again."""
