"""The offline API: a model in this process, prompts in, outputs out.

    from quire.llm import LLM, SamplingParams

    with LLM("owner/name") as llm:
        outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))

The names are those that vLLM's users know. It runs with torch, numpy, safetensors, tokenizers and transformers alone:
no server, no other process.
"""

from quire.llm.llm import LLM
from quire.llm.metrics import Distribution, LLMMetrics
from quire.llm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from quire.llm.sampling_params import SamplingParams
from quire.llm.structured_outputs import StructuredOutputsParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "Distribution",
    "LLMMetrics",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]
