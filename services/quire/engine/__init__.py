"""The engine pod: pages, batches, models. `core.step()` is schedule → run → commit."""
