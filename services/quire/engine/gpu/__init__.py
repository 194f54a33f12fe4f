"""The engine on a GPU: a batch that stays there, and a runner that launches steps as graphs over it."""
