"""The parts of a service that make its engines' pods: what a canary tries, and what the others keep meanwhile.

The engines' Deployment says in an annotation which revision it was made of, so what it was is known when the service
asks for something else.
"""

from __future__ import annotations

import msgspec
from msgspec import field

from quire.operator.engine_spec import EngineSpec, SidecarSpec
from quire.operator.model_spec import ModelSpec
from quire.operator.spec import InferenceService


class Revision(msgspec.Struct, frozen=True, omit_defaults=True):
    """Without the number of engines, which is no matter of their kind."""

    model: ModelSpec = field(default_factory=ModelSpec)
    engine: EngineSpec = field(default_factory=EngineSpec)
    sidecar: SidecarSpec = field(default_factory=SidecarSpec)

    @classmethod
    def of(cls, service: InferenceService) -> Revision:
        """What the service asks for."""
        spec = service.spec
        engine = msgspec.structs.replace(spec.engine, replicas=EngineSpec().replicas, autoscaling=None)
        return cls(spec.model, engine, spec.sidecar)

    @classmethod
    def read(cls, text: str) -> Revision | None:
        """What `text` says; None if it is not what this operator writes."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeError):
            return None

    @property
    def text(self) -> str:
        """As `read` has it."""
        return msgspec.json.encode(self).decode()

    def within(self, service: InferenceService) -> InferenceService:
        """The service, as many engines as ever, if it had asked for this revision."""
        wanted = service.spec.engine
        engine = msgspec.structs.replace(self.engine, replicas=wanted.replicas, autoscaling=wanted.autoscaling)
        spec = msgspec.structs.replace(service.spec, model=self.model, engine=engine, sidecar=self.sidecar)
        return msgspec.structs.replace(service, spec=spec)
