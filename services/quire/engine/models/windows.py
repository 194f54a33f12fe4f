"""Which layers attend to the last tokens only, as the Qwen families state it."""

from __future__ import annotations

from quire.engine.models.settings import Settings


def upper_windows(settings: Settings, num_layers: int) -> tuple[int, ...]:
    """Per layer how many tokens a query sees; 0 is all. Raises ModelError for settings that contradict each other."""
    if not settings.flag("use_sliding_window", False):
        return (0,) * num_layers
    window = settings.integer("sliding_window")
    if "layer_types" not in settings:
        first = settings.integer("max_window_layers", 28)
        return tuple(window if index >= first else 0 for index in range(num_layers))
    kinds = settings.texts("layer_types")
    if len(kinds) != num_layers or not {"full_attention", "sliding_attention"}.issuperset(kinds):
        raise settings.error("layer_types", f"must be full_attention or sliding_attention for {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
