"""From a trained run to a Hub repository: export, model card, proof in a fresh process, push."""

from phi_mm.hub.export import export
from phi_mm.hub.merge import merge
from phi_mm.hub.push import Destination, push, push_adapter
from phi_mm.hub.verify import ask_fresh, verify

__all__ = ["Destination", "ask_fresh", "export", "merge", "push", "push_adapter", "verify"]
