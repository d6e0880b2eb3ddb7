"""Floor 2: changes to single layers. `find` finds their kinds, `arguments` reads a run's settings, `insert` puts them
in place, `files` names their tensors."""

from sfumato.adapters.arguments import parse
from sfumato.adapters.find import from_tensors, kind, kinds
from sfumato.adapters.plan import AdapterPlan

__all__ = ["AdapterPlan", "from_tensors", "kind", "kinds", "parse"]
