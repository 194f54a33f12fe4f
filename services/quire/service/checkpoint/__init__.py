"""Finding a model and reading its text side, without torch or transformers.

The gateway, the sidecar, the engine and the command line all start here, so that a flag `--model` means the same
everywhere. `locate` finds the files; `load_text` reads tokenizer, chat template and end tokens from them.
"""

from quire.service.checkpoint.locate import Checkpoint, CheckpointFormat, locate
from quire.service.checkpoint.text import TextModel, load_text

__all__ = ["Checkpoint", "CheckpointFormat", "TextModel", "load_text", "locate"]
