"""From a trained run to a Hub repository: export, model card, proof in a fresh process."""

from phi_mm.hub.export import export
from phi_mm.hub.merge import merge
from phi_mm.hub.verify import ask_fresh, verify

__all__ = ["ask_fresh", "export", "merge", "verify"]
