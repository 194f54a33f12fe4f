"""Where the supervisor was before gateways had workers: `quire.service.supervisor`."""

from quire.service.supervisor import ChildDiedError, ChildSpec, Supervisor, Timing

__all__ = ["ChildDiedError", "ChildSpec", "Supervisor", "Timing"]
